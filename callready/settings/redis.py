"""What an inventory may say of the Redis that the SFUs and recorders of a fleet share, and how they
reach it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from callready.settings.android import address as ip_address
from callready.settings.endpoints import endpoint, split_endpoint
from callready.settings.types import (
    INT_MAX,
    GeneratedSecret,
    Name,
    Origin,
    Port,
    RedisAddress,
    SecretByHand,
    Section,
    listed,
)

# The groups whose hosts use it, each as the ACL user of its name.
USERS = ("egress", "livekit")


class RedisServer(Section):
    """The host of group `redis`: by its Redis, SFUs with one `livekit.url` are one service, and
    LiveKit finds recorders. `livekit.redis` follows from it."""

    port: Port = Field(
        6379,
        description="On loopback where no other host uses it; else with TLS by the fleet's "
        "authority, on `internal_address` if all that use it have one, to their addresses only.",
    )
    livekit_password: Annotated[
        list[GeneratedSecret], BeforeValidator(listed), Origin(rotation="redis")
    ] = Field(min_length=1, description="Of the user `livekit`; the first one is used.")
    egress_password: Annotated[
        list[GeneratedSecret], BeforeValidator(listed), Origin(rotation="redis")
    ] = Field([], description="Of the user `egress`; needed with hosts in group egress.")

    def passwords(self, user: str) -> list[SecretStr]:
        """Those that are accepted of a user; clients have the first one."""
        return {"livekit": self.livekit_password, "egress": self.egress_password}[user]


class RedisTls(Section):
    """livekit.yaml's `redis.tls`, for Redis and for Sentinel."""

    enabled: bool = Field(True, description="False is without TLS.")
    insecure: bool = Field(False, description="Take any certificate, also a stranger's.")
    server_name: Name | None = Field(
        None, description="What the certificate is for, if not what the address says."
    )
    ca_cert_file: str | None = Field(
        None,
        description="PEM file of the authority, on this machine; without it those of the system.",
    )
    client_cert_file: str | None = Field(
        None, description="PEM file of LiveKit's own certificate, on this machine."
    )
    client_key_file: str | None = Field(None, description="PEM file of its key.")

    @model_validator(mode="after")
    def _pair(self) -> RedisTls:
        if bool(self.client_cert_file) != bool(self.client_key_file):
            raise ValueError("set client_cert_file and client_key_file, or none of them")
        return self


_Timeout = Annotated[int | None, Field(ge=1, le=60_000)]


class Redis(Section):
    """livekit.yaml's `redis`: one server (`address`), those that Sentinel names
    (`sentinel_addresses`), or a cluster (`cluster_addresses`). Any of them switches on distributed
    mode."""

    address: RedisAddress | None = Field(
        None, description="`host:port`, or the path of a socket on this host."
    )
    username: str | None = Field(None, description="ACL user.")
    password: SecretByHand | None = Field(None, description="Its password.")
    db: int = Field(0, ge=0, le=INT_MAX, description="Database number.")
    use_tls: bool = Field(
        False, description="Connect with TLS, by the system's authorities; `tls` says more."
    )
    tls: RedisTls | None = Field(None, description="Connect with TLS.")
    sentinel_addresses: list[Annotated[str, AfterValidator(endpoint(26379))]] = Field(
        [], description="The Sentinels, each as `host:port`."
    )
    sentinel_master_name: str | None = Field(
        None, min_length=1, description="What the Sentinels call it."
    )
    sentinel_username: str | None = Field(None, description="ACL user of the Sentinels.")
    sentinel_password: SecretByHand | None = Field(None, description="Its password.")
    cluster_addresses: list[Annotated[str, AfterValidator(endpoint(6379))]] = Field(
        [], description="The nodes of a Redis Cluster, each as `host:port`."
    )
    max_redirects: int | None = Field(
        None, ge=0, le=100, description="To other nodes of a cluster, of one command; 2."
    )
    dial_timeout: _Timeout = Field(
        None, description="Milliseconds to connect, with Sentinel only; 2000."
    )
    read_timeout: _Timeout = Field(
        None,
        description="Milliseconds for an answer, with Sentinel only; 2000. LiveKit's own 200 take "
        "live nodes for dead when Redis is slow.",
    )
    write_timeout: _Timeout = Field(
        None, description="Milliseconds to send a command, with Sentinel only; 2000."
    )
    pool_size: int | None = Field(
        None, ge=1, le=100_000, description="Connections at most; 10 for each core."
    )
    pool_timeout: int | None = Field(
        None, ge=1, le=3600, description="Seconds to wait for a free one."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Redis:
        kinds = ("address", "sentinel_addresses", "cluster_addresses")
        if len(given := [kind for kind in kinds if getattr(self, kind)]) != 1:
            found = f", not {' and '.join(given)}" if given else ""
            raise ValueError(f"set exactly one of {', '.join(kinds)}{found}")
        # LiveKit passes over these without a word (livekit/protocol, redis/redis.go).
        of_kind = {
            "sentinel_addresses": (
                *("sentinel_master_name", "sentinel_username", "sentinel_password"),
                *("dial_timeout", "read_timeout", "write_timeout"),
            ),
            "cluster_addresses": ("max_redirects",),
        }
        for kind, keys in of_kind.items():
            unused = [key for key in keys if getattr(self, key) is not None]
            if unused and kind not in given:
                raise ValueError(
                    f"{', '.join(unused)} count with {kind} only, and LiveKit would not say so: "
                    "leave out"
                )
        if self.sentinel_addresses and not self.sentinel_master_name:
            raise ValueError("sentinel_master_name is missing: what the Sentinels call the Redis")
        if self.cluster_addresses and self.db:
            raise ValueError("a Redis Cluster has db 0 only: leave db out")
        if self.use_tls and self.tls:
            raise ValueError("use_tls says less than tls: leave use_tls out")
        return self

    @property
    def where(self) -> str:
        """What it is, the same for all whose settings mean the same."""
        if self.address:
            return self.address
        found = ", ".join(sorted(self.sentinel_addresses or self.cluster_addresses))
        return f"{self.sentinel_master_name} of {found}" if self.sentinel_addresses else found

    @property
    def is_tls(self) -> bool:
        """Whether it is connected to with TLS."""
        return self.tls.enabled if self.tls else self.use_tls

    @property
    def files(self) -> dict[str, str]:
        """The files of this machine that it takes, each by its key."""
        if not self.tls or not self.tls.enabled:
            return {}
        keys = ("ca_cert_file", "client_cert_file", "client_key_file")
        return {key: file for key in keys if (file := getattr(self.tls, key))}


# Where the files of a Redis of the operator's own are on a host.
FILES = {
    "ca_cert_file": "/etc/callready/redis-ca.pem",
    "client_cert_file": "/etc/callready/redis-client.pem",
    "client_key_file": "/etc/callready/redis-client.key",
}


class RedisAccess(NamedTuple):
    """How a program reaches its Redis: `address` is HOST:PORT, a socket's path, or what
    `Redis.where` says; with `tls` the authority of `ca_file` is trusted, without one those of the
    system. `own` is said of one that is the operator's."""

    address: str
    username: str | None
    password: SecretStr | None
    db: int = 0
    tls: bool = False
    ca_file: str = ""
    own: Redis | None = None

    @property
    def addresses(self) -> list[str]:
        """What a program connects to at first: Redis, Sentinels, or nodes of a cluster."""
        many = self.own and (self.own.sentinel_addresses or self.own.cluster_addresses)
        return many or [self.address]

    @property
    def place(self) -> tuple[str, int]:
        """The same for all that share one: that of a fleet has another address for its own host,
        where there is NAT."""
        return (self.address if self.own else self.ca_file or self.address), self.db

    @property
    def is_local(self) -> bool:
        """Whether it is one of the host's own: loopback, or a name for it of RFC 6761 or of
        Debian's /etc/hosts, or a socket."""
        return any(map(_is_local, self.addresses))


def _is_local(address: str) -> bool:
    if address.startswith("/"):
        return True
    name, _ = split_endpoint(address)
    if ip := ip_address(name):
        return ip.is_loopback or ip.is_unspecified
    names = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
    return name in names or name.endswith(".localhost")

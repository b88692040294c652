"""What an inventory may say of the Redis that the SFUs and recorders of a fleet share, and how they
reach it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, Field, SecretStr

from callready.settings.android import address as ip_address
from callready.settings.endpoints import split_endpoint
from callready.settings.types import GeneratedSecret, Origin, Port, Section, listed

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


class RedisAccess(NamedTuple):
    """How a program reaches its Redis: `address` is HOST:PORT or a socket's path; with `tls` the
    authority of `ca_file` is trusted, without one those of the system."""

    address: str
    username: str | None
    password: SecretStr | None
    db: int = 0
    tls: bool = False
    ca_file: str = ""

    @property
    def place(self) -> tuple[str, int]:
        """The same for all that share one: that of a fleet has another address for its own host,
        where there is NAT."""
        return self.ca_file or self.address, self.db

    @property
    def is_local(self) -> bool:
        """Whether it is one of the host's own: loopback, or a name for it of RFC 6761 or of
        Debian's /etc/hosts, or a socket."""
        if self.address.startswith("/"):
            return True
        name, _ = split_endpoint(self.address)
        if ip := ip_address(name):
            return ip.is_loopback or ip.is_unspecified
        names = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
        return name in names or name.endswith(".localhost")

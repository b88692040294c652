"""coturn: pools of TURN hosts, and what is common to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from callready.settings.types import (
    INT_MAX,
    FreeKeys,
    GeneratedSecret,
    Name,
    Origin,
    PeerRange,
    Port,
    Section,
    Username,
    Version,
)


class PoolKeys(Section):
    """What one coturn instance is configured with; set in `turn` for all pools or in one pool."""

    listening_port: Port = Field(3478, description="STUN and TURN, UDP and TCP.")
    tls_listening_port: Port = Field(5349, description="TURN over TLS.")
    tls: bool = Field(True, description="Listen with TLS; needs a certificate.")
    tls_on_443: bool = Field(
        False,
        description="TURN over TLS on 443 too, for networks that let nothing else out; it is then "
        "what clients are told.",
    )
    proxy_port: Port = Field(
        3480,
        description="Where coturn takes connections from the edge of the same host (PROXY "
        "protocol, loopback only).",
    )
    min_port: Port = Field(49152, description="First relay port (RFC 8656, section 7.2).")
    max_port: Port = Field(65535, description="Last relay port.")
    peers: Literal["sfu", "internet"] = Field(
        "sfu",
        description="Whom a relay may reach: only the SFUs' addresses, or any public address.",
    )
    allowed_peers: list[PeerRange] = Field(
        [], description="Exceptions from the deny-list: addresses or ranges first-last."
    )
    user_quota: int | None = Field(
        None,
        ge=0,
        le=INT_MAX,
        description="Allocations a user name may hold on a host, 0 is any number. Unset it is 48, "
        "twice what a caller with IPv4 and IPv6 on two networks takes; of fixed users, whom "
        "callers share, any number.",
    )
    total_quota: int | None = Field(
        None,
        ge=0,
        le=INT_MAX,
        description="Allocations in all on a host, 0 is any number; unset: as many as relay ports.",
    )
    stale_nonce: int = Field(
        600, ge=60, le=INT_MAX, description="Seconds a nonce lives (RFC 8656, 5)."
    )
    tcp_relay: bool = Field(False, description="RFC 6062 relaying to TCP peers.")
    extra: FreeKeys = Field(
        {}, description="Other keys of turnserver.conf, checked by version; true is a bare key."
    )

    @model_validator(mode="after")
    def _range(self) -> PoolKeys:
        if self.max_port < self.min_port:
            raise ValueError(
                f"min_port {self.min_port} is above max_port {self.max_port}; coturn would start "
                "and crash at the first allocation"
            )
        if self.max_port - self.min_port < 100:
            raise ValueError(
                f"{self.min_port}-{self.max_port} is less than 100 relay ports: "
                "set min_port and max_port"
            )
        return self


class Pool(PoolKeys):
    """A TURN service: the instances of one pool share realm and secrets on all its hosts."""

    realm: Name = Field(description="The realm of its credentials, usually a domain.")
    secrets: Annotated[list[GeneratedSecret], Origin(rotation="turn")] = Field(
        [],
        description="Accepted shared secrets of TURN REST credentials; the first one mints.",
    )
    users: dict[Username, GeneratedSecret] = Field(
        {}, description="Fixed users instead, for SDKs that take only a name and a password."
    )

    @property
    def relay_ports(self) -> int:
        """How many there are of one address."""
        return self.max_port - self.min_port + 1

    @property
    def allocations_per_user(self) -> int:
        """turnserver.conf's `user-quota`; 0 is any number."""
        if self.user_quota is not None:
            return self.user_quota
        return 0 if self.users else 48

    @property
    def allocations(self) -> int:
        """turnserver.conf's `total-quota`; 0 is any number. Without a free port coturn tries all of
        them for every further allocation."""
        return self.relay_ports if self.total_quota is None else self.total_quota

    @model_validator(mode="after")
    def _fits(self) -> Pool:
        if bool(self.secrets) == bool(self.users):
            raise ValueError("set either secrets (TURN REST credentials) or users (fixed ones)")
        if self.tls_on_443 and not self.tls:
            raise ValueError("tls_on_443 needs TLS: leave it out, or set tls to True")
        return self


class Turn(PoolKeys):
    """coturn; keys set here are the defaults of every pool."""

    version: Version = Field("4.6.1", description="coturn as the Debian release installs it.")
    pools: dict[Username, Pool] = Field({}, description="The TURN services by name.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_pools(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("pools"), dict):
            return data
        common = {key: value for key, value in data.items() if key in PoolKeys.model_fields}
        pools = {
            name: {**common, **pool} if isinstance(pool, dict) else pool
            for name, pool in data["pools"].items()
        }
        return {**data, "pools": pools}

"""livekit-server, the SFU: its sections are those of livekit.yaml."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import Field, model_validator

from callready.settings.redis import Redis
from callready.settings.types import (
    INT_MAX,
    IP,
    FreeKeys,
    GeneratedSecret,
    HttpUrl,
    HttpUrlWithQuery,
    LiveKitUrl,
    Network,
    Origin,
    Port,
    Section,
    Source,
    StunServer,
    Version,
)


class Ips(Section):
    """livekit.yaml's `rtc.ips`: callers are told of the host's `address` and `address6`, and of
    these addresses of its interfaces."""

    includes: list[Network] = Field([], description="More addresses or networks of the host.")


class Rtc(Section):
    """livekit.yaml's `rtc`."""

    port_range_start: Port = Field(50000, description="First UDP port of media.")
    port_range_end: Port = Field(60000, description="Last UDP port of media.")
    tcp_port: Port = Field(7881, description="ICE over TCP.")
    stun_servers: list[StunServer] = Field(
        [], description="STUN servers, `host:port`, besides our own coturn (which comes first)."
    )
    turn_ttl: int = Field(
        3600, ge=30, le=86400, description="Seconds a TURN credential minted by LiveKit is valid."
    )
    ips: Ips | None = Field(
        Ips(),
        description="Which of the host's addresses callers are told of. None is all of them, also "
        "those of bridges and internal networks.",
    )

    def more(self, version: Literal[4, 6]) -> list[str]:
        """The networks of an address family that callers are told of beside the host's own."""
        networks = map(ipaddress.ip_network, self.ips.includes if self.ips else ())
        return [str(network) for network in networks if network.version == version]

    @model_validator(mode="after")
    def _range(self) -> Rtc:
        if self.port_range_end - self.port_range_start < 100:
            raise ValueError(
                f"{self.port_range_start}-{self.port_range_end} is less than 100 ports, too few "
                "for media: set port_range_start and port_range_end"
            )
        return self


class Logging(Section):
    """livekit.yaml's `logging`."""

    level: Literal["debug", "info", "warn", "error"] = Field("info", description="LiveKit's own.")
    pion_level: Literal["debug", "info", "warn", "error"] = Field(
        "error", description="The WebRTC library's."
    )
    json_: bool = Field(True, alias="json", description="One JSON object a line.")


class Prometheus(Section):
    """livekit.yaml's `prometheus`."""

    port: Port = Field(6789, description="Port of /metrics.")
    username: str = Field("prometheus", min_length=1, description="Basic-auth user.")
    password: GeneratedSecret = Field(description="Basic-auth password.")
    sources: list[Source] = Field(
        [],
        description="Who may scrape it besides the host itself, as `firewall.open.NAME.sources`.",
    )


class Webhook(Section):
    """livekit.yaml's `webhook`."""

    urls: list[HttpUrlWithQuery] = Field(
        min_length=1,
        description="URLs that get events, also of callready's own rooms, `callready-…`.",
    )
    api_key: str = Field(description="The key that signs them; one of `livekit.keys`.")


class LiveKit(Section):
    """livekit-server, the SFU."""

    version: Version = Field("1.13.5", description="Release to install, pinned.")
    base_url: HttpUrl = Field(
        "https://github.com/livekit/livekit/releases/download",
        description="Where `v<version>/livekit_<version>_linux_<arch>.tar.gz` and "
        "`checksums.txt` are; a mirror for hosts without Internet.",
    )
    archive_sha256: dict[Literal["amd64", "arm64"], str] = Field(
        {}, description="SHA-256 of the archive; without it the release's checksums.txt decides."
    )
    url: LiveKitUrl = Field(
        description="What clients are told: wss://…, or ws:// for a lab or a LAN."
    )
    port: Port = Field(7880, description="Signalling over HTTP and WebSocket.")
    bind_addresses: list[IP] = Field(
        [], description="Addresses `port` listens on; empty is every address."
    )
    keys: Annotated[dict[str, GeneratedSecret], Origin(rotation="livekit")] = Field(
        min_length=1, description="API key name to secret; the first is the one handed to the app."
    )
    token_ttl: int = Field(
        21_600,
        ge=30,
        le=INT_MAX,
        description="Seconds the app's tokens are valid at most (6 h is the SDKs' "
        "default); a rotated key stays known that long.",
    )
    turn_pool: str | None = Field(
        "calls", description="The TURN pool LiveKit hands out; none is for a LAN only."
    )
    rtc: Rtc = Field(Rtc(), description="Media transport.")
    logging: Logging = Field(Logging(), description="What goes to the journal.")
    redis: Redis | None = Field(
        None,
        description="A Redis of your own, instead of that of group `redis`: SFUs with one `url` "
        "have one in common.",
    )
    prometheus: Prometheus | None = Field(None, description="Metrics.")
    webhook: Webhook | None = Field(None, description="Events to the app.")
    config: FreeKeys = Field(
        {}, description="Other keys of livekit.yaml (`room`, `limit`, …), checked by version."
    )

    @model_validator(mode="after")
    def _webhook_key(self) -> LiveKit:
        if self.webhook and self.webhook.api_key not in self.keys:
            raise ValueError(
                f"webhook.api_key {self.webhook.api_key!r} is not one of keys: "
                + ", ".join(self.keys)
            )
        return self

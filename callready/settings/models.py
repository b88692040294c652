"""What an inventory may say: one model a section, every field with its default and its reason.

The keys keep the name of the key they end up in (`port_range_start`, `min-port` as `min_port`).
Rules that need more than one section are in `host_checks.py`, those of the fleet in `checks.py`.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from callready.settings.android import Android
from callready.settings.app import App
from callready.settings.edge import Edge, Tls
from callready.settings.egress import Egress
from callready.settings.livekit import LiveKit
from callready.settings.monitor import Monitor
from callready.settings.redis import USERS, RedisServer
from callready.settings.turn import Pool, Turn
from callready.settings.types import (
    INT_MAX,
    IP,
    PROTOCOLS,
    GeneratedSecret,
    IPv4,
    IPv6,
    Name,
    OpenPort,
    Origin,
    Port,
    Protocol,
    Region,
    Resolver,
    SecretByHand,
    Section,
    Source,
    Username,
    listed,
)

PROMETHEUS_PORT = 9090  # on loopback
# The groups whose hosts get something on them that runs.
ROLES = frozenset({"redis", "livekit", "turn", "egress", "app", "monitor"})


class Host(Section):
    """The host itself, before any role."""

    other_listeners: list[OpenPort] = Field(
        [], description="Listeners of other programs that are meant to be there, as `9100/tcp`."
    )
    udp_buffer: int = Field(
        5_000_000,
        ge=212_992,
        le=INT_MAX,
        description="Bytes for net.core.rmem_max and wmem_max; LiveKit warns below 5 MB.",
    )
    bandwidth: float | None = Field(
        None,
        gt=0,
        description="Megabits a second in each direction that the provider lets through, for "
        "`make capacity`; unset, the speed of the interface where it has one.",
    )
    max_clock_skew: float = Field(
        30.0,
        gt=0,
        le=86_400,
        description="Seconds a host's clock may differ from the controller's; TURN REST "
        "credentials carry an expiry time.",
    )


class Deploy(Section):
    """How a host changes."""

    confirm_timeout: int = Field(
        60,
        ge=5,
        le=3600,
        description="Seconds from the switch until a host that nobody confirmed reverts by itself.",
    )
    gate_from: Name | None = Field(
        None,
        description="A host of the inventory to probe from, where this machine's network lets no "
        "UDP out.",
    )
    resolver: Resolver | None = Field(
        None,
        description="Name server (`ADDRESS` or `ADDRESS:PORT`) that says what callers are told, "
        "where this machine's own says something else (split horizon): asked for CAA records, and "
        "what names lead to, before ACME, by the gate and in the verification.",
    )
    batch: int = Field(5, ge=1, description="Hosts of a role that change at once, after the first.")
    drain: int = Field(
        0,
        ge=0,
        le=86_400,
        description="Seconds to wait for calls to end before LiveKit or coturn restarts; for one "
        "of several SFUs also for the WebSockets that it relays.",
    )


class Verify(Section):
    """What the verification asks of calls at this host's LiveKit."""

    attempts: int = Field(5, ge=1, description="Calls in a row that must all connect.")
    max_loss: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of packets that may be lost, of each path and call: above it video "
        "stutters.",
    )
    max_jitter: float = Field(
        0.03,
        gt=0,
        description="Seconds by which packets of sound may vary (jitter) in a call that lasts.",
    )
    min_bitrate: int = Field(
        150,
        ge=0,
        description="Kilobits a second of video that must arrive in a call that lasts; 300 are "
        "sent.",
    )


class Opening(Section):
    """What another program on the host is reached by, and by whom. A group of the inventory may be
    one that gets nothing else of callready."""

    ports: list[OpenPort] = Field([], description="Ports, as `6379/tcp` or `60000-60010/udp`.")
    protocols: list[Protocol] = Field(
        [],
        description="IP protocols without ports, by number or name: "
        + ", ".join(f"`{name}`" for name in PROTOCOLS)
        + ".",
    )
    sources: list[Source] | None = Field(
        None,
        min_length=1,
        description="Who may: addresses, networks (`10.0.0.0/24`), and groups of the inventory, "
        "which stand for `address`, `address6` and `internal_address` of their hosts. Without it "
        "anyone.",
    )

    @model_validator(mode="after")
    def _something(self) -> Opening:
        if not self.ports and not self.protocols:
            raise ValueError("opens nothing: set ports or protocols")
        return self


class Firewall(Section):
    """The host's own nftables table, made from the port plan."""

    enabled: bool = Field(True, description="False leaves the host's packet filter alone.")
    extra_ports: list[OpenPort] = Field(
        [], description="More ports to open to everyone, as `443/tcp` or `60000-60010/udp`."
    )
    open: dict[Username, Opening] = Field(
        {},
        description="What else to open, by a name of your own: to some only, or protocols without "
        "ports.",
    )
    turn_requests_per_client: int = Field(
        1000,
        ge=0,
        le=1_000_000,
        description="STUN and TURN requests and new TURN connections in a second that one client, "
        "an IPv4 address or an IPv6 /64, may make, for ten seconds at once. Media is not counted. "
        "0 is without limit.",
    )
    notrack: bool = Field(
        False,
        description="Exempt media from connection tracking; refused where another table does NAT.",
    )


class HostSettings(Section):
    """Everything one host's inventory data says."""

    name: Name = Field(
        description="The name callers use, no other host's; the inventory name unless set."
    )
    groups: frozenset[str] = Field(frozenset(), description="The inventory groups it is in.")
    elsewhere: frozenset[str] = Field(
        frozenset(), description="The inventory groups that other hosts are in."
    )
    peers: tuple[str, ...] = Field(
        (), description="The other SFUs with its URL that have an edge too, if it has one."
    )
    address: IPv4 | None = Field(None, description="Public IPv4 address.")
    address6: IPv6 | None = Field(None, description="Public IPv6 address, if any.")
    private_address: IPv4 | None = Field(
        None, description="The address on the interface, behind 1:1 NAT."
    )
    internal_address: IP | None = Field(
        None,
        description="The address on an internal network (vRack), over which the hosts reach each "
        "other; callers are never told of it.",
    )
    region: Region | None = Field(
        None,
        description="Where it is, by a name of your own: callers of an SFU are told of TURN hosts "
        "of its region first, and LiveKit knows it, for a `livekit.config.node_selector` that is "
        "`regionaware`.",
    )
    pools: list[Username] = Field([], description="TURN pools this host runs.")
    hand_out: bool = Field(
        True,
        description="False before a host leaves its TURN pools: it goes on serving, but no caller "
        "is told of it any more.",
    )
    sudo_password: SecretByHand | None = Field(None, description="sudo's, where it asks for one.")
    ssh_port: Port = Field(22, description="Port pyinfra connects to.")
    host: Host = Field(Host(), description="The host itself.")
    deploy: Deploy = Field(Deploy(), description="How it changes.")
    verify: Verify = Field(Verify(), description="What is asked of its calls.")
    tls: Tls | None = Field(None, description="Certificates.")
    edge: Edge | None = Field(None, description="HAProxy with TLS in front of LiveKit and app.")
    firewall: Firewall = Field(Firewall(), description="Packet filter.")
    fleet_ca: Annotated[
        list[GeneratedSecret], BeforeValidator(listed), Origin(rotation="fleet-ca")
    ] = Field(
        [],
        description="What the key of the fleet's own authority is made from, by whose certificates "
        "hosts know each other; needed with `monitor`, with a `redis` that other hosts use, and "
        "with edges on several SFUs of one URL. "
        "The first one signs, others are accepted.",
    )
    monitor: Monitor | None = Field(None, description="Metrics and alerts.")
    redis: RedisServer | None = Field(None, description="What SFUs and recorders share.")
    livekit: LiveKit | None = Field(None, description="The SFU.")
    turn: Turn = Field(Turn(), description="coturn.")
    egress: Egress | None = Field(None, description="Recording.")
    app: App | None = Field(None, description="The application's environment.")
    android: Android | None = Field(None, description="The Android project.")

    @property
    def local_address(self) -> str:
        """The IPv4 address on the host's interface."""
        return self.private_address or self.address or ""

    @property
    def addresses(self) -> list[str]:
        """Those by which other hosts know it, public and internal."""
        return [a for a in (self.address, self.address6, self.internal_address) if a]

    @property
    def sfu(self) -> LiveKit | None:
        """LiveKit's settings, if this host runs it."""
        return self.livekit if "livekit" in self.groups else None

    @property
    def backend(self) -> App | None:
        """The application's settings, if this host runs it."""
        return self.app if "app" in self.groups else None

    @property
    def records(self) -> Egress | None:
        """The settings of egress, if this host runs it."""
        return self.egress if "egress" in self.groups else None

    @property
    def watches(self) -> Monitor | None:
        """The monitor's settings, if this host runs it."""
        return self.monitor if "monitor" in self.groups else None

    @property
    def watched(self) -> Monitor | None:
        """The monitor's settings, if it measures this host."""
        return self.monitor if self.groups & ROLES else None

    @property
    def redis_here(self) -> RedisServer | None:
        """Redis' settings, if this host runs it."""
        return self.redis if "redis" in self.groups else None

    @property
    def redis_clients(self) -> tuple[str, ...]:
        """The groups whose other hosts use the Redis of this one."""
        return tuple(group for group in USERS if self.redis_here and group in self.elsewhere)

    @property
    def turn_pools(self) -> dict[str, Pool]:
        """The pools that run on this host, by name."""
        if "turn" not in self.groups:
            return {}
        return {name: self.turn.pools[name] for name in self.pools if name in self.turn.pools}

    @property
    def serves(self) -> bool:
        """Whether callers reach this host."""
        return bool(self.groups & {"livekit", "turn", "monitor"}) or bool(self.edge_backends)

    @property
    def is_server(self) -> bool:
        """Whether callers reach this host, or other hosts of the fleet do, or it records what
        callers say, so that its kernel and firewall are ours to set."""
        return self.serves or bool(self.groups & {"redis", "egress"})

    @property
    def has_release(self) -> bool:
        """Whether something of ours is on this host, or may still be after its last role has gone:
        an Android project is only a folder on it."""
        return "android" not in self.groups or bool(self.groups & ROLES)

    @property
    def edge_backends(self) -> dict[str, str]:
        """What this host's edge serves: name in the URL to `address:port` behind it."""
        found: dict[str, str] = {}
        if self.edge and (livekit := self.sfu):
            found[urlsplit(livekit.url).hostname or ""] = f"127.0.0.1:{livekit.port}"
        if self.edge and (app := self.backend) and app.url and app.upstream:
            found[urlsplit(app.url).hostname or ""] = app.upstream
        if self.edge and (monitor := self.watches):
            found[urlsplit(monitor.url).hostname or ""] = f"127.0.0.1:{PROMETHEUS_PORT}"
        return found

    @property
    def has_edge(self) -> bool:
        """Whether there is anything on this host for an edge to serve."""
        return bool(self.edge_backends)

    @property
    def tls_names(self) -> list[str]:
        """The names this host needs certificates for."""
        names = [self.name] if any(pool.tls for pool in self.turn_pools.values()) else []
        return [*names, *(name for name in self.edge_backends if name not in names)]

    @property
    def challenge_port(self) -> int | None:
        """Where certbot answers HTTP-01 challenges: behind an edge on loopback, else on 80."""
        acme = self.tls.acme if self.tls else None
        if acme is None or acme.challenge != "http-01" or not self.tls_names:
            return None
        return 8888 if self.has_edge else 80

    @property
    def livekit_addresses(self) -> list[str]:
        """livekit.yaml's `bind_addresses`: loopback behind an edge."""
        if self.livekit is None:
            return []
        return ["127.0.0.1"] if self.has_edge else self.livekit.bind_addresses

    @property
    def livekit_on_loopback(self) -> bool:
        """Whether LiveKit's signalling and metrics are for this host alone."""
        bound = self.livekit_addresses
        return bool(bound) and {"127.0.0.1", "::1"}.issuperset(bound)

"""The port plan: which ports a host opens, for what, over what and to whom; everything that opens,
checks or documents a port reads it from here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import Literal, NamedTuple

from callready.settings import pools
from callready.settings.models import PROMETHEUS_PORT, ROLES, HostSettings
from callready.settings.types import PROTOCOLS

Role = Literal["sshd", "redis", "livekit", "coturn", "egress", "edge", "acme", "monitor", "extra"]
# Or some: networks and groups of the inventory, as `Fleet.networks` takes them.
Audience = Literal["anyone", "this host"] | tuple[str, ...]
LIVEKIT, EGRESS = "livekit-server.service", "callready-egress.service"
EGRESS_SPACE, REDIS = "callready-egress-space.service", "callready-redis.service"
# Debian's units of these programs are masked: they listen on every address.
NODE_EXPORTER, EXPORTERS = "callready-node-exporter.service", "callready-exporters.service"
MEASURE = "callready-measure.service"
PROMETHEUS, ALERTMANAGER = "callready-prometheus.service", "callready-alertmanager.service"
CALLER = "callready-caller.service"
LOGS, LOG_RECEIVER = "callready-logs.service", "callready-log-receiver.service"
NODE_EXPORTER_PORT, EDGE_METRICS_PORT, ALERTMANAGER_PORT, CALLER_PORT = 9100, 8404, 9093, 9436


class Use(NamedTuple):
    """A range of ports (one port: first == last) that a role of a host uses for `audience`.

    `proto` is `tcp` or `udp`, or another IP protocol by its name in PROTOCOLS or its number; that
    has no ports, and `first` and `last` are 0. `service` is what people call it; `unit` is the
    systemd unit that has the ports open, empty for sshd, for what `firewall` opens to other
    programs and where the packet filter redirects to another port. `relay` marks ranges whose
    sockets come and go.
    """

    role: Role
    service: str
    unit: str
    proto: str
    first: int
    last: int
    purpose: str
    setting: str
    audience: Audience = "anyone"
    relay: bool = False

    @property
    def ports(self) -> str:
        """`3478` or `49152-65535`, as nftables writes it; empty for a protocol without ports."""
        if not self.first:
            return ""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    @property
    def key(self) -> str:
        """What it is known by, also to nftables: `livekit.rtc.tcp_port/tcp/7881`."""
        return "/".join(filter(None, (self.setting, self.proto, self.ports)))

    @property
    def protocol_number(self) -> int:
        """IANA's number of a protocol without ports."""
        return PROTOCOLS.get(self.proto) or int(self.proto)

    @property
    def some(self) -> tuple[str, ...]:
        """Whom it is open to, if not to anyone and not to this host alone."""
        return self.audience if isinstance(self.audience, tuple) else ()

    @property
    def open_to(self) -> str:
        """Its audience in words."""
        return self.audience if isinstance(self.audience, str) else ", ".join(self.audience)

    def __contains__(self, port: object) -> bool:
        return isinstance(port, int) and self.first <= port <= self.last


def parse_port(value: str) -> tuple[str, int, int]:
    """Split `FIRST-LAST/udp` or `PORT/tcp` into protocol, first and last port."""
    ports, _, proto = value.partition("/")
    first, _, last = ports.partition("-")
    return proto, int(first), int(last or first)


def port_plan(host: HostSettings, ssh_ports: tuple[int, ...] = ()) -> list[Use]:
    """Every port `host` uses; `ssh_ports` are sshd's own (default: the one pyinfra connects to)."""
    return [
        *_sshd(ssh_ports or (host.ssh_port,)),
        *_redis(host),
        *_livekit(host),
        *_coturn(host),
        *_egress(host),
        *_edge(host),
        *_acme(host),
        *_monitor(host),
        *_extra(host),
    ]


def listeners(plan: list[Use], unit: str) -> list[str]:
    """The sockets that a unit has open all the time, as `udp/3478`."""
    return [f"{use.proto}/{use.first}" for use in plan if use.unit == unit and not use.relay]


def has_low_port(plan: list[Use], unit: str) -> bool:
    """Whether a unit opens a port that takes CAP_NET_BIND_SERVICE (ip(7),
    ip_unprivileged_port_start)."""
    return any(use.unit == unit and use.first < 1024 for use in plan)


def _sshd(ports: tuple[int, ...]) -> Iterator[Use]:
    for port in ports:
        yield Use("sshd", "sshd", "", "tcp", port, port, "administration", "ssh_port")


def _redis(host: HostSettings) -> Iterator[Use]:
    if redis := host.redis_here:
        clients: Audience = host.redis_clients or "this host"
        port, key = redis.port, "redis.port"
        yield Use("redis", "Redis", REDIS, "tcp", port, port, "what SFUs share", key, clients)


def _livekit(host: HostSettings) -> Iterator[Use]:
    if not (livekit := host.sfu):
        return
    use = partial(Use, "livekit", "LiveKit", LIVEKIT)
    audience: Audience = "this host" if host.livekit_on_loopback else "anyone"
    yield use("tcp", livekit.port, livekit.port, "signalling", "livekit.port", audience)
    rtc, key = livekit.rtc, "livekit.rtc"
    yield use("tcp", rtc.tcp_port, rtc.tcp_port, "ICE over TCP", f"{key}.tcp_port")
    first, last = rtc.port_range_start, rtc.port_range_end
    yield use("udp", first, last, "media", f"{key}.port_range_start", relay=True)
    if metrics := livekit.prometheus:
        # Behind an edge LiveKit listens on loopback alone: scrapers come through the edge too.
        unit = pools.EDGE if metrics.sources and host.has_edge else LIVEKIT
        scraper: Audience = tuple(metrics.sources) or "this host"
        port, key = metrics.port, "livekit.prometheus.port"
        yield Use("livekit", "LiveKit", unit, "tcp", port, port, "metrics", key, scraper)


_PURPOSES = {
    "udp": "STUN and TURN",
    "tcp": "TURN over TCP",
    "tls": "TURN over TLS",
    "tls on 443": "TURN over TLS on 443",
}


def _coturn(host: HostSettings) -> Iterator[Use]:
    for name, pool in host.turn_pools.items():
        use, key = partial(Use, "coturn", f"coturn {name}"), f"turn.pools.{name}"
        for way in pools.ways(host, name):
            port, unit = way.port, way.unit if way.listens_on == way.port else ""
            if (unit, way.setting) != (pools.EDGE, "tls_on_443"):  # that is the edge's own port
                yield use(unit, way.proto, port, port, _PURPOSES[way.over], f"{key}.{way.setting}")
        unit, port = pools.unit(name), pool.proxy_port
        if pools.behind_edge(host, name):
            purpose, setting = "TURN from the edge", f"{key}.proxy_port"
            yield use(unit, "tcp", port, port, purpose, setting, "this host")
        for proto in ("udp", "tcp") if pool.tcp_relay else ("udp",):
            first, last = pool.min_port, pool.max_port
            yield use(unit, proto, first, last, "relay range", f"{key}.min_port", relay=True)


def _egress(host: HostSettings) -> Iterator[Use]:
    if egress := host.records:
        purposes = {"template": "layouts of rooms", "health": "health", "prometheus": "metrics"}
        for name, purpose in purposes.items():
            port, key = getattr(egress, f"{name}_port"), f"egress.{name}_port"
            yield Use("egress", "egress", EGRESS, "tcp", port, port, purpose, key, "this host")


def _edge(host: HostSettings) -> Iterator[Use]:
    if host.has_edge and (edge := host.edge):
        use = partial(Use, "edge", "edge", pools.EDGE, "tcp")
        yield use(edge.port, edge.port, "HTTPS and wss", "edge.port")
        yield use(edge.http_port, edge.http_port, "redirects and ACME", "edge.http_port")
        if host.peers:
            port, setting = edge.peers_port, "edge.peers_port"
            yield use(port, port, "callers from other SFUs", setting, host.peers)


def _acme(host: HostSettings) -> Iterator[Use]:
    if port := host.challenge_port:
        use = partial(Use, "acme", "ACME", "certbot.service", "tcp", port, port)
        if host.has_edge:
            yield use("challenges behind the edge", "tls.acme", "this host")
        else:
            yield use("HTTP-01 challenges", "tls.acme")


def _monitor(host: HostSettings) -> Iterator[Use]:
    if not (monitor := host.watched):
        return

    def local(unit: str, port: int, purpose: str) -> Use:
        return Use("monitor", "monitor", unit, "tcp", port, port, purpose, "monitor", "this host")

    port, setting = monitor.port, "monitor.port"
    scrapers = ("monitor", *monitor.sources)
    yield Use("monitor", "monitor", EXPORTERS, "tcp", port, port, "metrics", setting, scrapers)
    yield local(NODE_EXPORTER, NODE_EXPORTER_PORT, "the host's metrics")
    if host.has_edge:
        yield local(pools.EDGE, EDGE_METRICS_PORT, "the edge's metrics")
    if host.watches:
        yield local(PROMETHEUS, PROMETHEUS_PORT, "Prometheus")
        yield local(ALERTMANAGER, ALERTMANAGER_PORT, "Alertmanager")
        yield local(CALLER, CALLER_PORT, "test calls")
        if logs := monitor.logs:
            port, setting = logs.port, "monitor.logs.port"
            fleet = tuple(sorted(ROLES))
            yield Use("monitor", "logs", LOG_RECEIVER, "tcp", port, port, "logs", setting, fleet)


def _extra(host: HostSettings) -> Iterator[Use]:
    key = "firewall.extra_ports"
    for value in host.firewall.extra_ports:
        yield Use("extra", "extra", "", *parse_port(value), key, key)
    for name, opening in host.firewall.open.items():
        what = [parse_port(value) for value in opening.ports]
        what += [(protocol, 0, 0) for protocol in opening.protocols]
        whom: Audience = "anyone" if opening.sources is None else tuple(opening.sources)
        for proto, first, last in what:
            key = f"firewall.open.{name}"
            yield Use("extra", name, "", proto, first, last, "another program", key, whom)


def overlaps(plan: list[Use]) -> Iterator[tuple[str, str]]:
    """The conflicts of a plan as (setting, message); each message names ports that work."""
    for ranges in _overlapping_ranges(plan):
        uses = " and ".join(f"{use.service} ({use.purpose} {use.ports})" for use in ranges)
        setting, proposal = _proposal(ranges)
        yield setting, f"{uses} overlap on the same host; {proposal}"
    for a, b in combinations(plan, 2):
        both = b._replace(first=max(a.first, b.first), last=min(a.last, b.last))
        if a.proto != b.proto or both.first > both.last:
            continue
        if a.relay and b.relay:
            continue
        if a.role == b.role == "extra":
            if (a.audience == "anyone") != (b.audience == "anyone"):
                what = "/".join(filter(None, (both.ports, b.proto)))
                yield (
                    b.setting,
                    f"opens {what} to {b.open_to}, {a.setting} to {a.open_to}: leave it out of "
                    "the one that is not meant",
                )
            continue
        is_metrics = b.role == "extra" and a.setting == "livekit.prometheus.port"
        yield (
            b.setting,
            f"port {both.ports}/{b.proto} is taken twice on this host: {a.service} ({a.purpose}, "
            f"{a.setting}) and {b.service} ({b.purpose}); give one of them another port"
            + ", or say who may scrape in livekit.prometheus.sources"
            * is_metrics,
        )


def _overlapping_ranges(plan: list[Use]) -> Iterator[list[Use]]:
    """Relay ranges that overlap, those that hang together in one list. A service's TCP range is
    its UDP range, so that looking at UDP is enough."""
    found: list[list[Use]] = []
    for use in sorted(plan, key=lambda use: use.first):
        if not use.relay or use.proto != "udp":
            continue
        if found and use.first <= max(other.last for other in found[-1]):
            found[-1].append(use)
        else:
            found.append([use])
    for ranges in found:
        if len(ranges) > 1:
            yield sorted(ranges, key=plan.index)


def _proposal(ranges: list[Use]) -> tuple[str, str]:
    """Ranges that do not overlap: the smallest one keeps its place if that leaves the others
    1000 ports each, else all share alike. Returns the last setting to change, and what to do."""
    first, last = min(use.first for use in ranges), max(use.last for use in ranges)
    kept = min(ranges, key=lambda use: use.last - use.first)
    others = [use for use in ranges if use is not kept]
    start = f"keep {kept.ports} for {kept.service}, "
    low, high = max((kept.last + 1, last), (first, kept.first - 1), key=lambda gap: gap[1] - gap[0])
    if high - low < 1000 * len(others):
        others, start, low, high = ranges, "", first, last
    size = (high - low + 1) // len(others)
    if size <= 100:
        return others[-1].setting, f"{first}-{last} is too little for all: use other ranges too"
    ends = [low + size * n for n in range(len(others))] + [high + 1]
    shares = [
        f"{a}-{b - 1} to {use.service}" for use, a, b in zip(others, ends, ends[1:], strict=False)
    ]
    return others[-1].setting, f"{start}give {' and '.join(shares)}"

"""The port plan: which ports a host opens, for what, over what and to whom; everything that opens,
checks or documents a port reads it from here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import Literal, NamedTuple

from callready.settings import pools
from callready.settings.models import HostSettings

Proto = Literal["tcp", "udp"]
Role = Literal["sshd", "livekit", "coturn", "edge", "acme", "extra"]
Audience = Literal["anyone", "this host"]
LIVEKIT = "livekit-server.service"


class Use(NamedTuple):
    """A range of ports (one port: first == last) that a role of a host uses for `audience`.

    `service` is what people call it; `unit` is the systemd unit that has the ports open, empty for
    sshd, for `firewall.extra_ports` and where the packet filter redirects to another port. `relay`
    marks ranges whose sockets come and go.
    """

    role: Role
    service: str
    unit: str
    proto: Proto
    first: int
    last: int
    purpose: str
    setting: str
    audience: Audience = "anyone"
    relay: bool = False

    @property
    def ports(self) -> str:
        """`3478` or `49152-65535`, as nftables writes it."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    def __contains__(self, port: object) -> bool:
        return isinstance(port, int) and self.first <= port <= self.last


def parse_port(value: str) -> tuple[Proto, int, int]:
    """Split `FIRST-LAST/udp` or `PORT/tcp` into protocol, first and last port."""
    ports, _, proto = value.partition("/")
    first, _, last = ports.partition("-")
    return "tcp" if proto == "tcp" else "udp", int(first), int(last or first)


def port_plan(host: HostSettings, ssh_ports: tuple[int, ...] = ()) -> list[Use]:
    """Every port `host` uses; `ssh_ports` are sshd's own (default: the one pyinfra connects to)."""
    return [
        *_sshd(ssh_ports or (host.ssh_port,)),
        *_livekit(host),
        *_coturn(host),
        *_edge(host),
        *_acme(host),
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


def _livekit(host: HostSettings) -> Iterator[Use]:
    if not (livekit := host.sfu):
        return
    use, bound = partial(Use, "livekit", "LiveKit", LIVEKIT), host.livekit_addresses
    on_loopback = bool(bound) and {"127.0.0.1", "::1"}.issuperset(bound)
    audience: Audience = "this host" if on_loopback else "anyone"
    yield use("tcp", livekit.port, livekit.port, "signalling", "livekit.port", audience)
    rtc, key = livekit.rtc, "livekit.rtc"
    yield use("tcp", rtc.tcp_port, rtc.tcp_port, "ICE over TCP", f"{key}.tcp_port")
    first, last = rtc.port_range_start, rtc.port_range_end
    yield use("udp", first, last, "media", f"{key}.port_range_start", relay=True)
    if livekit.prometheus:
        port = livekit.prometheus.port
        yield use("tcp", port, port, "metrics", "livekit.prometheus.port", "this host")


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


def _edge(host: HostSettings) -> Iterator[Use]:
    if host.has_edge and (edge := host.edge):
        use = partial(Use, "edge", "edge", pools.EDGE, "tcp")
        yield use(edge.port, edge.port, "HTTPS and wss", "edge.port")
        yield use(edge.http_port, edge.http_port, "redirects and ACME", "edge.http_port")


def _acme(host: HostSettings) -> Iterator[Use]:
    if port := host.challenge_port:
        use = partial(Use, "acme", "ACME", "certbot.service", "tcp", port, port)
        if host.has_edge:
            yield use("challenges behind the edge", "tls.acme", "this host")
        else:
            yield use("HTTP-01 challenges", "tls.acme")


def _extra(host: HostSettings) -> Iterator[Use]:
    key = "firewall.extra_ports"
    for value in host.firewall.extra_ports:
        yield Use("extra", "extra", "", *parse_port(value), key, key)


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
        if (a.relay and b.relay) or a.role == b.role == "extra":
            continue
        yield (
            b.setting,
            f"port {both.ports}/{b.proto} is taken twice on this host: {a.service} ({a.purpose}, "
            f"{a.setting}) and {b.service} ({b.purpose}); give one of them another port",
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

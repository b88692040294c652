"""The port plan: which ports a host opens, for what, over what; everything that opens, checks or
documents a port reads it from here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Literal, NamedTuple

from callready.settings.models import HostSettings

Proto = Literal["tcp", "udp"]


class Use(NamedTuple):
    """A range of ports (one port: first == last) that a service of a host uses.

    `relay` marks ranges whose sockets come and go; `public` is False for what only the host
    itself may reach.
    """

    service: str
    proto: Proto
    first: int
    last: int
    purpose: str
    setting: str
    relay: bool = False
    public: bool = True

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


def port_plan(here: HostSettings, ssh_ports: tuple[int, ...] = ()) -> list[Use]:
    """Every port `here` uses; `ssh_ports` are sshd's own (default: the one pyinfra connects to)."""
    plan = [
        Use("sshd", "tcp", port, port, "administration", "ssh_port")
        for port in ssh_ports or (here.ssh_port,)
    ]
    if here.is_sfu and (lk := here.livekit):
        addresses = here.livekit_addresses
        public = not addresses or any(a not in ("127.0.0.1", "::1", "localhost") for a in addresses)
        rtc = lk.rtc
        plan += [
            Use("LiveKit", "tcp", lk.port, lk.port, "signalling", "livekit.port", public=public),
            Use(
                "LiveKit", "tcp", rtc.tcp_port, rtc.tcp_port, "ICE over TCP", "livekit.rtc.tcp_port"
            ),
            Use(
                "LiveKit",
                "udp",
                rtc.port_range_start,
                rtc.port_range_end,
                "media",
                "livekit.rtc.port_range_start",
                relay=True,
            ),
        ]
        if lk.prometheus:
            port = lk.prometheus.port
            plan.append(
                Use(
                    "LiveKit", "tcp", port, port, "metrics", "livekit.prometheus.port", public=False
                )
            )
    for name, pool in here.turn_pools.items():
        service, key = f"coturn {name}", f"turn.pools.{name}"
        port, tls = pool.listening_port, pool.tls_listening_port
        plan += [
            Use(service, "udp", port, port, "STUN and TURN", f"{key}.listening_port"),
            Use(service, "tcp", port, port, "TURN over TCP", f"{key}.listening_port"),
        ]
        if pool.tls:
            plan.append(Use(service, "tcp", tls, tls, "TURN over TLS", f"{key}.tls_listening_port"))
            if pool.tls_on_443 and here.has_edge:
                port = pool.proxy_port
                plan.append(
                    Use(
                        service,
                        "tcp",
                        port,
                        port,
                        "TURN from the edge",
                        f"{key}.proxy_port",
                        public=False,
                    )
                )
            elif pool.tls_on_443:
                plan.append(
                    Use(service, "tcp", 443, 443, "TURN over TLS on 443", f"{key}.tls_on_443")
                )
        for proto in ("udp", "tcp") if pool.tcp_relay else ("udp",):
            plan.append(
                Use(
                    service,
                    proto,
                    pool.min_port,
                    pool.max_port,
                    "relay range",
                    f"{key}.min_port",
                    relay=True,
                )
            )
    if here.has_edge and here.edge:
        for port, purpose, key in (
            (here.edge.port, "HTTPS and wss", "edge.port"),
            (here.edge.http_port, "redirects and ACME", "edge.http_port"),
        ):
            plan.append(Use("edge", "tcp", port, port, purpose, key))
    if port_ := here.challenge_port:
        purpose = "challenges behind the edge" if here.has_edge else "HTTP-01 challenges"
        plan.append(Use("ACME", "tcp", port_, port_, purpose, "tls.acme", public=not here.has_edge))
    for value in here.firewall.extra_ports:
        proto_, first, last = parse_port(value)
        plan.append(
            Use("extra", proto_, first, last, "firewall.extra_ports", "firewall.extra_ports")
        )
    return plan


def overlaps(plan: list[Use]) -> Iterator[tuple[str, str]]:
    """The conflicts of a plan as (setting, message); each message names ports that work."""
    for crowd in _crowds(plan):
        uses = " and ".join(f"{use.service} ({use.purpose} {use.ports})" for use in crowd)
        setting, split = _split(crowd)
        yield setting, f"{uses} overlap on the same host; {split}"
    for a, b in combinations(plan, 2):
        if (
            a.proto != b.proto
            or a.last < b.first
            or b.last < a.first
            or (a.relay and b.relay)
            or a.service == b.service == "extra"
        ):
            continue
        low, high = max(a.first, b.first), min(a.last, b.last)
        port = str(low) if low == high else f"{low}-{high}"
        yield (
            b.setting,
            (
                f"port {port}/{b.proto} is taken twice on this host: {a.service} ({a.purpose}, "
                f"{a.setting}) and {b.service} ({b.purpose}); give one of them another port"
            ),
        )


def _crowds(plan: list[Use]) -> Iterator[list[Use]]:
    """Relay ranges that overlap, those that hang together in one list. A service's TCP range is
    its UDP range, so that looking at UDP is enough."""
    crowds: list[list[Use]] = []
    for use in sorted(plan, key=lambda use: use.first):
        if not use.relay or use.proto != "udp":
            continue
        if crowds and use.first <= max(other.last for other in crowds[-1]):
            crowds[-1].append(use)
        else:
            crowds.append([use])
    for crowd in crowds:
        if len(crowd) > 1:
            yield sorted(crowd, key=plan.index)


def _split(crowd: list[Use]) -> tuple[str, str]:
    """Ranges that do not overlap: the smallest one keeps its place if that leaves the others
    1000 ports each, else all share alike. Returns the last setting to change, and what to do."""
    first, last = min(use.first for use in crowd), max(use.last for use in crowd)
    kept = min(crowd, key=lambda use: use.last - use.first)
    others = [use for use in crowd if use is not kept]
    start = f"keep {kept.ports} for {kept.service}, "
    low, high = max((kept.last + 1, last), (first, kept.first - 1), key=lambda gap: gap[1] - gap[0])
    if high - low < 1000 * len(others):
        others, start, low, high = crowd, "", first, last
    size = (high - low + 1) // len(others)
    if size <= 100:
        return others[-1].setting, f"{first}-{last} is too little for all: use other ranges too"
    ends = [low + size * n for n in range(len(others))] + [high + 1]
    shares = [
        f"{a}-{b - 1} to {use.service}" for use, a, b in zip(others, ends, ends[1:], strict=False)
    ]
    return others[-1].setting, f"{start}give {' and '.join(shares)}"

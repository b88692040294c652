"""Sample packets of a flow, and what nftables' expressions say of one (libnftables-json(5))."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network, summarize_address_range
from typing import Any, Literal, NamedTuple

from callready.diagnosis.model import Flow

Direction = Literal["in", "out"]
Answer = Literal["yes", "likely", "maybe", "no"]
RANK: dict[Answer, int] = {"yes": 3, "likely": 2, "maybe": 1, "no": 0}
# IP packets: a request, audio, video; with headers of 1200 bytes in UDP.
SIZES = (60, 250, 1100, 1228)
# Above this many packets a second nobody's call meets a limit.
ENOUGH = 1000
CALLER = 40000  # a port that callers send from
PER = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
# Callers anywhere: a rule that meets none of them is about somebody.
ANYWHERE = {
    4: ("5.9.1.2", "31.19.4.4", "91.64.7.7", "177.32.5.5", "203.0.113.77"),
    6: ("2003:e1::77", "2a02:810::77", "2607:fb90::77", "2409:4000::77"),
}
_TRANSPORTS = ("udp", "tcp", "th", "sctp", "dccp", "udplite", "icmp", "icmpv6", "igmp")
_PROTOCOLS: dict[str, frozenset[str | int]] = {
    "tcp": frozenset({"tcp", 6}),
    "udp": frozenset({"udp", 17}),
    "icmpv6": frozenset({"icmpv6", "ipv6-icmp", 58}),
}
# By which neighbours find each other (RFC 826, RFC 4861).
_FOUND = {
    "arp": {"operation": frozenset({"request", "reply", 1, 2})},
    "icmpv6": {"type": frozenset({"nd-neighbor-solicit", "nd-neighbor-advert", 135, 136})},
}
_VIRTUAL = re.compile(r"lo$|docker|br-|veth|virbr|wg|tun|tap|tailscale|cali|cni|lxc|lxd")


class Likely:
    """A value that is often the one asked for."""


class _Interface(str):
    """The public interface, by whatever name a rule has for it; never loopback."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and not _VIRTUAL.match(other)

    def __hash__(self) -> int:
        return 0


UNKNOWN, LIKELY, INTERFACE = object(), Likely(), _Interface("*")


class Packet(NamedTuple):
    """One as a filter sees it; `port` is the host's, `remote` and `remote_port` are the other's."""

    family: int
    proto: str
    port: int
    remote: str
    remote_port: int
    local: str
    size: int
    state: str
    direction: Direction

    def value(self, left: Any) -> Any:
        """What an expression is for it: None if it has nothing of the kind, UNKNOWN, a tuple of
        several, or a frozenset of which any will do."""
        if not isinstance(left, dict) or not left:
            return UNKNOWN
        kind, body = next(iter(left.items()))
        match kind:
            case "concat":
                return tuple(self.value(each) for each in body)
            case "payload":
                return self._payload(body.get("protocol"), body.get("field"))
            case "meta":
                return self._meta(body["key"])
            case "ct":
                is_original = self.state == "new" or self.direction == "in"
                return {
                    "state": frozenset({self.state}),
                    "mark": 0,
                    "status": frozenset(),
                    "direction": frozenset({"original" if is_original else "reply"}),
                }.get(body["key"], UNKNOWN)
            case "fib":
                if body.get("result") == "type" and "daddr" in body.get("flags", []):
                    return frozenset({"local" if self.direction == "in" else "unicast"})
                return frozenset({"unicast", True})
            case "&":
                inner, mask = self.value(body[0]), body[1]
                # Flags under a mask: those that the packet has, of them.
                if isinstance(inner, frozenset) and isinstance(mask, list):
                    have = inner & set(mask)
                    return next(iter(have)) if len(have) == 1 else UNKNOWN
                return inner if inner is None or inner == 0 else UNKNOWN
            case "exthdr" | "tcp option":
                return None
        return UNKNOWN

    def _payload(self, protocol: str | None, name: str | None) -> Any:
        ours, theirs = (self.local, self.port), (self.remote, self.remote_port)
        source, to = (theirs, ours) if self.direction == "in" else (ours, theirs)
        if self.proto in _FOUND and protocol in (self.proto, "th"):
            return _FOUND[self.proto].get(name or "", UNKNOWN)
        if protocol in _TRANSPORTS:
            if protocol not in (self.proto, "th"):
                return None
            return {
                "length": self.size - (20 if self.family == 4 else 40),
                "flags": frozenset({"syn"} if self.state == "new" else {"ack", "psh"}),
                "sport": source[1],
                "dport": to[1],
            }.get(name or "", UNKNOWN)
        if protocol in ("ip", "ip6"):
            if protocol not in self.families:
                return None
            return {
                "saddr": source[0],
                "daddr": to[0],
                "length": self.size if protocol == "ip" else self.size - 40,
                "protocol": self._protocol,
                "nexthdr": self._protocol,
                "version": self.family,
                "ttl": 57,
                "hoplimit": 57,
            }.get(name or "", UNKNOWN)
        return None if protocol in ("arp", "vlan") else UNKNOWN

    def _meta(self, key: str) -> Any:
        is_in = self.direction == "in"
        return {
            "l4proto": self._protocol,
            "nfproto": frozenset({f"ipv{self.family}", 2 if self.family == 4 else 10}),
            "protocol": frozenset({"arp" if self.proto == "arp" else self.families[-1]}),
            "length": self.size,
            "pkttype": frozenset({"host", "unicast", 0}),
            "mark": 0,
            "iif": INTERFACE if is_in else None,
            "iifname": INTERFACE if is_in else None,
            "oif": None if is_in else INTERFACE,
            "oifname": None if is_in else INTERFACE,
            "skuid": None if is_in else LIKELY,
            "skgid": None if is_in else LIKELY,
            "random": LIKELY,
        }.get(key, UNKNOWN)

    @property
    def _protocol(self) -> frozenset[str | int] | None:
        return _PROTOCOLS.get(self.proto)

    @property
    def families(self) -> tuple[str, ...]:
        """Of tables that see it."""
        if self.proto == "arp":
            return "netdev", "arp"
        return "netdev", "inet", "ip" if self.family == 4 else "ip6"

    def is_spoiled(self, body: dict[str, Any]) -> bool:
        """Whether a statement that changes it takes it its way or its size."""
        key, value = body.get("key", {}), body.get("value")
        if not isinstance(key, dict):
            return False
        payload = key.get("payload", {})
        if payload.get("field") in ("ttl", "hoplimit") and isinstance(value, int):
            return payload.get("protocol") == {4: "ip", 6: "ip6"}[self.family] and value < 32
        if "tcp option" in key:
            return self.proto == "tcp" and isinstance(value, int) and value < 400
        return payload.get("field") in ("sport", "dport", "saddr", "daddr", "length", "checksum")


def neighbours(flow: Flow, locals_: Mapping[int, str], size: int) -> Iterator[Packet]:
    """Packets that a flow needs before its own: those beside the host find it, and it them, by ARP
    and by neighbour discovery, which connection tracking leaves alone."""
    for family, local in locals_.items():
        proto, other = "arp" if family == 4 else "icmpv6", ANYWHERE[family][0]
        for port in (flow.first, flow.last) if flow.family in (0, family) else ():
            found = Packet(family, proto, port, other, 0, local, size, "untracked", "in")
            yield from (found, found._replace(direction="out"))


def samples(
    flow: Flow,
    numbers: set[int],
    sizes: Sequence[int],
    locals_: Mapping[int, str],
    peers: Mapping[str, int],
    strangers: Mapping[int, Sequence[str]],
) -> Iterator[Packet]:
    """Packets of a flow, there and back, that rules tell apart.

    Args:
        flow: of the port plan.
        numbers: that stand in the rules: of ports, each is tried, and those beside it.
        sizes: of IP packets, in bytes.
        locals_: the host's address by family.
        peers: addresses that it is certainly with, and the port that they send from.
        strangers: by family, addresses that it is with too.
    """
    edges = {n + d for n in numbers for d in (-1, 0, 1) if flow.first <= n + d <= flow.last}
    ports = sorted({flow.first, flow.last, *sorted(edges)[:24]})
    for family, local in locals_.items():
        if flow.family not in (0, family):
            continue
        others = [(text, CALLER) for text in strangers.get(family, ())]
        others += [(text, p) for text, p in peers.items() if ip_address(text).version == family]
        # Firewalls that ban are asked by each address, limits of size by one of each sort.
        for port in ports:
            for n, (remote, remote_port) in enumerate(others):
                for size in sizes if n in (0, len(others) - 1) else sizes[:1]:
                    ends = (port, remote, remote_port, local)
                    new = Packet(family, flow.proto, *ends, size, "new", "in")
                    if size == sizes[0] or flow.proto == "udp":
                        yield new
                    if remote in peers and remote_port != CALLER:  # relays begin themselves
                        yield new._replace(direction="out")
                    yield new._replace(state="established")
                    yield new._replace(state="established", direction="out")


def both(one: Answer, other: Answer) -> Answer:
    """Of two conditions the one that holds less."""
    return min(one, other, key=RANK.__getitem__)


def equals(value: Any, right: Any) -> bool:
    """Whether a value is the one, or in the range or prefix, on the right of an expression."""
    try:
        match right:
            case {"range": [low, high]} if isinstance(value, int):
                return isinstance(low, int) and bool(low <= value <= high)
            case {"range": [low, high]}:
                ends = ip_address(low), ip_address(high)
                return any(ip_address(value) in net for net in summarize_address_range(*ends))
            case {"prefix": {"addr": address, "len": length}}:
                return ip_address(value) in ip_network(f"{address}/{length}", strict=False)
            case str() if isinstance(value, str):
                return bool(value == right) or ip_address(value) == ip_address(right)
    except (ValueError, TypeError):
        return False
    return bool(value == right)


def limited(kind: str, body: Any) -> tuple[Answer, str]:
    """Whether a packet passes a statement that counts, and its limit in words. Only what few
    callers reach already counts: more is care, not a fault."""
    if kind == "limit":
        rate, per = int(body.get("rate", 0)), str(body.get("per", "second"))
        unit = body.get("rate_unit", "packets")
        packets = rate / PER.get(per, 1)
        if unit != "packets":
            packets *= {"kbytes": 1024, "mbytes": 1024**2}.get(unit, 1) / 1000
        passes: Answer = "maybe" if body.get("inv") else "yes"
        return "likely" if packets < ENOUGH else passes, f"{rate} {unit} a {per}"
    if kind == "quota":
        return ("likely" if body.get("inv") else "yes"), "a quota"
    if kind == "ct count":
        few = int(body.get("val", 0)) < 64
        return ("likely" if few else "maybe") if body.get("inv") else "yes", "some connections"
    for inner in body.get("stmt", []) if isinstance(body, dict) else []:
        name, what = next(iter(inner.items())) if isinstance(inner, dict) else (inner, {})
        if name in ("limit", "quota", "ct count"):
            return limited(name, what)
    return "yes", ""


def numbers_in(value: Any) -> Iterator[int]:
    """Every number in JSON."""
    if isinstance(value, dict):
        value = [each for key, each in value.items() if key not in ("counter", "handle", "log")]
    if isinstance(value, list):
        for each in value:
            yield from numbers_in(each)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value

"""How far packets get on a host: a table of nftables that counts them where they arrive, where a
program gets them, where it answers and where the answer leaves. It counts, and keeps nothing of
what is in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from secrets import token_hex
from typing import Literal, NamedTuple

from callready.diagnosis.model import Flow

TABLE = f"callready_diagnosis_{token_hex(3)}"
"""Of this run: two people may look at the same hosts. The unit of its timer has the same name."""
LARGE = 700
"""Bytes of an IP packet from which on it counts as a large one: checks and signalling are smaller,
video is larger."""
KEPT = 120
"""Seconds after which a timer on the host removes the table, whatever became of this machine."""

Size = Literal["small", "large"]


class Point(NamedTuple):
    """A place that packets pass on a host."""

    name: str
    hook: str
    priority: int  # before and behind every filter of others (nft(8), "Priorities")
    side: Literal["dport", "sport"]


POINTS = (
    Point("arrived", "prerouting", -450, "dport"),
    Point("let_in", "input", 450, "dport"),
    Point("answered", "output", -450, "sport"),
    Point("left", "postrouting", 450, "sport"),
)


@dataclass(frozen=True)
class Watched:
    """A flow between a host and some peers.

    Args:
        flow: of one address family.
        client: the host of the fleet at the other side; empty: this machine.
        peers: addresses of the other side; empty: all but `strangers`.
        strangers: addresses that are not meant, where `peers` is empty.
        behind: the port that the packet filter leads it to, if that is another one.
    """

    flow: Flow
    client: str = ""
    peers: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()
    behind: int = 0


@dataclass(frozen=True)
class Counted:
    """Packets of one size at each of the four points."""

    arrived: int = 0
    let_in: int = 0
    answered: int = 0
    left: int = 0


def script(watched: Sequence[Watched]) -> str:
    """The shell script that puts the table on a host, with the timer that takes it away again. It
    fails where a release waits for its confirmation."""
    return f"""
if [ -e /var/lib/callready/pending ]; then
    echo 'a release waits for its confirmation' >&2
    exit 1
fi
systemctl stop {TABLE}.timer 2> /dev/null
systemd-run -q --unit={TABLE} --on-active={KEPT} --collect nft delete table inet {TABLE} ||
    exit 1
nft -f - <<'END'
table inet {TABLE}
delete table inet {TABLE}
{_table(watched)}
END
"""


END = f"""
nft -j list counters table inet {TABLE}
nft delete table inet {TABLE}
systemctl stop {TABLE}.timer
"""
"""The shell script that prints what was counted, for `read`, and removes the table."""


def read(text: str, watched: Sequence[Watched]) -> dict[tuple[Watched, Size], Counted]:
    """What was counted, from the output of END."""
    counters = {
        item["counter"]["name"]: int(item["counter"]["packets"])
        for item in json.loads(text)["nftables"]
        if "counter" in item
    }
    sizes: tuple[Size, ...] = ("small", "large")
    return {
        (each, size): Counted(*(counters.get(_name(number, point, size), 0) for point in POINTS))
        for number, each in enumerate(watched)
        for size in sizes
    }


def _name(number: int, point: Point, size: str) -> str:
    return f"w{number}_{point.name}_{size}"


def _table(watched: Sequence[Watched]) -> str:
    names = [
        _name(number, point, size)
        for number in range(len(watched))
        for point in POINTS
        for size in ("small", "large")
    ]
    lines = [f"table inet {TABLE} {{", *(f"counter {name} {{}}" for name in names)]
    for point in POINTS:
        lines.append(f"chain {point.name} {{")
        lines.append(f"type filter hook {point.hook} priority {point.priority}; policy accept;")
        for number, each in enumerate(watched):
            lines += _rules(number, each, point)
        lines.append("}")
    return "\n".join([*lines, "}"])


def _rules(number: int, each: Watched, point: Point) -> Iterator[str]:
    flow = each.flow
    family, other = (
        "ip" if flow.family == 4 else "ip6",
        "saddr" if point.side == "dport" else "daddr",
    )
    ports = str(flow.first) if flow.first == flow.last else f"{flow.first}-{flow.last}"
    port = f"{flow.proto} {point.side} {ports}"
    if each.behind and point.hook == "input":
        port = f"{flow.proto} {point.side} {each.behind} ct original proto-dst {flow.first}"
    elif each.behind and point.hook == "output":  # before conntrack knows whose answer it is
        port = f"{flow.proto} {point.side} {each.behind}"
    whom = _addresses(each.peers, flow.family)
    if whom:
        match = f"{family} {other} {{ {whom} }} {port}"
    elif each.peers:
        return
    elif strangers := _addresses(each.strangers, flow.family):
        match = f"{family} {other} != {{ {strangers} }} {port}"
    else:
        match = f"meta nfproto ipv{flow.family} {port}"
    yield f"{match} meta length < {LARGE} counter name {_name(number, point, 'small')}"
    yield f"{match} meta length >= {LARGE} counter name {_name(number, point, 'large')}"


def _addresses(addresses: Iterable[str], family: int) -> str:
    return ", ".join(sorted(text for text in addresses if ip_address(text).version == family))

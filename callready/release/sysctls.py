"""Kernel settings that others may have set too: theirs and ours are joined, none is lowered."""

from __future__ import annotations

from collections.abc import Iterable

FILE = "/etc/sysctl.d/60-callready.conf"
RESERVED_PORTS = "net.ipv4.ip_local_reserved_ports"
MAXIMA = ("net.core.rmem_max", "net.core.wmem_max")


def join(key: str, ours: str, theirs: str) -> str:
    """The value of `key` that has all of both (ip-sysctl.rst, socket(7)); ours where theirs is
    none, or the key is not one that can be joined."""
    try:
        if key == RESERVED_PORTS:
            return port_list([*_ranges(ours), *_ranges(theirs)])
        if key in MAXIMA:
            return str(max(int(ours), int(theirs)))
    except ValueError:
        pass
    return ours


def covers(key: str, found: str, wanted: str) -> bool:
    """Whether a host with `found` has all of `wanted`."""
    if key == RESERVED_PORTS or key in MAXIMA:
        return join(key, wanted, found) == join(key, found, found)
    return found.split() == wanted.split()


def port_list(ranges: Iterable[tuple[int, int]]) -> str:
    """Ports as the kernel lists reserved ones: sorted, neighbours merged."""
    merged: list[list[int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in merged)


def _ranges(text: str) -> list[tuple[int, int]]:
    parts = (part.partition("-") for part in text.split(",") if part.strip())
    return [(int(first), int(last or first)) for first, _, last in parts]

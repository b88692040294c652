"""Which TCP ports a stranger finds open."""

from __future__ import annotations

import argparse
import asyncio
import errno
import re
import resource
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from callready.probes import ProbeError, command, endpoint, reason, run

SERVICES = Path("/etc/services")
"""The registered services as Debian's netbase lists them."""

UNREGISTERED = (
    "2375-2376,3000,3478,5000,5349,5601,7880-7881,8000,8081,8443,8888,9000,9090,9100,9200,10250,"
    "11211,15672,27017"
)
"""Where container engines, databases, consoles and exporters usually listen, and netbase has no
entry."""


@dataclass(frozen=True)
class Sweep:
    """Ports by what a connection attempt met: accepted, refused (RST), or no answer."""

    open: frozenset[int]
    refused: frozenset[int]
    filtered: frozenset[int]


def usual() -> list[int]:
    """The thousand usual TCP ports: 1 to 1024, those of /etc/services, and `UNREGISTERED`.

    Raises:
        ProbeError: there is no /etc/services (Debian's package netbase).
    """
    try:
        registered = re.findall(r"^\S+\s+(\d+)/tcp\b", SERVICES.read_text(), re.MULTILINE)
    except OSError as error:
        raise ProbeError(
            "the usual ports cannot be listed", "package netbase", f"{SERVICES}: {reason(error)}"
        ) from None
    return sorted({*range(1, 1025), *map(int, registered), *_ranges(UNREGISTERED)})


def sweep(
    address: str, ports: Iterable[int], timeout: float = 1.0, concurrency: int = 2000
) -> Sweep:
    """Connect to every port of one address.

    A connection is given up before its first retransmission (1 s, RFC 6298 section 2.1), so a
    lost packet makes a port look filtered: sweep again what must be open.

    Args:
        address: host name or IP address; its family is the one that is swept.
        ports: TCP ports.
        timeout: seconds to wait for an answer.
        concurrency: attempts at a time; 65,535 ports against a DROP take 65,535 / concurrency
            times `timeout`, 33 s with the defaults. Lowered to what the open-files limit allows.

    Raises:
        ProbeError: the address does not resolve, or cannot be reached at all.
    """
    try:
        family, *_, target = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ProbeError(f"{address} cannot be swept", "the address", reason(error)) from None
    codes = asyncio.run(_codes(family, target, set(ports), timeout, concurrency))
    if codes and set(codes.values()) <= {errno.ENETUNREACH, errno.EHOSTUNREACH}:
        raise ProbeError(
            f"{endpoint(address, min(codes))} cannot be swept: no route to {address}",
            "the address, and this machine's own network",
        )
    is_open = frozenset(port for port, code in codes.items() if code == 0)
    refused = frozenset(port for port, code in codes.items() if code == errno.ECONNREFUSED)
    return Sweep(is_open, refused, frozenset(codes) - is_open - refused)


async def _codes(
    family: int, target: tuple[object, ...], ports: set[int], timeout: float, concurrency: int
) -> dict[int, int]:
    """The error number that each connection ends with, 0 for an open port."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    waiting = iter(ports)
    codes: dict[int, int] = {}

    async def connect() -> None:
        loop = asyncio.get_running_loop()
        for port in waiting:
            with socket.socket(family, socket.SOCK_STREAM) as caller:
                caller.setblocking(False)
                try:
                    attempt = loop.sock_connect(caller, (target[0], port, *target[2:]))
                    await asyncio.wait_for(attempt, timeout)
                    codes[port] = 0
                except OSError as error:  # TimeoutError too
                    codes[port] = error.errno or errno.ETIMEDOUT

    await asyncio.gather(*(connect() for _ in range(min(concurrency, hard - 100, len(ports)))))
    return codes


def _ranges(text: str) -> list[int]:
    """``22,80,7000-7010`` as a list of ports."""
    ports: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise argparse.ArgumentTypeError(f"{part!r} is no port and no range such as 7000-7010")
        ports += range(int(first), int(last or first) + 1)
    if not all(0 < port < 65536 for port in ports):
        raise argparse.ArgumentTypeError("a port is a number from 1 to 65535")
    return ports


def _probe(options: argparse.Namespace) -> object:
    ports = range(1, 65536) if options.all else options.ports or usual()
    swept = sweep(options.address, ports, options.timeout)
    unplanned = sorted(swept.open - set(options.planned or swept.open))
    if unplanned:
        raise ProbeError(
            f"strangers reach {options.address} on ports nobody planned",
            "what listens there (ss -ltnp), and nftables",
            ", ".join(map(str, unplanned)),
        )
    return {"open": swept.open, "refused": len(swept.refused), "filtered": len(swept.filtered)}


def main() -> None:
    parser = command("ports", __doc__)
    parser.add_argument("address", help="host name or IP address")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ports", type=_ranges, help="22,80,7000-7010 (default: the usual ones)")
    which.add_argument("--all", action="store_true", help="1-65535")
    parser.add_argument("--planned", type=_ranges, help="fail when any other port is open")
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds (%(default)g)")
    run(parser, _probe)


if __name__ == "__main__":
    main()

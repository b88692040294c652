"""Which TCP ports a stranger finds open."""

from __future__ import annotations

import argparse
import errno
import re
import resource
import selectors
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from callready.probes import ProbeError, endpoint, reason, run

SERVICES = Path("/etc/services")
"""The registered services as Debian's netbase lists them."""

UNREGISTERED = (
    2375,
    2376,
    3000,
    3478,
    5000,
    5349,
    5601,
    7880,
    7881,
    8000,
    8081,
    8443,
    8888,
    9000,
    9090,
    9100,
    9200,
    10250,
    11211,
    15672,
    27017,
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
            f"the usual ports cannot be listed: {SERVICES}: {reason(error)}", "package netbase"
        ) from None
    return sorted({*range(1, 1025), *map(int, registered), *UNREGISTERED})


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
        raise ProbeError(f"{address} cannot be swept: {reason(error)}", "the address") from None
    wanted = sorted(set(ports))
    at_once = min(concurrency, _descriptors(concurrency + 100) - 100)
    results: dict[int, int] = {}
    for start in range(0, len(wanted), at_once):
        results |= _attempt(family, target, wanted[start : start + at_once], timeout)
    if results and set(results.values()) <= {errno.ENETUNREACH, errno.EHOSTUNREACH}:
        raise ProbeError(
            f"{endpoint(address, wanted[0])} cannot be swept: no route to {address}",
            "the address, and this machine's own network",
        )
    return Sweep(
        open=frozenset(port for port, code in results.items() if code == 0),
        refused=frozenset(port for port, code in results.items() if code == errno.ECONNREFUSED),
        filtered=frozenset(
            port for port, code in results.items() if code not in (0, errno.ECONNREFUSED)
        ),
    )


def _descriptors(wanted: int) -> int:
    """Raise the soft limit of open files towards the hard one; what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else soft


def _attempt(
    family: int, target: tuple[object, ...], ports: Sequence[int], timeout: float
) -> dict[int, int]:
    """The error number each connection ended with, 0 for an open port."""
    results: dict[int, int] = {}
    with selectors.DefaultSelector() as pending:
        for port in ports:
            attempt = socket.socket(family, socket.SOCK_STREAM)
            attempt.setblocking(False)
            code = attempt.connect_ex((target[0], port, *target[2:]))
            if code == errno.EINPROGRESS:
                pending.register(attempt, selectors.EVENT_WRITE, port)
            else:
                results[port] = code
                attempt.close()
        deadline = time.monotonic() + timeout
        while pending.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in pending.select(left):
                attempt = key.fileobj  # type: ignore[assignment]
                results[key.data] = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                pending.unregister(attempt)
                attempt.close()
        for key in list(pending.get_map().values()):
            results[key.data] = errno.ETIMEDOUT
            key.fileobj.close()  # type: ignore[union-attr]
    return results


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m callready.probes.ports", description=__doc__)
    parser.add_argument("address", help="host name or IP address")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ports", type=_ranges, help="22,80,7000-7010 (default: the usual ones)")
    which.add_argument("--all", action="store_true", help="1-65535")
    parser.add_argument("--planned", type=_ranges, help="fail when any other port is open")
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds (%(default)g)")

    def probe(options: argparse.Namespace) -> object:
        ports = range(1, 65536) if options.all else options.ports or usual()
        found = sweep(options.address, ports, options.timeout)
        unplanned = sorted(found.open - set(options.planned or found.open))
        if unplanned:
            raise ProbeError(
                f"strangers reach {options.address} on ports nobody planned: "
                f"{', '.join(map(str, unplanned))}",
                "what listens there (ss -ltnp), and nftables",
            )
        return {"open": found.open, "refused": len(found.refused), "filtered": len(found.filtered)}

    return run(parser, probe, arguments)


if __name__ == "__main__":
    sys.exit(main())

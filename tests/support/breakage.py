"""Breaking the path between callers and a host as networks and other programs do: filters, a small
MTU, too little bandwidth, routes, addresses. Each is a context manager that undoes what it did.

A filter is put where it shall be looked for: into the host (`inside`, or at its interface, before
its own filter: `ingress`), before the host, where the host cannot see it (`before`: the provider's
edge), or where the callers are (`callers`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from lab import Lab, plan
from lab.run import abandoned, run
from tests.support.fleet import Host

Run = Callable[[str], str]
INTERFACE = "host0"  # of a lab host
_numbers = itertools.count(1)
SOL_PACKET, PACKET_VNET_HDR, ETH_P_ALL, VNET_HDR = 263, 15, 3, 10


@dataclass(frozen=True)
class Packets:
    """Packets between a service and those who use it.

    Args:
        to: "in" for those to the service, "out" for its answers, "both".
        family: 4 or 6; 0 is both.
        proto: "udp" or "tcp"; empty is both.
        ports: of the service, as nftables writes them ("3478", "50000-60000", "{ 443, 7881 }").
        peer: only those of this address at the other end.
        larger: only IP packets of more than so many bytes.
        rate: only what is beyond it ("20/second", "10 kbytes/second").
        loss: only so many of a hundred, at random.
    """

    to: Literal["in", "out", "both"] = "both"
    family: Literal[0, 4, 6] = 0
    proto: Literal["", "udp", "tcp"] = ""
    ports: str = ""
    peer: str = ""
    larger: int = 0
    rate: str = ""
    loss: int = 0

    def matches(self, inwards: bool, host: str = "") -> Iterator[str]:
        """nftables matches of them, for one way. `host` narrows them to a host's addresses."""
        if self.to == ("out" if inwards else "in"):
            return
        here, there = ("d", "s") if inwards else ("s", "d")
        transport = "" if self.proto else "meta l4proto { tcp, udp } "
        if self.ports:
            transport = f"{self.proto or 'th'} {here}port {self.ports} "
            transport = transport if self.proto else f"meta l4proto {{ tcp, udp }} {transport}"
        elif self.proto:
            transport = f"meta l4proto {self.proto} "
        for family, ip in ((4, "ip"), (6, "ip6")):
            if self.family not in (0, family) or (self.peer and (":" in self.peer) != (ip != "ip")):
                continue
            match = f"meta protocol {ip} "
            if host:
                found = plan.find_host(host)
                match += f"{ip} {here}addr {found.ipv6 if family == 6 else found.ipv4} "
            match += f"{ip} {there}addr {self.peer} " * bool(self.peer) + transport
            match += f"meta length > {self.larger} " * bool(self.larger)
            match += f"numgen random mod 100 < {self.loss} " * bool(self.loss)
            yield match + f"limit rate over {self.rate} " * bool(self.rate)


@dataclass(frozen=True)
class Point:
    """Where a filter is: what runs a script there, the family of its table, its base chain for each
    way (None: there is none), a match before all others, the host whose addresses it is narrowed
    to, and how its table's name ends."""

    run: Run
    table: str
    inwards: str | None
    outwards: str | None
    match: tuple[str, str] = ("", "")
    host: str = ""
    name: str = "others"


def inside(host: Host, priority: int = -10) -> Point:
    """In the host, in a table of somebody else, before callready's own."""
    hook = "type filter hook {} priority {};"
    return Point(host.root, "inet", hook.format("input", priority), hook.format("output", priority))


def ingress(host: Host) -> Point:
    """At the host's interface, before anything else sees the packet; nothing is found here of what
    the host sends."""
    hook = f"type filter hook ingress device {INTERFACE} priority 0;"
    return Point(host.root, "netdev", hook, None)


def before(host: Host) -> Point:
    """Before the host, where it cannot look: the provider's edge, which also its neighbours
    pass."""
    port = f"vb-{host.name}"
    hook = "type filter hook forward priority 0;"
    matches = f'oifname "{port}" ', f'iifname "{port}" '
    name = f"{plan.INSTANCE}-{host.name}"  # swept by the lab, by the process id that follows
    return Point(_here, "bridge", hook, hook, matches, name=name)


def callers(host: Host) -> Point:
    """Where the callers are, for what they exchange with a host."""
    hook = "type filter hook {} priority 0;"
    # Towards the service is outwards here.
    return Point(_at_callers, "inet", hook.format("output"), hook.format("input"), host=host.name)


def _here(script: str) -> str:
    return run("sh", "-c", script)


def _at_callers(script: str) -> str:
    return run(*Lab().client_prefix(), "sh", "-c", script)


@contextmanager
def filtered(point: Point, *packets: Packets, verdict: str = "drop") -> Iterator[None]:
    """Have a table that does this to packets: "drop", "reject", or anything that nftables knows."""
    table = f"{point.table} {point.name}-{next(_numbers)}-{os.getpid()}"
    script = ""
    ways = ((True, "inwards", point.inwards), (False, "outwards", point.outwards))
    for number, (inwards, chain, base) in enumerate(ways):
        rules = [
            f"{point.match[number]}{match}counter {verdict}"
            for each in packets
            for match in each.matches(inwards, point.host)
        ]
        if rules and base:
            script += f"chain {chain} {{ {base} {'; '.join(rules)}; }}\n"
    assert script, "no packet passes there"
    point.run(f"nft 'table {table} {{\n{script}}}'")
    try:
        yield
    finally:
        point.run(f"nft delete table {table}")


def remove_filters(*names: Host) -> None:
    """Remove those of a test that was killed."""
    for there in (*(host.root for host in names), _at_callers):
        for line in there("nft list tables").splitlines():
            _, family, table = line.split()
            if table.startswith("others-") and abandoned(table):
                there(f"nft delete table {family} {table}")


@contextmanager
def mtu(host: Host | None, size: int) -> Iterator[None]:
    """A smaller MTU on the host's interface, or with None on the callers'.

    Below 1280 bytes an interface has no IPv6 (RFC 8200 section 5): its addresses come back with
    the MTU.
    """
    there, interface = _interface(host)
    was = there(f"ip -6 -o address show dev {interface} scope global").split()
    address = was[was.index("inet6") + 1]
    there(f"ip link set {interface} mtu {size}")
    try:
        yield
    finally:
        there(
            f"ip link set {interface} mtu 1500; ip address replace {address} dev {interface} nodad"
        )


@contextmanager
def shaped(host: Host | None, rate: str) -> Iterator[None]:
    """Let no more than this out of the host (or with None, of the callers): "200kbit"."""
    there, interface = _interface(host)
    there(f"tc qdisc add dev {interface} root tbf rate {rate} burst 2000 latency 20ms")
    try:
        yield
    finally:
        there(f"tc qdisc del dev {interface} root")


@contextmanager
def delayed(host: Host, source: Host, packets: Packets, seconds: float) -> Iterator[None]:
    """Have what one host sends another late, before both, where they cannot look; not every kernel
    has netem. What the bridge drops is sent by hand (packet(7))."""
    over = threading.Event()

    def port(of: Host) -> socket.socket:
        found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        # With a header that says which checksums the network card would make (linux/if_packet.h).
        found.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        found.bind((f"vb-{of.name}", ETH_P_ALL))
        return found

    async def pass_on() -> None:
        loop = asyncio.get_running_loop()
        with port(source) as taken, port(host) as given:
            ends = socket.inet_aton(source.ipv4) + socket.inet_aton(host.ipv4)
            taken.settimeout(0.1)

            def take() -> None:
                with suppress(TimeoutError):
                    frame = taken.recv(1 << 17)
                    if frame[VNET_HDR + 26 :][:8] == ends:
                        at = time.monotonic() + seconds
                        loop.call_soon_threadsafe(lambda: loop.call_at(at, given.send, frame))

            def go_on() -> None:
                while not over.is_set():
                    take()

            await asyncio.to_thread(go_on)

    with filtered(before(host), packets), ThreadPoolExecutor(1) as pool:
        done = pool.submit(asyncio.run, pass_on())
        try:
            yield
        finally:
            over.set()
            done.result()


@contextmanager
def route(host: Host | None, what: str) -> Iterator[None]:
    """A route more on the host (or with None, where the callers are): "blackhole 198.51.100.2"."""
    there, _ = _interface(host)
    ip = "ip -6" if ":" in what else "ip"
    there(f"{ip} route add {what}")
    try:
        yield
    finally:
        there(f"{ip} route del {what}")


@contextmanager
def without_address(host: Host, family: Literal[4, 6]) -> Iterator[None]:
    """Take an address from the host's interface."""
    address = (
        f"{host.ipv6}/{plan.IPV6_LENGTH}" if family == 6 else f"{host.ipv4}/{plan.IPV4_LENGTH}"
    )
    host.root(f"ip address del {address} dev {INTERFACE}")
    try:
        yield
    finally:
        nodad = "nodad" if family == 6 else ""
        host.root(f"ip address replace {address} dev {INTERFACE} {nodad}")


def _interface(host: Host | None) -> tuple[Run, str]:
    return (host.root, INTERFACE) if host else (_at_callers, "eth0")

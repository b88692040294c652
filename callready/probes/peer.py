"""A peer-to-peer call in which both sides relay: ICE, then data both ways (RFC 8445).

The relayed addresses are IPv4, as with browsers; `turn.relay_between` covers IPv6.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import aioice

from callready.probes import SILENCE, ProbeError, endpoint, reason, run, secret_from
from callready.probes.tls import tls_forwarder
from callready.probes.turn import Credentials, TurnServer, mint
from callready.probes.turn_client import client

T = TypeVar("T")

CONNECT_TIMEOUT = 10.0
_PACKET = struct.Struct("!d152x")  # when it was sent; the size of 20 ms of G.711


@dataclass(frozen=True)
class PeerToPeer:
    """What the peers measured; times in seconds.

    Args:
        connect_seconds: from asking for the relays until ICE was complete.
        relayed: both relayed transport addresses.
        sent: packets sent, one every 20 ms. received: of those, how many came back.
        rtt: median round trip, through both relays and back.
        longest_gap: the longest time in which nothing came back.
    """

    connect_seconds: float
    relayed: tuple[str, str]
    sent: int
    received: int
    rtt: float
    longest_gap: float


Side = tuple[TurnServer, Credentials]


def peer_to_peer(a: Side, b: Side, duration: float = 1.0) -> PeerToPeer:
    """Connect two peers by ICE with relayed candidates only and exchange data both ways.

    Args:
        a: TURN server and credentials of one peer.
        b: of the other; with names of their own, for coturn's ``user-quota``.
        duration: seconds to exchange data.

    Raises:
        TurnRefused: a TURN server refuses one side.
        ProbeError: one side gets no relay, or they do not reach each other.
    """
    return peer_to_peer_while(a, b, lambda: time.sleep(duration))[0]


def peer_to_peer_while(a: Side, b: Side, action: Callable[[], T]) -> tuple[PeerToPeer, T]:
    """As `peer_to_peer`, kept up while `action` runs in a thread: a call through another pool.

    Returns:
        What the peers measured over that time, and what `action` returned.

    Raises:
        ProbeError: as `peer_to_peer`, or it fell silent (`SILENCE`) before the action ended.
    """
    return asyncio.run(_while(a, b, action))


async def _while(a: Side, b: Side, action: Callable[[], T]) -> tuple[PeerToPeer, T]:
    async with contextlib.AsyncExitStack() as stack:
        # aioice would not say why it gets no relay, or no permission for the other's.
        async with client(*a) as left_caller, client(*b) as right_caller:
            await left_caller.allocate()
            await right_caller.allocate()
            start = time.perf_counter()
            left = await _relayed_peer(*a, controlling=True, stack=stack)
            right = await _relayed_peer(*b, controlling=False, stack=stack)
            await left_caller.permit(right.local_candidates[0].host)
            await right_caller.permit(left.local_candidates[0].host)
        relayed = _address(left), _address(right)
        try:
            await _connect(left, right)
        except (ConnectionError, TimeoutError) as error:
            raise ProbeError(
                f"callers who both relay do not connect: {relayed[0]} and {relayed[1]} do not "
                f"reach each other ({reason(error)})",
                "the relay range (min-port to max-port, udp) of both pools in nftables and in the "
                "provider's firewall",
            ) from None
        connected = time.perf_counter() - start
        exchange = _Exchange(left, right)
        try:
            result = await asyncio.to_thread(action)
        finally:
            await exchange.end()
        if exchange.broken or not exchange.round_trips or exchange.longest_gap > SILENCE:
            raise ProbeError(
                f"a peer-to-peer call between {relayed[0]} and {relayed[1]} did not stay up: "
                f"{len(exchange.round_trips)} of {exchange.sent} packets came back, nothing for "
                f"{exchange.longest_gap:.1f} s",
                "the logs of both sides' pools; one that is restarted drops every relayed call",
            )
        return PeerToPeer(
            connected,
            relayed,
            exchange.sent,
            len(exchange.round_trips),
            statistics.median(exchange.round_trips),
            exchange.longest_gap,
        ), result


async def _relayed_peer(
    server: TurnServer,
    credentials: Credentials,
    controlling: bool,
    stack: contextlib.AsyncExitStack,
) -> aioice.Connection:
    address, port, transport = server.address, server.port, server.transport
    if transport == "tls":
        forwarder = tls_forwarder(address, port, server.server_name, server.ca_file)
        address, port, transport = "127.0.0.1", await stack.enter_async_context(forwarder), "tcp"
    peer = aioice.Connection(
        ice_controlling=controlling,
        turn_server=(address, port),
        turn_username=credentials.username,
        turn_password=credentials.password,
        turn_transport=transport,
        transport_policy=aioice.TransportPolicy.RELAY,
    )
    stack.push_async_callback(_close, peer)
    await peer.gather_candidates()
    if not peer.local_candidates:
        raise ProbeError(f"callers get no relay candidate from {server.uri}", "the pool's log")
    return peer


async def _close(peer: aioice.Connection) -> None:
    with contextlib.suppress(TimeoutError):  # a server that died does not take its relay back
        await asyncio.wait_for(peer.close(), 1)


def _address(peer: aioice.Connection) -> str:
    return endpoint(peer.local_candidates[0].host, peer.local_candidates[0].port)


async def _connect(left: aioice.Connection, right: aioice.Connection) -> None:
    for one, other in ((left, right), (right, left)):
        one.remote_username, one.remote_password = other.local_username, other.local_password
        for candidate in [*other.local_candidates, None]:
            await one.add_remote_candidate(candidate)
    async with asyncio.timeout(CONNECT_TIMEOUT):
        await asyncio.gather(left.connect(), right.connect())


class _Exchange:
    """Packets from left to right and back, from its making until `end`."""

    def __init__(self, left: aioice.Connection, right: aioice.Connection) -> None:
        self._left, self._right = left, right
        self._stop = asyncio.Event()
        self._last = time.perf_counter()
        self._tasks = [asyncio.create_task(each()) for each in (self._send, self._echo, self._read)]
        self.broken = False
        self.sent = 0
        self.round_trips: list[float] = []
        self.longest_gap = 0.0

    async def end(self) -> None:
        self._stop.set()
        await asyncio.wait(self._tasks[:1], timeout=1)
        self._note_gap()
        await asyncio.sleep(0.2)  # what is still on its way
        self.broken = any(each.done() and each.exception() for each in self._tasks)
        for each in self._tasks:
            each.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self) -> None:
        while not self._stop.is_set():
            await self._left.send(_PACKET.pack(time.perf_counter()))
            self.sent += 1
            await asyncio.sleep(0.02)

    async def _echo(self) -> None:
        while True:
            await self._right.send(await self._right.recv())

    async def _read(self) -> None:
        while True:
            (sent_at,) = _PACKET.unpack(await self._left.recv())
            self.round_trips.append(time.perf_counter() - sent_at)
            self._note_gap()

    def _note_gap(self) -> None:
        now = time.perf_counter()
        self.longest_gap = max(self.longest_gap, now - self._last)
        self._last = now


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m callready.probes.peer",
        description=f"{__doc__} The pool's shared secret is read from TURN_SECRET.",
    )
    parser.add_argument("uri", help="TURN URI, turn:turn.example.com:3478?transport=udp")
    parser.add_argument("other_uri", nargs="?", help="of the other peer (default: the same)")
    parser.add_argument("--duration", type=float, default=1.0, help="seconds (%(default)g)")
    parser.add_argument("--ca-file", help="PEM file of the authorities to trust, for turns:")
    parser.add_argument("--secret-file", help="file with the secret, - for stdin")

    def probe(options: argparse.Namespace) -> object:
        secret = secret_from("TURN_SECRET", options.secret_file)
        a, b = (
            (TurnServer.from_uri(uri, options.ca_file), mint(secret, 600))
            for uri in (options.uri, options.other_uri or options.uri)
        )
        return peer_to_peer(a, b, options.duration)

    return run(parser, probe, arguments)


if __name__ == "__main__":
    sys.exit(main())

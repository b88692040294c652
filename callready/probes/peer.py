"""A peer-to-peer call in which both sides relay: ICE, then data both ways (RFC 8445).

The relayed addresses are IPv4, as with browsers; `turn.relay_between` covers IPv6.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import aioice

from callready.probes import SILENCE, ProbeError, command, endpoint, reason, run, secret_from
from callready.probes.tls import tls_forwarder
from callready.probes.turn import Exchange, Side, TurnServer, client, mint

T = TypeVar("T")

CONNECT_TIMEOUT = 10.0


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
            left = await _relayed_peer(a, True, stack)
            right = await _relayed_peer(b, False, stack)
            await left_caller.permit(right.local_candidates[0].host)
            await right_caller.permit(left.local_candidates[0].host)
        relayed = _address(left), _address(right)
        try:
            await _connect(left, right)
        except (ConnectionError, TimeoutError) as error:
            raise ProbeError(
                "callers who both relay do not connect",
                "the relay range (min-port to max-port, udp) of both pools in nftables and in the "
                "provider's firewall",
                f"{relayed[0]} and {relayed[1]} do not reach each other ({reason(error)})",
            ) from None
        connected = time.perf_counter() - start
        exchange = Exchange(left, right)
        try:
            result = await asyncio.to_thread(action)
        finally:
            exchange.stop()
            await exchange.end()
        round_trips, gap = exchange.round_trips, exchange.longest_gap
        if exchange.broken or not round_trips or gap > SILENCE:
            raise ProbeError(
                f"a peer-to-peer call between {relayed[0]} and {relayed[1]} did not stay up",
                "the logs of both sides' pools; one that is restarted drops every relayed call",
                f"{len(round_trips)} of {exchange.sent} packets came back, nothing for {gap:.1f} s",
            )
        rtt = statistics.median(round_trips)
        return PeerToPeer(connected, relayed, exchange.sent, len(round_trips), rtt, gap), result


async def _relayed_peer(
    side: Side, controlling: bool, stack: contextlib.AsyncExitStack
) -> aioice.Connection:
    server, credentials = side
    at = server.address, server.port
    if server.transport == "tls":
        forwarder = tls_forwarder(*at, server.server_name, server.ca_file)
        at = "127.0.0.1", await stack.enter_async_context(forwarder)
    peer = aioice.Connection(
        ice_controlling=controlling,
        turn_server=at,
        turn_username=credentials.username,
        turn_password=credentials.password,
        turn_transport=server.protocol,
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


def _probe(options: argparse.Namespace) -> PeerToPeer:
    secret = secret_from("TURN_SECRET", options.secret_file)
    a, b = (
        (TurnServer.from_uri(uri, options.ca_file), mint(secret, 600))
        for uri in (options.uri, options.other_uri or options.uri)
    )
    return peer_to_peer(a, b, options.duration)


def main() -> None:
    about = f"{__doc__} The pool's shared secret is read from TURN_SECRET."
    parser = command("peer", about, "--duration", "--ca-file", "--secret-file")
    parser.add_argument("uri", help="TURN URI, turn:turn.example.com:3478?transport=udp")
    parser.add_argument("other_uri", nargs="?", help="of the other peer (default: the same)")
    run(parser, _probe)


if __name__ == "__main__":
    main()

"""TURN as callers use it: allocations, permissions, data relayed both ways (RFC 8656)."""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import hmac
import ipaddress
import os
import secrets
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aioice.turn import TCP_TRANSPORT
from pydantic import SecretStr

from callready.probes import ProbeError, endpoint, run, secret_from
from callready.probes.turn_client import (
    Allocation,
    Credentials,
    IceServer,
    TurnRefused,
    TurnServer,
    client,
)

__all__ = [
    "Allocation",
    "Credentials",
    "IceServer",
    "Relay",
    "TurnRefused",
    "TurnServer",
    "allocate",
    "mint",
    "permissions",
    "relay_between",
    "tcp_allocation_code",
]


@dataclass(frozen=True)
class Relay:
    """Packets sent through two allocations and back, how many came, median round trip (s)."""

    sent: int
    received: int
    rtt: float


def mint(secret: SecretStr, ttl: int, name: str | None = None) -> Credentials:
    """Temporary credentials from the shared secret (draft-uberti-behave-turn-rest-00).

    Args:
        secret: the pool's shared secret (coturn's ``static-auth-secret``).
        ttl: seconds until they expire; negative for ones that have.
        name: user; default a new random one, because coturn's ``user-quota`` counts by name and
            the allocations of a caller who vanished live on for ten minutes.
    """
    username = f"{int(time.time()) + ttl}:{name or 'probe-' + secrets.token_hex(8)}"
    digest = hmac.new(secret.get_secret_value().encode(), username.encode(), hashlib.sha1).digest()
    return Credentials(username, base64.b64encode(digest).decode())


def allocate(
    server: TurnServer, credentials: Credentials | None, family: Literal[4, 6] = 4
) -> Allocation:
    """Allocate a relayed address, and give it back.

    Args:
        server: where and how.
        credentials: None asks anonymously, which must be refused with 401.
        family: address family of the relayed address, 4 or 6.

    Raises:
        TurnRefused: the server answered with an error code.
        ProbeError: it did not answer, or its certificate is not to be trusted.
    """

    async def attempt() -> Allocation:
        async with client(server, credentials) as caller:
            return await caller.allocate(family)

    return asyncio.run(attempt())


def permissions(
    server: TurnServer, credentials: Credentials, peers: Sequence[str]
) -> dict[str, int | None]:
    """For each peer address the code that its permission was refused with, None where granted.

    IPv4 and IPv6 peers each go over one allocation of their family; where the server has none,
    the code is the one the allocation was refused with (440).

    Raises:
        TurnRefused, ProbeError: as `allocate`, where an IPv4 allocation fails.
    """

    async def of_family(family: Literal[4, 6], asked: list[str]) -> dict[str, int | None]:
        codes: dict[str, int | None] = {}
        async with client(server, credentials) as caller:
            try:
                await caller.allocate(family)
            except TurnRefused as refused:
                if refused.code != 440:
                    raise
                return dict.fromkeys(asked, refused.code)
            for peer in asked:
                try:
                    await caller.permit(peer)
                    codes[peer] = None
                except TurnRefused as refused:
                    codes[peer] = refused.code
        return codes

    async def attempt() -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        families: tuple[Literal[4, 6], ...] = (4, 6)
        for family in families:
            asked = [peer for peer in peers if ipaddress.ip_address(peer).version == family]
            if asked:
                found |= await of_family(family, asked)
        return {peer: found[peer] for peer in peers}

    return asyncio.run(attempt())


def tcp_allocation_code(server: TurnServer, credentials: Credentials) -> int | None:
    """The code that relaying over TCP (RFC 6062) is refused with, None where it is granted.

    442 where ``no-tcp-relay`` is set. `server` must be reached over tcp or tls: over UDP the RFC
    wants 400 whatever is configured (section 5.1).

    Raises:
        ProbeError: as `allocate`.
    """
    if server.transport == "udp":
        raise ValueError("a TCP allocation is asked for over tcp or tls (RFC 6062 section 5.1)")

    async def attempt() -> int | None:
        async with client(server, credentials) as caller:
            try:
                await caller.allocate(transport=TCP_TRANSPORT)
            except TurnRefused as refused:
                return refused.code
            return None

    return asyncio.run(attempt())


class _Receiver(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.packets: asyncio.Queue[bytes] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.packets.put_nowait(data)


async def _relay(
    a: tuple[TurnServer, Credentials],
    b: tuple[TurnServer, Credentials],
    packets: int,
    family: Literal[4, 6],
) -> Relay:
    async with client(*a) as near, client(*b) as far:
        at_near, at_far = await near.allocate(family), await far.allocate(family)
        to_far = (at_far.relayed_address, at_far.relayed_port)
        to_near = (at_near.relayed_address, at_near.relayed_port)
        await near.bind(to_far)
        await far.bind(to_near)
        near.channel.receiver, far.channel.receiver = here, there = _Receiver(), _Receiver()

        async def echo() -> None:
            while True:
                await far.channel.send_data(await there.packets.get(), to_near)

        async def collect() -> None:
            while len(round_trips) < packets:
                sent_at = sent.pop(await here.packets.get(), None)
                if sent_at is not None:
                    round_trips.append(time.perf_counter() - sent_at)

        sent: dict[bytes, float] = {}
        round_trips: list[float] = []
        tasks = [asyncio.create_task(echo()), asyncio.create_task(collect())]
        try:
            for _ in range(packets):
                packet = secrets.token_bytes(160)  # 20 ms of G.711, a voice packet's size
                sent[packet] = time.perf_counter()
                await near.channel.send_data(packet, to_far)
                await asyncio.sleep(0.005)
            await asyncio.wait(tasks[1:], timeout=2)
        finally:
            for task in tasks:
                task.cancel()
        if not round_trips:
            raise ProbeError(
                f"callers who both relay hear nothing: none of {packets} packets came through "
                f"{endpoint(*to_near)} and {endpoint(*to_far)}",
                "the relay range (min-port to max-port, udp) in nftables and in the provider's "
                "firewall of both hosts",
            )
        return Relay(packets, len(round_trips), statistics.median(round_trips))


def relay_between(
    a: tuple[TurnServer, Credentials],
    b: tuple[TurnServer, Credentials],
    packets: int = 50,
    family: Literal[4, 6] = 4,
) -> Relay:
    """Send packets from allocation `a` to allocation `b` and back over bound channels.

    Args:
        a: server and credentials of the caller who sends.
        b: server and credentials of the one who sends back; may be the same server.
        packets: how many.
        family: address family of both relayed addresses.

    Raises:
        TurnRefused: 403 where a pool's peer policy forbids the other's relayed address.
        ProbeError: as `allocate`, or no packet came back.
    """
    return asyncio.run(_relay(a, b, packets, family))


def _credentials(options: argparse.Namespace) -> Credentials | None:
    if options.anonymous:
        return None
    if "TURN_USERNAME" in os.environ:
        password = secret_from("TURN_PASSWORD", options.secret_file)
        return Credentials(os.environ["TURN_USERNAME"], password.get_secret_value())
    return mint(secret_from("TURN_SECRET", options.secret_file), options.ttl)


def _probe(options: argparse.Namespace) -> object:
    port = options.port or (5349 if options.transport == "tls" else 3478)
    server = TurnServer(
        options.address, port, options.transport, options.server_name, options.ca_file
    )
    credentials = _credentials(options)
    if options.what == "allocate" or credentials is None:
        return allocate(server, credentials, options.family)
    if options.what == "tcp-allocation":
        return {"code": tcp_allocation_code(server, credentials)}
    if options.what == "relay":
        return relay_between((server, credentials), (server, credentials), family=options.family)
    return permissions(server, credentials, options.peers)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m callready.probes.turn",
        description=f"{__doc__} The pool's shared secret is read from TURN_SECRET (or --secret-file"
        "), a fixed user's name and password from TURN_USERNAME and TURN_PASSWORD.",
    )
    parser.add_argument("what", choices=["allocate", "relay", "permissions", "tcp-allocation"])
    parser.add_argument("address", help="host name or IP address of the TURN server")
    parser.add_argument("peers", nargs="*", help="permissions: the peer addresses to ask for")
    parser.add_argument("--port", type=int, help="default 3478, over tls 5349")
    parser.add_argument("--transport", choices=["udp", "tcp", "tls"], default="udp")
    parser.add_argument("--family", type=int, choices=[4, 6], default=4, help="of the relay")
    parser.add_argument("--server-name", help="name in the certificate (default: address)")
    parser.add_argument("--ca-file", help="PEM file of the authorities to trust")
    parser.add_argument("--secret-file", help="file with the secret or password, - for stdin")
    parser.add_argument("--ttl", type=int, default=600, help="of the credentials, seconds")
    parser.add_argument("--anonymous", action="store_true", help="without credentials")
    return run(parser, _probe, arguments)


if __name__ == "__main__":
    sys.exit(main())

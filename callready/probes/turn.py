"""TURN as callers use it: allocations, permissions, data relayed both ways (RFC 8656)."""

# Built on aioice's TURN client, which knows the protocol; here are the things a probe needs and it
# hides: error codes, the address family, a certificate that fails.

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import math
import os
import re
import secrets
import statistics
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import aioice
from aioice import stun as messages
from aioice.turn import TCP_TRANSPORT, UDP_TRANSPORT
from pydantic import SecretStr

from callready.probes import (
    TIMEOUT,
    ProbeError,
    command,
    endpoint,
    reason,
    run,
    secret_from,
    waited_for,
)
from callready.probes.stun import Channel, connect, request
from callready.probes.tls import shared_context

Family = Literal[4, 6]
Way = Literal["udp", "tcp", "tls"]

# RFC 8656 section 18.6; aioice does not know it: its own client only relays over IPv4.
_FAMILY = "REQUESTED-ADDRESS-FAMILY"
messages.ATTRIBUTES_BY_NAME[_FAMILY] = (
    0x0017,
    _FAMILY,
    messages.pack_unsigned,
    messages.unpack_unsigned,
)

# The server may still know a port from the caller who had it before: a client tries three before it
# gives up on a 437 (RFC 8656 section 7.4).
_PORTS = 3

# What a caller suffers by code, and what to look at (RFC 8656 section 19).
_REFUSALS = {
    400: (
        "finds the request malformed",
        "the pool's realm (a comment behind it in the file gives 400)",
    ),
    401: (
        "does not accept the credentials",
        "whether the secret is the one in the pool's userdb, the expiry in the user name and "
        "the clocks of both sides",
    ),
    403: ("forbids this peer", "denied-peer-ip and allowed-peer-ip of the pool"),
    437: ("finds the allocation mismatched", "the server's log: it lost or kept an allocation"),
    438: ("keeps calling the nonce stale", "stale-nonce, and whether two servers share an address"),
    440: ("relays nothing of this address family", "relay-ip of the pool: one for each family"),
    441: ("sees other credentials than the allocation's", "whether two servers share an address"),
    442: ("does not relay over TCP", "no-tcp-relay, which is meant"),
    443: ("does not take a peer of the other address family", "the family of the allocation"),
    486: ("has reached this user's quota", "user-quota, and whether every call has its own name"),
    508: (
        "has no capacity left",
        "min-port and max-port, total-quota, and whether relay-ip is an address of the host",
    ),
}


class NoUri(ProbeError):
    """What a client is given as a STUN or TURN server is no URI of one; browsers then throw, and
    no call starts."""


@dataclass(frozen=True)
class TurnServer:
    """One way into a TURN server.

    Args:
        address: host name or IP address; its family is the one the caller uses.
        port: 3478, or 5349 over TLS (RFC 7065).
        transport: how the caller reaches it: ``udp``, ``tcp`` or ``tls``.
        server_name: the name its certificate must carry; default `address`.
        ca_file: PEM file of the authorities to trust; default the system's.
        verify: False takes any certificate.
        connect_to: where to connect to instead, if a tunnel leads there.
    """

    address: str
    port: int = 3478
    transport: Way = "udp"
    server_name: str | None = None
    ca_file: str | None = None
    verify: bool = True
    connect_to: tuple[str, int] | None = None

    @classmethod
    def from_uri(cls, uri: str, ca_file: str | None = None) -> TurnServer:
        """The server that a TURN URI (RFC 7065) names.

        Raises:
            NoUri: it is none.
        """
        parts = re.fullmatch(
            r"(turns?):(\[[0-9a-fA-F:.]+\]|[^:?/@\[\]]+)(?::(\d+))?(?:\?transport=(udp|tcp))?", uri
        )
        if not parts or (parts[1] == "turns" and parts[4] == "udp"):
            raise NoUri(
                f"callers can do nothing with {uri!r}: it is no STUN or TURN URI",
                "where it was configured; turn:turn.example.com:3478?transport=udp is one, and "
                "livekit.rtc.stun_servers takes stun.example.com:3478 without stun:",
            )
        tls = parts[1] == "turns"
        transport: Way = "tls" if tls else "tcp" if parts[4] == "tcp" else "udp"
        port = int(parts[3] or (5349 if tls else 3478))
        return cls(parts[2].strip("[]"), port, transport, None, ca_file)

    @property
    def protocol(self) -> Literal["udp", "tcp"]:
        """The protocol of its packets."""
        return "udp" if self.transport == "udp" else "tcp"

    @property
    def way(self) -> str:
        """How callers say it: ``UDP``, ``TCP``, ``TLS``, ``TLS 443``."""
        return self.transport.upper() + " 443" * ((self.transport, self.port) == ("tls", 443))

    @property
    def uri(self) -> str:
        """The TURN URI (RFC 7065) that a client would be given."""
        scheme = "turns" if self.transport == "tls" else "turn"
        return f"{scheme}:{endpoint(self.address, self.port)}?transport={self.protocol}"


@dataclass(frozen=True)
class Credentials:
    """A user name and password; the password never shows in a repr or a result."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class IceServer:
    """STUN or TURN URIs (RFC 7064, RFC 7065) as a client gets them, with their credentials."""

    urls: tuple[str, ...]
    username: str = ""
    credential: str = field(default="", repr=False)


@dataclass(frozen=True)
class Allocation:
    """A granted allocation: relayed and mapped transport address, lifetime, time it took (s)."""

    relayed_address: str
    relayed_port: int
    mapped_address: str
    mapped_port: int
    lifetime: int
    time_to_allocate: float


@dataclass(frozen=True)
class Relay:
    """Packets sent through two allocations and back, how many came, median round trip (s)."""

    sent: int
    received: int
    rtt: float


class TurnRefused(ProbeError):
    """The server answered with an error code."""

    def __init__(self, server: TurnServer, code: int, reason: str, about: str = "") -> None:
        does, look_at = _REFUSALS.get(code, ("refuses", "the pool's log"))
        super().__init__(
            f"callers get no relay through {server.uri}",
            look_at,
            f"it {does}{about} ({code} {reason})",
        )
        self.code = code


class Client(asyncio.DatagramProtocol):
    """One caller at a TURN server; `client` opens and closes it. Its requests raise TurnRefused,
    and ProbeError where no answer comes."""

    channel: Channel

    def __init__(
        self, server: TurnServer, open_channel: Callable[[], Awaitable[Channel]], timeout: float
    ) -> None:
        self.server = server
        self.timeout = timeout
        self._open_channel = open_channel
        self._started = time.perf_counter()
        self._allocated = False
        self._received: asyncio.Queue[bytes] = asyncio.Queue()

    async def connect(self) -> None:
        """Connect, from a port of its own."""
        try:
            self.channel = await self._open_channel()
        except OSError as error:
            raise _unreachable(self.server, error) from None
        self.channel.receiver = self

    async def ask(
        self, method: messages.Method, attributes: dict[str, Any], about: str = ""
    ) -> dict[str, Any]:
        """The attributes of the success response to a request with these attributes."""
        message = messages.Message(method, messages.Class.REQUEST, attributes=attributes)
        try:
            return (await request(self.channel, message, self.timeout)).attributes
        except OSError as error:
            raise _unreachable(self.server, error) from None
        except messages.TransactionFailed as error:
            code, why = error.response.attributes.get("ERROR-CODE", (0, "without a code"))
            raise TurnRefused(self.server, code, why.rstrip("\0 "), about) from None

    async def allocate(self, family: Family = 4, transport: int = UDP_TRANSPORT) -> Allocation:
        """Ask for a relayed address (RFC 8656 section 7)."""
        wanted = {"REQUESTED-TRANSPORT": transport, "LIFETIME": 600}
        if family == 6:  # without the attribute a server relays over IPv4, and browsers send none
            wanted[_FAMILY] = 0x02000000
        for ports_left in reversed(range(_PORTS)):
            try:
                got = await self.ask(messages.Method.ALLOCATE, wanted)
                break
            except TurnRefused as refused:
                if refused.code != 437 or self._allocated or not ports_left:
                    raise
                self.channel.transport.close()
                await self.connect()
        self._allocated = True
        took = time.perf_counter() - self._started
        relayed: tuple[str, int] = got["XOR-RELAYED-ADDRESS"]
        mapped: tuple[str, int] = got["XOR-MAPPED-ADDRESS"]
        if ipaddress.ip_address(relayed[0]).version != family:
            raise ProbeError(
                f"{self.server.uri} relays through {relayed[0]}, not over IPv{family} as asked",
                "allocation-default-address-family and relay-ip of the pool",
            )
        return Allocation(*relayed, *mapped, got["LIFETIME"], took)

    async def permit(self, peer: str) -> None:
        """Ask for permission to exchange data with a peer (RFC 8656 section 10)."""
        await self.ask(
            messages.Method.CREATE_PERMISSION, {"XOR-PEER-ADDRESS": (peer, 9)}, f" {peer}"
        )

    async def bind(self, peer: tuple[str, int]) -> None:
        """Bind a channel to a peer (RFC 8656 section 12), for `send` and `recv`."""
        number = self.channel.channel_number
        attributes = {"CHANNEL-NUMBER": number, "XOR-PEER-ADDRESS": peer}
        await self.ask(messages.Method.CHANNEL_BIND, attributes, f" {peer[0]}")
        self.channel.channel_to_peer[number] = peer
        self.channel.peer_to_channel[peer] = number
        self.channel.channel_refresh_at[number] = math.inf
        self._peer = peer

    async def send(self, data: bytes) -> None:
        """Send to the peer of `bind`."""
        await self.channel.send_data(data, self._peer)

    async def recv(self) -> bytes:
        """The next that came from a peer."""
        return await self._received.get()

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._received.put_nowait(data)

    async def close(self) -> None:
        """Give the allocation back (a Refresh with lifetime 0) and close the connection."""
        with contextlib.suppress(ProbeError):  # the probe has its result; the server lets it expire
            if self._allocated:
                self.timeout = min(self.timeout, 1)
                await self.ask(messages.Method.REFRESH, {"LIFETIME": 0})
        self.channel.transport.close()


@contextlib.asynccontextmanager
async def client(
    server: TurnServer,
    credentials: Credentials | None,
    timeout: float = TIMEOUT,
    begin: Callable[[str], object] = str,
    sending: Callable[[asyncio.BaseTransport], asyncio.DatagramTransport] | None = None,
) -> AsyncIterator[Client]:
    """A connected caller, anonymous without credentials; leaves no allocation behind.

    Waits `timeout` seconds for the connection and for each answer; `begin` as in `stun.connect`.
    `sending` gets what UDP is sent with, and returns what it shall be sent with.

    Raises:
        ProbeError: no connection, or TLS that a caller would not trust.
    """

    async def open_channel() -> Channel:
        channel = await connect(
            server.connect_to or (server.address, server.port),
            server.protocol,
            shared_context("turn", server.ca_file, server.verify)
            if server.transport == "tls"
            else None,
            server.server_name or server.address,
            timeout,
            begin,
        )
        if credentials:
            channel.username, channel.password = credentials.username, credentials.password
        if sending and server.protocol == "udp":
            channel.transport = sending(channel.transport)
        return channel

    caller = Client(server, open_channel, timeout)
    await caller.connect()
    try:
        yield caller
    finally:
        await caller.close()


def _unreachable(server: TurnServer, error: OSError) -> ProbeError:
    certificate = (
        "its certificate (callready.probes.tls says more; coturn drops its TLS listener silently "
        "when certificate or key cannot be read), "
    )
    return ProbeError(
        f"callers get no relay through {server.uri}",
        certificate
        * (server.transport == "tls")
        + f"the pool's turnserver@ unit and listeners, {server.port}/{server.protocol} in nftables "
        "and in the provider's firewall",
        reason(error),
    )


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


async def allocated(
    server: TurnServer,
    credentials: Credentials | None,
    family: Family = 4,
    begin: Callable[[str], object] = str,
) -> Allocation:
    """Allocate a relayed address, and give it back.

    Args:
        server: where and how.
        credentials: None asks anonymously, which must be refused with 401.
        family: address family of the relayed address, 4 or 6.
        begin: is told what begins: ``TCP``, ``TLS``, ``allocate``.

    Raises:
        TurnRefused: the server answered with an error code.
        ProbeError: it did not answer, or its certificate is not to be trusted.
    """
    async with client(server, credentials, begin=begin) as caller:
        begin("allocate")
        return await caller.allocate(family)


allocate = waited_for(allocated)


def permissions(
    server: TurnServer, credentials: Credentials, peers: Sequence[str]
) -> dict[str, int | None]:
    """For each peer address the code that its permission was refused with, None where granted.

    IPv4 and IPv6 peers each go over one allocation of their family; where the server has none,
    the code is the one the allocation was refused with (440).

    Raises:
        TurnRefused, ProbeError: as `allocate`, where an IPv4 allocation fails.
    """

    async def attempt() -> dict[str, int | None]:
        codes: dict[str, int | None] = dict.fromkeys(peers)
        for family in get_args(Family):
            asked = [peer for peer in peers if ipaddress.ip_address(peer).version == family]
            if not asked:
                continue
            async with client(server, credentials) as caller:
                try:
                    await caller.allocate(family)
                except TurnRefused as refused:
                    if refused.code != 440:
                        raise
                    codes |= dict.fromkeys(asked, refused.code)
                    continue
                for peer in asked:
                    codes[peer] = await _refusal(caller.permit(peer))
        return codes

    return asyncio.run(attempt())


async def _refusal(attempt: Coroutine[Any, Any, object]) -> int | None:
    """The code that a request is refused with, None where it is granted; raises TurnRefused where
    it is the caller who is refused."""
    try:
        await attempt
    except TurnRefused as refused:
        if refused.code == 401:
            raise
        return refused.code
    return None


def tcp_allocation_code(server: TurnServer, credentials: Credentials) -> int | None:
    """The code that relaying over TCP (RFC 6062) is refused with, None where it is granted.

    442 where ``no-tcp-relay`` is set. `server` must be reached over tcp or tls: over UDP the RFC
    wants 400 whatever is configured (section 5.1).

    Raises:
        ProbeError: as `allocate`.
    """
    if server.transport == "udp":
        raise ProbeError("nobody asks for a TCP allocation over UDP", "--transport tcp or tls")

    async def attempt() -> int | None:
        async with client(server, credentials) as caller:
            return await _refusal(caller.allocate(transport=TCP_TRANSPORT))

    return asyncio.run(attempt())


_PACKET = struct.Struct("!d152x")  # when it was sent; the size of 20 ms of G.711


class Exchange:
    """Packets from near to far and back, one every `interval` seconds, from its making until `end`,
    `limit` at most."""

    def __init__(
        self,
        near: Client | aioice.Connection,
        far: Client | aioice.Connection,
        interval: float = 0.02,
        limit: float = math.inf,
    ) -> None:
        self._near, self._far = near, far
        self._interval, self._limit = interval, limit
        self._last = time.perf_counter()
        self._tasks = [asyncio.create_task(each()) for each in (self._send, self._echo, self._read)]
        self.broken = False
        self.sent = 0
        self.round_trips: list[float] = []
        self.longest_gap = 0.0

    async def end(self) -> None:
        """Wait until the last was sent, and for what is still on its way."""
        await asyncio.wait(self._tasks[:1], timeout=TIMEOUT)
        self._note_gap()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                while len(self.round_trips) < self.sent:
                    await asyncio.sleep(0.01)
        self.broken = any(each.done() and each.exception() for each in self._tasks)
        for each in self._tasks:
            each.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop(self) -> None:
        """Send no more."""
        self._limit = 0

    async def _send(self) -> None:
        while self.sent < self._limit:
            await self._near.send(_PACKET.pack(time.perf_counter()))
            self.sent += 1
            await asyncio.sleep(self._interval)

    async def _echo(self) -> None:
        while True:
            await self._far.send(await self._far.recv())

    async def _read(self) -> None:
        while True:
            (sent_at,) = _PACKET.unpack(await self._near.recv())
            self.round_trips.append(time.perf_counter() - sent_at)
            self._note_gap()

    def _note_gap(self) -> None:
        now = time.perf_counter()
        self.longest_gap = max(self.longest_gap, now - self._last)
        self._last = now


Side = tuple[TurnServer, Credentials]


def relay_between(a: Side, b: Side, packets: int = 50, family: Family = 4) -> Relay:
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

    async def attempt() -> Relay:
        async with client(*a) as near, client(*b) as far:
            to_near, to_far = [
                (relay.relayed_address, relay.relayed_port)
                for relay in [await each.allocate(family) for each in (near, far)]
            ]
            await near.bind(to_far)
            await far.bind(to_near)
            exchange = Exchange(near, far, 0.005, packets)
            await exchange.end()
        if not exchange.round_trips:
            raise ProbeError(
                "callers who both relay hear nothing",
                "the relay range (min-port to max-port, udp) in nftables and in the provider's "
                "firewall of both hosts",
                f"none of {packets} packets came through {endpoint(*to_near)} and "
                f"{endpoint(*to_far)}",
            )
        round_trips = exchange.round_trips
        return Relay(packets, len(round_trips), statistics.median(round_trips))

    return asyncio.run(attempt())


def _credentials(options: argparse.Namespace) -> Credentials | None:
    if options.anonymous:
        return None
    if "TURN_USERNAME" in os.environ:
        password = secret_from("TURN_PASSWORD", options.secret_file)
        return Credentials(os.environ["TURN_USERNAME"], password.get_secret_value())
    return mint(secret_from("TURN_SECRET", options.secret_file), options.ttl)


def _probe(options: argparse.Namespace) -> object:
    transport: Way = options.transport or ("tcp" if options.what == "tcp-allocation" else "udp")
    port = options.port or (5349 if transport == "tls" else 3478)
    server = TurnServer(options.address, port, transport, options.server_name, options.ca_file)
    credentials = _credentials(options)
    if options.what == "allocate" or credentials is None:
        return allocate(server, credentials, options.family)
    if options.what == "tcp-allocation":
        return {"code": tcp_allocation_code(server, credentials)}
    if options.what == "relay":
        return relay_between((server, credentials), (server, credentials), family=options.family)
    return permissions(server, credentials, options.peers)


def main() -> None:
    parser = command(
        "turn",
        f"{__doc__} The pool's shared secret is read from TURN_SECRET (or --secret-file), a fixed "
        "user's name and password from TURN_USERNAME and TURN_PASSWORD.",
        "--ca-file",
        "--secret-file",
    )
    parser.add_argument("what", choices=["allocate", "relay", "permissions", "tcp-allocation"])
    parser.add_argument("address", help="host name or IP address of the TURN server")
    parser.add_argument("peers", nargs="*", help="permissions: the peer addresses to ask for")
    parser.add_argument("--port", type=int, help="default 3478, over tls 5349")
    parser.add_argument(
        "--transport", choices=["udp", "tcp", "tls"], help="default udp, of tcp-allocation tcp"
    )
    parser.add_argument("--family", type=int, choices=[4, 6], default=4, help="of the relay")
    parser.add_argument("--server-name", help="name in the certificate (default: address)")
    parser.add_argument("--ttl", type=int, default=600, help="of the credentials, seconds")
    parser.add_argument("--anonymous", action="store_true", help="without credentials")
    run(parser, _probe)


if __name__ == "__main__":
    main()

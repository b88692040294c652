"""TURN as callers use it: allocations, permissions, data relayed both ways (RFC 8656)."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aioice import stun as messages
from aioice.turn import TCP_TRANSPORT, UDP_TRANSPORT

from callready.probes import ProbeError, endpoint, run, secret_from
from callready.probes.stun import Channel, NoAnswer, connect, request
from callready.probes.tls import client_context

# RFC 8656 section 18.6; aioice does not know it: its own client only relays over IPv4.
_FAMILY = "REQUESTED-ADDRESS-FAMILY"
messages.ATTRIBUTES_BY_NAME[_FAMILY] = (
    0x0017, _FAMILY, messages.pack_unsigned, messages.unpack_unsigned
)

# What a caller suffers by code, and what to look at (RFC 8656 section 19).
_REFUSALS = {
    400: ("finds the request malformed",
          "the pool's realm (a comment behind it in the file gives 400)"),
    401: ("does not accept the credentials",
          "whether the secret is the one in the pool's userdb, the expiry in the user name and "
          "the clocks of both sides"),
    403: ("forbids this peer", "denied-peer-ip and allowed-peer-ip of the pool"),
    437: ("finds the allocation mismatched", "the server's log: it lost or kept an allocation"),
    438: ("keeps calling the nonce stale", "stale-nonce, and whether two servers share an address"),
    440: ("relays nothing of this address family", "relay-ip of the pool: one for each family"),
    441: ("sees other credentials than the allocation's", "whether two servers share an address"),
    442: ("does not relay over TCP", "no-tcp-relay, which is meant"),
    443: ("does not take a peer of the other address family", "the family of the allocation"),
    486: ("has reached this user's quota", "user-quota, and whether every call has its own name"),
    508: ("has no capacity left",
          "min-port and max-port, total-quota, and whether relay-ip is an address of the host"),
}  # fmt: skip


@dataclass(frozen=True)
class TurnServer:
    """One way into a TURN server.

    Args:
        address: host name or IP address; its family is the one the caller uses.
        port: 3478, or 5349 over TLS (RFC 7065).
        transport: how the caller reaches it: ``udp``, ``tcp`` or ``tls``.
        server_name: the name its certificate must carry; default `address`.
        ca_file: PEM file of the authorities to trust; default the system's.
    """

    address: str
    port: int = 3478
    transport: Literal["udp", "tcp", "tls"] = "udp"
    server_name: str | None = None
    ca_file: str | None = None

    @classmethod
    def from_uri(cls, uri: str, ca_file: str | None = None) -> TurnServer:
        """The server that a TURN URI (RFC 7065) names.

        Raises:
            ProbeError: it is none.
        """
        found = re.fullmatch(
            r"(turns?):(\[[0-9a-fA-F:.]+\]|[^:?\[\]]+)(?::(\d+))?(?:\?transport=(udp|tcp))?", uri
        )
        if not found or (found[1] == "turns" and found[4] == "udp"):
            raise ProbeError(
                f"callers can do nothing with {uri!r}: it is no TURN URI over udp, tcp or tls",
                "where it was configured; turn:turn.example.com:3478?transport=udp is one",
            )
        secure = found[1] == "turns"
        port = int(found[3] or (5349 if secure else 3478))
        transport: Literal["udp", "tcp"] = "tcp" if found[4] == "tcp" else "udp"
        return cls(found[2].strip("[]"), port, "tls" if secure else transport, None, ca_file)

    @property
    def uri(self) -> str:
        """The TURN URI (RFC 7065) that a client would be given."""
        scheme, over = ("turns", "tcp") if self.transport == "tls" else ("turn", self.transport)
        return f"{scheme}:{endpoint(self.address, self.port)}?transport={over}"


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
    """The server answered with an error code (`code`, `reason` as it sent them)."""

    def __init__(self, server: TurnServer, code: int, reason: str, about: str = "") -> None:
        does, look_at = _REFUSALS.get(code, ("refuses", "the pool's log"))
        super().__init__(
            f"callers get no relay through {server.uri}: it {does}{about} ({code} {reason})",
            look_at,
        )
        self.code = code
        self.reason = reason


def mint(secret: str, ttl: int, name: str | None = None) -> Credentials:
    """Temporary credentials from the shared secret (draft-uberti-behave-turn-rest-00).

    Args:
        secret: the pool's shared secret (coturn's ``static-auth-secret``).
        ttl: seconds until they expire; negative for ones that have.
        name: user; default a new random one, because coturn's ``user-quota`` counts by name and
            the allocations of a caller who vanished live on for ten minutes.
    """
    username = f"{int(time.time()) + ttl}:{name or 'probe-' + secrets.token_hex(8)}"
    digest = hmac.new(secret.encode(), username.encode(), hashlib.sha1).digest()
    return Credentials(username, base64.b64encode(digest).decode())


class Client:
    """One caller at a TURN server; `client` opens and closes it."""

    def __init__(self, server: TurnServer, channel: Channel, started: float) -> None:
        self.server = server
        self.channel = channel
        self._started = started
        self._allocated = False

    async def ask(
        self, method: messages.Method, attributes: dict[str, Any], about: str = ""
    ) -> dict[str, Any]:
        """The attributes of the success response to a request with these attributes."""
        message = messages.Message(method, messages.Class.REQUEST, attributes=attributes)
        try:
            return (await request(self.channel, message)).attributes
        except NoAnswer as error:
            raise _unreachable(self.server, error) from None
        except messages.TransactionFailed as error:
            code, why = error.response.attributes.get("ERROR-CODE", (0, "without a code"))
            raise TurnRefused(self.server, code, why.rstrip("\0 "), about) from None

    async def allocate(
        self, family: Literal[4, 6] = 4, transport: int = UDP_TRANSPORT
    ) -> Allocation:
        """Ask for a relayed address (RFC 8656 section 7)."""
        wanted = {"REQUESTED-TRANSPORT": transport, "LIFETIME": 600}
        if family == 6:  # without the attribute a server relays over IPv4, and browsers send none
            wanted[_FAMILY] = 0x02000000
        got = await self.ask(messages.Method.ALLOCATE, wanted)
        self._allocated = True
        took = time.perf_counter() - self._started
        relayed: tuple[str, int] = got["XOR-RELAYED-ADDRESS"]
        mapped: tuple[str, int] = got["XOR-MAPPED-ADDRESS"]
        allocation = Allocation(*relayed, *mapped, got["LIFETIME"], took)
        if ipaddress.ip_address(allocation.relayed_address).version != family:
            raise ProbeError(
                f"{self.server.uri} relays through {allocation.relayed_address}, not over "
                f"IPv{family} as asked",
                "allocation-default-address-family and relay-ip of the pool",
            )
        return allocation

    async def permit(self, peer: str) -> None:
        """Ask for permission to exchange data with a peer (RFC 8656 section 10)."""
        await self.ask(
            messages.Method.CREATE_PERMISSION, {"XOR-PEER-ADDRESS": (peer, 9)}, f" {peer}"
        )

    async def bind(self, peer: tuple[str, int]) -> None:
        """Bind a channel to a peer (RFC 8656 section 12), for ``channel.send_data``."""
        number = self.channel.channel_number
        attributes = {"CHANNEL-NUMBER": number, "XOR-PEER-ADDRESS": peer}
        await self.ask(messages.Method.CHANNEL_BIND, attributes, f" {peer[0]}")
        self.channel.channel_to_peer[number] = peer
        self.channel.peer_to_channel[peer] = number
        self.channel.channel_refresh_at[number] = float("inf")

    async def close(self) -> None:
        """Give the allocation back (a Refresh with lifetime 0) and close the connection."""
        try:
            if self._allocated:
                await self.ask(messages.Method.REFRESH, {"LIFETIME": 0})
        except ProbeError:
            pass  # the probe has its result already; the server frees it when it expires
        finally:
            self.channel.transport.close()


@contextlib.asynccontextmanager
async def client(server: TurnServer, credentials: Credentials | None) -> AsyncIterator[Client]:
    """A connected caller, anonymous without credentials; leaves no allocation behind.

    Raises:
        ProbeError: no connection, or TLS that a caller would not trust.
    """
    started = time.perf_counter()
    over_tls = server.transport == "tls"
    try:
        channel = await connect(
            (server.address, server.port),
            "udp" if server.transport == "udp" else "tcp",
            (credentials.username, credentials.password) if credentials else None,
            client_context(server.ca_file) if over_tls else None,
            server.server_name,
        )
    except NoAnswer as error:
        raise _unreachable(server, error) from None
    caller = Client(server, channel, started)
    try:
        yield caller
    finally:
        await caller.close()


def _unreachable(server: TurnServer, error: NoAnswer) -> ProbeError:
    over = "udp" if server.transport == "udp" else "tcp"
    certificate = "" if server.transport != "tls" else (
        "its certificate (callready.probes.tls says more; coturn drops its TLS listener silently "
        "when certificate or key cannot be read), "
    )
    return ProbeError(
        f"callers get no relay through {server.uri}: {error}",
        f"{certificate}the pool's turnserver@ unit and listeners, {server.port}/{over} in nftables "
        "and in the provider's firewall",
    )


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


def permission(server: TurnServer, credentials: Credentials, peer: str) -> None:
    """Ask for permission to exchange data with one peer.

    Raises:
        TurnRefused: 403 where the pool's peer policy forbids it.
        ProbeError: as `allocate`.
    """

    async def attempt() -> None:
        async with client(server, credentials) as caller:
            await caller.allocate(6 if ":" in peer else 4)
            await caller.permit(peer)

    asyncio.run(attempt())


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
    a: tuple[TurnServer, Credentials], b: tuple[TurnServer, Credentials], packets: int,
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
        return Credentials(os.environ["TURN_USERNAME"], password)
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

"""Every path of a call by itself, from one signalling join: each of LiveKit's candidates, directly
and through each way into a TURN server, with packets of several sizes and one after the other."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
import socket
import statistics
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, cast, get_args

from pydantic import SecretStr

from callready.probes import (
    Finding,
    ProbeError,
    as_data,
    command,
    endpoint,
    ice,
    local_address,
    reason,
    run,
    secret_from,
    waited_for,
)
from callready.probes.livekit import Joined, add_url, keys_from, offered
from callready.probes.turn import Client, Credentials, Family, TurnServer, client, mint
from callready.settings.models import Verify

WAIT = 2.5
"""Seconds for each part of a path."""

SIZES = (600, 1200)
"""Bytes of UDP payload besides the least that a check takes: libwebrtc's video packets have up to
1,200."""

MAX_LOSS = Verify().max_loss
"""Share of lost packets above which video stutters."""

LOSS = "loss"
"""In place of a step: small packets one after the other."""

_AGAIN = (0.1, 0.2, 0.4, 0.8, 1.0)  # seconds after which a check is sent again, at last given up
_BURST, _INTERVAL = 20, 0.01  # packets, seconds: as many a second as video of 1 Mbit/s has
_LATE = 0.5  # seconds after which an answer is lost


@dataclass(frozen=True)
class Step:
    """A part of a connection: ``DNS``, ``TCP``, ``TLS``, ``allocate``, ``permission``, ``ICE``,
    ``ICE 1200 B``; between two relays ``ICE`` is a packet and its echo.

    Args:
        start: when it began, in seconds from the start of the connection.
        seconds: how long it took.
    """

    name: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Through:
    """A way into a TURN server.

    Args:
        server: where and how, by name or by address.
        credentials: for one leg.
        family: address family of the caller's packets.
        relay: address family of the relay; clients ask for IPv4 ones.
    """

    server: TurnServer
    credentials: Credentials
    family: Family
    relay: Family = 4

    @property
    def way(self) -> str:
        """As in `Leg`."""
        return f"TURN/{self.server.way}"


@dataclass(frozen=True)
class Leg:
    """A path as it was found.

    Args:
        way: ``UDP`` or ``TCP`` (ICE/TCP) for direct ones, else ``TURN/UDP``, ``TURN/TCP``,
            ``TURN/TLS``, ``TURN/TLS 443``.
        family: address family of the caller's packets.
        turn: URI of the TURN server, empty for direct ones.
        relay: the relayed transport address, if one was given.
        peer: the candidate at its other end.
        steps: what was done until it stood, or failed.
        rtt: median round trip (s). loss: share of packets without an answer.
        sent: UDP packets that were sent from here, without the largest of SIZES.
        failed: the step that failed, `LOSS` if too many were lost.
        error: what was wrong.
    """

    way: str
    family: Family
    turn: str = ""
    relay: str = ""
    peer: str = ""
    steps: tuple[Step, ...] = ()
    rtt: float | None = None
    loss: float | None = None
    sent: int = 0
    failed: str = ""
    error: Finding | None = None

    @property
    def words(self) -> str:
        """The path as it ends a sentence."""
        if self.turn:
            return f"through {self.turn} over IPv{self.family}"
        return f"directly over {'UDP' if self.way == 'UDP' else 'ICE/TCP'}, IPv{self.family}"

    def __str__(self) -> str:
        text = f"{self.way} IPv{self.family} {self.turn or 'direct'} {self.peer}:"
        if self.error:
            return f"{text} FAILED: {self.error.evidence}"
        times = ", ".join(f"{each.name} {each.seconds * 1000:.0f} ms" for each in self.steps)
        return f"{text} {times}, RTT {(self.rtt or 0) * 1000:.1f} ms, loss {self.loss:.0%}"


@dataclass(frozen=True)
class Legs:
    """All paths of one SFU: the node that the room was on, seconds until the join and the offer
    were there, direct paths by candidate, and those through TURN servers."""

    node_id: str
    time_to_join: float
    time_to_offer: float
    direct: tuple[Leg, ...]
    relayed: tuple[Leg, ...]

    def __str__(self) -> str:
        legs = "\n  ".join(map(str, (*self.direct, *self.relayed)))
        return f"joined in {self.time_to_join * 1000:.0f} ms\n  {legs}"


T = TypeVar("T", ice.Candidate, Through)


class _Packets(asyncio.DatagramProtocol):
    """What one leg sends, and its answers, whatever carries them."""

    def __init__(
        self,
        make: Callable[[int], tuple[bytes, bytes]],
        answered: Callable[[bytes], bytes | None],
    ) -> None:
        self._make, self._answered = make, answered
        self._waiting: dict[bytes, asyncio.Future[float]] = {}
        self.broken: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.send: Callable[[bytes], object]

    def datagram_received(self, data: bytes, addr: object) -> None:
        waiting = self._waiting.pop(self._answered(data) or b"", None)
        if waiting and not waiting.done():
            waiting.set_result(time.perf_counter())

    def error_received(self, exc: Exception) -> None:
        if not self.broken.done():
            self.broken.set_result(exc)

    def _ask(self, size: int) -> tuple[bytes, asyncio.Future[float]]:
        key, data = self._make(size)
        self._waiting[key] = asyncio.get_running_loop().create_future()
        return data, self._waiting[key]

    async def one(self, size: int = 0) -> None:
        """Send one until its answer comes.

        Raises:
            OSError: none came.
        """
        data, answer = self._ask(size)
        for pause in _AGAIN:
            self.send(data)
            await asyncio.wait(
                (answer, self.broken), timeout=pause, return_when=asyncio.FIRST_COMPLETED
            )
            if answer.done():
                return
            if self.broken.done():
                raise self.broken.result()
        raise TimeoutError

    async def many(self, count: int) -> tuple[list[float], int]:
        """Send small ones one after the other, each once; the round trips (s) of those that were
        answered, and how many were not.

        Raises:
            OSError: some are not even sent.
        """
        asked = [self._ask(0) for _ in range(count)]
        sent = []
        for data, _ in asked:
            sent.append(time.perf_counter())
            self.send(data)
            await asyncio.sleep(_INTERVAL)
        answers = [answer for _, answer in asked]
        await asyncio.wait(answers, timeout=_LATE)
        times = [
            answer.result() - start
            for start, answer in zip(sent, answers, strict=True)
            if answer.done()
        ]
        if len(times) < count and self.broken.done():
            raise self.broken.result()
        return times, count - len(times)


def _checks(offer: ice.Offer) -> _Packets:
    """Connectivity checks, as LiveKit answers them."""
    key = offer.password.encode()

    def make(size: int) -> tuple[bytes, bytes]:
        message = ice.request(offer, size)
        return message.transaction_id, bytes(message)

    return _Packets(make, lambda data: ice.answered(data, key))


def _echoes() -> _Packets:
    """Packets that somebody sends back."""

    def make(size: int) -> tuple[bytes, bytes]:
        key = secrets.token_bytes(12)
        return key, key.ljust(max(100, size), b"\0")

    return _Packets(make, lambda data: data[:12])


class _Sending(asyncio.DatagramTransport):
    """A UDP transport that counts what it sends, as `Leg.sent`."""

    def __init__(self, transport: asyncio.DatagramTransport) -> None:
        super().__init__()
        self._transport = transport
        self.sent = 0

    def sendto(self, data: bytes | bytearray | memoryview, addr: object = None) -> None:
        self.sent += len(data) < SIZES[-1]
        self._transport.sendto(data)

    def close(self) -> None:
        self._transport.close()


class _Trial:
    """One leg while it is tried."""

    def __init__(self, way: str, family: Family, max_loss: float) -> None:
        self._max_loss = max_loss
        self._begun = time.perf_counter()
        self._at = ("connect", 0.0)
        self._steps: list[Step] = []
        self._sending: list[_Sending] = []
        self.leg = Leg(way, family)

    def sending(self, transport: asyncio.BaseTransport) -> _Sending:
        """It, counting from now on."""
        self._sending.append(_Sending(cast(asyncio.DatagramTransport, transport)))
        return self._sending[-1]

    def begin(self, name: str) -> None:
        """The step before has passed, and another begins."""
        now = time.perf_counter() - self._begun
        before, start = self._at
        if before not in ("connect", LOSS):
            self._steps.append(Step(before, start, now - start))
        self._at = (name, now)

    async def exchange(self, packets: _Packets) -> None:
        """Send small and large packets, then many; raises OSError or ProbeError."""
        self.begin("ICE")
        await packets.one()
        for size in SIZES:
            self.begin(f"ICE {size} B")
            await packets.one(size)
        self.begin(LOSS)
        times, lost = await packets.many(_BURST)
        if lost:  # is that the rule, or was it chance?
            more, again = await packets.many(2 * _BURST)
            times, lost = times + more, lost + again
        loss = lost / (len(times) + lost)
        self.leg = replace(self.leg, loss=loss, rtt=statistics.median(times) if times else None)
        if loss > self._max_loss:
            raise OSError(f"{lost} of {len(times) + lost} small packets get no answer")

    async def run(self, attempt: Callable[[_Trial], AbstractAsyncContextManager[_Packets]]) -> Leg:
        """Try it with packets that `attempt` gives."""
        try:
            async with attempt(self) as packets:
                await self.exchange(packets)
        except ProbeError as error:
            self._fail(error.finding.evidence or error.finding.suffers, error.finding.look_at)
        except OSError as error:
            self._fail(reason(error), is_silent=isinstance(error, TimeoutError))
        sent = sum(each.sent for each in self._sending)
        return replace(self.leg, steps=tuple(self._steps), sent=sent)

    def _fail(self, why: str, look_at: str = "", is_silent: bool = False) -> None:
        leg, (step, _) = self.leg, self._at
        between = f"{leg.relay or 'here'} and {leg.peer or leg.turn}"
        suffers, where = f"no media passes {leg.words}", f"filters between {between}"
        if step.startswith("ICE ") and is_silent:
            suffers = f"calls {leg.words} have sound and no video"
            why = f"packets of {step.removeprefix('ICE ')} do not come through, smaller ones do"
            where = f"the MTU and filters by length on the way from here to {leg.peer}"
        elif step == LOSS:
            suffers = f"calls {leg.words} stutter"
            where = f"rate limits and load on the way from here to {leg.peer}"
        error = Finding(suffers, look_at or where, f"{step}: {why}")
        self.leg = replace(leg, failed=step, error=error)


@contextlib.asynccontextmanager
async def _direct(
    offer: ice.Offer, candidate: ice.Candidate, trial: _Trial
) -> AsyncIterator[_Packets]:
    loop, packets = asyncio.get_running_loop(), _checks(offer)
    trial.leg = replace(trial.leg, peer=str(candidate))
    to = candidate.address, candidate.port
    if candidate.proto == "udp":
        channel, _ = await loop.create_datagram_endpoint(lambda: packets, remote_addr=to)
        packets.send = trial.sending(channel).sendto
        try:
            yield packets
        finally:
            channel.close()
        return
    trial.begin("TCP")
    async with asyncio.timeout(WAIT):
        reader, writer = await asyncio.open_connection(*to)

    async def read() -> None:
        try:  # framed as RFC 4571 says (RFC 6544, section 3)
            while True:
                (length,) = struct.unpack("!H", await reader.readexactly(2))
                packets.datagram_received(await reader.readexactly(length), None)
        except (OSError, EOFError):
            packets.error_received(ConnectionResetError("it closed the connection"))

    packets.send = lambda data: writer.write(struct.pack("!H", len(data)) + data)
    reading = asyncio.create_task(read())
    try:
        yield packets
    finally:
        reading.cancel()
        writer.transport.abort()


class _Echo(asyncio.DatagramProtocol):
    """Sends everything back."""

    def __init__(self, caller: Client) -> None:
        self._send = _sender(caller)

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._send(data)


def _sender(caller: Client) -> Callable[[bytes], object]:
    """`caller.send` at once, for a channel that is bound (RFC 8656, section 12.4)."""
    (number,) = caller.channel.channel_to_peer
    return lambda data: caller.channel._send(struct.pack("!HH", number, len(data)) + data)


@contextlib.asynccontextmanager
async def _relayed(
    offer: ice.Offer | None, through: Through, trial: _Trial
) -> AsyncIterator[_Packets]:
    trial.leg = replace(trial.leg, turn=through.server.uri)
    server = await _resolved(trial, through)
    ways = server, through.credentials, WAIT
    async with contextlib.AsyncExitStack() as stack:
        near = await stack.enter_async_context(client(*ways, trial.begin, trial.sending))
        trial.begin("allocate")
        relay = await near.allocate(through.relay)
        own = relay.relayed_address, relay.relayed_port
        trial.leg = replace(trial.leg, relay=endpoint(*own))
        if offer is None:
            far = await stack.enter_async_context(client(*ways, sending=trial.sending))
            other = await far.allocate(through.relay)
            peer = other.relayed_address, other.relayed_port
            await far.bind(own)
            far.channel.receiver = _Echo(far)
            packets = _echoes()
            trial.leg = replace(trial.leg, peer=endpoint(*peer))
        else:
            peer = _peer(offer, through.relay)
            packets = _checks(offer)
            trial.leg = replace(trial.leg, peer=f"{endpoint(*peer)}/udp")
        trial.begin("permission")
        await near.bind(peer)
        near.channel.receiver = packets
        packets.send = _sender(near)
        packets.broken = near.channel.failed
        yield packets


def _peer(offer: ice.Offer, family: Family) -> tuple[str, int]:
    """LiveKit's UDP candidate of a family."""
    for each in offer.candidates:
        if (each.proto, each.family) == ("udp", family):
            return each.address, each.port
    raise ProbeError(
        f"relays of IPv{family} reach no SFU", "rtc.node_ip", f"it has no candidate of IPv{family}"
    )


async def _resolved(trial: _Trial, through: Through) -> TurnServer:
    """The server at its address of the leg's family."""
    server = through.server
    kind = socket.AF_INET6 if through.family == 6 else socket.AF_INET
    with contextlib.suppress(OSError):
        socket.inet_pton(kind, server.address)
        return server
    trial.begin("DNS")
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(WAIT):
        found = await loop.getaddrinfo(server.address, None, family=kind)
    name = server.server_name or server.address
    return replace(server, address=str(found[0][4][0]), server_name=name)


async def all_tried(
    url: str,
    key: str,
    secret: SecretStr,
    through: Sequence[Through] | None = None,
    ca_file: str | None = None,
    verify: bool = True,
    max_loss: float = MAX_LOSS,
    directly: Callable[[ice.Candidate], bool] = bool,
    at: tuple[str, int] | None = None,
    node_id: str = "",
) -> Legs:
    """Try every path of a call at LiveKit, all at the same time.

    Args:
        url, key, secret, ca_file, verify, at, node_id: as `livekit.reach` takes them.
        through: ways into TURN servers, each for one leg, in this order; default those that the
            join hands out, over each address family that leads there from here.
        max_loss: share of lost packets above which a path has failed.
        directly: which of LiveKit's candidates, of those that a route leads to; default all.

    Raises:
        ProbeError: it cannot join.
    """
    start = time.perf_counter()
    async with offered(url, key, secret, ca_file, at, verify, node_id) as (told, offer):
        took = time.perf_counter() - start
        ways = await _handed_out(told, ca_file, verify) if through is None else through
        candidates = [c for c in offer.candidates if directly(c) and local_address(c.address)]
        direct, relayed = await asyncio.gather(
            _each(candidates, partial(_direct, offer), max_loss),
            _each(ways, partial(_relayed, offer), max_loss),
        )
        return Legs(told.node_id, told.time_to_join, took, direct, relayed)


async def relays_tried(through: Sequence[Through], max_loss: float = MAX_LOSS) -> tuple[Leg, ...]:
    """Try ways into TURN servers without an SFU, from one relay to another of the same server;
    arguments as `all_tried`."""
    return await _each(through, partial(_relayed, None), max_loss)


try_all, try_relays = waited_for(all_tried), waited_for(relays_tried)


async def _each(
    items: Sequence[T],
    attempt: Callable[[T, _Trial], AbstractAsyncContextManager[_Packets]],
    max_loss: float,
) -> tuple[Leg, ...]:
    trials = [_Trial(each.way, each.family, max_loss).run(partial(attempt, each)) for each in items]
    return tuple(await asyncio.gather(*trials))


async def _handed_out(told: Joined, ca_file: str | None, verify: bool) -> list[Through]:
    """The TURN servers of a join, by each address family that leads there."""
    found = []
    for given in told.ice_servers:
        for uri in given.urls:
            if uri.startswith("turn"):
                server = replace(TurnServer.from_uri(uri, ca_file), verify=verify)
                who = Credentials(given.username, given.credential)
                families = await asyncio.to_thread(_families, server)
                found += [Through(server, who, family) for family in families]
    return found


def _families(server: TurnServer) -> list[Family]:
    """Those over which a server is reached from here; IPv4 if none is, so that it is tried."""
    found: list[Family] = []
    for family in get_args(Family):
        address = ice.resolve(server.address, family)
        if address and local_address(address):
            found.append(family)
    return found or [4]


def _probe(options: argparse.Namespace) -> object:
    through = None
    if options.turn:
        pool = secret_from("TURN_SECRET", None)
        servers = [TurnServer.from_uri(uri, options.ca_file) for uri in options.turn]
        through = [
            Through(server, mint(pool, 600), family)
            for server in servers
            for family in _families(server)
        ]
    found = try_all(options.url, *keys_from(options), through, options.ca_file)
    failed = [leg for leg in (*found.direct, *found.relayed) if leg.error]
    if failed and options.json:
        print(json.dumps({"ok": False, **as_data(found)}))
        sys.exit(1)
    if failed:
        raise ProbeError(
            f"{len(failed)} paths of a call do not work", "what is said of each", str(found)
        )
    return found


def main() -> None:
    parser = command(
        "legs",
        f"{__doc__} LIVEKIT_API_KEY and LIVEKIT_API_SECRET are read from the environment, with "
        "--turn also TURN_SECRET.",
        "--secret-file",
        "--ca-file",
    )
    add_url(parser)
    parser.add_argument(
        "--turn",
        metavar="URI",
        action="append",
        help="through this TURN URI instead of those that LiveKit hands out (can be repeated)",
    )
    run(parser, _probe)


if __name__ == "__main__":
    main()

"""Calls that go on while something else happens, and what of that their callers notice.

`calls_of` keeps them up; each is a process `python continuity.py` of its own where the callers are,
which reads a `Request` as a line of JSON, says "up", and when stdin closes prints a `Continuity` of
each of its two participants.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr, TypeAdapter

from callready.probes.livekit import create_room, token
from callready.probes.participants import Caller, in_call
from callready.probes.turn import IceServer, mint
from callready.probes.webrtc import Request
from lab import Lab, plan

INTERVAL = 0.02  # seconds between data packets, as between those of audio
RECOVERY = 40  # seconds for a call to come back; a client alone gives a dead relay up after 15
TICK = "tick"


@dataclass(frozen=True)
class Continuity:
    """What one participant noticed; gaps in milliseconds.

    Args:
        way: type of its candidate, and the TURN URI of a relayed one, in the end.
        moved: whether it had another candidate or another port in the beginning.
        reconnects: how often it lost the connection. gone: it did not come back.
        sent: audio packets (RTP) sent since the call was up; after a reconnect the SDK counts anew.
        received: the same.
        data_sent: data packets sent, one every 20 ms, unreliable. data_received: the same.
        data_gap: longest time without a data packet; errs on the long side, since SCTP backs off.
        audio_gap: longest time without the other's tone; errs on the short side, since a decoder
            makes up what is missing for a moment.
    """

    way: str
    moved: bool
    reconnects: int
    gone: bool
    sent: int
    received: int
    data_sent: int
    data_received: int
    data_gap: int
    audio_gap: int

    @property
    def gap(self) -> int:
        """The longest gap in what was received."""
        return max(self.data_gap, self.audio_gap)

    @property
    def undisturbed(self) -> bool:
        """No reconnect, the same way all the time, and no gap over a second."""
        return not (self.reconnects or self.gone or self.moved) and self.gap <= 1000


Calls = dict[str, tuple[Continuity, Continuity]]


@contextmanager
def calls_of(
    url: str,
    key: str,
    secret: str,
    relays: dict[str, str],
    ca_file: str = f"{plan.STATE}/ca.pem",
    node_id: str = "",
    room: str = "",
) -> Iterator[Calls]:
    """Keep a direct call and one through each relay up for as long as the block runs, and then
    until all hear each other; what came of them is in the result afterwards, by name.

    Args:
        url: of LiveKit. key: API key. secret: API secret.
        relays: TURN URI, or several with blanks between, to the secret of their pool; each names a
            call that has no other way.
        ca_file: of the authorities that callers trust.
        node_id: the node of a cluster that the rooms are on, whoever takes the signalling.
        room: of the direct call; default a new one.
    """
    found: Calls = {}
    with ExitStack() as stack:
        calls = {}
        for name, servers in {
            "direct": (),
            **{u: _server(u, s) for u, s in relays.items()},
        }.items():
            room = (room if name == "direct" else "") or f"continuity-{os.urandom(4).hex()}"
            if node_id:
                may = token(key, SecretStr(secret), room, create=True)
                create_room(url, may, room, node_id, ca_file if url.startswith("wss:") else None)
            one, other = (token(key, SecretStr(secret), room, ttl=3600) for _ in "ab")
            request = Request(
                url,
                (one.get_secret_value(), other.get_secret_value()),
                servers,
                bool(servers),
                ca_file if "turns:" in name or url.startswith("wss:") else None,
                0,
            )
            calls[name] = stack.enter_context(_process(request))
        for name, process in calls.items():
            said = process.stdout.readline() if process.stdout else ""
            assert said == "up\n", f"{name}: the call never stood: {said}"
        yield found
        for name, process in calls.items():
            first, second = json.loads(process.communicate(timeout=RECOVERY + 30)[0])
            found[name] = Continuity(**first), Continuity(**second)


def _server(uris: str, secret: str) -> tuple[IceServer, ...]:
    minted = mint(SecretStr(secret), 3600)
    return (IceServer(tuple(uris.split()), minted.username, minted.password),)


@contextmanager
def _process(request: Request) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    if request.ca_file:
        environment["SSL_CERT_FILE"] = request.ca_file
    process = subprocess.Popen(
        [*Lab().client_prefix(), sys.executable, __file__],
        text=True,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdin
        process.stdin.write(json.dumps(dataclasses.asdict(request)) + "\n")
        process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.communicate()


class Steady(Caller):
    """A participant who notes every gap."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.data_sent = self.data_received = 0
        self.data_gap = self.last_data = 0.0
        self.room.on("data_received", self._on_tick)

    def _on_tick(self, packet: Any) -> None:
        if packet.topic == TICK:
            now = time.perf_counter()
            self.data_gap = max(self.data_gap, now - (self.last_data or now))
            self.last_data = now
            self.data_received += 1

    def hears(self, since: float) -> bool:
        """Whether data and audio have come since then."""
        return min(self.last_data, self.last_heard) > since

    async def talk(self) -> None:
        await super().talk()
        self.tasks.append(asyncio.create_task(self._tick()))

    async def _tick(self) -> None:
        while True:
            try:
                await self.room.local_participant.publish_data(b".", reliable=False, topic=TICK)
                self.data_sent += 1
            except Exception:  # while it reconnects; the other sees the gap
                pass
            await asyncio.sleep(INTERVAL)

    async def packets(self) -> tuple[int, int]:
        """Audio packets sent and received so far."""
        stats = await self.room.get_rtc_stats()
        each = [*stats.publisher_stats, *stats.subscriber_stats]
        return (
            sum(s.outbound_rtp.sent.packets_sent for s in each if s.HasField("outbound_rtp")),
            sum(s.inbound_rtp.received.packets_received for s in each if s.HasField("inbound_rtp")),
        )

    async def begin(self, urls: dict[str, str]) -> None:
        self.data_sent = self.data_received = 0
        self.data_gap = self.longest_silence = 0.0
        self.before = await self.measured(urls), await self.packets()

    async def end(self, urls: dict[str, str]) -> Continuity:
        now = time.perf_counter()
        gaps = (
            max(self.data_gap, now - self.last_data),
            max(self.longest_silence, now - self.last_heard),
        )
        was, (sent, received) = self.before
        try:
            now_sent, now_received = await self.packets()
            after = await self.measured(urls)
        # It is reconnecting (RuntimeError: no such candidate), or gone.
        except (KeyError, RuntimeError):
            now_sent, now_received, after = sent, received, None
        return Continuity(
            way=f"{after.local} {after.turn_url}".strip() if after else "none",
            moved=not after or (was.local, was.local_port) != (after.local, after.local_port),
            reconnects=self.reconnects,
            gone=self.gone,
            sent=now_sent - sent,
            received=now_received - received,
            data_sent=self.data_sent,
            data_received=self.data_received,
            data_gap=round(gaps[0] * 1000),
            audio_gap=round(gaps[1] * 1000),
        )


async def _hold(request: Request) -> list[Continuity]:
    async with in_call(request, Steady) as (callers, urls):
        await asyncio.sleep(1)  # the first second has its own gaps: encoders start, SCTP opens
        for each in callers:
            await each.begin(urls)
        print("up", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        # A relay that has just restarted is noticed by its callers only later.
        asked = time.perf_counter()
        with suppress(TimeoutError):
            async with asyncio.timeout(RECOVERY):
                while not all(each.gone or each.hears(asked) for each in callers):
                    await asyncio.sleep(INTERVAL)
        return [await each.end(urls) for each in callers]


def main() -> None:
    request = TypeAdapter(Request).validate_json(sys.stdin.readline())
    try:
        found = asyncio.run(_hold(request))
        print(json.dumps([dataclasses.asdict(each) for each in found]), flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
    os._exit(0)  # the SDK's threads


if __name__ == "__main__":
    main()

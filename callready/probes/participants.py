"""The two participants of `callready.probes.webrtc.call`, in a process of their own.

Reads a `Request` as a line of JSON on standard input and writes the result as one on standard
output, again and again, until a call fails or there are no more requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from itertools import starmap
from typing import Any, TypeVar
from urllib.parse import urlsplit

from livekit import rtc
from livekit.rtc._proto.stats_pb2 import IceCandidateType
from pydantic import TypeAdapter

from callready.probes import SILENCE, Finding, ProbeError, endpoint
from callready.probes.tls import tls_forwarder
from callready.probes.turn import TurnServer
from callready.probes.webrtc import CONNECT_TIMEOUT, NO_VIDEO, Call, Door, Participant, Request

RATE = 48_000
FRAME = RATE // 10  # the SDK cuts it into the 10 ms that libwebrtc works with
# A 440 Hz tone (44 periods in 100 ms), loud enough that no comfort noise is taken for it.
TONE = array("h", (int(12_000 * math.sin(math.tau * 440 * n / RATE)) for n in range(RATE // 10)))
LOUD = 3_000
TOPIC = "callready"
LARGE = "callready-large"
LARGE_SIZE = 1_100  # bytes: with what SCTP, DTLS and LiveKit add, a packet as of video
LARGE_INTERVAL = 0.02  # seconds
BESIDE_VIDEO = 0.2  # instead, where pictures are most of what is large
WIDTH, HEIGHT, VIDEO_RATE = 160, 90, 15  # pixels, frames a second
VIDEO_BITRATE = 300_000


class _Retries(logging.Handler):
    """Counts what the SDK only logs: connection attempts that it made again."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "retrying..." in record.getMessage()


class Caller:
    """One participant: talks all the time, and notes when it hears and reads the other."""

    tone = TONE  # what it says, again and again

    def __init__(self, name: str) -> None:
        self.name = name
        self.voice = ""  # the track's id, once there is one
        self.room = rtc.Room()
        self.connected_at = 0.0
        self.connect_seconds = 0.0
        self.data_at: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.heard_at: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.last_heard = self.longest_silence = 0.0
        self.large_sent = self.counted_from = 0
        self.large: set[int] = set()
        self.reconnects = 0
        self.gone = False
        self.tasks: list[asyncio.Task[None]] = []
        self.room.on("data_received", self._on_data)
        self.room.on("track_subscribed", self._on_track)
        self.room.on("reconnecting", self._on_reconnecting)
        self.room.on("disconnected", self._on_disconnected)

    def _on_data(self, packet: rtc.DataPacket) -> None:
        if packet.topic == LARGE:
            self.large.add(int.from_bytes(packet.data[:4], "big"))
        if packet.topic == TOPIC and not self.data_at.done():
            self.data_at.set_result(time.perf_counter())

    def _on_track(self, track: rtc.Track, *_: object) -> None:
        if isinstance(track, rtc.RemoteAudioTrack):
            self.tasks.append(asyncio.create_task(self._listen(track)))

    def _on_reconnecting(self) -> None:
        self.reconnects += 1

    def _on_disconnected(self, *_: object) -> None:
        self.gone = True

    async def connect(
        self, request: Request, url: str, token: str, servers: list[rtc.IceServer]
    ) -> None:
        kinds = rtc.IceTransportType
        policy = kinds.TRANSPORT_RELAY if request.relay_only else kinds.TRANSPORT_ALL
        configuration = rtc.RtcConfiguration(ice_transport_type=policy, ice_servers=servers)
        start = time.perf_counter()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                options = rtc.RoomOptions(rtc_config=configuration)
                await self.room.connect(url, token, options)
        except (rtc.ConnectError, TimeoutError):  # the SDK's text may hold the token
            seconds = time.perf_counter() - start
            raise ProbeError(
                "calls do not connect",
                "which path fails: python -m callready.probes.legs",
                f"{self.name} participant has no media connection through {request.url} after "
                f"{seconds:.1f} s",
            ) from None
        self.connected_at = time.perf_counter()
        self.connect_seconds = self.connected_at - start

    async def talk(self) -> None:
        """Publish an audio track and keep it sounding; send data until the other has some."""
        source = rtc.AudioSource(RATE, 1)
        track = rtc.LocalAudioTrack.create_audio_track("voice", source)
        publication = await self.room.local_participant.publish_track(track)
        self.voice = publication.sid
        self.tasks.append(asyncio.create_task(self._sound(source)))
        self.tasks.append(asyncio.create_task(self._write()))

    async def _sound(self, source: rtc.AudioSource) -> None:
        while True:
            for start in range(0, len(self.tone), FRAME):
                samples = self.tone[start : start + FRAME].tobytes()
                await source.capture_frame(rtc.AudioFrame(samples, RATE, 1, FRAME))

    async def _write(self) -> None:
        while True:  # the SFU delivers nothing to a participant who is not quite there yet
            await self.room.local_participant.publish_data(b"hello", topic=TOPIC)
            await asyncio.sleep(0.1)

    async def write_large(self, interval: float) -> None:
        """Send a packet of video's size every so many seconds, each once."""
        while True:
            data = self.large_sent.to_bytes(4, "big").ljust(LARGE_SIZE, b"\0")
            self.large_sent += 1
            await self.room.local_participant.publish_data(data, reliable=False, topic=LARGE)
            await asyncio.sleep(interval)

    async def show(self) -> None:
        """Publish a video track of noise, which no encoder makes small."""
        source = rtc.VideoSource(WIDTH, HEIGHT)
        await self.publish_video("noise", source, VIDEO_BITRATE, VIDEO_RATE)
        self.tasks.append(asyncio.create_task(self._film(source)))

    async def publish_video(
        self, name: str, source: rtc.VideoSource, bitrate: int, rate: float
    ) -> None:
        """Publish a video track in one layer of at most so many bits and pictures a second."""
        track = rtc.LocalVideoTrack.create_video_track(name, source)
        encoding = rtc.VideoEncoding(max_bitrate=bitrate, max_framerate=rate)
        options = rtc.TrackPublishOptions(video_encoding=encoding, simulcast=False)
        await self.room.local_participant.publish_track(track, options)

    async def _film(self, source: rtc.VideoSource) -> None:
        while True:
            pixels = os.urandom(WIDTH * HEIGHT * 3 // 2)
            source.capture_frame(rtc.VideoFrame(WIDTH, HEIGHT, rtc.VideoBufferType.I420, pixels))
            await asyncio.sleep(1 / VIDEO_RATE)

    async def _listen(self, track: rtc.RemoteAudioTrack) -> None:
        stream = rtc.AudioStream(track, sample_rate=RATE, num_channels=1, frame_size_ms=20)
        async for event in stream:
            if max(event.frame.data) > LOUD:
                now = time.perf_counter()
                if self.heard_at.done():
                    self.longest_silence = max(self.longest_silence, now - self.last_heard)
                else:
                    self.heard_at.set_result(now)
                self.last_heard = now

    async def measured(self, original_urls: dict[str, str]) -> Participant:
        stats = await self.room.get_rtc_stats()
        return _participant(self, [*stats.publisher_stats, *stats.subscriber_stats], original_urls)

    async def leave(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.room.disconnect(), 5)


def _participant(caller: Caller, stats: list[Any], original_urls: dict[str, str]) -> Participant:
    """The selected pair and the candidates from WebRTC statistics."""
    kinds: dict[str, dict[str, Any]] = {}
    for each in stats:
        kind = each.WhichOneof("stats")
        kinds.setdefault(kind, {})[getattr(each, kind).rtc.id] = getattr(each, kind)
    selected = next(
        each.transport.selected_candidate_pair_id
        for each in kinds["transport"].values()
        if each.transport.selected_candidate_pair_id
    )
    pair = kinds["candidate_pair"][selected].candidate_pair
    local = kinds["local_candidate"][pair.local_candidate_id].candidate
    remote = kinds["remote_candidate"][pair.remote_candidate_id].candidate
    # One host address makes many TCP candidates, one for each address of the SFU: a foundation
    # (RFC 8445 section 5.1.1.3) is the same for all that come the same way.
    distinct = {
        each.candidate.foundation: each.candidate.candidate_type
        for each in kinds["local_candidate"].values()
    }
    inbound = kinds.get("inbound_rtp", {}).values()
    audio, video = (
        [each for each in inbound if each.stream.kind == kind] for kind in ("audio", "video")
    )
    lost = sum(max(0, each.received.packets_lost) for each in inbound)
    seconds = time.perf_counter() - caller.heard_at.result()
    candidates = Counter(IceCandidateType.Name(kind).lower() for kind in distinct.values())
    return Participant(
        connect_seconds=caller.connect_seconds,
        data_seconds=max(0.0, caller.data_at.result() - caller.connected_at),
        audio_seconds=max(0.0, caller.heard_at.result() - caller.connected_at),
        local=IceCandidateType.Name(local.candidate_type).lower(),
        local_address=local.address,
        local_port=local.port,
        remote=IceCandidateType.Name(remote.candidate_type).lower(),
        remote_address=remote.address,
        remote_port=remote.port,
        protocol=local.protocol,
        turn_url=original_urls.get(local.url, local.url),
        rtt=pair.total_round_trip_time / max(1, pair.responses_received),
        candidates=dict(candidates),
        loss=lost / max(1, lost + sum(each.received.packets_received for each in inbound)),
        jitter=max((each.received.jitter for each in audio), default=0.0),
        bitrate=8 * sum(each.inbound.bytes_received for each in video) / max(0.001, seconds),
    )


C = TypeVar("C", bound=Caller)


async def _both(callers: Sequence[Caller], what: str) -> None:
    """Wait until data or audio has reached both callers."""
    arrived = {each: each.data_at if what == "data" else each.heard_at for each in callers}
    await asyncio.wait(arrived.values(), timeout=CONNECT_TIMEOUT)
    missing = [each.name for each, future in arrived.items() if not future.done()]
    if missing:
        raise ProbeError(
            f"calls connect, but no {what} reaches {' and '.join(missing)} participant in "
            f"{CONNECT_TIMEOUT:g} s",
            "LiveKit's log (journalctl -u livekit-server), and whether the media ports are open "
            "both ways",
        )


@contextlib.asynccontextmanager
async def in_call(request: Request, kind: type[C]) -> AsyncIterator[tuple[list[C], dict[str, str]]]:
    """Two callers who read and hear each other; what the URIs of their ICE servers were before."""
    async with contextlib.AsyncExitStack() as stack:
        servers, original_urls = await _usable(request, stack)
        callers = [kind("the first"), kind("the second")]
        urls = [await _entered(request, door, stack) for door in request.doors]

        async def come(caller: C, url: str, token: str) -> None:
            await caller.connect(request, url, token, servers)
            stack.push_async_callback(caller.leave)
            await caller.talk()

        each = zip(callers, urls or [request.url] * 2, request.tokens, strict=True)
        if urls:
            await asyncio.gather(*starmap(come, each))
        else:
            for one in each:
                await come(*one)
        await _both(callers, "data")
        await _both(callers, "audio")
        yield callers, original_urls


async def _entered(request: Request, door: Door, stack: contextlib.AsyncExitStack) -> str:
    """A URL that leads to one of several SFUs."""
    url = urlsplit(door.url)
    if url.scheme != "wss":
        return f"ws://{endpoint(door.address, door.port)}"
    way = door.address, door.port, url.hostname, request.ca_file, url.netloc
    return f"ws://127.0.0.1:{await stack.enter_async_context(tls_forwarder(*way))}"


async def _large_ones(callers: Sequence[Caller], request: Request, max_loss: float) -> None:
    """Packets of video's size both ways, as long as the call is to last.

    Raises:
        ProbeError: more than this share is lost.
    """
    first, second = callers
    interval = BESIDE_VIDEO if request.video else LARGE_INTERVAL
    sending = [asyncio.create_task(each.write_large(interval)) for each in callers]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SILENCE):  # their channel opens when first used
            while not (first.large and second.large):
                await asyncio.sleep(LARGE_INTERVAL)
            for each in callers:
                each.counted_from = each.large_sent
    await asyncio.sleep(request.duration if first.large and second.large else 0)
    # Of each caller, the numbers of those that the other sent.
    wanted = {
        each: set(range(other.counted_from, other.large_sent))
        for each, other in ((first, second), (second, first))
    }
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SILENCE):
            while any(numbers - each.large for each, numbers in wanted.items()):
                await asyncio.sleep(LARGE_INTERVAL)
    for task in sending:
        task.cancel()
    await asyncio.gather(*sending, return_exceptions=True)
    sent = sum(map(len, wanted.values()))
    lost = sum(len(numbers - each.large) for each, numbers in wanted.items())
    if lost > 1 + max_loss * sent and request.video and lost < sent / 2:
        raise ProbeError(
            "calls that last stutter",
            "rate limits and load on the way between callers and LiveKit, and on these hosts",
            f"{lost} of {sent} packets of {LARGE_SIZE} bytes did not arrive",
        )
    if lost > 1 + max_loss * sent:
        raise ProbeError(
            NO_VIDEO,
            "the MTU, and filters by length or rate, on both ways between callers and LiveKit",
            f"{lost} of {sent} packets of {LARGE_SIZE} bytes did not arrive, small ones do",
        )


async def _call(request: Request, retries: _Retries) -> Call:
    async with in_call(request, Caller) as (callers, original_urls):
        if request.video:
            for each in callers:
                await each.show()
        if request.max_loss is None:
            await asyncio.sleep(request.duration)
        else:
            await _large_ones(callers, request, request.max_loss)
        now = time.perf_counter()
        silent = [each.name for each in callers if each.gone or now - each.last_heard > SILENCE]
        if silent:
            raise ProbeError(
                "calls connect and break off",
                "LiveKit's and coturn's logs at that time, and UDP timeouts of firewalls between",
                f"{' and '.join(silent)} participant hears nothing any more after "
                f"{request.duration:g} s",
            )
        first, second = [await each.measured(original_urls) for each in callers]
        reconnects = sum(each.reconnects for each in callers)
        silence = max(each.longest_silence for each in callers)
        return Call((first, second), retries.count, reconnects, silence)


async def _usable(
    request: Request, stack: contextlib.AsyncExitStack
) -> tuple[list[rtc.IceServer], dict[str, str]]:
    """The ICE servers as libwebrtc can use them, and what their URIs were before."""
    original_urls: dict[str, str] = {}
    servers = []
    for each in request.ice_servers:
        urls = list(each.urls)
        for index, uri in enumerate(each.urls):
            if uri.startswith("turns:") and request.ca_file:
                server = TurnServer.from_uri(uri, request.ca_file)
                forwarder = tls_forwarder(server.address, server.port, None, request.ca_file)
                port = await stack.enter_async_context(forwarder)
                urls[index] = f"turn:127.0.0.1:{port}?transport=tcp"
            original_urls[urls[index]] = uri
        servers.append(rtc.IceServer(urls=urls, username=each.username, password=each.credential))
    return servers, original_urls


def _answer(request: Request, retries: _Retries, runner: asyncio.Runner) -> Call | Finding:
    retries.count = 0
    try:
        return runner.run(_call(request, retries))
    except ProbeError as error:
        return error.finding
    except Exception as error:  # the SDK's: its text may hold a token
        return Finding(
            "calls break off",
            "LiveKit's log at that time",
            f"the client reports {type(error).__name__}",
        )


def main() -> None:
    retries = _Retries()
    logging.getLogger().addHandler(retries)
    runner = asyncio.Runner()
    for line in sys.stdin:
        answer = _answer(TypeAdapter(Request).validate_json(line), retries, runner)
        print(json.dumps(dataclasses.asdict(answer)), flush=True)
        if isinstance(answer, Finding):
            break
    os._exit(0)  # the SDK's threads may still be at an attempt that was given up


if __name__ == "__main__":
    main()

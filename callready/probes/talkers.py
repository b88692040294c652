"""The two who are recorded (`callready.probes.recording.talking`), in a process of their own.

Each says a tone that the other does not have and shows colours that move. Reads a
`webrtc.Request` as a line of JSON on standard input, writes a `recording.Room` or what was wrong
as one on standard output, and goes on until standard input ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import sys
from array import array
from itertools import count

from livekit import rtc
from pydantic import TypeAdapter

from callready.probes import Finding, ProbeError
from callready.probes.participants import RATE, Caller, in_call
from callready.probes.recording import TONES, Room
from callready.probes.webrtc import Request

WIDTH, HEIGHT, PICTURES = 320, 180, 15  # pixels, a second
BITRATE = 300_000
# From dark to bright and back, so that no edge costs the encoder much.
RAMP = bytes(40 + abs(160 - n % 320) for n in range(3 * WIDTH))


def _tone(hz: int) -> array[int]:
    """A tenth of a second, in which each has whole periods."""
    wave = (int(9_000 * math.sin(math.tau * hz * n / RATE)) for n in range(RATE // 10))
    return array("h", wave)


class Talker(Caller):
    """One who is recorded."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.tone = _tone(TONES[name != "the first"])

    async def show(self) -> None:
        """Publish colours that move."""
        source = rtc.VideoSource(WIDTH, HEIGHT)
        await self.publish_video("colours", source, BITRATE, PICTURES)
        self.tasks.append(asyncio.create_task(self._film(source)))

    async def _film(self, source: rtc.VideoSource) -> None:
        for number in count():
            start = 4 * number % 320
            luma = RAMP[start : start + WIDTH] * HEIGHT
            chroma = bytes([64 + number % 128]) * (WIDTH * HEIGHT // 4)
            pixels = luma + chroma + chroma[::-1]
            source.capture_frame(rtc.VideoFrame(WIDTH, HEIGHT, rtc.VideoBufferType.I420, pixels))
            await asyncio.sleep(1 / PICTURES)


def _say(what: Room | Finding) -> None:
    print(json.dumps(dataclasses.asdict(what)), flush=True)


async def _talk(request: Request) -> None:
    async with in_call(request, Talker) as (callers, _):
        for each in callers:
            await each.show()
        first = callers[0]
        _say(Room(first.room.name, first.room.local_participant.identity, first.voice))
        await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    request = TypeAdapter(Request).validate_json(sys.stdin.readline())
    try:
        asyncio.run(_talk(request))
    except ProbeError as error:
        _say(error.finding)
    except Exception as error:  # the SDK's: its text may hold a token
        why = f"the client reports {type(error).__name__}"
        _say(Finding("calls break off", "LiveKit's log at that time", why))
    os._exit(0)  # the SDK's threads


if __name__ == "__main__":
    main()

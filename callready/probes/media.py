"""What a media file holds, by decoding all of it: its length, who is heard, and whether there is a
picture. Needs PyAV (package av) and numpy."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from numpy.typing import NDArray

from callready.probes import ProbeError, command, run

RATE = 16_000  # Hz; voices are below half of it
WINDOW = RATE // 2  # samples that are judged together
SILENT = -50.0  # dB of full scale
BAND = 0.03  # a tone's band, either side, as a share of its frequency
TONE_SHARE = 0.05  # of the sound's power that is in the tone's band
MOST = 0.8  # of the windows or pictures that have to be right: a recording begins and ends ragged
BLACK = 24.0  # mean luma; black is 16 (ITU-R BT.601)
STILL = 0.5  # mean difference of luma from one window to the next
FROZEN = 0.5  # of the windows have to differ: a busy host leaves pictures out
SMALL = 64, 36  # pixels that pictures are judged by


@dataclass(frozen=True)
class Media:
    """What was decoded of a file.

    Args:
        container: names of its format, as libavformat calls it.
        codecs: of its streams. seconds: of the longest stream.
        loudness: of the sound (dB of full scale); None without sound.
        sounding: share of the sound that is not silent.
        tones: of each frequency (Hz) that was asked for, the share of the time in which it sounds.
        size: width and height of the picture, (0, 0) without one.
        bright: share of the pictures that are not black.
        moving: share of the half seconds whose last picture is not that of the one before.
    """

    container: str
    codecs: tuple[str, ...]
    seconds: float
    loudness: float | None
    sounding: float
    tones: dict[int, float]
    size: tuple[int, int]
    bright: float
    moving: float

    def __str__(self) -> str:
        sound = "" if self.loudness is None else f", sound at {self.loudness:.0f} dB"
        tones = "".join(f", {hz} Hz {share:.0%}" for hz, share in self.tones.items())
        width, height = self.size
        picture = f", picture {width}x{height}" if width else ""
        return f"{self.seconds:.1f} s of {'+'.join(self.codecs)}{sound}{tones}{picture}"


def read(file: bytes | Path, tones: Collection[int] = ()) -> Media:
    """Decode a file.

    Args:
        file: its content, or where it is.
        tones: frequencies to listen for (Hz).

    Raises:
        ProbeError: it cannot be played.
    """
    try:
        with av.open(BytesIO(file) if isinstance(file, bytes) else str(file), "r") as container:
            return _read(container, tones)
    except (av.FFmpegError, OSError) as error:
        raise ProbeError(
            "the recording cannot be played",
            "whether what wrote it was killed before it ended the file: an MP4 without its index "
            "is lost",
            str(error.strerror if isinstance(error, OSError) else error),
        ) from None


def _read(container: InputContainer, tones: Collection[int]) -> Media:
    streams = [*container.streams.audio[:1], *container.streams.video[:1]]
    sound, picture = _Sound(tones), _Picture()
    for frame in container.decode(streams) if streams else ():
        if isinstance(frame, av.AudioFrame):
            sound.add(frame)
        elif isinstance(frame, av.VideoFrame):
            picture.add(frame)
    if sound.samples:
        sound.add(None)
    return Media(
        container.format.name,
        tuple(stream.codec_context.name for stream in container.streams.get()),
        max(sound.samples / RATE, picture.end - picture.begin),
        _decibels(sound.energy / sound.samples) if sound.samples else None,
        _share(sound.sounding),
        {hz: _share(flags) for hz, flags in sound.tones.items()},
        picture.size,
        _share(picture.bright),
        _share(picture.moving),
    )


class _Sound:
    """What is heard, a window at a time: a recording may be hours."""

    def __init__(self, tones: Collection[int]) -> None:
        self.samples, self.energy = 0, 0.0
        self.sounding: list[bool] = []
        self.tones: dict[int, list[bool]] = {hz: [] for hz in tones}
        self._resampler = AudioResampler("flt", "mono", RATE)
        self._rest = np.zeros(0, np.float32)

    def add(self, frame: av.AudioFrame | None) -> None:
        """What comes next; None at the end."""
        for each in self._resampler.resample(frame):
            samples = each.to_ndarray()[0]
            self.samples += len(samples)
            self.energy += float(np.square(samples, dtype=np.float64).sum())
            self._rest = np.concatenate((self._rest, samples))
        while len(self._rest) >= WINDOW:
            self._listen(self._rest[:WINDOW])
            self._rest = self._rest[WINDOW:]

    def _listen(self, window: NDArray[np.float32]) -> None:
        is_sound = _decibels(float(np.square(window, dtype=np.float64).mean())) > SILENT
        self.sounding.append(is_sound)
        spectrum = np.square(np.abs(np.fft.rfft(window * np.hanning(WINDOW))))
        frequencies = np.fft.rfftfreq(WINDOW, 1 / RATE)
        for hz, flags in self.tones.items():
            band = spectrum[np.abs(frequencies - hz) <= BAND * hz].sum()
            flags.append(is_sound and bool(band >= TONE_SHARE * spectrum[1:].sum()))


class _Picture:
    """What is seen."""

    def __init__(self) -> None:
        self.size, self.begin, self.end = (0, 0), 0.0, 0.0
        self.bright: list[bool] = []
        self.moving: list[bool] = []
        self._last: NDArray[np.float32] | None = None
        self._before: NDArray[np.float32] | None = None

    def add(self, frame: av.VideoFrame) -> None:
        """What comes next."""
        at = frame.time or 0.0
        if not self.bright:  # a file that does not begin at 0 is not the longer for it
            self.begin = at
        elif at * RATE // WINDOW != self.end * RATE // WINDOW:
            if self._before is not None and self._last is not None:
                self.moving.append(bool(np.abs(self._last - self._before).mean() > STILL))
            self._before = self._last
        small = frame.reformat(*SMALL, format="gray").to_ndarray().astype(np.float32)
        # `gray` is full range, in which black is 0: back to that of video.
        self._last = (small * (235 - 16) / 255 + 16).astype(np.float32)
        self.size, self.end = (frame.width, frame.height), at
        self.bright.append(bool(self._last.mean() > BLACK))


def _decibels(power: float) -> float:
    """Of a sine of full scale 0 dB."""
    return 10 * math.log10(max(2 * power, 1e-12))


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


def judge(
    file: bytes | Path,
    seconds: float,
    tones: Collection[int] = (),
    sound: bool = True,
    picture: bool = False,
) -> Media:
    """Decode a recording and compare it with what it must be.

    Args:
        file: its content, or where it is.
        seconds: that it lasts at least.
        tones: frequencies (Hz) that sound in it all the time, one of each caller.
        sound, picture: whether it has that.

    Raises:
        ProbeError: it cannot be played, or everything that is wrong with it.
    """
    found = read(file, tones)
    has_sound, has_picture = found.loudness is not None, found.size != (0, 0)
    silent = has_sound and found.sounding < MOST
    missing = [str(hz) for hz, share in found.tones.items() if share < MOST]
    wrong = {
        f"it lasts {found.seconds:.1f} s, not {seconds:g} s": found.seconds < seconds,
        "it has no sound": sound and not has_sound,
        "it has sound": has_sound and not sound,
        "it has no picture": picture and not has_picture,
        "it has a picture": has_picture and not picture,
        f"it is silent for {1 - found.sounding:.0%} of the time": sound and silent,
        f"nobody is heard with {' and '.join(missing)} Hz": bool(missing) and not silent,
        f"it is black for {1 - found.bright:.0%} of the time": has_picture and found.bright < MOST,
        f"its picture stands still for {1 - found.moving:.0%} of the time": has_picture
        and found.bright >= MOST
        and found.moving < FROZEN,
    }
    if evidence := "; ".join(text for text, is_so in wrong.items() if is_so):
        raise ProbeError(
            "recordings are not what was said and shown",
            "the log of egress at that time, and the load of its host",
            f"{evidence} ({found})",
        )
    return found


def _probe(options: argparse.Namespace) -> object:
    wanted = options.seconds, options.tone
    return judge(options.file, *wanted, sound=not options.no_sound, picture=options.picture)


def main() -> None:
    parser = command("media", __doc__)
    parser.add_argument("file", type=Path, help="the recording")
    parser.add_argument("--seconds", type=float, default=0, help="that it lasts at least")
    parser.add_argument(
        "--tone", type=int, action="append", default=[], metavar="HZ", help="that sounds in it"
    )
    parser.add_argument("--no-sound", action="store_true", help="it is pictures only")
    parser.add_argument("--picture", action="store_true", help="it shows one")
    run(parser, _probe)


if __name__ == "__main__":
    main()

"""The judge of recordings: what it says of files that are right, and of those that are not."""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from callready.probes import ProbeError
from callready.probes.media import judge

RATE, FPS = 48_000, 15
TONES = 440, 1000


def _recording(
    seconds: float = 4,
    tones: tuple[int, ...] = TONES,
    audio: str | None = "libopus",
    video: str | None = None,
    kind: str = "ogg",
    picture: str = "moving",
    sounding: float = 1,
) -> bytes:
    """A file of these streams; `sounding` is the share of the time with sound."""
    file = io.BytesIO()
    with av.open(file, "w", kind) as container:
        streams: list[tuple[Any, Any]] = []
        if audio:
            streams.append(
                (container.add_stream(audio, rate=RATE), _sound(seconds, tones, sounding))
            )
        if video:
            stream: Any = container.add_stream(video, rate=FPS)
            stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
            streams.append((stream, _pictures(seconds, picture)))
        for stream, frames in streams:
            for frame in [*frames, None]:
                container.mux(stream.encode(frame))
    return file.getvalue()


def _sound(seconds: float, tones: tuple[int, ...], sounding: float) -> list[av.AudioFrame]:
    at = np.arange(int(seconds * RATE)) / RATE
    wave = sum((9_000 * np.sin(2 * np.pi * hz * at) for hz in tones), np.zeros_like(at))
    wave *= at < sounding * seconds
    frames = []
    for start in range(0, len(wave), 960):
        part = wave[np.newaxis, start : start + 960].astype(np.int16)
        frame = av.AudioFrame.from_ndarray(part, "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
        frames.append(frame)
    return frames


def _pictures(seconds: float, picture: str) -> list[av.VideoFrame]:
    frames = []
    for number in range(int(seconds * FPS)):
        pixels = np.zeros((180, 320, 3), np.uint8)
        if picture != "black":
            # Of a busy sender every sixth one gets through, and is shown again until the next.
            step = 8 * {"moving": number, "still": 0, "few": number - number % 6}[picture]
            pixels[:, :, 0] = (np.arange(320) + step) % 256
            pixels[:, :, 1] = 128
        frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
        frame.pts, frame.time_base = number, Fraction(1, FPS)
        frames.append(frame)
    return frames


def _said(file: bytes | Path, **wanted: Any) -> str:
    with pytest.raises(ProbeError) as caught:
        judge(file, **dict[str, Any](seconds=3, tones=TONES) | wanted)
    return caught.value.finding.shown


@pytest.mark.parametrize(
    ("audio", "video", "kind"),
    [
        ("libopus", None, "ogg"),
        ("aac", None, "mp4"),
        ("aac", "libx264", "mp4"),
        ("libopus", "libvpx", "webm"),
    ],
)
def test_a_good_recording(audio: str, video: str | None, kind: str) -> None:
    file = _recording(audio=audio, video=video, kind=kind)
    found = judge(file, 3.9, TONES, picture=bool(video))
    assert abs(found.seconds - 4) < 0.2
    assert len(found.codecs) == 1 + bool(video)
    assert found.tones == {440: 1, 1000: 1}
    assert found.size == ((320, 180) if video else (0, 0))


def test_pictures_alone(tmp_path: Path) -> None:
    (tmp_path / "track.webm").write_bytes(_recording(audio=None, video="libvpx", kind="webm"))
    found = judge(tmp_path / "track.webm", 3.8, sound=False, picture=True)
    assert found.loudness is None and found.bright == 1 and found.moving > 0.9


def test_one_caller_is_not_heard() -> None:
    assert "nobody is heard with 1000 Hz" in _said(_recording(tones=(440,)))


def test_other_sounds_are_no_tone() -> None:
    """Neither neighbours nor harmonics."""
    assert "nobody is heard with 440 and 1000 Hz" in _said(_recording(tones=(500, 880, 2000)))


def test_silence() -> None:
    said = _said(_recording(tones=()))
    assert "it is silent for 100% of the time" in said
    assert "nobody" not in said
    assert "it is silent for 50% of the time" in _said(_recording(sounding=0.5))


def test_too_short() -> None:
    assert "it lasts 2.0 s, not 3 s" in _said(_recording(2))


def test_black_and_still() -> None:
    media: dict[str, Any] = {"audio": "aac", "video": "libx264", "kind": "mp4"}
    few = _recording(picture="few", **media)
    assert judge(few, 3, TONES, picture=True).moving > 0.5
    assert "it is black for 100% of the time" in _said(
        _recording(picture="black", **media), picture=True
    )
    assert "its picture stands still for 100% of the time" in _said(
        _recording(picture="still", **media), picture=True
    )


def test_wrong_streams() -> None:
    both = _recording(audio="aac", video="libx264", kind="mp4")
    assert "it has a picture" in _said(both)
    assert "it has sound" in _said(both, sound=False, picture=True)
    assert "it has no picture" in _said(_recording(), picture=True)
    silent = _recording(audio=None, video="libx264", kind="mp4")
    assert "it has no sound" in _said(silent, picture=True)


def test_an_mp4_whose_writer_was_killed() -> None:
    """Its index is what is written last."""
    file = _recording(audio="aac", video="libx264", kind="mp4")
    said = _said(file[: file.index(b"moov")], picture=True)
    assert said.startswith("the recording cannot be played: ")


def test_a_file_that_was_cut_in_the_middle() -> None:
    file = _recording(6)
    assert "s, not 5 s" in _said(file[: len(file) // 2], seconds=5)


@pytest.mark.parametrize("file", [b"", b"no media at all"])
def test_no_media(file: bytes) -> None:
    assert _said(file).startswith("the recording cannot be played: ")

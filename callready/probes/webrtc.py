"""Real calls of two participants through LiveKit, direct or forced through a TURN server.

Calls run in processes of their own (`callready.probes.participants`), so that neither the SDK's
native threads nor a hang of theirs can reach the caller, and a private authority can be given to
it (SSL_CERT_FILE). Credentials reach it over standard input. A process that has made a call makes
the next one too: loading the SDK takes longer than a call. One in which a call failed makes no
other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import SecretStr, TypeAdapter, ValidationError

from callready.probes import Finding, ProbeError, command, ice, run, secret_from
from callready.probes.livekit import add_url, keys_from, new_room, signalling, token
from callready.probes.turn import IceServer, TurnServer, mint
from callready.settings.models import Verify

T = TypeVar("T")
LIMITS = Verify()

NO_VIDEO = "calls have sound and no video: large packets are lost"
"""What callers suffer from a path that lets no packets of video's size through."""

CONNECT_TIMEOUT = 10.0
"""Seconds a participant may take to connect. The SDK starts a second attempt after 15 s by itself
and would hide that the first one failed."""


@dataclass(frozen=True)
class Participant:
    """One side of a call, as it measured it; times in seconds.

    Args:
        connect_seconds: until signalling and media transport stood.
        data_seconds: from then until the other's data arrived.
        audio_seconds: from then until the other's voice was heard.
        local: candidate type of its side of the selected pair: host, srflx, prflx or relay.
        remote: the other end's, the SFU's.
        protocol: udp or tcp, between the two candidates.
        local_address: of the selected pair; the relay's where `local` is relay.
        turn_url: TURN URI that the selected candidate came through, empty for a direct path.
        rtt: mean round-trip time of the selected pair.
        candidates: how many were gathered, by type: distinct ones (by foundation). libwebrtc stops
            gathering once connected, so a direct call may have no relayed ones: see `gather`.
        loss: share of the other's audio and video packets that did not arrive.
        jitter: of the other's voice; pictures are sent in bursts.
        bitrate: of the video that arrived (bit/s), 0 without any.
    """

    connect_seconds: float
    data_seconds: float
    audio_seconds: float
    local: str
    local_address: str
    local_port: int
    remote: str
    remote_address: str
    remote_port: int
    protocol: str
    turn_url: str
    rtt: float
    candidates: dict[str, int]
    loss: float = 0.0
    jitter: float = 0.0
    bitrate: float = 0.0


@dataclass(frozen=True)
class Call:
    """A call in which data and audio arrived both ways and went on to the end.

    `retries` counts the attempts that the SDK made again by itself, `reconnects` how often a
    participant lost the connection on the way, `longest_silence` the longest time (s) in which one
    heard nothing of the other.
    """

    participants: tuple[Participant, Participant]
    retries: int
    reconnects: int
    longest_silence: float = 0.0

    def __str__(self) -> str:
        return (
            "; ".join(
                f"connected in {each.connect_seconds * 1000:.0f} ms, heard the other after "
                f"{each.audio_seconds * 1000:.0f} ms, {each.local} to {each.remote} over "
                f"{each.turn_url or each.protocol}, round trip {each.rtt * 1000:.1f} ms"
                for each in self.participants
            )
            + f"; {self.retries} retries, {self.reconnects} reconnects"
        )


@dataclass(frozen=True)
class Calls:
    """Several attempts: how many connected, the time to connect of those, the others' errors."""

    attempts: int
    succeeded: int
    connect_seconds: tuple[float, ...]
    median_connect_seconds: float | None
    max_connect_seconds: float | None
    errors: tuple[str, ...]


class Door(NamedTuple):
    """Where one of several SFUs lets callers in: its URL, and an address and port to connect to
    instead of what the URL's name leads to."""

    url: str
    address: str
    port: int


@dataclass(frozen=True)
class Request:
    """What the participants' process is asked for; goes to it as a line of JSON."""

    url: str
    tokens: tuple[str, str] = field(repr=False)
    ice_servers: tuple[IceServer, ...]
    relay_only: bool
    ca_file: str | None
    duration: float
    max_loss: float | None = None
    video: bool = False
    doors: tuple[Door, ...] = ()


def tokens(key: str, secret: SecretStr, room: str = "") -> tuple[SecretStr, SecretStr]:
    """Tokens of two participants for a room, default one of their own, made with an API key and its
    secret."""
    room = room or new_room()
    return token(key, secret, room), token(key, secret, room)


def call(
    url: str,
    tokens: tuple[SecretStr, SecretStr],
    ice_servers: Sequence[IceServer] | None = None,
    relay_only: bool = False,
    ca_file: str | None = None,
    duration: float = 1.0,
    max_loss: float | None = None,
    video: bool = False,
    doors: Sequence[Door] = (),
) -> Call:
    """Two participants call each other.

    Args:
        url: ws:// or wss:// URL of LiveKit.
        tokens: of both, for one room: `tokens`, or what the app gives its users.
        ice_servers: instead of what LiveKit hands out. One TURN URI and `relay_only` force the
            call through exactly that one.
        relay_only: use relayed candidates only.
        ca_file: PEM file of the authorities to trust, for wss:// and turns:. libwebrtc knows only
            its built-in ones, so turns: goes through `tls_forwarder` where this is given.
        duration: seconds the call is to go on once both hear each other.
        max_loss: share of packets of video's size that may be lost in that time, both ways; None
            sends none.
        video: with a video track.
        doors: of each participant, instead of `url`; both then come at the same moment.

    Raises:
        ProbeError: what did not work, and why as far as it can be found out from here.
    """
    first, second = (each.get_secret_value() for each in tokens)
    ca_path = str(Path(ca_file).resolve()) if ca_file else None
    servers = tuple(ice_servers or ())
    way = servers, relay_only, ca_path
    request = Request(url, (first, second), *way, duration, max_loss, video, tuple(doors))
    result = _participants(request)
    if isinstance(result, Call):
        return result
    raise ProbeError(result.suffers, result.look_at, result.evidence)


_idle: dict[str | None, list[tuple[subprocess.Popen[bytes], int]]] = defaultdict(list)
"""Processes whose last call was well and how many they made, by what they trust. They end with this
one, by their standard input."""

_RESULT = TypeAdapter[Call | Finding](Call | Finding)
_CALLS = 25  # of one process: each leaves threads and 1 MB behind in it (measured, livekit 1.2)


def _participants(request: Request) -> Call | Finding:
    idle = _idle[request.ca_file]
    process, made = idle.pop() if idle else (started("participants", request.ca_file), 0)
    limit = 5 * CONNECT_TIMEOUT + request.duration
    result = asked(process, "participants", request, limit, _RESULT)
    if isinstance(result, Call) and made + 1 < _CALLS:
        idle.append((process, made + 1))
    else:
        process.communicate()
    return result


def started(module: str, ca_file: str | None) -> subprocess.Popen[bytes]:
    """The process of a module of ours that makes calls, which trusts these authorities."""
    return subprocess.Popen(
        [sys.executable, "-m", f"callready.probes.{module}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the SDK writes whole tokens to its log: it goes nowhere
        cwd=Path(__file__).parents[2],
        env={**os.environ, **({"SSL_CERT_FILE": ca_file} if ca_file else {})},
    )


def asked(
    process: subprocess.Popen[bytes],
    module: str,
    request: Request,
    limit: float,
    answer: TypeAdapter[T],
) -> T:
    """What a module's process answers to a request within `limit` seconds; raises ProbeError if it
    does not, and the process is ended then."""
    assert process.stdin and process.stdout
    killer = threading.Timer(limit, process.kill)
    killer.start()
    try:
        process.stdin.write(json.dumps(dataclasses.asdict(request)).encode() + b"\n")
        process.stdin.flush()
        return answer.validate_json(process.stdout.readline())
    except (BrokenPipeError, ValidationError):
        in_time = killer.is_alive()
        process.kill()
        ended = f"ended with status {process.wait()} and no result"
        raise ProbeError(
            "the call could not be tried",
            f"whether `python -m callready.probes.{module}` starts (package livekit)",
            f"its process {ended if in_time else f'did not end in {limit:.0f} s and was killed'}",
        ) from None
    finally:
        killer.cancel()


def shortcomings(call: Call, limits: Verify) -> list[Finding]:
    """What a call with video falls short of."""
    worst = {
        "loss": (max(each.loss for each in call.participants), limits.max_loss, ".1%"),
        "jitter": (max(each.jitter for each in call.participants), limits.max_jitter, ".3f"),
    }
    found = [
        f"{name} {value:{form}}, more than {limit:{form}}"
        for name, (value, limit, form) in worst.items()
        if value > limit
    ]
    bitrate = min(each.bitrate for each in call.participants) / 1000
    if bitrate < limits.min_bitrate:
        found.append(f"{bitrate:.0f} kbit/s of video arrive, less than {limits.min_bitrate}")
    if call.reconnects:
        found.append(f"{call.reconnects} reconnects")
    look_at = "the load of the hosts on its path, and rate limits and idle timeouts between"
    return [Finding("calls that last have poor sound and video", look_at, each) for each in found]


def seconds(text: str) -> float:
    """A time as people write it: ``90``, ``90s``, ``10m``, ``1h``."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not parts:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90s or 10m")
    return float(parts[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[parts[2]]


def calls(attempts: int, attempt: Callable[[], Call], give_up: int | None = None) -> Calls:
    """Call several times, one after the other.

    Args:
        attempts: how often.
        attempt: makes one call; with minted TURN credentials it mints new ones each time.
        give_up: after so many that failed; default never.
    """
    seconds: list[float] = []
    errors: list[str] = []
    while len(seconds) + len(errors) < attempts and len(errors) != give_up:
        try:
            done = attempt()
        except ProbeError as error:
            errors.append(str(error))
        else:
            seconds.append(max(each.connect_seconds for each in done.participants))
    return Calls(
        attempts=len(seconds) + len(errors),
        succeeded=len(seconds),
        connect_seconds=tuple(seconds),
        median_connect_seconds=statistics.median(seconds) if seconds else None,
        max_connect_seconds=max(seconds, default=None),
        errors=tuple(errors),
    )


def _troubles(gathered: ice.Gathered) -> str:
    failed = [each.finding for each in gathered.values() if isinstance(each, ProbeError)]
    return "; ".join(f"{each.shown} ({each.look_at})" for each in failed)


def _probe(options: argparse.Namespace) -> object:
    key, secret = keys_from(options)
    # It says why nobody can join; the SDK does not.
    joined = signalling(options.url, token(key, secret), options.ca_file)
    if options.turn:
        TurnServer.from_uri(options.turn)
    if options.ice_servers:
        candidates = ice.gather(joined.ice_servers, options.ca_file)
        if troubles := _troubles(candidates):
            raise ProbeError("an ICE server that callers are given does not serve them", troubles)
        return candidates

    def attempt() -> Call:
        servers = None
        if options.turn:
            minted = mint(secret_from("TURN_SECRET", None), 600)
            servers = [IceServer((options.turn,), minted.username, minted.password)]
        relay_only = options.relay_only or bool(options.turn)
        pair = tokens(key, secret)
        soak = options.soak or 0
        last = soak or options.duration
        found = call(
            options.url, pair, servers, relay_only, options.ca_file, last, LIMITS.max_loss, soak > 0
        )
        if soak and (poor := shortcomings(found, LIMITS)):
            raise ProbeError(
                poor[0].suffers, poor[0].look_at, "; ".join(each.evidence for each in poor)
            )
        return found

    if options.attempts == 1:
        return attempt()
    result = calls(options.attempts, attempt)
    if result.errors:
        raise ProbeError(
            f"{len(result.errors)} of {result.attempts} calls do not connect", result.errors[0]
        )
    return result


def main() -> None:
    parser = command(
        "webrtc",
        "Real calls of two participants through LiveKit, direct or forced through a TURN server. "
        "LIVEKIT_API_KEY and LIVEKIT_API_SECRET are read from the environment, with --turn also "
        "TURN_SECRET.",
        "--duration",
        "--secret-file",
        "--ca-file",
    )
    add_url(parser)
    parser.add_argument(
        "--relay-only", action="store_true", help="through the TURN servers that LiveKit hands out"
    )
    parser.add_argument("--turn", metavar="URI", help="relay-only through exactly this TURN URI")
    parser.add_argument(
        "--ice-servers",
        action="store_true",
        help="no call: ask each STUN and TURN server that LiveKit hands out",
    )
    parser.add_argument(
        "--soak", type=seconds, metavar="TIME", help="a call with video that lasts: 90s, 10m"
    )
    parser.add_argument("--attempts", type=int, default=1, help="calls in a row (%(default)s)")
    run(parser, _probe)


if __name__ == "__main__":
    main()

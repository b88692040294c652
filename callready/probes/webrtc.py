"""Real calls of two participants through LiveKit, direct or forced through a TURN server.

A call runs in a process of its own (`callready.probes.participants`), so that neither the
SDK's native threads nor a hang of theirs can reach the caller, and a private authority can be
given to it (SSL_CERT_FILE). Credentials reach it over standard input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr, TypeAdapter, ValidationError

from callready.probes import Finding, ProbeError, command, ice, run, secret_from
from callready.probes.livekit import add_url, keys_from, new_room, signalling, token
from callready.probes.turn import IceServer, mint

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
    median_connect_seconds: float | None
    max_connect_seconds: float | None
    errors: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """What the participants' process is asked for; goes to it as JSON on standard input."""

    url: str
    tokens: tuple[str, str] = field(repr=False)
    ice_servers: tuple[IceServer, ...]
    relay_only: bool
    ca_file: str | None
    duration: float


def tokens(key: str, secret: SecretStr) -> tuple[SecretStr, SecretStr]:
    """Tokens of two participants for a room of their own, made with an API key and its secret."""
    room = new_room()
    return token(key, secret, room), token(key, secret, room)


def call(
    url: str,
    tokens: tuple[SecretStr, SecretStr],
    ice_servers: Sequence[IceServer] | None = None,
    relay_only: bool = False,
    ca_file: str | None = None,
    duration: float = 1.0,
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

    Raises:
        ProbeError: what did not work, and why as far as it can be found out from here.
    """
    first, second = (each.get_secret_value() for each in tokens)
    ca_path = str(Path(ca_file).resolve()) if ca_file else None
    request = Request(url, (first, second), tuple(ice_servers or ()), relay_only, ca_path, duration)
    result = _participants(request)
    if isinstance(result, Call):
        return result
    look_at = result.look_at
    if not look_at:  # no media connection, although there may be signalling
        servers = ice_servers or signalling(url, tokens[0], ca_file).ice_servers
        look_at = _ice_trouble(servers, relay_only, ca_file)
    raise ProbeError(result.suffers, look_at, result.evidence)


def _participants(request: Request) -> Call | Finding:
    limit = 5 * CONNECT_TIMEOUT + request.duration
    environment = {"SSL_CERT_FILE": request.ca_file} if request.ca_file else {}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "callready.probes.participants"],
            input=json.dumps(dataclasses.asdict(request)).encode(),
            capture_output=True,  # the SDK writes whole tokens to its log: it goes nowhere
            timeout=limit,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **environment},
        )
        return TypeAdapter[Call | Finding](Call | Finding).validate_json(done.stdout)
    except subprocess.TimeoutExpired:
        why = f"did not end in {limit:.0f} s and was killed"
    except ValidationError:
        why = f"ended with status {done.returncode} and no result"
    raise ProbeError(
        "the call could not be tried",
        "whether `python -m callready.probes.participants` starts (package livekit)",
        f"its process {why}",
    )


def _ice_trouble(servers: Sequence[IceServer], relay_only: bool, ca_file: str | None) -> str:
    """What to look at when a call does not connect although signalling works."""
    if relay_only:
        hint = "whether the pool's peer policy allows the SFU's address; coturn's log"
    else:
        hint = (
            "rtc.node_ip, and rtc.port_range_start to _end (udp) and rtc.tcp_port of LiveKit in "
            "nftables and in the provider's firewall"
        )
    return "; ".join(filter(None, (_troubles(ice.gather(servers, ca_file)), hint)))


def calls(attempts: int, attempt: Callable[[], Call]) -> Calls:
    """Call several times, one after the other.

    Args:
        attempts: how often.
        attempt: makes one call; with minted TURN credentials it mints new ones each time.
    """
    seconds: list[float] = []
    errors: list[str] = []
    for _ in range(attempts):
        try:
            done = attempt()
        except ProbeError as error:
            errors.append(str(error))
        else:
            seconds.append(max(each.connect_seconds for each in done.participants))
    return Calls(
        attempts=attempts,
        succeeded=len(seconds),
        median_connect_seconds=statistics.median(seconds) if seconds else None,
        max_connect_seconds=max(seconds, default=None),
        errors=tuple(errors),
    )


def _troubles(gathered: ice.Gathered) -> str:
    failed = [each.finding for each in gathered.values() if isinstance(each, ProbeError)]
    return "; ".join(f"{each.shown} ({each.look_at})" for each in failed)


def _probe(options: argparse.Namespace) -> object:
    key, secret = keys_from(options)
    if options.ice_servers:
        joined = signalling(options.url, token(key, secret), options.ca_file)
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
        return call(options.url, pair, servers, relay_only, options.ca_file, options.duration)

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
    parser.add_argument("--attempts", type=int, default=1, help="calls in a row (%(default)s)")
    run(parser, _probe)


if __name__ == "__main__":
    main()

"""Participants of many calls at once: the program in load/, on LiveKit's Go SDK, as it is asked."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import SecretStr

from callready.probes import livekit
from callready.settings.problem import SettingsError

PROGRAM = Path(__file__).parents[2] / "load/generator"
# What no run may exceed; the program holds itself to it, too.
MOST_PARTICIPANTS, MOST_SECONDS = 2_000, 3_600


@dataclass(frozen=True)
class Service:
    """LiveKit as callers reach it."""

    url: str
    key: str
    secret: SecretStr
    ca: str | None

    def token(self, room: str, identity: str | None = None, create: bool = False) -> SecretStr:
        """An access token for the longest run."""
        return livekit.token(self.key, self.secret, room, identity, MOST_SECONDS, create)

    def create(self, room: str) -> None:
        """Make a room that is gone as soon as it is empty."""
        livekit.create_room(self.url, self.token(room, create=True), room, ca_file=self.ca)


class Participant(NamedTuple):
    """One that the program is to have join; `by` is empty where no TURN server must relay it."""

    service: Service
    room: str
    identity: str
    speaks: bool
    by: str

    def asked(self) -> dict[str, object]:
        """As the program takes it."""
        token = self.service.token(self.room, self.identity).get_secret_value()
        return {
            "url": self.service.url,
            "token": token,
            "identity": self.identity,
            "speaks": self.speaks,
            "by": self.by,
        }


@dataclass
class Heard:
    """What the program has seen in a step."""

    joins: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0
    streams: int = 0
    expected: int = 0
    received: int = 0
    bytes: int = 0
    broken: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)

    def lost(self, streams: int) -> float:
        """The share of packets that did not arrive; a stream that is missing would have had 50 a
        second, as sound."""
        missing = max(0, streams - self.streams) * 50 * self.seconds
        return 1 - min(1, self.received / max(1, self.expected + missing))


class Generator:
    """The program that makes the calls, until the block ends."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @classmethod
    @contextmanager
    def started(
        cls,
        kind: str,
        allowed: Iterable[str],
        ca: str | None,
        seconds: float,
        before: Sequence[str] = (),
    ) -> Iterator[Generator]:
        """Start it; all participants leave at the end, however that comes.

        Args:
            kind: of KINDS.
            allowed: addresses that it may connect to.
            ca: PEM file of the authorities to trust; None: the system's.
            seconds: after which it ends by itself.
            before: what leads to where the callers are, if that is not here.

        Raises:
            SettingsError: it was not built.
        """
        try:
            process = subprocess.Popen(
                [*before, PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **({"SSL_CERT_FILE": ca} if ca else {})},
                start_new_session=True,  # Ctrl-C is for us: its participants have to leave
            )
        except OSError as error:
            raise SettingsError(
                f"{PROGRAM} cannot be started ({error.strerror}): make load builds it, with Go 1.26"
            ) from None
        generator = cls(process)
        try:
            generator._write({"addresses": sorted(allowed), "kind": kind, "seconds": seconds})
            yield generator
        finally:
            generator.leave()

    def _write(self, request: Mapping[str, object]) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> SettingsError:
        return SettingsError(f"the program that makes calls ended with {self._process.wait()}")

    def _ask(self, request: Mapping[str, object], within: float) -> list[dict[str, Any]]:
        """What it says until it is done, the last line last."""
        assert self._process.stdout
        killer = threading.Timer(within, self._process.kill)
        killer.start()
        try:
            self._write(request)
            found: list[dict[str, Any]] = []
            while not found or "done" not in found[-1]:
                line = self._process.stdout.readline()
                if not line:
                    raise self._ended()
                found.append(json.loads(line))
            return found
        finally:
            killer.cancel()

    def join(self, who: Sequence[Participant], rate: float, heard: Heard) -> None:
        """Have participants join, and note how that went."""
        request = {"join": [each.asked() for each in who], "rate": rate}
        by = {each.identity: each.by for each in who}
        for line in self._ask(request, len(who) / rate + 60)[:-1]:
            if "failed" in line:
                heard.failed.append(" ".join(line["why"].split()))
                continue
            heard.joins.append(line["seconds"])
            if by[line["joined"]] and line["path"] != "relay":
                heard.failed.append(f"media that TURN should relay goes by {line['path']}")

    def measure(self, seconds: float, streams: int, heard: Heard) -> None:
        """Note what arrives in so many seconds, once there is something of so many streams."""
        request = {"measure": seconds, "streams": streams}
        for name, value in self._ask(request, seconds + 60)[-1].items():
            if name != "done":
                setattr(heard, name, value)

    def leave(self) -> None:
        """Have all participants leave, and wait for it."""
        assert self._process.stdin
        try:
            self._process.stdin.close()
            self._process.wait(30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

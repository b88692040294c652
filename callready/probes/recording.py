"""Recordings by LiveKit's egress: two callers talk, and LiveKit's API has them recorded. That it is
COMPLETE proves nothing: `media.judge` compares the file with what was said and shown."""

from __future__ import annotations

import argparse
import base64
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from google.protobuf.json_format import ParseDict
from livekit.protocol.egress import EgressInfo, EgressStatus, ListEgressResponse
from pydantic import SecretStr, TypeAdapter

from callready.probes import TIMEOUT, Finding, ProbeError, command, run
from callready.probes.app import get, web_url
from callready.probes.livekit import add_url, create_room, granting, keys_from, new_room, token
from callready.probes.storage import Storage, Unreadable
from callready.probes.webrtc import CONNECT_TIMEOUT, Request, asked, started, tokens
from callready.settings.egress import FOLDER

if TYPE_CHECKING:
    from callready.probes.media import Media

Kind = Literal["audio_room_composite", "track", "participant", "room_composite"]
"""What is recorded, as egress counts its cost: all voices of a room mixed, one track as it is sent,
one participant, or the whole room as Chrome shows it."""

TONES = 440, 1000
"""What the first and the second caller say (Hz); none is a harmonic of the other."""

WITHIN = 60.0
"""Seconds that a recording may take besides what is recorded: a start that no egress takes is
refused after 8 to 25 s, and Chrome needs up to 10 s for its page."""
SHORT = 25.0
"""The same where a deploy waits, and only sound is recorded."""
TRIES, PAUSE = 8, 1.0
"""Starts until one is taken by the host that is asked for, because any egress of the fleet may take
it, and seconds between them: a host is busy for a moment longer than its recording is."""

LOOK_AT = "journalctl -u callready-egress on the hosts of group egress"
# What is shown here is small: 1080p, the default, would ask more of the host than the check needs.
_SMALL = {"width": 640, "height": 360, "framerate": 15, "video_bitrate": 700}


@dataclass(frozen=True)
class Room:
    """A call to record: its room, the first caller, and the track of that one's voice."""

    name: str
    identity: str
    track: str


_ROOM = TypeAdapter[Room | Finding](Room | Finding)


@dataclass(frozen=True)
class Recording:
    """A recording that has ended.

    Args:
        egress_id: as LiveKit knows it. kind: of `Kind`.
        file: path below the target's folder or prefix, in a folder of its own.
        size: bytes. seconds: as egress says it.
        time_to_start: seconds from asking to being on. time_to_end: from the stop to the file.
    """

    egress_id: str
    kind: Kind
    file: str
    size: int
    seconds: float
    time_to_start: float
    time_to_end: float


@dataclass(frozen=True)
class Api:
    """LiveKit's API for recordings.

    Args:
        url: of LiveKit. key, secret: of the API.
        ca, at, verify: as `app.get` takes them.
    """

    url: str
    key: str
    secret: SecretStr
    ca: str | None = None
    at: tuple[str, int] | None = None
    verify: bool = True

    def start(self, kind: Kind, room: Room, within: float = WITHIN) -> str:
        """Have something recorded into a folder that is called as the room; its id.

        Raises:
            ProbeError: nobody takes it, in so many seconds.
        """
        file = {"filepath": f"{room.name}/{kind}", "disable_manifest": True}
        body: dict[str, Any] = {"room_name": room.name, "file_outputs": [file]}
        match kind:
            case "audio_room_composite":
                method = "StartRoomCompositeEgress"
                file["file_type"] = "OGG"
                body["audio_only"] = True
            case "track":
                method = "StartTrackEgress"
                body = {"room_name": room.name, "track_id": room.track, "file": file}
            case "participant":
                method = "StartParticipantEgress"
                body |= {"identity": room.identity, "advanced": _SMALL}
            case "room_composite":
                method = "StartRoomCompositeEgress"
                body |= {"layout": "grid", "advanced": _SMALL}
        return ParseDict(self._ask(method, body, within), EgressInfo(), True).egress_id

    def stop(self, egress_id: str) -> None:
        """End a recording; raises ProbeError if that is refused."""
        self._ask("StopEgress", {"egress_id": egress_id})

    def status(self, egress_id: str) -> EgressInfo:
        """How a recording is; raises ProbeError if LiveKit knows it not."""
        found = ParseDict(
            self._ask("ListEgress", {"egress_id": egress_id}), ListEgressResponse(), True
        )
        if not found.items:
            raise ProbeError(
                "recordings get lost",
                "whether Redis lost its data",
                f"LiveKit knows no recording {egress_id}",
            )
        return found.items[0]

    def _ask(self, method: str, body: Mapping[str, Any], within: float = TIMEOUT) -> Any:
        access = granting(self.key, self.secret, {"roomRecord": True}, ttl=60)
        answer, _ = get(
            web_url(self.url, "http", f"/twirp/livekit.Egress/{method}"),
            self.ca,
            {"Authorization": f"Bearer {access.get_secret_value()}"},
            body,
            self.at,
            self.verify,
            within,
        )
        if answer.status_code == 200:
            return answer.json()
        try:
            said = answer.json().get("msg", "")
        except (ValueError, AttributeError):
            said = ""
        raise ProbeError(*_refusal(answer.status_code), f"{method}: {answer.status_code} {said}")


def _refusal(status: int) -> tuple[str, str]:
    """What that means for a request, and what to look at."""
    if status in (401, 403):
        return "nobody may record", "the API key, which needs LiveKit's permission roomRecord"
    if status == 503:
        return (
            "no recording starts: no egress takes it",
            "whether its hosts have processors for it (egress.cpu_cost) or are drained, "
            f"{LOOK_AT}, and their way to Redis",
        )
    return "recordings are refused", f"LiveKit's log, livekit.redis, {LOOK_AT}"


@contextmanager
def talking(
    url: str,
    key: str,
    secret: SecretStr,
    ca_file: str | None = None,
    at: tuple[str, int] | None = None,
    verify: bool = True,
) -> Iterator[Room]:
    """A call to record, in a room of its own, until the block ends; arguments as `livekit.reach`.

    Raises:
        ProbeError: there is no call.
    """
    name = new_room()
    maker = token(key, secret, name, ttl=60, create=True)
    create_room(url, maker, name, "", ca_file, at, verify)
    first, second = (each.get_secret_value() for each in tokens(key, secret, name))
    trusted = str(Path(ca_file).resolve()) if ca_file else None
    request = Request(url, (first, second), (), False, trusted, 0)
    with started("talkers", trusted) as process:
        room = asked(process, "talkers", request, 5 * CONNECT_TIMEOUT, _ROOM)
        if isinstance(room, Finding):
            raise ProbeError(room.suffers, room.look_at, room.evidence)
        try:
            yield room
        finally:
            assert process.stdin
            process.stdin.close()
            try:
                process.wait(CONNECT_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()


def record(
    api: Api,
    room: Room,
    kind: Kind,
    seconds: float,
    meanwhile: Callable[[str], None] | None = None,
    within: float = WITHIN,
) -> Recording:
    """Record a call, and wait until its file is where it goes.

    Args:
        api: of LiveKit. room: the call.
        kind: what of it.
        seconds: how long.
        meanwhile: called with the recording's id as soon as it is on.
        within: seconds that all may take besides.

    Raises:
        ProbeError: it does not start, fails, or ends elsewhere.
    """
    asked = time.monotonic()
    end = asked + within
    egress_id = api.start(kind, room, within)
    try:
        _wait(api, egress_id, EgressStatus.EGRESS_ACTIVE, "start", end)
        is_on = time.monotonic()
        if meanwhile:
            meanwhile(egress_id)
        time.sleep(max(0.0, is_on + seconds - time.monotonic()))
    except Elsewhere:
        # As long as that host is busy, LiveKit prefers it for the next one.
        _end(api, egress_id)
        time.sleep(PAUSE)
        raise
    except BaseException:
        with suppress(ProbeError):
            api.stop(egress_id)
        raise
    stopped = time.monotonic()
    with suppress(ProbeError):  # it may have failed meanwhile: why is said below
        api.stop(egress_id)
    info = _wait(api, egress_id, EgressStatus.EGRESS_COMPLETE, "end", end + seconds)
    took = time.monotonic() - stopped
    if info.backup_storage_used:
        raise ProbeError(
            "recordings do not get to where they go, but to the host's own disk",
            f"egress.storage: its credentials, and whether its hosts reach it; {LOOK_AT}",
            f"{egress_id} went to the backup",
        )
    if not info.file_results or not info.file_results[0].size:
        why = f"{egress_id} is COMPLETE and has no file"
        raise ProbeError("recordings are empty", LOOK_AT, why)
    file = info.file_results[0]
    name = f"{room.name}/{Path(file.filename).name}"
    return Recording(egress_id, kind, name, file.size, file.duration / 1e9, is_on - asked, took)


def _end(api: Api, egress_id: str) -> None:
    """Stop a recording of which nobody wants to know, and wait until that is done."""
    end = time.monotonic() + TIMEOUT
    with suppress(ProbeError):
        api.stop(egress_id)
        while api.status(egress_id).status in _AHEAD and time.monotonic() < end:
            time.sleep(0.2)


_AHEAD = {EgressStatus.EGRESS_STARTING, EgressStatus.EGRESS_ACTIVE, EgressStatus.EGRESS_ENDING}


def _wait(api: Api, egress_id: str, wanted: int, to: str, end: float) -> EgressInfo:
    """Until a recording has this state; raises ProbeError if it gets another one."""
    while (info := api.status(egress_id)).status != wanted:
        name = EgressStatus.Name(info.status).removeprefix("EGRESS_")
        if info.status not in _AHEAD:
            said = ": ".join(filter(None, (info.error, info.details)))
            raise ProbeError("recordings fail", LOOK_AT, f"{egress_id} is {name}: {said}")
        if time.monotonic() > end:
            why = f"{egress_id} is {name}, and that takes too long"
            raise ProbeError(f"recordings do not {to}", LOOK_AT, why)
        time.sleep(0.2)
    return info


@dataclass(frozen=True)
class Host:
    """A host of group egress, by a root shell there.

    Args:
        name: in the inventory.
        run: gives what a script prints there, or raises ProbeError.
    """

    name: str
    run: Callable[[str], str]

    def expect(self, egress_id: str) -> None:
        """Raises Elsewhere if a recording that is on runs on another host."""
        if not self.run(f"ls -d {FOLDER}/tmp/{shlex.quote(egress_id)} 2>/dev/null || :"):
            raise Elsewhere(
                f"whether {self.name} records is not known: others take its recordings",
                "other hosts of group egress, and who else uses this Redis",
                f"{egress_id} does not run there",
            )

    def read(self, name: str) -> bytes:
        """A recording that stays there, by its path; raises ProbeError if it is not there."""
        folder, _, file = name.rpartition("/")
        where = f"{FOLDER}/recordings/{folder}"
        # The container chose these names: no link is followed.
        shown = self.run(
            f"find {shlex.quote(where)} -maxdepth 1 -type f -name {shlex.quote(file)} "
            "-exec stat -c %a {} \\; -exec base64 -w 0 {} \\; 2>/dev/null || :"
        )
        if not shown:
            why = f"{name} is said to be complete and is not in {FOLDER}/recordings on {self.name}"
            raise ProbeError("recordings get lost", LOOK_AT, why)
        mode, _, content = shown.partition("\n")
        if int(mode, 8) & 0o007:
            raise ProbeError(
                "others on the host may read recordings",
                "the umask in systemctl cat callready-egress.service",
                f"{name} on {self.name} has mode {mode}",
            )
        return base64.b64decode(content)

    def remove(self, prefix: str, folder: str) -> None:
        """A folder of recordings, also of the backup."""
        places = f"recordings/{prefix}", f"backup/{prefix}", "backup"
        self.run(f"rm -rf {shlex.join(f'{FOLDER}/{place}/{folder}' for place in places)}")


class Elsewhere(ProbeError):
    """A recording that another host has taken."""


@dataclass(frozen=True)
class Proof:
    """A recording and what was found in it; without that, why nobody could look; and whether it is
    still there, because only others may delete it."""

    recording: Recording
    found: Media | None
    why: str = ""
    left: bool = False

    def __str__(self) -> str:
        text = str(self.found or f"{self.recording.size} bytes, not looked at: {self.why}")
        return f"{text}; {self.recording.file} stays there" if self.left else text


def prove(
    api: Api,
    room: Room,
    kind: Kind,
    seconds: float,
    host: Host,
    storage: Storage,
    others: Iterable[Host] = (),
    within: float = WITHIN,
) -> Proof:
    """Have one host record a call, fetch the file from where it went, judge it, and take it away
    where that is allowed; arguments as `record` has them.

    Args:
        host: that shall record it.
        storage: where its recordings go.
        others: hosts that may take one too.

    Raises:
        Elsewhere: they have taken all of them.
        ProbeError: what is wrong with it.
    """
    from callready.probes import media

    folder = "/".join(filter(None, (storage.prefix, room.name)))
    try:
        for attempt in reversed(range(TRIES)):
            try:
                done = record(api, room, kind, seconds, host.expect, within)
                break
            except Elsewhere:
                if not attempt:
                    raise
        name = f"{folder}/{Path(done.file).name}"
        try:
            content = _fetch(host, storage, name, api.ca)
        except Unreadable as why:
            return Proof(done, None, why.finding.evidence, left=True)
        left = storage.bucket is not None and not storage.bucket.remove(name, api.ca)
        # It ends when egress is told, and may begin with the next picture that is whole.
        return Proof(done, media.judge(content, seconds - 1, **wanted(kind)), left=left)
    finally:
        for each in (host, *others):
            each.remove(storage.prefix, room.name)


def _fetch(host: Host, storage: Storage, name: str, ca_file: str | None) -> bytes:
    if storage.bucket:
        return storage.bucket.read(name, ca_file)
    if storage.elsewhere:
        raise Unreadable(f"callready reads nothing from {storage.elsewhere}")
    return host.read(name)


def wanted(kind: Kind) -> dict[str, Any]:
    """What `media.judge` shall find in it: the tones, and whether there is a picture."""
    tones = TONES if kind.endswith("composite") else TONES[:1]
    return {"tones": tones, "picture": kind in ("participant", "room_composite")}


def _probe(options: argparse.Namespace) -> object:
    key, secret = keys_from(options)
    api = Api(options.url, key, secret, options.ca_file)
    with talking(options.url, key, secret, options.ca_file) as room:
        return record(api, room, options.kind, options.duration)


def main() -> None:
    parser = command(
        "recording",
        f"{__doc__} LIVEKIT_API_KEY and LIVEKIT_API_SECRET are read from the environment. Says "
        "where the file is; `python -m callready.probes.media` judges it.",
        "--duration",
        "--secret-file",
        "--ca-file",
    )
    add_url(parser)
    parser.add_argument("--kind", choices=get_args(Kind), default="track", help="(%(default)s)")
    parser.set_defaults(duration=10.0)
    run(parser, _probe)


if __name__ == "__main__":
    main()

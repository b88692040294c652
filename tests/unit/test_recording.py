"""What recordings are asked for, what is said when there are none, and which host has made one; the
recordings themselves are tried on lab hosts."""

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from livekit.api import TokenVerifier
from pydantic import SecretStr
from pyinfra.connectors.util import CommandOutput, OutputLine

from callready.probes import Finding, ProbeError, recording
from callready.probes.kinds import Recording, from_json
from callready.probes.probe import as_json, hidden
from callready.probes.recording import Api, Elsewhere, Host, Room, prove, record
from callready.probes.storage import Bucket, Storage, Unreadable
from callready.rollout import shell

KEY, SECRET = "APIunit", SecretStr("unit-secret-of-more-than-32-characters")
ROOM = Room("callready-0123", "probe-1", "TR_1")
Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def api(answer: Answer) -> Iterator[Api]:
    """LiveKit's API as an operator's mistakes make it answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            token = self.headers["Authorization"].removeprefix("Bearer ")
            claims = TokenVerifier(KEY, SECRET.get_secret_value()).verify(token)
            assert claims.video and claims.video.room_record
            status, said = answer(self.path.rpartition("/")[2], body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as at:
        yield Api(f"ws://{at}", KEY, SECRET)


def going_through(*states: dict[str, Any]) -> Answer:
    """An egress that takes what it is asked for, and then is in one of these states after the
    other."""
    left = list(states)

    def answer(method: str, _: dict[str, Any]) -> tuple[int, Any]:
        if method == "ListEgress":
            state = left.pop(0) if len(left) > 1 else left[0]
            return 200, {"items": [{"egress_id": "EG_1", **state}]}
        return 200, {"egress_id": "EG_1", "status": "EGRESS_STARTING"}

    return answer


ACTIVE = {"status": "EGRESS_ACTIVE"}
COMPLETE = {
    "status": "EGRESS_COMPLETE",
    "file_results": [{"filename": "/out/callready-0123/track.ogg", "size": "7", "duration": "9"}],
}


def failing(answer: Answer, within: float = 5) -> str:
    with api(answer) as asked, pytest.raises(ProbeError) as caught:
        record(asked, ROOM, "track", 0, within=within)
    return caught.value.finding.shown


@pytest.mark.parametrize(
    ("kind", "method", "asked"),
    [
        ("audio_room_composite", "StartRoomCompositeEgress", {"audio_only": True}),
        ("track", "StartTrackEgress", {"track_id": "TR_1"}),
        ("participant", "StartParticipantEgress", {"identity": "probe-1"}),
        ("room_composite", "StartRoomCompositeEgress", {"layout": "grid"}),
    ],
)
def test_what_is_asked_for(kind: recording.Kind, method: str, asked: dict[str, Any]) -> None:
    seen = []

    def answer(name: str, body: dict[str, Any]) -> tuple[int, Any]:
        seen.append((name, body))
        return 200, {"egress_id": "EG_1"}

    with api(answer) as there:
        assert there.start(kind, ROOM) == "EG_1"
    [(name, body)] = seen
    assert name == method and body["room_name"] == ROOM.name
    assert body.items() >= asked.items()
    file = body.get("file") or body["file_outputs"][0]
    assert file["filepath"] == f"callready-0123/{kind}"


def test_a_recording() -> None:
    ids: list[str] = []
    states = {"status": "EGRESS_STARTING"}, ACTIVE, {"status": "EGRESS_ENDING"}, COMPLETE
    with api(going_through(*states)) as there:
        done = record(there, ROOM, "track", 0, ids.append)
    assert ids == ["EG_1"]
    assert (done.file, done.size) == ("callready-0123/track.ogg", 7)


def test_nobody_takes_it() -> None:
    said = failing(lambda *_: (503, {"msg": "no response from servers"}))
    assert said == (
        "no recording starts: no egress takes it: StartTrackEgress: 503 no response from servers"
    )


def test_the_key_may_not_record() -> None:
    said = failing(lambda *_: (403, {"msg": "permissions denied"}))
    assert said == "nobody may record: StartTrackEgress: 403 permissions denied"


def test_it_fails() -> None:
    failed = {"status": "EGRESS_FAILED", "error": "No space left"}
    assert failing(going_through(failed)) == "recordings fail: EG_1 is FAILED: No space left"
    assert (
        failing(going_through(ACTIVE, failed)) == "recordings fail: EG_1 is FAILED: No space left"
    )


def test_it_does_not_begin_or_end() -> None:
    starting = going_through({"status": "EGRESS_STARTING"})
    assert failing(starting, 0.3).startswith("recordings do not start: EG_1 is STARTING")
    assert failing(going_through(ACTIVE), 0.3).startswith("recordings do not end: EG_1 is ACTIVE")


def test_complete_proves_nothing() -> None:
    assert failing(going_through(ACTIVE, {**COMPLETE, "backup_storage_used": True})) == (
        "recordings do not get to where they go, but to the host's own disk: EG_1 went to the backup"
    )
    empty = {"status": "EGRESS_COMPLETE"}
    assert failing(going_through(ACTIVE, empty)) == (
        "recordings are empty: EG_1 is COMPLETE and has no file"
    )


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's folder of egress."""
    monkeypatch.setattr(recording, "FOLDER", str(tmp_path))
    for name in ("tmp", "recordings", "backup"):
        (tmp_path / name).mkdir()
    return tmp_path


def host(name: str = "rec1") -> Host:
    def run(script: str) -> str:
        return subprocess.run(
            ["sh", "-c", script], check=True, capture_output=True, text=True
        ).stdout

    return Host(name, run)


def test_a_recording_that_another_host_has_taken(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ended at once, and tried again when that is done; what the other one has of it is taken
    away there."""
    monkeypatch.setattr(recording, "PAUSE", 0)
    (disk / "backup/callready-0123").mkdir()
    calls = []
    attempt = ACTIVE, {"status": "EGRESS_ENDING"}, COMPLETE
    going = going_through(*attempt * recording.TRIES)

    def answer(method: str, body: dict[str, Any]) -> tuple[int, Any]:
        calls.append(method)
        return going(method, body)

    with api(answer) as there, pytest.raises(Elsewhere) as caught:
        prove(there, ROOM, "track", 60, Host("other", lambda _: ""), Storage(), [host()])
    assert "others take its recordings" in str(caught.value)
    once = ["StartTrackEgress", "ListEgress", "StopEgress", "ListEgress", "ListEgress"]
    assert calls == once * recording.TRIES
    assert not (disk / "backup/callready-0123").exists()
    (disk / "tmp/EG_1").mkdir()
    host().expect("EG_1")


def test_a_file_on_a_host(disk: Path) -> None:
    folder = disk / "recordings/a/callready-0123"
    folder.mkdir(parents=True)
    file = folder / "track.ogg"
    file.write_bytes(b"\0sound")
    file.chmod(0o640)
    assert host().read("a/callready-0123/track.ogg") == b"\0sound"
    file.chmod(0o644)
    with pytest.raises(ProbeError, match=r"others on the host may read .* mode 644"):
        host().read("a/callready-0123/track.ogg")
    (folder / "link.ogg").symlink_to("/etc/passwd")
    shutil.copytree(folder, disk / "elsewhere")
    (disk / "recordings/link").symlink_to(disk / "elsewhere")
    for name in ("a/callready-0123/link.ogg", "a/callready-0123/none.ogg", "link/track.ogg"):
        with pytest.raises(ProbeError, match="recordings get lost"):
            host().read(name)
    host().remove("a", "callready-0123")
    assert not folder.exists()
    assert {path.name for path in (disk / "recordings").iterdir()} == {"a", "link"}


DENIED = "<Error><Key>{}</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
OBJECTS = "/recordings/lab/callready-0123/"


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    """An S3 that has one object, refuses to delete and to read others, and knows its key."""
    content = {f"{OBJECTS}a.ogg": b"sound"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert "Credential=AKEXAMPLE/" in self.headers["Authorization"]
            status = 200 if self.path in content else 403 if "secret" in self.path else 404
            body = content.get(self.path, b"")
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT")
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            assert self.path == "/recordings?delete"
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            key = body.partition("<Key>")[2].partition("</Key>")[0]
            gone = content.pop(f"/recordings/{key}", None)
            said = "<Deleted><Key>{}</Key></Deleted>" if gone else DENIED
            answer = f"<DeleteResult>{said.format(key)}</DeleteResult>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as at:
        secret = SecretStr("unit-s3-secret")
        yield Bucket("recordings", "AKEXAMPLE", secret, "", f"http://{at}", True)


def test_a_file_in_a_bucket(bucket: Bucket) -> None:
    name = f"{OBJECTS.removeprefix('/recordings/')}a.ogg"
    assert bucket.read(name) == b"sound"
    assert bucket.remove(name)
    assert not bucket.remove(name)
    with pytest.raises(ProbeError, match=r"recordings get lost: lab/callready-0123/a.ogg is said"):
        bucket.read(name)
    with pytest.raises(Unreadable, match="its credentials may not read recordings"):
        bucket.read("secret")


def test_a_bucket_that_is_not_reached_from_here() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    there = Bucket("recordings", "AK", SECRET, "", f"http://127.0.0.1:{port}", True)
    with pytest.raises(Unreadable, match=f"http://127.0.0.1:{port} does not give it"):
        there.read("a.ogg")
    assert not there.remove("a.ogg")


def probe(**more: Any) -> Recording:
    storage = Storage("lab", Bucket("recordings", "AK", SecretStr("unit-s3-secret")))
    way: dict[str, Any] = {"node": "rec1", "address": "sfu1", "port": 1, "url": "ws://127.0.0.1:1"}
    return Recording(**way, keys={KEY: SECRET}, storage=storage, **more)


def test_the_prober_gets_all_of_a_probe() -> None:
    assert from_json(json.loads(json.dumps(as_json(probe())))) == probe()


def test_no_secret_of_a_probe_is_said() -> None:
    found = Finding("no unit-s3-secret", f"not {SECRET.get_secret_value()}")
    said = str(hidden(found, [probe()]))
    assert "unit-s3" not in said and SECRET.get_secret_value() not in said
    assert "unit-s3" not in repr(probe())


def test_where_no_call_can_be_made_from_here_egress_is_not_to_blame() -> None:
    found = probe().ask()
    assert found and found.warning and found.suffers.startswith("nothing was recorded: callers get")


def test_scripts_of_the_prober() -> None:
    def run(name: str, script: str) -> tuple[bool, CommandOutput]:
        if name == "rec2":
            raise OSError("the line broke")
        done = subprocess.run(["sh"], input=script, capture_output=True, text=True, check=False)
        lines = [OutputLine("stdout", each) for each in done.stdout.splitlines()]
        lines += [OutputLine("stderr", each) for each in done.stderr.splitlines()]
        return not done.returncode, CommandOutput(lines)

    with shell.shell(run) as path:
        asked = probe(shell=path)
        assert asked._run("rec1", "echo one; echo two") == "one\ntwo"
        for name, script, why in (("rec1", "echo no >&2; exit 1", "no"), ("rec2", "", "line")):
            with pytest.raises(ProbeError, match=f"{name} cannot be looked at: .*{why}"):
                asked._run(name, script)
        assert Path(path).parent.stat().st_mode & 0o077 == 0
    assert not Path(path).exists()

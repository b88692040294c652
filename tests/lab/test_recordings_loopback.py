"""/recordings of examples/backend, with Debian's own packages, against a real livekit-server with
Redis on loopback. Debian's packages are unpacked and never installed.

What records is the lab's stand-in for egress, which has no Chrome (docs/recording.md). Where it is
not there, a start gets the answer of an egress that is full or missing, recordings that are listed
are put where LiveKit looks for them, into Redis, and events are signed as LiveKit signs them.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import jwt
import pytest
from livekit.protocol.egress import EgressInfo, EgressStatus
from pydantic import SecretStr

from callready.probes import ProbeError, livekit, media, recording
from callready.settings.egress import RECORDINGS
from lab import archive, ca, recorder
from lab.backend import EXAMPLE, PACKAGES
from tests.support.fleet import eventually
from tests.support.log_receiver import free_port
from tests.support.packages import environment, libraries, unpack

KEY, SECRET = "APItest", secrets.token_hex(24)
TOKENS = "token-that-callers-have", "token-that-comes-next"
CALLER = {"Authorization": f"Bearer {TOKENS[0]}"}
NOW = int(time.time())


@contextmanager
def process(*command: str | Path, **how: Any) -> Iterator[None]:
    """A program and its children, ended in the end."""
    how |= {"stdin": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(command, **how) as running:
        try:
            yield
        finally:
            running.terminate()
            try:
                running.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)


class Place:
    """Redis, LiveKit and the backend on this machine."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.ports = {name: free_port() for name in ("redis", "livekit", "rtc", "app")}
        self.url = f"http://127.0.0.1:{self.ports['app']}"
        with tarfile.open(archive.publish()) as tar:
            tar.extract("livekit-server", folder, filter="data")

    @contextmanager
    def redis(self) -> Iterator[None]:
        program = self.root / "usr/bin/redis-server"
        place = "--bind", "127.0.0.1", "--port", str(self.ports["redis"]), "--save", ""
        with process(program, *place, env=environment(self.root), stdout=subprocess.DEVNULL):
            eventually(lambda: self.redis_says("ping") == b"PONG\n")
            yield

    def redis_says(self, *words: str, last: bytes | None = None) -> bytes:
        """redis-cli's answer; `last` is a last word that may have any bytes."""
        binary = [] if last is None else ["-x"]
        program = self.root / "usr/bin/redis-cli"
        return subprocess.run(
            [program, "-p", str(self.ports["redis"]), *binary, *words],
            env=environment(self.root),
            input=last,
            capture_output=True,
            check=False,
        ).stdout

    @contextmanager
    def livekit(self, redis: bool = True) -> Iterator[None]:
        config = {
            "port": self.ports["livekit"],
            "bind_addresses": ["127.0.0.1"],
            # Not on loopback, where the clients of egress do not look.
            "rtc": {"tcp_port": self.ports["rtc"], "udp_port": self.ports["rtc"]},
            "keys": {KEY: SECRET},
            "webhook": {"urls": [f"{self.url}/webhook"], "api_key": KEY},
            **({"redis": {"address": f"127.0.0.1:{self.ports['redis']}"}} if redis else {}),
        }
        file = self.folder / "livekit.yaml"
        file.write_text(json.dumps(config))  # JSON is YAML
        with (self.folder / "livekit.log").open("w") as log:
            server = self.folder / "livekit-server"
            with process(server, "--config", file, stdout=log, stderr=log):
                eventually(self.up)
                yield

    @contextmanager
    def egress(self, **costs: float) -> Iterator[Path]:
        """The stand-in, with these costs of its recordings; where their files go."""
        root = self.folder / "root"
        recorder.unpack(root)
        for name in ("dev", "out", "home/egress/tmp"):
            (root / name).mkdir(parents=True, exist_ok=True)
        config = {
            "redis": {"address": f"127.0.0.1:{self.ports['redis']}"},
            "api_key": KEY,
            "api_secret": SECRET,
            "ws_url": f"ws://127.0.0.1:{self.ports['livekit']}",
            "storage": {"prefix": RECORDINGS},
            "cpu_cost": costs,
        }
        run = f"mount --rbind /dev {root}/dev; mount -t proc proc {root}/proc; chroot {root} egress"
        env = {**os.environ, "EGRESS_CONFIG_BODY": json.dumps(config)}
        said = self.folder / "egress.log"
        with said.open("w") as log:
            command = "unshare", "--mount", "sh", "-ec", run.replace("chroot", "exec chroot")
            with process(*command, env=env, stdout=log, stderr=log):
                eventually(lambda: "service ready" in said.read_text())
                yield root / RECORDINGS.removeprefix("/")

    def up(self) -> bool:
        try:
            return livekit.health(f"http://127.0.0.1:{self.ports['livekit']}").status == 200
        except ProbeError:
            return False

    @contextmanager
    def backend(
        self, listener: socket.socket | None = None, secret: str = SECRET
    ) -> Iterator[None]:
        """The example as backend.service runs it, with the .env that callready writes; `listener`
        is handed to it as by backend.socket (sd_listen_fds(3))."""
        app = self.folder / "app"
        app.mkdir(exist_ok=True)
        for name in ("backend.py", "recordings.html"):
            shutil.copy(EXAMPLE / name, app)
        values = {
            "LIVEKIT_URL": f"ws://127.0.0.1:{self.ports['livekit']}",
            "LIVEKIT_API_KEY": KEY,
            "LIVEKIT_API_SECRET": secret,
            "APP_TOKEN": ",".join(TOKENS),
        }
        (app / ".env").write_text("".join(f"{key}={value}\n" for key, value in values.items()))
        start = re.findall(r"(?s)^ExecStart=/usr/bin/gunicorn (.*?)\n[A-Z]", UNIT, re.M)[0]
        options = [*start.replace("\\\n", "").split(), "--bind", self.url.removeprefix("http://")]
        program = ["/usr/bin/python3", self.root / "usr/bin/gunicorn", *options]
        packages = self.root / "usr/lib/python3/dist-packages"
        env = {
            **os.environ,
            "PYTHONPATH": str(packages),
            "LD_LIBRARY_PATH": str(libraries(self.root)),
        }
        handed: tuple[int, ...] = ()
        if listener:
            handed = (listener.fileno(),)
            hand = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{listener.fileno()}'
            program = ["bash", "-c", hand, "bash", *program]
        with (self.folder / "app.log").open("a") as log:
            how: Any = {"cwd": app, "env": env, "stdout": log, "stderr": log, "pass_fds": handed}
            with process(*program, **how):
                yield

    def ask(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """The backend's answer to a caller who has the app's token."""
        with httpx.Client(base_url=self.url, headers=CALLER | headers, timeout=60) as client:
            return client.get(path) if body is None else client.post(path, json=body)

    def refusal(self, path: str, body: Any = None) -> tuple[int, str]:
        answer = self.ask(path, body)
        return answer.status_code, answer.json()["detail"]

    def hear(self, event: dict[str, Any], secret: str = SECRET, key: str = KEY) -> int:
        """The backend's answer to an event, signed as LiveKit signs it
        (protocol/webhook/url_notifier.go)."""
        body = json.dumps(event).encode()
        hashed = b64encode(sha256(body).digest()).decode()
        token = jwt.encode({"iss": key, "exp": NOW + 3600, "sha256": hashed}, secret, "HS256")
        return self.post(body, token)

    def post(self, body: bytes, token: str) -> int:
        headers = {"Authorization": token, "Content-Type": "application/webhook+json"}
        return httpx.post(f"{self.url}/webhook", content=body, headers=headers).status_code

    def record(self, info: EgressInfo) -> None:
        """Put a recording where LiveKit looks for it (pkg/service/redisstore.go)."""
        self.redis_says("hset", "egress", info.egress_id, last=info.SerializeToString())
        self.redis_says("sadd", f"egress:room:{info.room_name}", info.egress_id)


UNIT = (EXAMPLE / "backend.service").read_text()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Redis, and what the backend is made of."""
    folder = tmp_path_factory.mktemp("packages")
    yield unpack(folder, "redis-server", *PACKAGES.split())
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def app(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """All of it runs."""
    place = Place(unpacked, tmp_path_factory.mktemp("app"))
    with place.redis(), place.livekit(), place.backend():
        eventually(lambda: answers(place))
        yield place


def answers(place: Place) -> bool:
    try:
        return place.ask("/health").status_code == 200
    except httpx.TransportError:
        return False


def event(name: str, number: int, egress_id: str, status: str, **info: Any) -> dict[str, Any]:
    return {
        "event": name,
        "id": f"EV_{egress_id}_{number}",
        "createdAt": str(NOW + number),
        "egressInfo": {
            "egressId": egress_id,
            "roomName": "daily",
            "status": status,
            "startedAt": str(NOW * 10**9),
            **info,
        },
    }


@pytest.fixture(scope="module")
def recorded(
    unpacked: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Place, Path]]:
    """All of it and a recorder, which has room for a voice and a participant; where it records."""
    place = Place(unpacked, tmp_path_factory.mktemp("recorded"))
    ca.create()
    cpus = float(os.cpu_count() or 1)
    costs = {"room_composite_cpu_cost": cpus, "web_cpu_cost": cpus}
    costs |= {"participant_cpu_cost": 0.5 * cpus, "track_cpu_cost": 0.1 * cpus}
    costs |= {"audio_room_composite_cpu_cost": 0.5 * cpus}
    with place.redis(), place.livekit(), place.egress(**costs) as folder, place.backend():
        eventually(lambda: answers(place))
        yield place, folder


def test_a_call_is_recorded_from_the_first_event_to_the_file(
    recorded: tuple[Place, Path],
) -> None:
    place, folder = recorded
    url = f"ws://127.0.0.1:{place.ports['livekit']}"
    with recording.talking(url, KEY, SecretStr(SECRET)) as room:
        there = {
            each["identity"]: each for each in place.ask(f"/participants?room={room.name}").json()
        }
        assert len(there) == 2  # and egress, which is hidden, never is
        voice = {"id": room.track, "type": "audio", "source": "unknown"}
        assert voice in there[room.identity]["tracks"]
        asked = [
            {"room": room.name, "kind": "participant", "identity": room.identity},
            {"room": room.name, "kind": "track", "track": room.track},
        ]
        started = [place.ask("/recordings", body).json() for body in asked]
        assert [(it["room"], it["kind"]) for it in started] == [
            (room.name, body["kind"]) for body in asked
        ]
        # Together they take more than it may have.
        assert place.refusal("/recordings", {"room": room.name, "kind": "audio"})[0] == 503
        for it in started:
            assert place.ask(f"/recordings/{it['id']}/stop", {}).json()["status"] == "ending"

        def finished() -> bool:
            found = place.ask(f"/recordings?room={room.name}").json()
            return [each["events"][-1:] and each["status"] for each in found] == ["complete"] * 2

        eventually(finished)
    for it, picture in zip(started, (True, False), strict=True):
        found = place.ask(f"/recordings/{it['id']}").json()
        (file,) = found["files"]
        path = folder / Path(file["location"]).relative_to(RECORDINGS)
        assert path.parent == folder / room.name
        assert path.stat().st_size == file["bytes"]
        heard = media.judge(path, 5, recording.TONES[:1], picture=picture)
        assert abs(heard.seconds - file["seconds"]) < 3
        eventually(partial(has_ended, place, it["id"]))
        assert events(place, it["id"])[0] == "egress_started"


def events(place: Place, egress_id: str) -> list[str]:
    """Those of LiveKit that the backend has taken."""
    return [it["event"] for it in place.ask(f"/recordings/{egress_id}").json()["events"]]


def has_ended(place: Place, egress_id: str) -> bool:
    """Whether it has that as the last."""
    return events(place, egress_id)[-1:] == ["egress_ended"]


def test_a_room_does_not_choose_where_its_files_go(recorded: tuple[Place, Path]) -> None:
    place, folder = recorded
    name = "../../{room_id}/etc"
    token = livekit.token(KEY, SecretStr(SECRET), name, create=True)
    livekit.create_room(f"http://127.0.0.1:{place.ports['livekit']}", token, name)
    started = place.ask("/recordings", {"room": name, "kind": "audio"})
    assert started.status_code == 201
    info = EgressInfo()
    info.ParseFromString(place.redis_says("--raw", "hget", "egress", started.json()["id"])[:-1])
    (file,) = info.room_composite.file_outputs
    assert re.fullmatch(r"-------room_id--etc/\d{8}-\d{6}-audio-[0-9a-f]{6}", file.filepath)
    # Nobody ever said a word.
    assert place.ask(f"/recordings/{started.json()['id']}/stop", {}).status_code == 200
    eventually(
        lambda: place.ask(f"/recordings/{started.json()['id']}").json()["status"] == "aborted"
    )
    assert not [each for each in folder.rglob("*room_id*")]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/recordings?room=daily", None),
        ("/recordings/EG_1", None),
        ("/participants?room=daily", None),
        ("/recordings", {"room": "daily", "kind": "audio"}),
        ("/recordings/EG_1/stop", {}),
    ],
)
def test_strangers_record_nothing_and_see_nothing(app: Place, path: str, body: Any) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": f"Bearer {'x' * 40}"}):
        assert app.ask(path, body, **headers).status_code == 401


def test_both_tokens_of_a_rotation_are_taken(app: Place) -> None:
    for token in TOKENS:
        headers = {"Authorization": f"Bearer {token}"}
        assert app.ask("/recordings?room=daily", **headers).json() == []


def test_who_starts_a_recording_is_told_that_there_is_no_room_for_it(app: Place) -> None:
    """Nothing answers LiveKit: every egress is full, or there is none."""
    token = livekit.token(KEY, SecretStr(SECRET), "daily", create=True)
    livekit.create_room(f"http://127.0.0.1:{app.ports['livekit']}", token, "daily")
    code, words = app.refusal("/recordings", {"room": "daily", "kind": "audio"})
    assert code == 503
    assert words.startswith("nothing was started: every egress is full")
    assert words.endswith(": no response from servers")


@pytest.mark.parametrize(
    ("path", "body", "code", "words"),
    [
        ("/recordings", {"room": "nobody", "kind": "room"}, 404, "requested room does not exist"),
        ("/recordings/EG_none", None, 404, "egress does not exist"),
        ("/recordings/EG_none/stop", {}, 404, "egress does not exist"),
        ("/recordings", {"room": "daily", "kind": "track"}, 422, "which track? See /participants"),
        ("/recordings", {"room": "daily", "kind": "participant", "track": "TR"}, 422, "which part"),
    ],
)
def test_what_is_not_there_is_said(app: Place, path: str, body: Any, code: int, words: str) -> None:
    seen, said = app.refusal(path, body)
    assert seen == code
    assert words in said


def test_what_livekit_knows_is_listed_for_its_room(app: Place) -> None:
    running = EgressInfo(
        egress_id="EG_running",
        room_name="weekly",
        status=EgressStatus.EGRESS_ACTIVE,
        started_at=(NOW + 60) * 10**9,
    )
    running.room_composite.audio_only = True
    failed = EgressInfo(
        egress_id="EG_failed",
        room_name="weekly",
        status=EgressStatus.EGRESS_FAILED,
        started_at=NOW * 10**9,
        error="No space left on device",
        backup_storage_used=True,
    )
    failed.track.track_id = "TR_1"
    file = failed.file_results.add()
    file.filename, file.size, file.duration = "weekly/1.ogg", 1200, 2_500_000_000
    for info in (running, failed):
        app.record(info)
    listed = app.ask("/recordings?room=weekly").json()
    assert [item["id"] for item in listed] == ["EG_running", "EG_failed"]
    assert app.ask("/recordings/EG_running").json() == listed[0]
    assert listed[0] == {
        "id": "EG_running",
        "room": "weekly",
        "kind": "audio",
        "status": "active",
        "started": NOW + 60,
        "ended": None,
        "files": [],
        "backup": False,
        "error": None,
        "events": [],
    }
    assert listed[1] == listed[0] | {
        "id": "EG_failed",
        "kind": "track",
        "status": "failed",
        "started": NOW,
        "files": [{"location": "weekly/1.ogg", "bytes": 1200, "seconds": 2.5}],
        "backup": True,
        "error": "No space left on device",
    }
    # It has ended, so it cannot be stopped.
    code, words = app.refusal("/recordings/EG_failed/stop", {})
    assert (code, words.partition(":")[0]) == (409, "it has ended")


def test_events_are_kept_once_and_outlive_what_livekit_knows(app: Place) -> None:
    """LiveKit forgets a recording a day after its end. It sends an event again when in doubt."""
    first = event("egress_started", 1, "EG_kept", "EGRESS_STARTING")
    file = {"filename": "daily/1.ogg", "location": "/out/daily/1.ogg", "size": "9"}
    file["duration"] = "3000000000"
    last = event("egress_ended", 2, "EG_kept", "EGRESS_COMPLETE", fileResults=[file])
    for each in (first, last, last):
        assert app.hear(each) == 200
    found = app.ask("/recordings/EG_kept").json()
    assert found["status"] == "complete"
    assert found["files"] == [{"location": "/out/daily/1.ogg", "bytes": 9, "seconds": 3.0}]
    assert [(it["at"] - NOW, it["event"], it["status"]) for it in found["events"]] == [
        (1, "egress_started", "starting"),
        (2, "egress_ended", "complete"),
    ]
    assert found in app.ask("/recordings?room=daily").json()
    assert found not in app.ask("/recordings?room=weekly").json()


def test_old_events_go(app: Place) -> None:
    old = event("egress_ended", 1, "EG_old", "EGRESS_COMPLETE")
    assert app.hear(old | {"createdAt": str(NOW - 31 * 86400)}) == 200
    assert app.refusal("/recordings/EG_old")[0] == 404


def test_only_livekits_events_are_believed(app: Place) -> None:
    planted = event("egress_ended", 1, "EG_planted", "EGRESS_COMPLETE")
    body = json.dumps(planted).encode()
    claims = {"iss": KEY, "exp": NOW + 3600}
    signed = jwt.encode(claims, SECRET, "HS256")  # such as any caller's token to join a room
    expired = jwt.encode(claims | {"exp": NOW - 3600}, SECRET, "HS256")
    refused = [
        app.hear(planted, secret="x" * 48),
        app.hear(planted, key="APIother"),
        *(app.post(body, token) for token in ("", "x", signed, expired)),
    ]
    assert refused == [401] * 6
    assert app.refusal("/recordings/EG_planted")[0] == 404
    # And those of rooms and participants are not recordings'.
    assert app.hear({"event": "room_started", "id": "EV_r", "createdAt": "1", "room": {}}) == 200


def test_the_page_holds_no_secret_and_runs_no_script_but_its_own(app: Place) -> None:
    pages = [httpx.get(app.url) for _ in range(2)]
    policies = [page.headers["Content-Security-Policy"] for page in pages]
    assert policies[0] != policies[1]
    for page, policy in zip(pages, policies, strict=True):
        nonce = re.findall(r"script-src 'nonce-([^']+)'", policy)[0]
        assert re.findall(r"<(?:script|style)[^>]*>", page.text) == [
            f'<style nonce="{nonce}">',
            f'<script nonce="{nonce}">',
        ]
        assert policy.startswith("default-src 'none'; ")
        assert not any(secret in page.text for secret in (SECRET, *TOKENS))


def test_a_restart_refuses_nobody(unpacked: Path, tmp_path: Path) -> None:
    """systemd holds the port: who comes between the old process and the new one waits."""
    place, done, answered = Place(unpacked, tmp_path), Event(), list[int]()

    def callers() -> None:
        while not done.is_set():
            # A worker may have taken it and not read it yet as it ends; that is not to be refused.
            with suppress(httpx.ReadError, httpx.RemoteProtocolError):
                answered.append(httpx.get(f"{place.url}/health", timeout=60).status_code)

    def is_past(number: int) -> bool:
        return caller.done() or len(answered) > number

    with ThreadPoolExecutor() as pool, ExitStack() as running:
        running.callback(done.set)
        listener = socket.create_server(("127.0.0.1", place.ports["app"]))
        running.enter_context(listener)
        caller = pool.submit(callers)
        for _ in range(3):
            with place.backend(listener):
                eventually(partial(is_past, len(answered) + 5))
        with place.backend(listener):
            done.set()
            caller.result()
    assert set(answered) == {200}


@pytest.mark.parametrize(
    ("runs", "secret", "words"),
    [
        ("", SECRET, r"LiveKit does not answer: .*Connection refused.*"),
        ("livekit", SECRET, r"LiveKit cannot do it: egress not connected \(redis required\)"),
        ("redis livekit", "x" * 48, r"LiveKit refuses the key in the app's \.env: .+"),
    ],
    ids=["no LiveKit", "no Redis", "another key"],
)
def test_what_keeps_everything_from_being_recorded_is_said(
    unpacked: Path, tmp_path: Path, runs: str, secret: str, words: str
) -> None:
    place = Place(unpacked, tmp_path)
    with ExitStack() as running:
        if "redis" in runs:
            running.enter_context(place.redis())
        if "livekit" in runs:
            running.enter_context(place.livekit(redis="redis" in runs))
        running.enter_context(place.backend(secret=secret))
        eventually(lambda: answers(place))
        code, said = place.refusal("/recordings?room=daily")
    assert code == 502
    assert re.fullmatch(words, said), said

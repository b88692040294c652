"""A TURN secret and a LiveKit key rotated on real hosts while callers come and go: none is refused;
phases in a wrong order are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from callready.probes import turn
from callready.probes.peer import peer_to_peer_while
from callready.probes.turn import TurnServer
from lab import Lab, hosts, plan
from tests.support.fleet import PYINFRA, REPOSITORY, SUPPORT, Host, delivered, eventually
from tests.support.fleet import inventory as shared_inventory

SFU, TURN = Host("h20"), Host("h19")
TTL = 30


class Operator:
    """An inventory of two hosts and the commands of whoever rotates its secrets."""

    def __init__(self, folder: Path) -> None:
        self.inventory, self.store = folder / "rot", folder / "rot.secrets.yaml"
        (folder / "group_data").mkdir()
        _, data, _ = shared_inventory()
        common = {key: data[key] for key in data if key.startswith("ssh_") or key == "tls"}
        values = {
            **common,
            "host": {"max_clock_skew": 1.0},
            "livekit": {
                **data["livekit"],
                "url": f"ws://{SFU.fqdn}:7880",
                "rtc": {"turn_ttl": TTL},
                "token_ttl": TTL,
            },
            "turn": {
                "pools": {
                    "calls": {**data["turn"]["pools"]["calls"], "max_port": 60000},
                    "avatar": {
                        **data["turn"]["pools"]["avatar"],
                        "listening_port": 3479,
                        "tls_listening_port": 5350,
                        "min_port": 60001,
                        "max_port": 65535,
                    },
                }
            },
            "app": {**data["app"], "commands": ["echo restarted >> /run/app-log"]},
        }
        text = "".join(f"{key} = {value!r}\n" for key, value in values.items())
        (folder / "group_data/rot.py").write_text(text)

        def entry(host: Host, **more: Any) -> list[Any]:
            return [(host.fqdn, {"address": host.ipv4, "address6": host.ipv6, **more})]

        groups = {
            "livekit": entry(SFU),
            "turn": entry(TURN, pools=["calls", "avatar"]),
            "app": [SFU.fqdn],
        }
        self.inventory.write_text("".join(f"{k} = {v!r}\n" for k, v in groups.items()))
        self.seen: set[str] = set()

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=REPOSITORY,
            text=True,
            capture_output=True,
            env={**os.environ, "PYINFRA_YES": "1"},
            stdin=subprocess.DEVNULL,
        )
        self.seen |= {v for k, v in self.entries().items() if not k.endswith((".until", "ation"))}
        assert not any(value in done.stdout + done.stderr for value in self.seen)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def deploy(self, *options: str) -> str:
        done = self.run(PYINFRA, self.inventory, "deploy.py", *options)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def rotate(self, *arguments: str) -> str:
        done = self.run(sys.executable, "-m", "callready.rotate", self.inventory, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def refused(self, *arguments: str) -> str:
        before = self.entries(), SFU.pids(), rows()
        done = self.run(sys.executable, "-m", "callready.rotate", self.inventory, *arguments)
        assert done.returncode in (1, 2), done.stdout
        assert (self.entries(), SFU.pids(), rows()) == before
        return done.stderr

    def entries(self) -> dict[str, str]:
        return yaml.safe_load(self.store.read_text()) if self.store.exists() else {}

    def let_it_be_time(self) -> None:
        """What is said to be the end of the wait is past."""
        past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
        ended = {name: past for name in self.entries() if name.endswith(".until")}
        self.store.write_text(yaml.safe_dump({**self.entries(), **ended}))

    def wait_for_phase_3(self) -> None:
        """As long as the tool says, for every secret that is rotated."""
        entries = self.entries()
        until = max(datetime.fromisoformat(entries[k]) for k in entries if k.endswith(".until"))
        time.sleep(max(0.0, (until - datetime.now(UTC)).total_seconds()))


def rows() -> list[str]:
    """The secrets that coturn accepts."""
    sql = "select value from turn_secret order by value"
    return TURN.root(f'sqlite3 -readonly /var/lib/turn/calls.db "{sql}"').split()


def app() -> dict[str, str]:
    """The app's environment."""
    lines = SFU.root("cat /srv/app/.env").splitlines()
    return dict(line.split("=", 1) for line in lines)


def known_keys() -> dict[str, str]:
    """The keys of the LiveKit process that runs."""
    text = SFU.root("cat /run/credentials/livekit-server.service/livekit.yaml")
    keys: dict[str, str] = yaml.safe_load(text)["keys"]
    return keys


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    with delivered(TURN.name, SFU.name):
        operator = Operator(tmp_path_factory.mktemp("rotation"))
        operator.run(sys.executable, "-m", "callready.secrets", operator.inventory)
        operator.deploy()
        yield operator


@contextmanager
def callers(*options: str) -> Iterator[dict[str, Any]]:
    """People call all the time; what happened to them is there afterwards."""
    leader = hosts.leader(plan.find_host(SFU.name))
    env = f"/proc/{leader}/root/srv/app/.env"
    process = subprocess.Popen(
        [
            *Lab().client_prefix(),
            sys.executable,
            SUPPORT / "rotation_caller.py",
            env,
            TURN.ipv4,
            *options,
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    found: dict[str, Any] = {}
    try:
        yield found
    finally:
        output, _ = process.communicate(timeout=60)
        found |= json.loads(output)


@contextmanager
def a_call() -> Iterator[None]:
    """Two people in a call."""
    process = subprocess.Popen(
        [
            *Lab().client_prefix(),
            sys.executable,
            "-m",
            "callready.probes.webrtc",
            app()["LIVEKIT_URL"],
            "--duration",
            "60",
            "--secret-file",
            "-",
        ],
        cwd=REPOSITORY,
        env={**os.environ, "LIVEKIT_API_KEY": app()["LIVEKIT_API_KEY"]},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin
    process.stdin.write(app()["LIVEKIT_API_SECRET"])
    process.stdin.close()
    try:
        eventually(lambda: SFU.media() > 0)
        yield
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    eventually(lambda: SFU.media() == 0)


def nobody_was_refused(found: dict[str, Any], *restarts: tuple[float, float]) -> None:
    assert found["refused"] == []
    kinds = ["turn, app's", "turn, earlier", "livekit", "livekit, earlier"]
    kinds += ["turn, LiveKit's"] if restarts else []
    assert all(found["attempts"].get(kind, 0) >= 5 for kind in kinds), found["attempts"]
    assert not restarts or found["attempts"]["calls"] > len(found["broken"]) + 3
    for each in found["broken"]:
        start, end, why = json.loads(each)
        # A call may be hit by LiveKit's restart, and by nothing else.
        assert any(start < till and since < end for since, till in restarts), why
    print(f"attempts {found['attempts']}, gaps {found['gaps']} s, {len(found['broken'])} calls hit")


def test_turn_secret_and_livekit_key_are_rotated_and_nobody_refused(operator: Operator) -> None:
    old, old_key, coturn = operator.entries()["turn/calls"], known_keys(), TURN.pids()
    assert "phase 2 is not what comes next: no rotation is under way" in operator.refused(
        "turn", "--phase", "2"
    )
    with callers() as found:
        said = operator.rotate("turn")
        new = operator.entries()["turn/calls.next"]
        assert sorted([old, new]) == rows() and app()["TURN_SECRET"] == old
        assert "next is phase 2, which restarts LiveKit" in said

        since = time.time()
        said = operator.rotate("turn", "--phase", "2")
        assert re.search(r"next is phase 3, not before 20\d\d-.* UTC \(in \d+ s\)", said)
        assert app()["TURN_SECRET"] == new and sorted([old, new]) == rows()
        assert SFU.root("cat /run/credentials/livekit-server.service/turn_secret") == new
        assert "phase 3 may start at" in operator.refused("turn")

        operator.rotate("livekit")
        restarts = since, time.time()
        livekit = SFU.pids()
        assert known_keys().keys() == {"APIfleet", "APIfleet-2"}
        assert app()["LIVEKIT_API_KEY"] == "APIfleet"
        operator.rotate("livekit")
        assert app()["LIVEKIT_API_KEY"] == "APIfleet-2"
        assert SFU.pids() == livekit  # the app moves, LiveKit goes on
        assert "next is phase 3" in operator.refused("livekit", "--phase", "2")

        operator.wait_for_phase_3()
        assert "the rotation of turn/calls is over" in operator.rotate("turn")
        assert rows() == [new]
    nobody_was_refused(found, restarts)
    assert TURN.pids() == coturn  # it dropped nothing
    with a_call():  # LiveKit may have given it a token of the old key
        assert "phase 3 has to wait for the end of the calls" in operator.refused("livekit")
    with callers("--no-calls") as found:
        assert "is over" in operator.rotate("livekit")
        eventually(lambda: known_keys().keys() == {"APIfleet-2"})
        time.sleep(8)
    assert found["refused"] == []
    assert known_keys().keys().isdisjoint(old_key)
    assert operator.entries().keys() == {
        "turn/calls",
        "turn/calls.generation",
        "livekit/api_secret",
        "livekit/api_secret.generation",
        "turn/avatar",
    }


def test_a_pool_of_another_program_is_rotated_under_a_running_call(operator: Operator) -> None:
    server, livekit, coturn = TurnServer(TURN.ipv4, 3479), SFU.pids(), TURN.pids()

    def minted(name: str = "turn/avatar") -> turn.Credentials:
        return turn.mint(SecretStr(operator.entries()[name]), 600)

    def rotation() -> None:
        old = minted()
        said = operator.rotate("turn/avatar")
        assert "next is phase 2; it may start now" in said
        turn.allocate(server, old), turn.allocate(server, minted("turn/avatar.next"))
        assert "give it to what mints for the pool" in operator.rotate("turn/avatar")
        turn.allocate(server, old), turn.allocate(server, minted())
        said = operator.refused("turn/avatar")
        assert "phase 3 may start at" in said
        assert re.search(r"in 86[34]\d\d s", said)  # a day: nobody knows who mints
        operator.let_it_be_time()
        assert "the rotation of turn/avatar is over" in operator.rotate("turn/avatar")
        turn.allocate(server, minted())
        with pytest.raises(turn.TurnRefused, match="401"):
            turn.allocate(server, old)

    call, _ = peer_to_peer_while((server, minted()), (server, minted()), rotation)
    print(f"{call.sent} packets sent, {call.received} back, longest gap {call.longest_gap:.2f} s")
    assert call.received >= 0.98 * call.sent
    assert (SFU.pids(), TURN.pids()) == (livekit, coturn)


def test_no_caller_is_refused_while_secrets_are_written(operator: Operator) -> None:
    secret = SecretStr(operator.entries()["turn/calls"])
    sql = "BEGIN EXCLUSIVE; DELETE FROM turn_secret; SELECT 'locked';"
    writer = subprocess.Popen(
        TURN.inside("sqlite3 /var/lib/turn/calls.db"),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdin and writer.stdout
    print(sql, file=writer.stdin, flush=True)
    assert writer.stdout.readline() == "locked\n"
    turn.allocate(TurnServer(TURN.ipv4, 3478), turn.mint(secret, 600))
    writer.communicate("ROLLBACK;\n")
    assert rows() == [secret.get_secret_value()]


def test_an_old_key_goes_in_spite_of_calls_if_the_operator_says_so(operator: Operator) -> None:
    operator.rotate("livekit")
    operator.rotate("livekit")
    operator.let_it_be_time()
    with a_call():
        assert "or end them with --end-calls" in operator.refused("livekit")
        assert "is over" in operator.rotate("livekit", "--end-calls")
    assert known_keys().keys() == {app()["LIVEKIT_API_KEY"]}


def test_a_phase_on_half_of_the_fleet_is_completed_and_limits_are_refused(
    operator: Operator,
) -> None:
    assert "a phase always concerns every host" in operator.refused("turn", "--limit", "h19*")
    Lab().cut("h20")
    done = operator.refused("turn")
    Lab().mend("h20")
    assert "cannot look at every host" in done
    operator.rotate("turn")
    # Somebody goes on by hand, with a part of the fleet: the store says phase 2, one host has it.
    entries = operator.entries()
    entries["turn/calls.previous"] = entries["turn/calls"]
    entries["turn/calls"] = entries.pop("turn/calls.next")
    operator.store.write_text(yaml.safe_dump(entries))
    operator.deploy("--limit", TURN.fqdn)
    said = operator.rotate("turn")
    assert f"phase 2 is not complete on {SFU.fqdn}: completing it" in said
    assert app()["TURN_SECRET"] == entries["turn/calls"]
    assert "phase 3 may start at" in operator.refused("turn")
    operator.store.write_text(yaml.safe_dump({**entries, "turn/calls.next": "x" * 40}))
    assert "are not in one phase: restore the file" in operator.refused("turn")
    operator.store.write_text(yaml.safe_dump(entries))


def test_a_dry_deploy_says_what_a_restart_does(operator: Operator) -> None:
    entries = operator.entries()
    operator.store.write_text(yaml.safe_dump({**entries, "livekit/api_secret": "y" * 40}))
    said = operator.deploy("--dry")
    operator.store.write_text(yaml.safe_dump(entries))
    assert "restarting livekit-server.service (0 media ports in use): every running call" in said

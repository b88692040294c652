"""What a host does for recordings outside of egress' container, in a folder that its scripts take for
the whole host; the processes are real ones, of which a folder says that they are the container's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from callready.diagnosis import inspection
from callready.release.bundle import APPLY
from callready.release.facts import Facts, host_script, parse, script

# A recording that ends when it is asked to, and says so; and egress, which ends when it is.
ASKED = "import signal, sys; signal.sigwait([signal.SIGINT, signal.SIGTERM]); sys.exit(7)"
DEAF = (
    "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; print(flush=True); "
    "time.sleep(60)"
)
# What a host would be asked to do; this machine is not.
SYSTEMCTL = 'systemctl() { echo "systemctl $*"; }; sleep() { command sleep 0.01; }\n'


class Machine:
    """A folder that is the whole host for the script."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "var/lib/egress"
        self.environment = {
            **os.environ,
            "CALLREADY_ROOT": str(root),
            "CALLREADY_EGRESS_UID": str(os.geteuid()),
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        for name in ("tmp", "recordings", "backup", "orphans"):
            (self.folder / name).mkdir(parents=True)
        (root / "run/callready").mkdir(parents=True)

    def apply(self, *steps: str) -> subprocess.Popen[str]:
        """Steps, as a deploy runs them."""
        here = self.root / "here"
        here.mkdir()
        for name, content in APPLY.items():
            (here / name).write_bytes(content)
        (here / "steps").write_text("\n".join((SYSTEMCTL, *steps)))
        return subprocess.Popen(
            ["sh", here / "apply.sh", here],
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def egress(self, *arguments: str, after: str = "") -> str:
        """What the script says, with more of it; it must succeed."""
        script = SYSTEMCTL + host_script("egress.sh").decode() + after
        done = subprocess.run(
            ["sh", "-s", "--", *arguments],
            input=script,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def process(
        self, name: str, *arguments: str, inside: int = 2, program: str = ASKED, uid: int = -1
    ) -> subprocess.Popen[bytes]:
        """A process that the host says is of egress' container, of this PID inside."""
        started = subprocess.Popen(
            [sys.executable, "-c", f"{program}"],
            stdout=subprocess.PIPE,
            preexec_fn=lambda: signal.pthread_sigmask(
                signal.SIG_BLOCK, [] if program == DEAF else [signal.SIGINT, signal.SIGTERM]
            ),
        )
        self.processes.append(started)
        if program == DEAF:
            assert started.stdout and started.stdout.readline()
        folder = self.root / f"proc/{started.pid}"
        folder.mkdir(parents=True)
        owner = os.geteuid() if uid == -1 else uid
        (folder / "status").write_text(
            f"Name:\t{name}\nPid:\t{started.pid}\nUid:\t{owner}\t{owner}\t{owner}\t{owner}\n"
            f"NSpid:\t{started.pid}\t{inside}\n"
        )
        (folder / "cmdline").write_text("\0".join((name, *arguments, "")))
        threading.Thread(target=self._leave, args=(started, folder)).start()
        return started

    def _leave(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        """As a process leaves /proc."""
        process.wait()
        shutil.rmtree(folder)

    def write(self, path: str, text: str = "media", age: float = 0) -> Path:
        """A file in egress' folders, that many days old."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        at = time.time() - 86400 * age
        os.utime(file, (at, at))
        return file

    def there(self, below: str) -> list[str]:
        """The files in one of egress' folders; the first level is a date in `orphans`."""
        start = self.folder / below
        found = (p.relative_to(start) for p in start.rglob("*") if not p.is_dir() or p.is_symlink())
        return sorted(str(Path(*p.parts[below == "orphans" :])) for p in found)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


HANDLER = ("run-handler", "--config", "redis: {}")


def test_recordings_are_counted_by_the_processes_that_make_them(machine: Machine) -> None:
    machine.process("tini", "--", "egress", inside=1)
    machine.process("egress")
    machine.process("pulseaudio")
    for _ in range(2):
        machine.process("egress", *HANDLER)
    machine.process("egress", "--name=run-handler")
    machine.process("egress", *HANDLER, uid=os.geteuid() + 1)  # somebody else's container
    found = machine.egress(after="list_egress | sed 's/ .*//' | sort")
    assert found.split() == ["egress"] * 2 + ["init", "pulseaudio"] + ["recording"] * 2


def test_a_stop_ends_each_recording_and_leaves_their_helpers_to_them(machine: Machine) -> None:
    init = machine.process("tini", "--", "egress", inside=1)
    recordings = [machine.process("egress", *HANDLER) for _ in range(2)]
    helper = machine.process("Xvfb")
    assert machine.egress("stop") == ""
    assert [process.wait(timeout=10) for process in (init, *recordings)] == [7, 7, 7]
    assert helper.poll() is None


def test_a_recording_that_hears_nothing_is_killed_in_time_and_that_is_said(
    machine: Machine,
) -> None:
    init = machine.process("tini", inside=1, program=DEAF)
    machine.process("egress", *HANDLER, program=DEAF)
    assert "recordings did not end in time: what they have is kept" in machine.egress("stop")
    assert init.wait(timeout=10) == -signal.SIGKILL


def test_what_a_recording_left_is_kept_and_nothing_else(machine: Machine) -> None:
    secret = machine.root / "secret.mp4"
    secret.write_text("root's")
    machine.write("tmp/EG_1/a room.mp4")
    machine.write("tmp/EG_1/-rf.ogg")
    machine.write("tmp/EG_2/line\nbreak.webm")
    machine.write("tmp/EG_2/empty.ogg", "")
    machine.write("tmp/EG_3/chrome/Preferences")
    (machine.folder / "tmp/EG_3/link.mp4").symlink_to(secret)
    (machine.folder / "tmp/EG_4").symlink_to(machine.root)
    os.mkfifo(machine.folder / "tmp/EG_3/pipe.mp4")
    said = machine.egress("keep")
    assert "recordings were cut off: 3 files are kept in" in said
    assert machine.there("orphans") == ["EG_1/-rf.ogg", "EG_1/a room.mp4", "EG_2/line\nbreak.webm"]
    assert list((machine.folder / "tmp").iterdir()) == []
    assert secret.read_text() == "root's"
    (kept,) = (machine.folder / "orphans").iterdir()
    assert sorted(os.listdir(kept)) == ["EG_1", "EG_2"]
    assert (machine.folder / "orphans").stat().st_mode & 0o777 == 0o700


def test_a_start_after_recordings_that_ended_says_nothing(machine: Machine) -> None:
    machine.write("tmp/EG_1/chrome/Preferences")
    machine.write("tmp/EG_1/chrome/icon.png")
    machine.write("tmp/EG_1/empty.mp4", "")
    assert machine.egress("keep") == ""
    assert machine.there("orphans") == []


def test_recordings_that_cannot_be_kept_keep_egress_from_starting(machine: Machine) -> None:
    """Its entrypoint would delete them."""
    machine.write("tmp/EG_1/a.mp4")
    (machine.folder / "orphans").rmdir()
    machine.write("orphans", "a file")
    with pytest.raises(AssertionError, match="orphans"):
        machine.egress("keep")
    assert machine.there("tmp") == ["EG_1/a.mp4"]


MARK = "run/callready/egress.full"
HUGE = str(2**62)


def test_egress_is_held_as_long_as_there_is_little_room(machine: Machine) -> None:
    init = machine.process("tini", inside=1)
    assert machine.egress("space", "1") == "" and init.poll() is None
    said = machine.egress("space", HUGE)
    assert "no new recording starts:" in said and f"fewer than {HUGE} (egress.min_free)" in said
    assert init.wait(timeout=10) == 7  # it was asked to end after those that run
    assert (machine.root / MARK).exists()
    assert machine.egress("space", HUGE) == ""  # once is enough
    said = machine.egress("space", "1")
    assert "there is room for recordings again" in said
    assert "systemctl start --no-block callready-egress.service" in said
    assert not (machine.root / MARK).exists()


@pytest.mark.parametrize("mark", ["full", "draining"])
def test_what_is_held_does_not_start(machine: Machine, mark: str) -> None:
    assert machine.egress("may-start") == ""
    (machine.root / f"run/callready/egress.{mark}").touch()
    with pytest.raises(AssertionError, match="not started: "):
        machine.egress("may-start")


def test_it_is_not_let_go_for_a_little_more_room(machine: Machine) -> None:
    free = "free_bytes() { echo %s; }\nlook_at_space 100\n"
    assert "no new recording" in machine.egress(after=free % 99)
    assert machine.egress(after=free % 109) == ""
    assert "room for recordings again" in machine.egress(after=free % 110)


@pytest.mark.parametrize(("free", "ended"), [(2 * 67108864, False), (67108864, True)])
def test_recordings_are_ended_while_their_files_still_fit(
    machine: Machine, free: int, ended: bool
) -> None:
    machine.write("tmp/EG_1/a.mp4", "x" * 100_000)
    recording = machine.process("egress", *HANDLER)
    said = machine.egress(after=f"free_bytes() {{ echo {free}; }}\nlook_at_space {HUGE}\n")
    assert ("recordings are ended now" in said) == ended
    if ended:
        assert recording.wait(timeout=10) == 7
    assert (recording.poll() is None) != ended


def test_a_deploy_that_died_holds_egress_no_more(machine: Machine) -> None:
    mark = machine.root / "run/callready/egress.draining"
    mark.write_text(f"{os.getpid()}\n")
    assert machine.egress(after="look_at_deploy") == "" and mark.exists()
    gone = machine.process("sh")
    gone.kill()
    gone.wait()
    mark.write_text(f"{gone.pid}\n")
    said = machine.egress(after="look_at_deploy")
    assert "systemctl start --no-block callready-egress.service" in said and not mark.exists()


def test_only_what_egress_wrote_there_and_is_older_is_removed(machine: Machine) -> None:
    outside = machine.root / "outside"
    outside.mkdir()
    (outside / "old.mp4").write_text("root's")
    os.utime(outside / "old.mp4", (0, 0))
    machine.write("recordings/call/old.mp4", age=8)
    machine.write("recordings/call/old.json", age=8)
    machine.write("recordings/call/new.mp4", age=6)
    machine.write("recordings/old.mp4", age=8)
    for folder in ("tmp", "backup", "orphans"):
        machine.write(f"{folder}/old.mp4", age=8)
    (machine.folder / "recordings/link").symlink_to(outside)
    (machine.folder / "recordings/old-link.mp4").symlink_to(outside / "old.mp4")
    os.utime(machine.folder / "recordings/old-link.mp4", (0, 0), follow_symlinks=False)
    assert "3 files in" in machine.egress(after="expire 7")
    assert machine.there("recordings") == ["call/new.mp4", "link", "old-link.mp4"]
    assert (outside / "old.mp4").exists()
    assert [machine.there(f) for f in ("tmp", "backup")] == [["old.mp4"]] * 2
    assert machine.egress(after="expire 7") == ""


def test_files_of_others_in_the_folder_stay(machine: Machine) -> None:
    machine.write("recordings/old.mp4", age=8)
    assert machine.egress(after=f"EGRESS_UID={os.geteuid() + 1}; expire 7") == ""
    assert machine.there("recordings") == ["old.mp4"]


def test_a_folder_that_is_empty_for_as_long_goes_too(machine: Machine) -> None:
    for name in ("old", "new"):
        (machine.folder / "recordings" / name).mkdir()
    os.utime(machine.folder / "recordings/old", (0, 0))
    machine.egress(after="expire 7")
    assert os.listdir(machine.folder / "recordings") == ["new"]


def test_what_is_known_of_recordings_is_there_as_metrics(machine: Machine) -> None:
    machine.process("tini", inside=1)
    machine.process("pulseaudio")
    machine.process("egress", *HANDLER)
    machine.write("orphans/now/EG_1/a.mp4")
    machine.write("backup/EG_2/b.ogg")
    machine.write("backup/EG_2/b.json")
    (machine.root / MARK).touch()
    lines = machine.egress(after="free_bytes() { echo 12345678901; }\nprint_metrics 5000000000\n")
    found = dict(line.split() for line in lines.splitlines() if not line.startswith("#"))
    assert found == {
        "callready_egress_recordings": "1",
        "callready_egress_pulseaudio": "1",
        "callready_egress_free_bytes": "12345678901",
        "callready_egress_min_free_bytes": "5000000000",
        "callready_egress_held": "1",
        "callready_egress_draining": "0",
        "callready_egress_orphans": "1",
        "callready_egress_backup": "1",
    }
    named = [line.split()[2] for line in lines.splitlines() if line.startswith("# TYPE")]
    assert sorted(named) == sorted(found)


@pytest.mark.parametrize("is_watched", [True, False])
def test_metrics_are_where_a_monitor_reads_them_if_there_is_one(
    machine: Machine, is_watched: bool
) -> None:
    read = machine.root / "run/callready-measure"
    if is_watched:
        read.mkdir()
    machine.write("recordings/old.mp4", age=8)
    machine.egress(after="sleep() { exit; }; watch 1 7")
    written = (machine.root / "run/callready/egress.prom").read_text()
    assert "callready_egress_held 0" in written
    assert machine.there("recordings") == []
    if is_watched:
        assert (read / "egress.prom").read_text() == written and len(os.listdir(read)) == 1
        assert (read / "egress.prom").stat().st_mode & 0o777 == 0o644
    assert read.exists() == is_watched


DRAINING = "run/callready/egress.draining"
RESTART = "restart callready-egress.service"


def said(deploy: subprocess.Popen[str]) -> list[str]:
    """What a deploy says until its end."""
    assert deploy.stdout
    with deploy.stdout:
        lines = deploy.stdout.read().splitlines()
    deploy.wait()
    return lines


def test_a_deploy_waits_until_the_last_recording_has_ended(machine: Machine) -> None:
    init = machine.process("tini", inside=1)
    recording = machine.process("egress", *HANDLER)
    deploy = machine.apply("drain_egress 100000", "echo drained", RESTART)
    assert init.wait(timeout=10) == 7  # it takes no new ones
    assert (machine.root / DRAINING).exists() and recording.poll() is None
    assert deploy.stdout
    first = [deploy.stdout.readline().rstrip("\n") for _ in range(2)]
    assert first == [
        "waiting up to 100000 s for recordings to end; no new one starts",
        "recordings that run: 1, 100000 s left",
    ]
    recording.kill()
    lines = said(deploy)
    end = lines[lines.index("drained") :]
    assert end == [
        "drained",
        "restarting callready-egress.service",
        "systemctl reset-failed callready-egress.service",
        "systemctl restart callready-egress.service",
    ]
    assert not (machine.root / DRAINING).exists()


def test_what_runs_after_that_time_is_ended(machine: Machine) -> None:
    recording = machine.process("egress", *HANDLER)
    lines = said(machine.apply("drain_egress 2", "echo drained", RESTART))
    assert recording.wait(timeout=10) == 7 and "drained" in lines


@pytest.mark.parametrize("how", ["a later step fails", "SIGINT", "nobody listens"])
def test_a_deploy_that_stops_while_it_drains_leaves_egress_to_serve(
    machine: Machine, how: str
) -> None:
    """What runs is not cut off; the unit starts again after the last one, by itself."""
    recording = machine.process("egress", *HANDLER)
    seconds = 1 if how == "a later step fails" else 100_000
    deploy = machine.apply(f"drain_egress {seconds}", "fail no more")
    assert deploy.stdout and deploy.stdout.readline()
    if how == "nobody listens":
        deploy.stdout.close()
        deploy.wait(timeout=30)
    else:
        if how == "SIGINT":
            deploy.send_signal(signal.SIGINT)
        lines = said(deploy)
        assert "systemctl start --no-block callready-egress.service" in lines
        if how == "SIGINT":
            assert any("to end them now, with complete files: systemctl" in line for line in lines)
    assert deploy.returncode != 0
    assert not (machine.root / DRAINING).exists()
    assert (recording.poll() is None) == (how != "a later step fails")


def test_the_survey_tells_what_runs_and_what_is_held(machine: Machine) -> None:
    survey = script(dict.fromkeys(("PACKAGES", "FILES", "USERS", "UNITS", "IMAGES"), ()))
    body = survey.replace("survey < /dev/null", "print_recordings; printf 'end\\n'")
    machine.process("egress", *HANDLER)
    machine.process("egress", *HANDLER)
    run = ["sh", "-s"]

    def look() -> Facts:
        done = subprocess.run(
            run, input=body, env=machine.environment, text=True, capture_output=True, check=True
        )
        return parse(done.stdout.splitlines())

    assert (look().recordings, look().held) == (2, None)
    machine.egress("space", HUGE)
    free, least = look().held or (0, 0)
    assert 0 < free < least == int(HUGE)
    shutil.rmtree(machine.folder)
    assert look().recordings == 0


def test_an_inspection_looks_itself(machine: Machine) -> None:
    """And believes nothing that the host has found before."""
    installed = machine.root / "usr/local/lib/callready/egress"
    inspect = host_script("common.sh").decode() + inspection.SCRIPT.read_text()
    body = inspect.replace("inspect < /dev/null", "print_recordings")

    def look() -> list[str]:
        run, given = ["sh", "-s"], machine.environment
        done = subprocess.run(
            run, input=body, env=given, text=True, capture_output=True, check=True
        )
        return done.stdout.splitlines()

    assert look() == []
    installed.parent.mkdir(parents=True)
    installed.write_bytes(host_script("egress.sh"))
    installed.chmod(0o755)
    (machine.root / "run/callready/egress.prom").write_text("callready_egress_pulseaudio 1\n")
    assert "egress\tpulseaudio\t0" in look()
    machine.process("pulseaudio")
    assert "egress\tpulseaudio\t1" in look()

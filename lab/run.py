"""Running things: progress on the terminal, commands, the lock, groups of processes."""

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lab import plan

STARTED = time.monotonic()


class LabError(Exception):
    """Something an operator can mend; the message says what and where."""


def say(message: str) -> None:
    """Print one line of progress with the seconds since this command began."""
    line = f"[lab {time.monotonic() - STARTED:5.1f} s] {message}\n"
    print(line, end="", flush=True)  # one write: several threads report at once


def run(*argv: str | Path, input: str | None = None, check: bool = True) -> str:
    """Run a short command and return what it printed.

    Raises:
        LabError: it failed (unless ``check`` is false), with its own words.
    """
    done = subprocess.run(
        [str(arg) for arg in argv], input=input, text=True, capture_output=True, check=False
    )
    if check and done.returncode:
        command = " ".join(str(arg) for arg in argv)
        raise LabError(f"`{command}` failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout


def wait_until(condition: Callable[[], bool], seconds: float, failure: str) -> None:
    """Poll until ``condition()`` is true; raise LabError(``failure``) after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise LabError(failure)
        time.sleep(0.05)


def abandoned(name: str) -> bool:
    """Whether the command that made something is gone, whose process id its name ends in.

    What is made under the lab's lock has no process id: found by another holder, it is abandoned.
    """
    return not Path(f"/proc/{name.rpartition('-')[2]}").exists()


def remove_tree(path: Path) -> None:
    """Delete a folder, after unmounting whatever is mounted in it.

    A root image or a host's root holds mounts while it is built or runs: `rm` must never walk
    into the machine's own /dev or /sys through one of them.
    """
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if Path(m).is_relative_to(path)), reverse=True):
        run("umount", "--lazy", mount)
    run("rm", "-rf", "--one-file-system", path)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold the machine-wide lab lock, which dies with its holder; wait for another's command.

    Raises:
        LabError: not root, or the other command has not ended after 15 minutes (images take some).
    """
    if os.geteuid():
        raise LabError("the lab needs root: start it with sudo")
    if _held.count:
        yield  # this process holds it already
        return
    descriptor = _lock_file()
    _held.count += 1
    try:
        yield
    finally:
        _held.count -= 1
        os.close(descriptor)


class _held:
    count = 0


def _lock_file(patience: float = 900) -> int:
    end = time.monotonic() + patience
    told = 0.0
    while True:
        descriptor = os.open(plan.LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # `down` deletes the file: a lock on a deleted one would exclude nobody
            if plan.LOCK.exists() and os.path.samestat(os.fstat(descriptor), plan.LOCK.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{' '.join(sys.argv)} (pid {os.getpid()})".encode())
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 500).decode(errors="replace")
            if time.monotonic() > end:
                raise LabError(
                    f"another lab command has been running for {patience:.0f} s: {holder}. "
                    "Wait for it or end it, then try again."
                ) from None
            if time.monotonic() - told > 4:
                told = time.monotonic()
                say(f"waiting for another lab command to end: {holder}")
        os.close(descriptor)
        time.sleep(0.2)


class Group:
    """Processes of the lab that belong together, as a cgroup of their own.

    The kernel keeps the book: whatever a host or service has forked is in its group, also after
    the command that started it was killed, so it can be found and ended without trusting a pid
    file and without touching anybody else's process. Hosts need separate groups in any case:
    started from the same cgroup, their systemds would share one tree.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # cgroup2 first; nspawn also asks systemd's own v1 hierarchy where there is one
        self.folders = [mount / plan.CGROUP / name for mount in _cgroup_mounts()]

    def start(self, *argv: str | Path) -> None:
        """Start a daemon in this group; its output goes to a log file named after the group."""
        plan.LOGS.mkdir(parents=True, exist_ok=True)
        with (plan.LOGS / f"{self.name}.log").open("ab") as log:
            # The fork comes after entering the group: whoever asks next finds it running.
            command = self._entering("setsid", "--fork", *argv)
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", check=False
            )
        if done.returncode:
            raise LabError(f"{self.name}: cannot be started; see {log.name}")

    def stream(self, *argv: str | Path, env: dict[str, str] | None = None) -> None:
        """Run a long command in this group and show its latest line every four seconds.

        Raises:
            LabError: it failed; the last lines it printed are in the message.
        """
        began, shown = time.monotonic(), time.monotonic()
        lines: list[str] = []
        process = subprocess.Popen(
            self._entering(*argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=env,
        )
        assert process.stdout is not None
        reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
        reader.start()
        while reader.is_alive():
            reader.join(0.1)
            if time.monotonic() - shown > 4:
                shown = time.monotonic()
                latest = lines[-1].strip()[:90] if lines else "started"
                say(f"{self.name} ({shown - began:.0f} s): {latest}")
        status = process.wait()
        self.kill()
        if status:
            tail = "".join(lines[-6:])
            raise LabError(f"{self.name}: `{argv[0]}` failed ({status}); it said last:\n{tail}")

    def _entering(self, *argv: str | Path) -> list[str]:
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
        enter = "; ".join(f"echo 0 > '{folder}/cgroup.procs'" for folder in self.folders)
        script = f'set -e; umask 022; {enter}; exec "$@"'
        return ["sh", "-c", script, self.name, *(str(arg) for arg in argv)]

    def running(self) -> bool:
        """True while any process of the group lives."""
        try:
            return "populated 1" in (self.folders[0] / "cgroup.events").read_text()
        except FileNotFoundError:
            return False

    def pids(self, subfolder: str) -> list[int]:
        """Process ids in one cgroup below this group's."""
        try:
            text = (self.folders[0] / subfolder / "cgroup.procs").read_text()
        except OSError:  # gone, or going just now
            return []
        return [int(pid) for pid in text.split()]

    def kill(self) -> None:
        """SIGKILL every process of the group at once (cgroup.kill, Linux 5.14) and remove it."""
        with contextlib.suppress(FileNotFoundError):
            (self.folders[0] / "cgroup.kill").write_text("1")
        wait_until(lambda: not self.running(), 10, f"{self.name}: processes do not end on SIGKILL")
        wait_until(self._removed, 10, f"{self.name}: the cgroup cannot be removed")

    def _removed(self) -> bool:
        for top in self.folders:
            for folder, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):  # busy for a moment after the last exit
                    os.rmdir(folder)
        return not any(folder.exists() for folder in self.folders)


def groups() -> list[Group]:
    """Every group that exists, also those of a run that was killed."""
    names = {
        folder.name
        for mount in _cgroup_mounts()
        if (mount / plan.CGROUP).exists()
        for folder in (mount / plan.CGROUP).iterdir()
        if folder.is_dir()
    }
    return [Group(name) for name in sorted(names)]


def remove_groups() -> None:
    """Kill and remove every group of the lab."""
    for group in groups():
        group.kill()
    for mount in _cgroup_mounts():
        if (mount / plan.CGROUP).exists():
            os.rmdir(mount / plan.CGROUP)


def _cgroup_mounts() -> list[Path]:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    unified = [Path(m[1]) for m in mounts if m[2] == "cgroup2"]
    named = [Path(m[1]) for m in mounts if m[2] == "cgroup" and "name=systemd" in m[3]]
    if not unified:
        raise LabError("no cgroup2 file system is mounted: the lab's hosts cannot boot here")
    return unified[:1] + named[:1]

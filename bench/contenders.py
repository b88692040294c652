"""Who is measured: how each is started, and how it is known that it did its work."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.world import ROOT, BenchError, Line
from callready.release.bundle import pack
from lab.plan import CACHE

HERE = Path(__file__).parent
PLAYBOOK = HERE / "playbook.yml"
VENV = CACHE / "bench-venv"
Command = list[str | Path]
PYINFRA = Path(sys.executable).parent / "pyinfra"
CONFIG = {"callready": "/etc/coturn/calls.conf", "bench": "/etc/bench/calls.conf"}
UNIT = {"callready": "turnserver@calls.service", "bench": "benchturn@calls.service"}


@dataclass(frozen=True)
class Result:
    """What a run says of itself."""

    hosts: int
    changed: int


class Contender:
    """Something that brings hosts to a state; `side` is the set of resources it works on."""

    name: str
    side = "bench"

    def run(self, line: Line) -> tuple[float, Result]:
        """Work on all hosts of a line once; wall seconds and what was done."""
        raise NotImplementedError

    def measure(self, line: Line, change: bool) -> float:
        """Wall seconds of one run with nothing or with one file to change.

        Raises BenchError unless every host was reached and changed, or none was, as it should be.
        """
        if change:
            line.world.change(self.side)
        seconds, result = self.run(line)
        if result.hosts != line.count:
            raise BenchError(f"{self.name} reached {result.hosts} of {line.count} hosts")
        if bool(result.changed) != change:
            raise BenchError(f"{self.name} made {result.changed} changes, asked for {int(change)}")
        if change:
            quota = line.world.quotas[self.side]
            written = f"grep -x user-quota={quota} {CONFIG[self.side]}"
            check = f"{written} && systemctl is-active {UNIT[self.side]} || {{ echo no; exit 1; }}"
            line.run({host.fqdn: check for host in line.hosts})
        return seconds


class Pyinfra(Contender):
    """`pyinfra INVENTORY DEPLOY`, literally; `folder` is the callready it belongs to, if any."""

    def __init__(self, name: str, deploy: Path, folder: Path | None = None) -> None:
        self.name, self.deploy, self.folder = name, deploy, folder
        self.side = "callready" if folder else "bench"

    def run(self, line: Line) -> tuple[float, Result]:
        """Hosts from its connections, changes from its table of results."""
        options = [] if self.folder else _data(line)
        command: Command = [PYINFRA, line.inventory, self.deploy, *options]
        folder = self.folder or line.world.folder
        # pyinfra looks there last: another callready on the path would be the one that is measured.
        settings = {"PYINFRA_YES": "1", "PYTHONPATH": str(folder)}
        seconds, output = timed(command, folder, settings)
        total = re.search(r"Grand total +\S+ +(\S+) +(\S+)", output)
        if not total or total[2] != "-":
            raise BenchError(f"{self.name}:\n{output[-3000:]}")
        changed = 0 if total[1] == "-" else int(total[1])
        return seconds, Result(len(re.findall(r"\] Connected$", output, re.MULTILINE)), changed)


class Ansible(Contender):
    """`ansible-playbook` with pipelining, as many forks as hosts, and a connection kept for the
    run (not from one run to the next: that would be a deploy within a minute of the last)."""

    name = "Ansible"

    def run(self, line: Line) -> tuple[float, Result]:
        """Hosts and changes from its recap."""
        sockets = line.world.folder / "cp"
        sockets.mkdir()
        settings = {
            "ANSIBLE_HOME": str(line.world.folder / "ansible"),
            "ANSIBLE_FORKS": str(max(5, line.count)),
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(sockets),
            "ANSIBLE_SSH_ARGS": f"-F {line.ssh[2]} -o ControlMaster=auto -o ControlPersist=60s",
            "ANSIBLE_PYTHON_INTERPRETER": "/usr/bin/python3",
            "ANSIBLE_NOCOLOR": "1",
        }
        extra = [f"-e{key}={shlex.quote(value)}" for key, value in line.world.variables().items()]
        inventory = line.inventory.with_suffix(".ini")
        command: Command = [ansible_playbook(), "-i", inventory, PLAYBOOK, *extra]
        try:
            seconds, output = timed(command, line.world.folder, settings)
        finally:
            for socket in sockets.iterdir():
                subprocess.run(
                    ["ssh", "-O", "exit", "-S", socket, "any"], capture_output=True, check=False
                )
            shutil.rmtree(sockets)
        recap = re.findall(r"changed=(\d+) +unreachable=0 +failed=0", output)
        return seconds, Result(len(recap), sum(map(int, recap)))


class Floor(Contender):
    """One ssh running one script a host, all at once."""

    name = "floor"

    def run(self, line: Line) -> tuple[float, Result]:
        """Hosts and changes from what the script printed."""
        known = line.world.variables()
        scripts = {}
        for host in line.hosts:
            files = (line.world.folder / "files" / host.fqdn).iterdir()
            variables = {
                "PACKAGES": known["bench_packages"],
                "RESERVED_PORTS": known["bench_reserved_ports"],
                "BUNDLE": pack({file.name: file.read_bytes() for file in files}),
            }
            head = "".join(f"{key}={shlex.quote(value)}\n" for key, value in variables.items())
            scripts[host.fqdn] = head + (HERE / "floor.sh").read_text()
        began = time.perf_counter()
        printed = line.run(scripts)
        seconds = time.perf_counter() - began
        whole = [text for text in printed.values() if text.endswith("end\n")]
        return seconds, Result(len(whole), sum(text.count("changed ") for text in whole))


def timed(command: Command, folder: Path, settings: dict[str, str]) -> tuple[float, str]:
    """Run a command; wall seconds and all it printed. Raises BenchError if it fails."""
    environment = {**os.environ, **settings}
    # An operator's Python keeps compiled modules.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        words = " ".join(str(word) for word in command[:3])
        raise BenchError(f"`{words}`: exit {done.returncode}:\n{done.stdout[-3000:]}")
    return seconds, done.stdout


def at_commit(commit: str, folder: Path) -> Pyinfra:
    """callready as it was at a commit, laid out in a folder of this one.

    Not a git worktree: the repository would remember that one when this run is killed.
    """
    own = folder / f"callready-{commit}"
    own.mkdir()
    subprocess.run(["tar", "-x", "-C", own], input=git("archive", commit), check=True)
    return Pyinfra(commit, Path("deploy.py"), own)


def find_commit(revision: str) -> str:
    """The short hash. Raises BenchError with git's words if there is no such commit."""
    return git("log", "-1", "--format=%h", revision, "--").decode().strip()


def git(*arguments: str) -> bytes:
    """What git prints about this repository. Raises BenchError with its words if it fails."""
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, check=False)
    if done.returncode:
        raise BenchError(f"git {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout


def _data(line: Line) -> Command:
    return [
        part
        for key, value in line.world.variables().items()
        for part in ("--data", f"{key}={value}")
    ]


@cache
def ansible_playbook() -> Path:
    """Ansible in a virtual environment of its own, made again when its requirements change."""
    wanted = (HERE / "requirements.txt").read_text()
    stamp = VENV / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        print("[bench] installing Ansible", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
        pip = [str(VENV / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--require-hashes", "-r", HERE / "requirements.txt"], check=True)
        stamp.write_text(wanted)
    return VENV / "bin" / "ansible-playbook"


CALLREADY = Pyinfra("callready", Path("deploy.py"), ROOT)
EMPTY = Pyinfra("empty.py", Path("empty.py"))
ORDINARY = Pyinfra("pyinfra's operations", HERE / "ordinary.py")
FLOOR, ANSIBLE = Floor(), Ansible()
ALL = (CALLREADY, EMPTY, FLOOR, ORDINARY, ANSIBLE)

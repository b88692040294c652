"""What a sabotage is: one thing broken on a deployed service as others break it, whom it concerns,
and the causes that are right to be named for it; and the tools that the catalogue breaks with."""

from __future__ import annotations

import itertools
import os
import runpy
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import plan
from tests.support.fleet import PYINFRA, REPOSITORY, Host, eventually

_numbers = itertools.count(1)
# The layers of what needs a monitor, hosts of the groups redis and egress, and several SFUs.
WATCHING, REDIS, RECORDING, CLUSTER = "watching", "redis", "recording", "cluster"


@dataclass(frozen=True)
class Service:
    """A deployed fleet like the lab's: an SFU, a TURN host of pool `calls` and one of pool
    `avatar`, perhaps the app's host, the monitor, those of egress and Redis, and another SFU."""

    inventory: str
    sfu: Host
    turn: Host
    avatar: Host
    app: Host | None = None
    monitor: Host | None = None
    recorder: Host | None = None
    redis: Host | None = None
    other: Host | None = None

    @property
    def hosts(self) -> list[Host]:
        more = (self.app, self.monitor, self.recorder, self.redis, self.other)
        every = (self.sfu, self.turn, self.avatar, *more)
        return list(dict.fromkeys(host for host in every if host))

    @classmethod
    def of(cls, inventory: str) -> Service:
        """The one that an inventory describes."""
        groups = runpy.run_path(str(REPOSITORY / inventory))

        def host(entry: str | tuple[str, Any]) -> Host:
            return Host(plan.find_host(entry if isinstance(entry, str) else entry[0]).name)

        turn = {pool: host(entry) for entry in groups["turn"] for pool in entry[1]["pools"]}
        calls = turn["calls"]
        roles = ("app", "monitor", "egress", "redis")
        app, monitor, recorder, redis = (
            next(map(host, groups.get(each, ())), None) for each in roles
        )
        (sfu, *others), avatar = map(host, groups["livekit"]), turn.get("avatar", calls)
        other = next(iter(others), None)
        return cls(inventory, sfu, calls, avatar, app, monitor, recorder, redis, other)

    def has(self, name: str) -> bool:
        """Whether what a sabotage breaks is here."""
        each = CATALOGUE[name]
        if each.role in ("app", "android"):
            return self.app is not None
        needed = {WATCHING: self.monitor, REDIS: self.redis, RECORDING: self.recorder}
        needed[CLUSTER] = self.other and self.redis
        return needed.get(each.layer, self.sfu) is not None

    def deploy(self) -> None:
        """Have everything be as the inventory says."""
        done = subprocess.run(
            [PYINFRA, self.inventory, "deploy.py"],
            cwd=REPOSITORY,
            env={**os.environ, "PYINFRA_YES": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def host(self, role: str) -> Host | None:
        """By the name of its field; None for what is not a host of the fleet."""
        found = getattr(self, role, None)
        return found if isinstance(found, Host) else None


# What is broken as long as it is open; a command that the verification has to be run by, if any.
Broken = AbstractContextManager[Sequence[str] | None]


@dataclass(frozen=True)
class Sabotage:
    """One of the catalogue.

    Args:
        name: what was done.
        layer: where.
        role: the host that has the cause, a field of `Service`; "here" for this machine's network,
            "android" for the app's checkout, "any" where several are right to be named.
        causes: keys that are right, any of them. also: keys that may be named beside it, since they
            follow from it at other hosts.
        do: breaks it.
        checks: those that are concerned, for `pytest -k`.
    """

    name: str
    layer: str
    role: str
    causes: tuple[str, ...]
    also: tuple[str, ...]
    checks: str
    do: Callable[[Service], Broken]


CATALOGUE: dict[str, Sabotage] = {}


def sabotage(
    layer: str,
    role: str,
    *causes: str,
    also: Sequence[str] = (),
    checks: str = "test_hosts or test_paths",
) -> Callable[[Callable[[Service], Broken]], Callable[[Service], Broken]]:
    """Put a function into the catalogue; its name says what it does. Arguments as `Sabotage`."""

    def add(do: Callable[[Service], Broken]) -> Callable[[Service], Broken]:
        name = do.__name__.replace("_", " ")
        CATALOGUE[name] = Sabotage(name, layer, role, causes, tuple(also), checks, do)
        return do

    return add


@contextmanager
def scripted(host: Host | None, do: str, undo: str) -> Iterator[None]:
    """Run a script as root on a host, and another to undo it."""
    assert host
    try:
        host.root(do)
        yield
    finally:
        host.root(undo)


@contextmanager
def edited(host: Host | None, path: str, sed: str, then: str = ":") -> Iterator[None]:
    """Edit what a path leads to by a sed script, which must change something, and run `then`, again
    once the file is as it was."""
    assert host
    kept = f"/run/sabotage/{next(_numbers)}"
    keep = f"set -e; file=$(readlink -f {path}); mkdir -p {kept}; cp -a $file {kept}/file"
    with scripted(
        host,
        f"{keep}; sed -i '{sed}' $file; ! cmp -s $file {kept}/file || exit 1; {then}",
        f"set -e; cp -a {kept}/file $(readlink -f {path}); rm -r {kept}; {then}",
    ):
        yield


def restarted(unit: str) -> str:
    """A script that restarts a unit and waits until it serves: LiveKit is active before it does."""
    port = {"livekit-server": "7880", "haproxy": "443", "backend": "8000"}.get(unit, "3478")
    listens = f"ss -Hltn sport = :{port} | grep -q ."
    wait = f"timeout 60 sh -c 'until {listens}; do sleep 0.1; done'"
    return f"systemctl restart {unit}; {wait}"


@contextmanager
def dropped_in(host: Host | None, unit: str, lines: str, then: str = ":") -> Iterator[None]:
    """A drop-in of somebody else for a unit."""
    folder = f"/etc/systemd/system/{unit}.service.d"
    file = f"{folder}/zz-others.conf"
    reload = f"systemctl daemon-reload; {then}"
    with scripted(
        host,
        f"mkdir -p {folder}; printf '[Service]\\n{lines}\\n' > {file}; {reload}",
        f"rm {file}; {reload}",
    ):
        yield


@contextmanager
def signalled(host: Host | None, unit: str, do: str = "STOP", undo: str = "CONT") -> Iterator[None]:
    """All processes of a unit get a signal, and another in the end."""
    send = f"systemctl kill --kill-whom=all -s {{}} {unit}"
    with scripted(host, send.format(do), send.format(undo)):
        yield


@contextmanager
def killed_again_and_again(host: Host | None, unit: str, seconds: int) -> Iterator[None]:
    """A unit's process has died some times, and dies every so many seconds; systemd starts it again
    each time."""
    assert host
    kill = f"systemctl kill -s KILL {unit}"
    # At no regular intervals: that is what a timer does, which outlives the mending for a while.
    begun = f"for pause in 3 6 3; do {kill}; sleep $pause; done; {kill}"
    loop = f"{begun}; while sleep {seconds}; do {kill}; sleep 4; {kill}; done"
    restarts = f"systemctl show -P NRestarts {unit}"
    with scripted(
        host,
        f'systemd-run -q --unit=others-kill sh -c "{loop}"',
        f"systemctl stop others-kill; {restarted(unit)}; systemctl reset-failed {unit}",
    ):
        eventually(lambda: int(host.root(restarts)) > 3)
        yield


def sqlite(host: Host, pool: str, statement: str) -> None:
    """Change rows of a pool's database, as the user that it belongs to."""
    file = f"/var/lib/turn/{pool}.db"
    host.root(f'sqlite3 -cmd ".timeout 5000" {file} "{statement}"')


@contextmanager
def rows(host: Host | None, pool: str, do: str, undo: str) -> Iterator[None]:
    """SQL that changes a pool's database, and SQL that undoes it."""
    assert host
    sqlite(host, pool, do)
    try:
        yield
    finally:
        sqlite(host, pool, undo)


@contextmanager
def named(name: str, *addresses: str) -> Iterator[Sequence[str]]:
    """Callers find these addresses by a host's name, by an /etc/hosts that is seen by what is run
    by the command that this gives."""
    file = Path(f"/run/sabotage-hosts-{next(_numbers)}")
    lines = Path("/etc/hosts").read_text().splitlines()
    kept = [line for line in lines if name not in line.split()]
    file.write_text("\n".join([*kept, *(f"{address} {name}" for address in addresses), ""]))
    try:
        mount = f'mount --bind {file} /etc/hosts; exec "$@"'
        yield "unshare", "--mount", "sh", "-ec", mount, "named"
    finally:
        file.unlink()

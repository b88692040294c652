"""What the deploy files call: callready's pyinfra operations, and the run they belong to."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Generator
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from pyinfra import logger
from pyinfra.api.command import FunctionCommand, StringCommand
from pyinfra.api.host import Host
from pyinfra.api.inventory import Inventory
from pyinfra.api.operation import operation
from pyinfra.api.state import State

from callready.release.android import REACT_NATIVE
from callready.release.node import Node
from callready.release.plan import content_name
from callready.rollout.deployment import Deployment
from callready.rollout.remote import as_root
from callready.rollout.run import LOGS, Declare, Refused, Run, command, prepare

_lock = Lock()
_runs: WeakKeyDictionary[State, Run] = WeakKeyDictionary()


def run(inventory: Inventory, declare: Declare, verb: str = "deploy") -> Run:
    """The run that this deploy file is part of; raises Refused with everything that is wrong
    before anything is changed.

    pyinfra runs a deploy file once a host, concurrently: the first one prepares for all.

    Args:
        inventory: pyinfra's.
        declare: the roles.
        verb: `deploy`, `rollback` or `remove`.
    """
    with _lock:
        if inventory.state not in _runs:
            _runs[inventory.state] = prepare(inventory, declare, verb)
        return _runs[inventory.state]


@operation()
def install(deployment: Deployment) -> Generator[Any, None, None]:
    """Install the programs that a host lacks. When it fails on one host, none is switched."""
    if deployment.plan.installing:
        yield FunctionCommand(_phase, ("install",), {})


@operation()
def switch(deployment: Deployment) -> Generator[Any, None, None]:
    """Bring a host to its release in its turn, and have it confirmed by what callers see."""
    if deployment.plan.changes_host:
        yield FunctionCommand(_phase, ("switch",), {})


@operation()
def prune(deployment: Deployment) -> Generator[Any, None, None]:
    """Remove what no host uses any more, when the whole fleet is confirmed."""
    if deployment.plan.pruning:
        yield FunctionCommand(_phase, ("prune",), {})


def _phase(state: State, host: Host, phase: str) -> bool:
    done: bool = getattr(_runs[state.inventory.state].rollout, phase)(host.name)
    return done


def history(inventory: Inventory, host: Host) -> None:
    """Print who deployed what when on a host; raises Refused if the inventory is wrong."""
    node = Node(host.name, command(inventory).fleet)
    if not node.settings.has_release:
        return
    _, output = as_root(host, node, "cat /var/lib/callready/history 2>/dev/null")
    for line in output.stdout_lines:
        logger.info(f"{host.print_prefix}{line}")


def logs(inventory: Inventory, host: Host) -> None:
    """Print the last lines of the monitor's logs that are what `--data log_…=…` says; raises
    Refused if the inventory is wrong."""
    node = Node(host.name, command(inventory).fleet)
    if not node.settings.watches:
        return
    choices = inventory.state.inventory.get_override_data()
    wanted = [f"{what}={choices[key]}" for key, what in LOGS.items() if choices.get(key)]
    show = ["/usr/local/lib/callready/log-receiver", "show", "/var/log/callready", "1000"]
    _, output = as_root(host, node, shlex.join([*show, *wanted]))
    for line in output.stdout_lines:
        logger.info(line)


class Checkout(NamedTuple):
    """What an app's checkout has: its manifest (None without one), our files that differ, and
    whether it is a React Native project."""

    manifest: str | None
    differing: list[str]
    is_react_native: bool


def read_checkout(
    host: Host, root: str, files: dict[str, bytes], manifest: str, build_files: list[str]
) -> Checkout:
    """Compare files in a checkout with what they should be; raises Refused without one."""
    names, react = shlex.join(files), shlex.join([REACT_NATIVE, "--", *build_files])
    script = (
        f"cd {shlex.quote(root)} || exit 3; grep -qsE {react} && echo yes || echo no; "
        f"sha256sum -- {names} 2>/dev/null; echo; "
        f"cat -- {shlex.quote(manifest)} 2>/dev/null; true"
    )
    ok, output = host.run_shell_command(StringCommand(script))
    if not ok:
        raise Refused(f"{host.name}: android.checkout: {root} is not a folder on this host")
    react_native, _, rest = output.stdout.partition("\n")
    sums, _, text = f"\n{rest}".partition("\n\n")
    found = {line[66:]: line[:64] for line in sums.splitlines() if line.strip()}
    differing = [p for p, body in files.items() if found.get(p) != content_name(body)]
    return Checkout(text or None, differing, react_native == "yes")


@operation()
def checkout(root: str, files: dict[str, bytes]) -> Generator[Any, None, None]:
    """Write files below `root`, each whole or not at all, as the user that connects."""
    if not files:
        return
    steps = ["set -eu", f"cd {shlex.quote(root)}"]
    for path, body in files.items():
        target, data = shlex.quote(path), base64.b64encode(body).decode()
        steps.append(f'mkdir -p "$(dirname {target})"')
        steps.append(f"printf %s {data} | base64 -d > {target}.callready-new")
        steps.append(f"mv {target}.callready-new {target}")
    yield StringCommand("sh -s", _stdin="\n".join(steps))

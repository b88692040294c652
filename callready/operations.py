"""The pyinfra side: survey every host at once, show the plan, roll the releases out."""

from __future__ import annotations

import base64
import difflib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Generator, Iterable
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import click
import gevent
from paramiko import SSHException
from pyinfra import logger
from pyinfra.api.command import FunctionCommand, StringCommand
from pyinfra.api.exceptions import DeployError
from pyinfra.api.host import Host
from pyinfra.api.inventory import Inventory
from pyinfra.api.operation import operation
from pyinfra.connectors.util import CommandOutput
from pyinfra.context import state

from callready.release import facts, refusals
from callready.release.declaration import NONE, Plan, content_name, media_ports
from callready.release.node import Node
from callready.rollout import gate
from callready.rollout.rollout import Rollout
from callready.secrets.loading import validate
from callready.secrets.masking import mask
from callready.settings.fleet import Fleet
from callready.settings.problem import SettingsError

PASSWORD_END = "--end-of-password--"
Declare = Callable[[Fleet, str, tuple[int, ...]], Node]

# What `--data do=…` asks for instead of a deploy.
VERBS = ("deploy", "rollback", "remove", "history")
OPTIONS = ("do", "keep_drift")

_lock = Lock()
# By run (its pyinfra State): deploy.py sees the inventory through a proxy object.
_fleets: dict[int, Fleet] = {}
_deployments: dict[int, dict[str, Deployment]] = {}
_rollouts: dict[int, Rollout] = {}


class Refused(DeployError):
    """Something for the operator to mend; shown without a line of our code."""

    # gevent sets it when it raises the error again, and pyinfra prints where that was.
    __traceback__ = property(lambda self: None, lambda self, value: None)


class Back(NamedTuple):
    """The release before the running one, the run that replaced it, and its manifest."""

    release: str
    run: str
    manifest: list[tuple[str, ...]]


class Deployment:
    """One host's declared state, what it is now, and the way from here to there."""

    def __init__(
        self, node: Node, found: facts.Facts, plan: Plan | None = None, back: Back | None = None
    ) -> None:
        self.node = node
        self.facts = found
        self.back = back
        self.plan: Plan = node.release.plan(found) if plan is None else plan

    @cached_property
    def probes(self) -> list[gate.Spec]:
        """What callers need of this host, after the change; on the way back, as far as the earlier
        release has it."""
        specs = gate.probes(self.node, certificates=not self.node.release.unissued(self.facts))
        if self.back is None:
            return specs
        promised = {line[1] for line in self.back.manifest if line[0] == "promise"}
        return [{**s, "any_key": True} for s in specs if s["promise"] in promised]

    @property
    def busy(self) -> dict[str, int]:
        """Media ports that each of our units has open now."""
        services = self.node.release.services.values()
        return {service.unit: media_ports(self.facts, service) for service in services}


def deployments(inventory: Inventory, declare: Declare) -> dict[str, Deployment]:
    """The files of the whole fleet, then one survey of every host to be deployed; raises Refused
    with everything that is wrong before anything is changed.

    pyinfra runs deploy.py once a host, concurrently: the first one here does the work for all.
    """
    with _lock:
        known = _deployments.get(id(inventory.state))
        if known is None:
            known = _deployments[id(inventory.state)] = _prepare(inventory, declare)
    return known


def _prepare(inventory: Inventory, declare: Declare) -> dict[str, Deployment]:
    fleet = load_fleet(inventory)
    declared = {name: declare(fleet, name, ()) for name in fleet.hosts}
    connected = set(inventory.get_active_hosts())
    ours = [host for host in inventory if _is_ours(declared[host.name])]
    active = [host for host in ours if host in connected]
    if (do := verb(inventory)) not in VERBS:
        raise Refused(f"--data do={do}: it is one of {', '.join(VERBS)}")
    looked: dict[str, Deployment] = {}
    refused: list[str] = []

    def look(host: Host) -> None:
        # gevent would print the traceback of what leaves a greenlet.
        try:
            looked[host.name] = _look(host, fleet, declare, declared[host.name], do)
        except (SettingsError, facts.SurveyError, SSHException, OSError, EOFError) as error:
            refused.append(f"{fleet.source}: {host.name}: {error}")

    gevent.joinall([gevent.spawn(look, host) for host in active], raise_error=True)
    # In the inventory's order: the first one of a role changes first.
    ready = {host.name: looked[host.name] for host in active if host.name in looked}
    if do == "rollback":
        _keep_older(ready)
    for name in ready:
        refused += [f"{fleet.source}: {name}: {why}" for why in _reasons(ready[name], do)]
    _refuse(refused)
    for host in active:
        show(host, ready[host.name])
    if _option(inventory, "keep_drift"):
        _refuse(
            f"{fleet.source}: {name}: {path} was edited on the host, and keep_drift is set: take "
            "the edit over into the inventory, or deploy without keep_drift"
            for name, deployment in ready.items()
            for path in deployment.plan.drifted
        )
    _rollouts[id(inventory.state)] = Rollout(
        {host.name: host for host in inventory}, ready, len(ready) == len(ours)
    )
    if report := os.environ.get("CALLREADY_REPORT"):
        summary = {name: {"changes": d.plan.changes, "busy": d.busy} for name, d in ready.items()}
        Path(report).write_text(json.dumps(summary))  # for callready.rotate
    return ready


def _refuse(reasons: Iterable[str]) -> None:
    if lines := list(reasons):
        raise Refused("nothing was changed\n" + "\n".join(lines))


def _keep_older(deployments: dict[str, Deployment]) -> None:
    """Roll back only what the last deploy of these hosts has changed."""
    last = max((d.back.run for d in deployments.values() if d.back), default="")
    for deployment in deployments.values():
        if deployment.back and deployment.back.run != last:
            deployment.plan = Plan(notes=[f"the last deploy ({last}) did not change this host"])


def verb(inventory: Inventory) -> str:
    """What this run is to do, one of VERBS."""
    return _option(inventory, "do") or "deploy"


def _is_ours(node: Node) -> bool:
    """Whether a host has something of ours, or may have it still after its last role has gone."""
    return bool(node.release.manifest) or "android" not in node.settings.groups


def _option(inventory: Inventory, name: str) -> str:
    """A choice of this run, from `--data`; empty without it."""
    return str(inventory.state.inventory.get_override_data().get(name) or "")


def _look(host: Host, fleet: Fleet, declare: Declare, node: Node, verb: str) -> Deployment:
    if verb == "history":
        _, output = as_root(host, node, "cat /var/lib/callready/history 2>/dev/null")
        for line in output.stdout_lines:
            logger.info(f"{host.print_prefix}{line}")
        return Deployment(node, facts.Facts(), Plan())
    found = survey(host, node)
    if found.is_stuck and "--dry" not in sys.argv:
        as_root(host, node, "systemctl start callready-revert.service")
        found = survey(host, node)
    node = declare(fleet, host.name, tuple(sorted(found.ssh_ports)))
    if verb == "deploy":
        return Deployment(node, found)
    back = Back(NONE, "", [])
    if verb == "rollback" and not found.folder:
        return Deployment(node, found, Plan())
    if verb == "rollback":
        _, output = as_root(host, node, "sh /usr/local/lib/callready/release previous")
        release, run, *manifest = output.stdout_lines
        back = Back(release, run, [tuple(line.split("\t")) for line in manifest])
    plan = node.release.go_back(back.release, back.manifest, found, verb)
    return Deployment(node, found, plan, back)


def _reasons(deployment: Deployment, verb: str) -> Iterable[str]:
    """Every reason not to change this host."""
    if deployment.facts.pending:
        release, _, who = deployment.facts.pending.split(" ", 2)
        yield (
            f"another deploy waits for its confirmation node (release {release} by {who}): it is "
            "confirmed or taken back within a minute or so; then try again"
        )
    if verb == "deploy" and (deployment.plan.steps or deployment.node.release.manifest):
        yield from refusals.of(deployment.node, deployment.facts)
    if deployment.back:
        yield from refusals.of_rollback(deployment.node, deployment.back.manifest)


def load_fleet(inventory: Inventory) -> Fleet:
    """The settings of an inventory that pyinfra has loaded; raises Refused with every error."""
    fleet = _fleets.get(id(inventory.state))
    if fleet is None:
        data = {host.name: {**host.data.dict(), "groups": list(host.groups)} for host in inventory}
        for values in data.values():
            for option in OPTIONS:
                values.pop(option, None)
        try:
            fleet = _fleets[id(inventory.state)] = validate(inventory_path(), data)
        except SettingsError as error:
            raise Refused(f"nothing was connected to\n{error}") from None
        for warning in fleet.warnings:
            logger.warning(warning)
    return fleet


def inventory_path() -> str:
    """The inventory file named on pyinfra's command line."""
    return str(click.get_current_context().params["inventory"])


def survey(host: Host, node: Node) -> facts.Facts:
    """Read everything a deploy of this host needs to know, in one round trip."""
    sent_at = time.time()
    ok, output = as_root(host, node, facts.script(node.release.survey_variables()))
    if not ok:
        words = output.stderr.strip().splitlines()
        raise SettingsError(
            f"cannot look at the host as root: {words[-1] if words else 'no words'}"
        )
    return facts.parse(output.stdout_lines, sent_at)


def as_root(
    host: Host, node: Node, stdin: str, command: str = "sh -s", print_output: bool = False
) -> tuple[bool, CommandOutput]:
    """Run a root shell on the host. Script, data and sudo's password all travel over stdin: an
    argument would be in the process list."""
    password = node.settings.sudo_password
    sudo = "sudo -n"
    if password is not None:
        # sudo takes its line only if it asks; whatever is left of it must not reach the shell.
        stdin = f"{password.get_secret_value()}\n{PASSWORD_END}\n{stdin}"
        skip = f'while IFS= read -r line; do [ "$line" = {PASSWORD_END} ] && break; done'
        sudo, command = "sudo -k -S -p ''", f"sh -c {shlex.quote(f'{skip}; exec {command}')}"
    # sudo clears the environment; the port this connection came in by is worth knowing.
    wrapped = f'{sudo} env SSH_PORT="${{SSH_CONNECTION##* }}" {command}'
    result: tuple[bool, CommandOutput] = host.run_shell_command(
        StringCommand(wrapped), print_output=print_output, _stdin=stdin
    )
    return result


def show(host: Host, deployment: Deployment) -> None:
    """Print what would change on a host; with --diff also how, secrets masked."""
    plan = deployment.plan
    if not plan.changes and not plan.steps:
        logger.info(f"{host.print_prefix}nothing to change")
    for change in plan.changes:
        logger.info(f"{host.print_prefix}  {change.mark} {change.kind:<11} {change.what}")
    for note in plan.notes:
        logger.info(f"{host.print_prefix}    {note}")
    release, found = deployment.node.release, deployment.facts.files
    paths = plan.drifted  # what somebody wrote there is shown before it is gone
    if state.config.DIFF and plan.changes:
        paths = [
            p for p, f in release.files.items() if p not in found or found[p].sha256 != f.sha256
        ]
    for line in diff(host, deployment, paths):
        logger.info(f"{host.print_prefix}    {line}")


def diff(host: Host, deployment: Deployment, paths: list[str]) -> Iterable[str]:
    """Unified differences of files that would change, secrets masked on both sides."""
    if not paths:
        return
    release = deployment.node.release
    script = 'for f in %s; do printf \'\\0%%s\\n\' "$f"; cat "$f" 2>/dev/null; done'
    _, output = as_root(host, deployment.node, script % shlex.join(paths))
    old = {
        path: text
        for path, _, text in (part.partition("\n") for part in output.stdout.split("\0")[1:])
    }
    for path in paths:
        content = release.files[path].content.decode(errors="replace")
        before, after = (
            mask(text, deployment.node.fleet.secrets) for text in (old.get(path, ""), content)
        )
        lines = difflib.unified_diff(
            before.splitlines(), after.splitlines(), path, path, lineterm="", n=2
        )
        yield from lines if before != after else [f"{path}: only secrets differ"]


@operation()
def release(deployment: Deployment) -> Generator[Any, None, None]:
    """Bring a host to its release, when it is its turn; nothing if nothing would change."""
    if deployment.plan.steps:
        yield FunctionCommand(_roll_out, (), {})


def _roll_out(state: Any, host: Host) -> bool:
    return _rollouts[id(state)].result(host.name)


def rolled_out(state: Any) -> bool:
    """Whether every host that was to change in this run has its release."""
    return _rollouts[id(state.inventory.state)].is_well


class Checkout(NamedTuple):
    """What an app's checkout has: its manifest (None without one) and our files that differ."""

    manifest: str | None
    differing: list[str]


def read_checkout(host: Host, root: str, files: dict[str, bytes], manifest: str) -> Checkout:
    """Compare files in a checkout with what they should be; raises Refused without one."""
    names = shlex.join(files)
    script = (
        f"cd {shlex.quote(root)} || exit 3; sha256sum -- {names} 2>/dev/null; echo; "
        f"cat -- {shlex.quote(manifest)} 2>/dev/null; true"
    )
    ok, output = host.run_shell_command(StringCommand(script))
    if not ok:
        raise Refused(f"{host.name}: android.checkout: {root} is not a folder on this host")
    sums, _, text = output.stdout.partition("\n\n") if output.stdout else ("", "", "")
    found = {line[66:]: line[:64] for line in sums.splitlines() if line.strip()}
    differing = [p for p, body in files.items() if found.get(p) != content_name(body)]
    return Checkout(text or None, differing)


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

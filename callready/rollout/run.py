"""One run of a deploy file: the settings of the fleet, a look at every host, and what will be done,
or everything that is wrong, before anything is changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from weakref import WeakKeyDictionary

import click
import gevent
from paramiko import SSHException
from pyinfra import logger
from pyinfra.api.exceptions import DeployError
from pyinfra.api.host import Host
from pyinfra.api.inventory import Inventory
from pyinfra.api.state import State

from callready.release import facts, refusals
from callready.release.manifest import Manifest
from callready.release.node import Node
from callready.release.plan import Plan, plan, plan_return
from callready.rollout.deployment import Deployment, Previous, only_the_last_run, show
from callready.rollout.prober import Prober
from callready.rollout.remote import as_root, survey
from callready.rollout.rollout import Rollout
from callready.secrets.loading import validate
from callready.settings.fleet import Fleet
from callready.settings.problem import SettingsError

Declare = Callable[[Fleet, str], Node]

KEEP_DRIFT, UNPROVED = "keep_drift", "unproved"
LOGS = {f"log_{what}": what for what in ("host", "unit", "since", "match")}
CHOICES = (KEEP_DRIFT, UNPROVED, *LOGS)
"""Choices of one run, as `--data keep_drift=yes`; no host data."""

_commands: WeakKeyDictionary[State, Command] = WeakKeyDictionary()


class Refused(DeployError):
    """Something for the operator to mend; shown without a line of our code."""

    # gevent sets it when it raises the error again, and pyinfra prints where that was.
    __traceback__ = property(lambda self: None, lambda self, value: None)


@dataclass
class Run:
    """The fleet, the hosts to be changed with their plans, and how they change."""

    fleet: Fleet
    deployments: dict[str, Deployment]
    rollout: Rollout


@dataclass(frozen=True)
class Command:
    """What pyinfra was called with: the fleet of the inventory, and whether only to show."""

    fleet: Fleet
    dry: bool


def command(inventory: Inventory) -> Command:
    """What pyinfra was called with, and the inventory that it has loaded for that; known from
    before it connects. Raises Refused with everything that is wrong with the settings."""
    if known := _commands.get(inventory.state):
        return known
    # Only pyinfra's main greenlet has this.
    given = click.get_current_context().params
    data = {host.name: {**host.data.dict(), "groups": list(host.groups)} for host in inventory}
    for values in data.values():
        for choice in CHOICES:
            values.pop(choice, None)
    try:
        fleet = validate(str(given["inventory"]), data)
    except SettingsError as error:
        raise Refused(f"nothing was connected to\n{error}") from None
    for warning in fleet.warnings:
        logger.warning(warning)
    known = _commands[inventory.state] = Command(fleet, bool(given["dry"]))
    return known


def prepare(inventory: Inventory, declare: Declare, verb: str) -> Run:
    """The files of the whole fleet, then one survey of every host that is selected; the plan of
    each is printed.

    Args:
        inventory: as pyinfra has loaded it.
        declare: the roles.
        verb: `deploy`, `rollback` or `remove`.

    Raises:
        Refused: with everything that is wrong; nothing was changed.
    """
    called, look = command(inventory), LOOKS[verb]
    fleet, dry = called.fleet, called.dry
    nodes = {name: declare(fleet, name) for name in fleet.hosts}
    connected = set(inventory.get_active_hosts())
    ours = [host for host in inventory if nodes[host.name].settings.has_release]
    active = [host for host in ours if host in connected]
    surveyed: dict[str, Deployment] = {}
    refused: list[str] = []
    prober = Prober()

    def attempt(host: Host) -> None:
        # gevent would print the traceback of what leaves a greenlet.
        try:
            deployment = look(host, nodes[host.name], _facts(host, nodes[host.name], dry))
        except (SettingsError, facts.SurveyError, SSHException, OSError, EOFError) as error:
            refused.append(f"{fleet.source}: {host.name}: {error}")
            return
        surveyed[host.name] = deployment
        if deployment.plan.changes_host and not dry:
            prober.start(deployment.probes)

    gevent.joinall([gevent.spawn(attempt, host) for host in active], raise_error=True)
    # In the inventory's order: the first one of a role changes first.
    ready = {host.name: surveyed[host.name] for host in active if host.name in surveyed}
    if verb == "rollback":
        only_the_last_run(ready.values())
    choices = inventory.state.inventory.get_override_data()
    for name, deployment in ready.items():
        reasons = _reasons(deployment, verb, bool(choices.get(UNPROVED)))
        if verb == "remove":
            reasons = chain(reasons, refusals.of_removal(deployment.node, ready))
        refused += [f"{fleet.source}: {name}: {why}" for why in reasons]
    if verb == "deploy":
        found = {name: (each.node, each.facts) for name, each in ready.items()}
        refused += [f"{fleet.source}: {at}: {why}" for at, why in refusals.of_cluster(found)]
    _refuse(refused)
    for host in active:
        show(host, ready[host.name], inventory.state.config.DIFF)
    if choices.get(KEEP_DRIFT):
        _refuse(
            f"{fleet.source}: {name}: {path} was edited on the host, and keep_drift is set: take "
            "the edit over into the inventory, or deploy without keep_drift"
            for name, deployment in ready.items()
            for path in deployment.plan.drifted
        )
    if report := os.environ.get("CALLREADY_REPORT"):
        summary = {name: {"changes": d.plan.changes, "busy": d.busy} for name, d in ready.items()}
        Path(report).write_text(json.dumps(summary))  # for callready.rotate
    hosts = {host.name: host for host in inventory}
    return Run(fleet, ready, Rollout(hosts, ready, prober, len(ready) == len(ours)))


def _refuse(reasons: Iterable[str]) -> None:
    if lines := list(reasons):
        raise Refused("nothing was changed\n" + "\n".join(lines))


def _facts(host: Host, node: Node, dry: bool) -> facts.Facts:
    found = survey(host, node)
    if found.is_stuck and not dry:
        as_root(host, node, "systemctl start callready-revert.service")
        found = survey(host, node)
    node.learn(found)
    return found


def _deploy(_host: Host, node: Node, found: facts.Facts) -> Deployment:
    return Deployment(node, found, plan(node.release, found))


def _rollback(host: Host, node: Node, found: facts.Facts) -> Deployment:
    if not found.folder:
        return Deployment(node, found, Plan())
    _, output = as_root(host, node, "sh /usr/local/lib/callready/release previous")
    release, run, *lines = output.stdout_lines
    return _return(node, found, Previous(release, run, Manifest.read(map(_split, lines))))


def _remove(_host: Host, node: Node, found: facts.Facts) -> Deployment:
    return _return(node, found, Previous(), "remove")


def _return(
    node: Node, found: facts.Facts, previous: Previous, verb: str = "rollback"
) -> Deployment:
    way = plan_return(node.release, previous.release, previous.manifest, found, verb)
    return Deployment(node, found, way, previous)


def _split(line: str) -> list[str]:
    return line.split("\t")


LOOKS: dict[str, Callable[[Host, Node, facts.Facts], Deployment]] = {
    "deploy": _deploy,
    "rollback": _rollback,
    "remove": _remove,
}


def _reasons(deployment: Deployment, verb: str, unproved: bool) -> Iterator[str]:
    """Every reason not to change this host."""
    found, node, previous = deployment.facts, deployment.node, deployment.previous
    newest = max(found.format, previous.manifest.format if previous else 0)
    yield from refusals.of_format(newest)
    if found.pending:
        release, _, who = found.pending.split(" ", 2)
        yield (
            f"another deploy waits for its confirmation here (release {release} by {who}): it is "
            "confirmed or taken back within a minute or so; then try again"
        )
    if verb == "deploy" and (deployment.plan.steps or node.release.manifest):
        yield from refusals.of(node, found)
    if previous:
        yield from refusals.of_rollback(node, previous.manifest)
        if previous.manifest.units and not deployment.probes and not unproved:
            yield (
                f"nothing that release {previous.release} has for callers can be probed from this "
                "inventory, so only SSH would say that it is well: give --data unproved=yes if "
                "that is enough"
            )

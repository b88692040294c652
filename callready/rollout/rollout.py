"""Bring the hosts of a fleet to their releases: role by role, one host first, each one confirmed by
what a caller sees or back where it was."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from threading import Lock
from typing import TYPE_CHECKING

import gevent
from paramiko import SSHException
from pyinfra import logger
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.host import Host

from callready.rollout import gate
from callready.rollout import ssh as reach
from callready.rollout.tunnel import via

if TYPE_CHECKING:
    from callready.operations import Deployment

# Relays are there before LiveKit tells callers of them, and LiveKit before the app does.
ROLES = ("turn", "livekit", "app")
UNPACK = (
    "umask 077; mkdir -p /var/lib/callready"
    " && d=$(mktemp -d /var/lib/callready/incoming.$$.XXXXXX)"
    ' && base64 -d | tar -xz -C "$d" && exec setsid -w sh "$d/apply.sh" "$d"'
)


class Stopped(Exception):
    """Why a host does not have its release."""


class Rollout:
    """The hosts that change, in their order; the first to be asked for its result does the work
    for all, because pyinfra runs an operation on every host at once."""

    def __init__(
        self, hosts: Mapping[str, Host], deployments: Mapping[str, Deployment], whole_fleet: bool
    ) -> None:
        """`hosts` are those of the whole inventory; `whole_fleet`, whether all of them that have
        something of ours are in `deployments`."""
        self.hosts, self.deployments, self.whole_fleet = hosts, deployments, whole_fleet
        self.changing = {name: d for name, d in deployments.items() if d.plan.steps}
        self._failed: dict[str, str] = {}
        self._specs: dict[str, list[gate.Spec]] = {}
        self._lock, self._done = Lock(), False

    def result(self, name: str) -> bool:
        """Whether a host has its release now."""
        with self._lock:
            if not self._done:
                self._done = True
                self._run()
        return name not in self._failed

    @property
    def is_well(self) -> bool:
        """Whether no host has failed."""
        return not self._failed

    @property
    def waves(self) -> Iterator[list[str]]:
        """Hosts that change at once: of every role one first, then batches; the other way round
        on the way back."""
        left, groups = dict(self.changing), []
        for role in ROLES:
            groups.append([n for n, d in left.items() if role in d.node.settings.groups])
            left = {name: d for name, d in left.items() if name not in groups[-1]}
        groups.append(list(left))  # whose last role has gone
        if any(deployment.plan.verb != "deploy" for deployment in self.changing.values()):
            groups.reverse()
        for names in filter(None, groups):
            yield names[:1]
            size = min(self.changing[name].node.settings.deploy.batch for name in names)
            for start in range(1, len(names), size):
                yield names[start : start + size]

    def _run(self) -> None:
        if not self._at_once(self._look_ahead, list(self.changing)):
            self._leave([n for n in self.changing if n not in self._failed])
            return
        # Installing programs disturbs nothing and takes long: everywhere at once, and where it
        # fails nothing has been switched anywhere.
        if not self._at_once(self._install, [n for n, d in self.changing.items() if d.plan.base]):
            self._leave([n for n in self.changing if n not in self._failed])
            return
        waves = list(self.waves)
        for number, names in enumerate(waves):
            if not self._at_once(self._change, names):
                self._leave([name for wave in waves[number + 1 :] for name in wave])
                return
        prunable = [name for name, d in self.changing.items() if d.plan.prune]
        if prunable and not self.whole_fleet:
            for name in prunable:
                self._say(name, "old secrets stay: hosts that --limit leaves out may use them")
            return
        self._at_once(self._prune, prunable)

    def _at_once(self, work: Callable[[str], None], names: list[str]) -> bool:
        def attempt(name: str) -> None:
            try:
                work(name)
            except Stopped as why:
                self._failed[name] = str(why)

        gevent.joinall([gevent.spawn(attempt, name) for name in names], raise_error=True)
        return not self._failed

    def _leave(self, names: list[str]) -> None:
        for name, why in self._failed.items():
            if why:
                logger.error(f"{self.hosts[name].print_prefix}{why}")
        for name in names:
            self._failed[name] = "untouched"
            logger.warning(
                f"{self.hosts[name].print_prefix}not switched, because "
                f"{', '.join(n for n, why in self._failed.items() if why != 'untouched')} failed"
            )

    def _say(self, name: str, words: str) -> None:
        logger.info(f"{self.hosts[name].print_prefix}{words}")

    def _script(self, name: str, steps: list[str]) -> None:
        """Run steps on a host; raises Stopped, empty if the host has said why."""
        deployment, host = self.deployments[name], self.hosts[name]
        bundle = deployment.node.release.bundle(steps)
        try:
            ok, output = _as_root(host, deployment, bundle, f"sh -c {shlex.quote(UNPACK)}")
        except (OSError, EOFError, SSHException):
            raise Stopped(self._line_lost(name)) from None
        if not ok and not output:
            raise Stopped(self._line_lost(name))
        if not ok:
            raise Stopped("")

    def _line_lost(self, name: str) -> str:
        deployment = self.deployments[name]
        if not deployment.plan.release:
            return "the connection broke; run the deploy again"
        seconds = deployment.node.settings.deploy.confirm_timeout
        return (
            f"the connection broke; within {seconds} s of its switch the host returns to release "
            f"{deployment.facts.folder or 'none'} by itself; then run the deploy again"
        )

    def _look_ahead(self, name: str) -> None:
        """Choose what will be probed; raises Stopped if it cannot be seen from here anyway."""
        deployment = self.deployments[name]
        facts, settings = deployment.facts, deployment.node.settings
        # An app that is not well before, or not there yet, says nothing about the release.
        specs = [
            spec
            for spec in deployment.probes
            if spec["probe"] != "app" or not self._probe(name, [spec], 0)
        ]
        self._specs[name] = specs
        if settings.deploy.gate_from:
            return
        # A packet filter that somebody changed is put right by this deploy.
        if facts.ruleset not in ("", "changed"):
            ports = {listener.port for listener in facts.listeners if listener.proto == "udp"}
            blocked = gate.blocked([spec for spec in specs if spec["port"] in ports])
        elif facts.folder or facts.tables:
            return
        else:  # bare: a closed port is refused, and only a filter on the way is silent
            blocked = gate.blocked(specs)
        if blocked:
            raise Stopped("nothing was changed: " + "\n".join(blocked))

    def _probe(self, name: str, specs: list[gate.Spec], within: float | None = None) -> list[str]:
        """What callers would suffer now, seen from here or from `deploy.gate_from`."""
        deploy = self.deployments[name].node.settings.deploy
        if within is None:
            within = min(gate.WITHIN, deploy.confirm_timeout / 2)
        if not deploy.gate_from or not specs:
            return gate.run(specs, within)
        try:
            with via(self.hosts[deploy.gate_from], specs) as through:
                return gate.run(through, within)
        except ConnectError as error:
            return [f"deploy.gate_from: {deploy.gate_from}: {error}"]

    def _install(self, name: str) -> None:
        self._script(name, self.deployments[name].plan.base)

    def _prune(self, name: str) -> None:
        self._script(name, self.deployments[name].plan.prune)

    def _change(self, name: str) -> None:
        """Switch one host and have it keep that, or not."""
        deployment, host = self.deployments[name], self.hosts[name]
        plan, node = deployment.plan, deployment.node
        if not plan.prepare and not plan.switch and not plan.keep:
            return
        families = reach.families(host, node) if plan.release else {}
        if plan.release and not families:
            raise Stopped(
                "takes no new SSH connection now, only the one that is open: mend that first"
            )
        if plan.prepare or plan.switch:
            self._script(name, plan.prepare + plan.switch)
            problems = [
                f"no new SSH connection{f' over IPv{family}' * bool(family)}: {why}"
                for family, address in families.items()
                if (why := _refused(host, address if family else None))
            ] or self._probe(name, self._specs[name])
            if problems:
                self._back(name, problems)
        if plan.keep:
            self._script(name, plan.keep)

    def _back(self, name: str, problems: list[str]) -> None:
        """Say what is wrong and what the host itself says; return to what it had."""
        deployment, host = self.deployments[name], self.hosts[name]
        for problem in problems:
            logger.error(f"{host.print_prefix}{problem}")
        script = ". /usr/local/lib/callready/release\n"
        for unit in deployment.node.release.services:
            script += f'say "last words of {unit}:"; last_words {unit}\n'
        if deployment.plan.release:
            script += (
                "systemctl start callready-revert.service\n"
                'say "this host has returned to release $(name_of current)"\n'
            )
        try:
            ok, _ = _as_root(host, deployment, script)
        except (OSError, EOFError, SSHException):
            ok = False
        raise Stopped("" if ok else self._line_lost(name))


def _refused(host: Host, address: str | None) -> str:
    try:
        reach.connect(host, address)
    except (ConnectError, OSError) as error:
        return str(error)
    return ""


def _as_root(
    host: Host, deployment: Deployment, stdin: str, command: str = "sh -s"
) -> tuple[bool, str]:
    from callready.operations import as_root

    ok, output = as_root(host, deployment.node, stdin, command, print_output=True)
    return ok, output.stderr

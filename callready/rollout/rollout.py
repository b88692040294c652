"""Bring the hosts of a fleet to their releases: role by role, one host first, each one confirmed by
what a caller sees or back where it was."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from threading import Lock

import gevent
from paramiko import SSHException
from pyinfra import logger
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.host import Host
from pyinfra.connectors.util import CommandOutput

from callready.probes import Finding, catalogue
from callready.probes.kinds import Health, Join, Recording
from callready.probes.probe import Probe
from callready.release.bundle import bundle
from callready.release.plan import Step
from callready.rollout import gate, ssh
from callready.rollout.deployment import Deployment
from callready.rollout.prober import WITHIN, Prober
from callready.rollout.remote import as_root
from callready.rollout.shell import shell
from callready.rollout.tunnel import tunnel

# Redis and relays are there before LiveKit needs them and tells callers of them, LiveKit before it
# is recorded, and both before the app asks for them.
ROLES = ("redis", "turn", "livekit", "egress", "app", "monitor")
UNPACK = (
    "umask 077; mkdir -p /var/lib/callready"
    " && d=$(mktemp -d /var/lib/callready/incoming.$$.XXXXXX)"
    ' && base64 -d | tar -xz -C "$d" && exec setsid -w sh "$d/apply.sh" "$d"'
)
# What the node of a cluster calls itself, which is new at every start: it is in its log only.
# Of this start of it: process ids come again after a reboot.
NODE_ID = (
    "journalctl -o cat -u livekit-server.service _SYSTEMD_INVOCATION_ID="
    "$(systemctl show -p InvocationID --value livekit-server.service) "
    "| grep -o 'ND_[A-Za-z0-9]*' | head -n 1"
)


@dataclass(frozen=True)
class Changed:
    """The host has its release, or needed nothing."""


@dataclass(frozen=True)
class Failed:
    """The host does not have its release; `why` is empty where the host has said it itself."""

    why: str = ""


@dataclass(frozen=True)
class Untouched:
    """The host was not switched, because these have failed."""

    because: tuple[str, ...]


Outcome = Changed | Failed | Untouched


class Stopped(Exception):
    """A step that failed: `Failed` of its host."""


class Rollout:
    """The hosts that change, in their order. The three phases are pyinfra operations, which run on
    every host at once: the first host in a phase does its work for all."""

    def __init__(
        self,
        hosts: Mapping[str, Host],
        deployments: Mapping[str, Deployment],
        prober: Prober,
        whole_fleet: bool,
    ) -> None:
        """`hosts` are those of the whole inventory; `whole_fleet`, whether all of them that have
        something of ours are in `deployments`."""
        self.hosts, self.deployments, self.whole_fleet = hosts, deployments, whole_fleet
        self.prober = prober
        self.changing = {name: d for name, d in deployments.items() if d.plan.steps}
        self.outcomes: dict[str, Outcome] = {name: Changed() for name in self.changing}
        self._probes: dict[str, list[Probe]] = {}
        self._to_change: set[str] = set()
        self._lock, self._done = Lock(), set[str]()

    def install(self, name: str) -> bool:
        """Install programs; whether the host has them. It disturbs nothing and takes long:
        everywhere at once."""
        return self._phase(name, "install", self._install_all)

    def switch(self, name: str) -> bool:
        """Switch and confirm; whether the host has its release now."""
        return self._phase(name, "switch", self._switch_all)

    def prune(self, name: str) -> bool:
        """Take away what no host uses any more; whether that was done."""
        return self._phase(name, "prune", self._prune_all)

    def _phase(self, name: str, phase: str, work: Callable[[], None]) -> bool:
        with self._lock:
            if phase not in self._done:
                self._done.add(phase)
                work()
        return isinstance(self.outcomes[name], Changed)

    @property
    def is_well(self) -> bool:
        """Whether no host has failed."""
        return all(isinstance(outcome, Changed) for outcome in self.outcomes.values())

    @property
    def waves(self) -> Iterator[list[str]]:
        """Hosts that change at once: of every role one first, then batches, SFUs that share a
        Redis one by one; the other way round on the way back."""
        left = {name: d for name, d in self.changing.items() if d.plan.changes_host}
        groups = []
        for role in ROLES:
            groups.append([n for n, d in left.items() if role in d.node.settings.groups])
            left = {name: d for name, d in left.items() if name not in groups[-1]}
        groups.append(list(left))  # whose last role has gone
        if any(deployment.plan.verb != "deploy" for deployment in self.changing.values()):
            groups.reverse()
        for names in filter(None, groups):
            yield names[:1]
            size = min(self.changing[name].node.settings.deploy.batch for name in names)
            wave: list[str] = []
            for name in names[1:]:
                cluster = self.deployments[name].node.fleet.cluster(name)
                if len(wave) == size or not set(cluster).isdisjoint(wave):
                    yield wave
                    wave = []
                wave.append(name)
            if wave:
                yield wave

    def _install_all(self) -> None:
        if self._at_once(self._look_ahead, self.changing):
            self._at_once(self._install, [n for n, d in self.changing.items() if d.plan.install])
        self._leave(self.changing)

    def _switch_all(self) -> None:
        if "install" not in self._done:  # no host needs a program
            self._install_all()
        if not self.is_well:  # pyinfra goes on with the hosts on which nothing failed
            return
        waves = list(self.waves)
        self._to_change = {name for wave in waves for name in wave}
        for number, names in enumerate(waves):
            if not self._at_once(self._change, names):
                self._leave([name for wave in waves[number + 1 :] for name in wave])
                return
            self._to_change -= set(names)

    def _prune_all(self) -> None:
        prunable = [name for name, d in self.changing.items() if d.plan.prune]
        if self.is_well and self.whole_fleet:
            self._at_once(self._prune, prunable)
            return
        others = "hosts that --limit leaves out" if self.is_well else "hosts that failed"
        for name in prunable:
            prefix = self.hosts[name].print_prefix
            logger.info(f"{prefix}old secrets stay: {others} may use them")

    def _at_once(self, work: Callable[[str], None], names: Iterable[str]) -> bool:
        def attempt(name: str) -> None:
            try:
                work(name)
            except Stopped as why:
                self.outcomes[name] = Failed(str(why))
                if str(why):
                    logger.error(f"{self.hosts[name].print_prefix}{why}")

        gevent.joinall([gevent.spawn(attempt, name) for name in names], raise_error=True)
        return self.is_well

    def _leave(self, names: Iterable[str]) -> None:
        """If a host has failed, the others are not switched."""
        failed = tuple(n for n, outcome in self.outcomes.items() if isinstance(outcome, Failed))
        for name in names if failed else ():
            if isinstance(self.outcomes[name], Changed):
                self.outcomes[name] = Untouched(failed)
                logger.warning(
                    f"{self.hosts[name].print_prefix}not switched, because "
                    f"{', '.join(failed)} failed"
                )

    def _script(self, name: str, steps: list[Step]) -> None:
        """Run steps on a host; raises Stopped, empty if the host has said why."""
        deployment, host = self.deployments[name], self.hosts[name]
        packed, command = bundle(deployment.node.release, steps), f"sh -c {shlex.quote(UNPACK)}"
        try:
            ok, output = as_root(host, deployment.node, packed, command, print_output=True)
        except (OSError, EOFError, SSHException):
            raise Stopped(self._line_lost(name)) from None
        if not ok:
            raise Stopped("" if output.stderr else self._line_lost(name))

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
        health = [probe for probe in deployment.probes if isinstance(probe, Health)]
        unwell = [probe for probe, _ in self._ask(name, health, 0)]
        probes = [probe for probe in deployment.probes if probe not in unwell]
        self._probes[name] = probes
        if settings.deploy.gate_from:
            return
        # A packet filter that somebody changed is put right by this deploy.
        if facts.ruleset not in ("", "changed"):
            ports = {listener.port for listener in facts.listeners if listener.proto == "udp"}
            blocked = gate.blocked(self.prober, [probe for probe in probes if probe.port in ports])
        elif facts.folder or facts.tables:
            return
        else:  # bare: a closed port is refused, and only a filter on the way is silent
            blocked = gate.blocked(self.prober, probes)
        if blocked:
            raise Stopped("nothing was changed: " + "\n".join(blocked))

    def _ask(
        self, name: str, probes: Sequence[Probe], within: float
    ) -> list[tuple[Probe, Finding]]:
        """What callers would suffer now, seen from here or from `deploy.gate_from`: the probes
        that do not pass, and what they found."""
        gate_from = self.deployments[name].node.settings.deploy.gate_from
        found: Sequence[Finding | None]
        if not gate_from or not probes:
            found = self.prober.ask(probes, within)
        else:
            try:
                with tunnel(self.hosts[gate_from], probes) as through:
                    found = self.prober.ask(through, within)
            except ConnectError as error:
                found = [
                    Finding(f"nothing is probed from {gate_from}", "deploy.gate_from", str(error))
                ]
        return [(probe, finding) for probe, finding in zip(probes, found, strict=False) if finding]

    def _install(self, name: str) -> None:
        self._script(name, self.deployments[name].plan.installing)

    def _prune(self, name: str) -> None:
        self._script(name, self.deployments[name].plan.pruning)

    def _change(self, name: str) -> None:
        """Switch one host and have it keep that, or not."""
        deployment, host = self.deployments[name], self.hosts[name]
        plan, node = deployment.plan, deployment.node
        families = ssh.families(host, node) if plan.release else {}
        if plan.release and not families:
            raise Stopped(
                "takes no new SSH connection now, only the one that is open: mend that first"
            )
        if plan.switching:
            answering = self._answering(name)
            self._script(name, plan.switching)
            problems = self._unreachable(name, families) or self._problems(name, answering)
            if problems:
                self._return(name, problems)
        if plan.confirming:
            self._script(name, plan.confirming)

    def _answering(self, name: str) -> tuple[str, ...]:
        """URIs of the ICE servers on other hosts that answer now, and that nothing changes in this
        run before the host is confirmed or later."""
        if not any(isinstance(probe, Join) for probe in self._probes[name]):
            return ()
        known = catalogue.ice_servers(self.deployments[name].node.fleet, name)
        servers = {uri: p for uri, p in known.items() if p.node not in self._to_change}
        silent = [probe for probe, _ in self._ask(name, list(servers.values()), 0)]
        return tuple(uri for uri, probe in servers.items() if probe not in silent)

    def _problems(self, name: str, answering: tuple[str, ...]) -> list[str]:
        """One sentence for each thing that callers would suffer from the release; what they could
        have better is only said."""
        node, host = self.deployments[name].node, self.hosts[name]
        settings, node_id = node.settings, ""
        if settings.sfu and node.fleet.redis_for(name, "livekit"):
            _, output = as_root(host, node, NODE_ID)
            node_id = output.stdout.strip()
        probes = [
            replace(probe, answering=answering, node_id=node_id)
            if isinstance(probe, Join)
            else probe
            for probe in self._probes[name]
        ]
        problems = []
        with ExitStack() as stack:
            if any(isinstance(probe, Recording) for probe in probes):
                path = stack.enter_context(shell(self._run))
                recorders = self.deployments[name].node.fleet.group("egress").keys() - {name}
                others = tuple(recorders & self.deployments.keys())
                probes = [
                    replace(probe, shell=path, others=others)
                    if isinstance(probe, Recording)
                    else probe
                    for probe in probes
                ]
            found = self._ask(name, probes, min(WITHIN, settings.deploy.confirm_timeout / 2))
        for probe, finding in found:
            if finding.warning:
                logger.warning(f"{host.print_prefix}{probe.title}: {finding}")
            else:
                problems.append(f"{probe.title}: {finding}")
        return problems

    def _run(self, name: str, script: str) -> tuple[bool, CommandOutput]:
        return as_root(self.hosts[name], self.deployments[name].node, script)

    def _unreachable(self, name: str, families: Mapping[int, str]) -> list[str]:
        """One sentence for each address family by which no new SSH connection can be opened."""
        return [
            f"no new SSH connection{f' over IPv{family}' * bool(family)}: {why}"
            for family, address in families.items()
            if (why := ssh.refusal(self.hosts[name], address if family else None))
        ]

    def _return(self, name: str, problems: list[str]) -> None:
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
            ok, _ = as_root(host, deployment.node, script, print_output=True)
        except (OSError, EOFError, SSHException):
            ok = False
        raise Stopped("" if ok else self._line_lost(name))

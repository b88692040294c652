"""One host of a run: what it shall be, what it is, and the way from one to the other."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from pyinfra import logger
from pyinfra.api.host import Host

from callready.probes.probe import Probe
from callready.release.facts import Facts
from callready.release.manifest import Manifest
from callready.release.node import Node
from callready.release.plan import NONE, Plan, media_ports
from callready.rollout import gate
from callready.rollout.remote import as_root
from callready.secrets.masking import mask


@dataclass(frozen=True)
class Previous:
    """The release before the running one, the run that replaced it, and its manifest."""

    release: str = NONE
    run: str = ""
    manifest: Manifest = field(default_factory=Manifest)


@dataclass
class Deployment:
    """A host with its facts and the plan; on the way back, with the release that it returns to."""

    node: Node
    facts: Facts
    plan: Plan
    previous: Previous | None = None

    @cached_property
    def probes(self) -> list[Probe]:
        """What callers need of the host after the change; on the way back, what the release that
        it returns to promised."""
        issued = not self.node.release.unissued(self.facts)
        if self.previous is None:
            found = gate.probes(self.node, issued)
        else:
            found = gate.promised(self.node, self.previous.manifest, issued)
        # That there is no room for recordings is said; no release is better for it.
        return [probe for probe in found if not (self.facts.held and probe.kind == "recording")]

    @property
    def busy(self) -> dict[str, int]:
        """Media ports that each of our units has open now."""
        services = self.node.release.services.values()
        return {service.unit: media_ports(self.facts, service) for service in services}


def show(host: Host, deployment: Deployment, differences: bool) -> None:
    """Print what would change on a host; with `differences` also how, secrets masked."""
    plan, release, found = deployment.plan, deployment.node.release, deployment.facts.files
    if not plan.changes and not plan.steps:
        logger.info(f"{host.print_prefix}nothing to change")
    for change in plan.changes:
        logger.info(f"{host.print_prefix}  {change.mark} {change.kind:<11} {change.what}")
    for note in plan.notes:
        logger.info(f"{host.print_prefix}    {note}")
    paths = plan.drifted  # what somebody wrote there is shown before it is gone
    if differences and plan.changes:
        paths = [
            p for p, f in release.files.items() if p not in found or found[p].sha256 != f.sha256
        ]
    for line in _differences(host, deployment, paths) if paths else ():
        logger.info(f"{host.print_prefix}    {line}")


def _differences(host: Host, deployment: Deployment, paths: list[str]) -> Iterator[str]:
    """Unified differences of files that would change, secrets masked on both sides."""
    release, secrets = deployment.node.release, deployment.node.fleet.secrets
    script = 'for f in %s; do printf \'\\0%%s\\n\' "$f"; cat "$f" 2>/dev/null; done'
    _, output = as_root(host, deployment.node, script % shlex.join(paths))
    parts = (part.partition("\n") for part in output.stdout.split("\0")[1:])
    old = {path: text for path, _, text in parts}
    for path in paths:
        content = release.files[path].content.decode(errors="replace")
        before, after = (mask(text, secrets) for text in (old.get(path, ""), content))
        if before == after:
            yield f"{path}: only secrets differ"
        lines = before.splitlines(), after.splitlines()
        yield from difflib.unified_diff(*lines, path, path, lineterm="", n=2)


def only_the_last_run(deployments: Iterable[Deployment]) -> None:
    """Roll back only what the last deploy of these hosts has changed."""
    deployments = list(deployments)
    last = max((d.previous.run for d in deployments if d.previous), default="")
    for deployment in deployments:
        if deployment.previous and deployment.previous.run != last:
            deployment.plan = Plan(notes=[f"the last deploy ({last}) did not change this host"])

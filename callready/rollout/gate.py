"""The health gate of a deploy: what is probed of a host, and whether it can be seen from here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from callready.probes import catalogue, local_address
from callready.probes.kinds import Join, LiveKit, Recording, UdpPath, without_credentials
from callready.probes.probe import Probe
from callready.release.manifest import Manifest, Promise
from callready.release.node import Node, key_digest
from callready.rollout.prober import Prober


def addresses(node: Node) -> list[str]:
    """The public addresses of a host, IPv6 only if the prober has it too: this machine, or the
    host of `deploy.gate_from`."""
    settings, prober = node.settings, node.settings.deploy.gate_from
    found = [settings.address] if settings.address else []
    if settings.address6 and (
        node.fleet[prober].address6 if prober else local_address(settings.address6)
    ):
        found.append(settings.address6)
    return found


def probes(node: Node, certificates: bool = True) -> list[Probe]:
    """What callers need of a host; `certificates` as `catalogue.probes` takes it. What is recorded
    are calls from here: with `deploy.gate_from` there are none."""
    found = catalogue.probes(node.name, node.settings, addresses(node), certificates)
    from_here = not node.settings.deploy.gate_from
    return [probe for probe in found if from_here or not isinstance(probe, Recording)]


def promised(node: Node, manifest: Manifest, certificates: bool = True) -> list[Probe]:
    """What an earlier release promised, as far as it can be asked now: with the credentials that
    the inventory still has, else without any."""
    known: dict[object, list[Probe]] = {}
    for probe in probes(node, certificates):
        known.setdefault(probe.key, []).append(probe)
    return [
        probe
        for promise in manifest.promises
        for probe in (
            _with_its_keys(known[promise.key], promise)
            if promise.key in known
            else _without_credentials(node, promise, certificates)
        )
    ]


def _with_its_keys(found: Iterable[Probe], promise: Promise) -> Iterator[Probe]:
    """LiveKit is asked with the keys that it had then; a promise of format 1 does not say which."""
    for probe in found:
        if not isinstance(probe, LiveKit):
            yield probe
        elif promise.credentials == "-":
            yield replace(probe, any_key=True)
        else:
            keys = {
                key: secret
                for key, secret in probe.keys.items()
                if key_digest(key, secret) in promise.credentials.split()
            }
            yield replace(probe, keys=keys)


def _without_credentials(node: Node, promise: Promise, certificates: bool) -> Iterator[Probe]:
    trust = catalogue.trust(node.settings, certificates)
    for address in addresses(node):
        probe = without_credentials(promise.key, node=node.name, address=address, **trust)
        if probe and (certificates or probe.kind != "certificate"):
            yield probe
        if promise.key.kind == "app":  # its URL says where it is asked
            return


def blocked(prober: Prober, running: Sequence[Probe]) -> list[str]:
    """One sentence for each UDP port that a running service of the host should answer on and that
    nothing comes back from: seen from here the gate would fail whatever is deployed.

    Args:
        prober: of this run.
        running: probes of services that run now.
    """
    paths: dict[tuple[str, int], UdpPath] = {}
    for probe in running:
        port = probe.media_port if isinstance(probe, Join) else probe.port
        if probe.proto == "udp" or isinstance(probe, Join):
            paths.setdefault(
                (probe.address, port),
                UdpPath(
                    node=probe.node,
                    of=probe.title,
                    address=probe.address,
                    port=port,
                    connect_to=probe.connect_to if probe.proto == "udp" else None,
                ),
            )
    found = prober.ask(list(paths.values()), 0)
    return [f"{path.title}: {why}" for path, why in zip(paths.values(), found, strict=True) if why]

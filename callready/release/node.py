"""One host of a fleet, as the roles in `tasks/` see it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import SecretStr

from callready.probes import catalogue
from callready.probes.probe import LiveKit
from callready.release.declaration import Release
from callready.release.manifest import Promise
from callready.settings.fleet import Fleet
from callready.settings.models import HostSettings
from callready.settings.ports import Use, port_plan


@dataclass
class Node:
    """A host: its inventory name, the fleet it belongs to, the release that the roles declare, and
    sshd's real ports (none: the survey has not told them yet)."""

    name: str
    fleet: Fleet
    release: Release = field(default_factory=Release)
    ssh_ports: tuple[int, ...] = ()
    port_roles: tuple[Callable[[Node], None], ...] = ()
    """The roles that declare anew when sshd's ports are other ones than the inventory says."""

    @property
    def settings(self) -> HostSettings:
        """What the inventory says about this host."""
        return self.fleet[self.name]

    @property
    def ports(self) -> list[Use]:
        """The port plan of this host."""
        return port_plan(self.settings, self.ssh_ports)

    def learn_ssh_ports(self, ports: set[int]) -> None:
        """Take over what the survey found sshd to listen on."""
        self.ssh_ports = tuple(sorted(ports))
        if ports - {self.settings.ssh_port} or not ports:
            for role in self.port_roles:
                role(self)

    @property
    def promises(self) -> list[Promise]:
        """What the release has for callers, wherever they are: by that it is judged when the host
        returns to it, whatever the inventory says by then."""
        settings = self.settings
        address = settings.address or settings.address6 or ""
        return [
            Promise.of(
                probe.key,
                (key_digest(*key) for key in probe.keys.items())
                if isinstance(probe, LiveKit)
                else (),
            )
            for probe in catalogue.probes(self.name, settings, [address])
        ]


def key_digest(name: str, secret: SecretStr) -> str:
    """What a promise knows a LiveKit key by: 16 hex digits."""
    return hashlib.sha256(f"{name}\t{secret.get_secret_value()}".encode()).hexdigest()[:16]

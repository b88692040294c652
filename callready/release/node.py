"""One host of a fleet, as the roles in `tasks/` see it."""

from __future__ import annotations

from dataclasses import dataclass, field

from callready.release.declaration import Release
from callready.settings.fleet import Fleet
from callready.settings.models import HostSettings
from callready.settings.ports import Use, port_plan


@dataclass
class Node:
    """A host: its inventory name, the fleet it belongs to, sshd's real ports, and the release
    that the roles declare."""

    name: str
    fleet: Fleet
    ssh_ports: tuple[int, ...] = ()
    release: Release = field(default_factory=Release)

    @property
    def settings(self) -> HostSettings:
        """What the inventory says about this host."""
        return self.fleet[self.name]

    @property
    def ports(self) -> list[Use]:
        """The port plan of this host."""
        return port_plan(self.settings, self.ssh_ports)

"""One host of a fleet, as the roles in `tasks/` see it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import SecretStr

from callready.probes import catalogue
from callready.probes.kinds import LiveKit
from callready.release.authority import Identity
from callready.release.declaration import Release
from callready.release.facts import Facts
from callready.release.manifest import Promise
from callready.settings.fleet import Fleet
from callready.settings.models import HostSettings
from callready.settings.ports import Use, port_plan


@dataclass
class Node:
    """A host: its inventory name, the fleet it belongs to, the release that the roles declare, and
    what the survey has to tell for that: sshd's real ports (none: it has not yet), kernel
    settings of somebody else, and the processor's cores (0: it has not yet)."""

    name: str
    fleet: Fleet
    release: Release = field(default_factory=Release)
    ssh_ports: tuple[int, ...] = ()
    sysctls: dict[str, str] = field(default_factory=dict)
    cores: int = 0
    survey_roles: tuple[Callable[[Node], None], ...] = ()
    """The roles that declare anew with what the survey has told."""

    @property
    def settings(self) -> HostSettings:
        """What the inventory says about this host."""
        return self.fleet[self.name]

    @property
    def ports(self) -> list[Use]:
        """The port plan of this host."""
        return port_plan(self.settings, self.ssh_ports)

    @property
    def identity(self) -> Identity:
        """As which the fleet knows this host: who asks it, and who gets its logs."""
        # The monitor asks itself by the address of its interface.
        addresses = dict.fromkeys((*self.settings.addresses, self.settings.local_address))
        return Identity(self.name, tuple(filter(None, addresses)), ("server", "client"))

    def learn(self, facts: Facts) -> None:
        """Take over what the survey found sshd to listen on, and what others have set, and how
        much the host can do."""
        self.ssh_ports = tuple(sorted(facts.ssh_ports))
        self.cores = facts.cores
        self.sysctls = {key: value for key, (value, _) in facts.elsewhere.items()}
        for role in self.survey_roles:
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

"""The validated settings of every host of an inventory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from callready.settings.models import HostSettings


@dataclass(frozen=True)
class Fleet:
    """The hosts of one inventory by inventory name, the warnings about their settings, every secret
    they refer to, and those of pyinfra's `ssh_…` data that are secrets, by host."""

    source: str
    hosts: Mapping[str, HostSettings]
    warnings: list[str] = field(default_factory=list)
    secrets: frozenset[str] = field(default=frozenset(), repr=False)
    logins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> HostSettings:
        return self.hosts[name]

    def group(self, name: str) -> dict[str, HostSettings]:
        """The hosts of an inventory group."""
        return {key: host for key, host in self.hosts.items() if name in host.groups}

    def pool(self, name: str | None) -> dict[str, HostSettings]:
        """The hosts that run the TURN pool `name`; none if there is no such pool."""
        return {key: host for key, host in self.hosts.items() if name in host.turn_pools}

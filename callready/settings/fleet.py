"""The validated settings of every host of an inventory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
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

    @property
    def watched(self) -> dict[str, HostSettings]:
        """The hosts that the monitor measures."""
        return {key: host for key, host in self.hosts.items() if host.watched}

    def pool(self, name: str | None) -> dict[str, HostSettings]:
        """The hosts that run the TURN pool `name`; none if there is no such pool."""
        return {key: host for key, host in self.hosts.items() if name in host.turn_pools}

    def networks(self, sources: Iterable[str]) -> tuple[list[IPv4Network], list[IPv6Network]]:
        """The IPv4 and IPv6 networks that sources stand for, those that overlap in one; a source
        that is no network is a group, all of whose hosts' addresses that others see it stands for.
        """
        found4, found6 = list[IPv4Network](), list[IPv6Network]()
        for source in sources:
            is_network = "/" in source
            hosts = () if is_network else self.group(source).values()
            for text in [source] if is_network else (a for host in hosts for a in host.addresses):
                network = ip_network(text)
                if isinstance(network, IPv4Network):
                    found4.append(network)
                else:
                    found6.append(network)
        return list(collapse_addresses(found4)), list(collapse_addresses(found6))

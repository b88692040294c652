"""The validated settings of every host of an inventory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from typing import Any

from callready.settings.models import HostSettings
from callready.settings.redis import FILES, USERS, RedisAccess

FLEET_CA = "/etc/callready/fleet-ca.pem"  # the authority by which hosts of a fleet know each other


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
    def groups(self) -> set[str]:
        """Those of the inventory that have a host."""
        return {name for host in self.hosts.values() for name in host.groups}

    @property
    def watched(self) -> dict[str, HostSettings]:
        """The hosts that the monitor measures."""
        return {key: host for key, host in self.hosts.items() if host.watched}

    def pool(self, name: str | None) -> dict[str, HostSettings]:
        """The hosts that run the TURN pool `name`; none if there is no such pool."""
        return {key: host for key, host in self.hosts.items() if name in host.turn_pools}

    def redis_for(self, name: str, user: str) -> RedisAccess | None:
        """How a program on a host reaches the Redis that the SFUs of its fleet share, as the ACL
        user `livekit` or `egress`: the one of `livekit.redis`, else that of group `redis`. None if
        there is none."""
        sfus = [self[name]] if user == "livekit" else self.group("livekit").values()
        for livekit in (host.livekit for host in sfus):
            if livekit and (own := livekit.redis):
                ca_file = FILES["ca_cert_file"] if "ca_cert_file" in own.files else ""
                who = own.username, own.password
                return RedisAccess(own.where, *who, own.db, own.is_tls, ca_file, own)
        for where, host in self.group("redis").items():
            at, tls = self.redis_address(where, name), bool(host.redis_clients)
            if at and (server := host.redis) and (passwords := server.passwords(user)):
                at = f"[{at}]" if ":" in at else at
                ca_file = FLEET_CA if tls else ""
                address = f"{at}:{server.port}"
                return RedisAccess(address, user, passwords[0], tls=tls, ca_file=ca_file)
        return None

    def redis_address(self, server: str, client: str) -> str:
        """The address at which the host `client` finds the Redis of the host `server`; its own is
        where that listens."""
        host = self[server]
        if not host.redis_clients:
            return "127.0.0.1"
        users = [each for each in self.hosts.values() if not each.groups.isdisjoint(USERS)]
        return self._address(server, client, users)

    def peer_address(self, server: str, client: str) -> str:
        """The address at which the edge of the SFU `client` finds its peer `server`; its own is
        where that listens for peers."""
        return self._address(server, client, [self[server], *self.peers(server).values()])

    def _address(self, server: str, client: str, both: Iterable[HostSettings]) -> str:
        """That of an internal network which all are in, else the public one."""
        host = self[server]
        if host.internal_address and all(each.internal_address for each in both):
            return host.internal_address
        public = host.local_address if client == server else host.address
        return public or host.address6 or host.internal_address or ""

    def peers(self, name: str) -> dict[str, HostSettings]:
        """The SFUs that take callers for this one, by their edges."""
        return {peer: self[peer] for peer in self[name].peers}

    def cluster(self, name: str) -> list[str]:
        """The other SFUs that share the Redis of this one: they take its new rooms while it takes
        none."""
        own = self.redis_for(name, "livekit")
        if not own or own.is_local:
            return []
        others = [other for other in self.group("livekit") if other != name]
        places = {other: self.redis_for(other, "livekit") for other in others}
        return [other for other, at in places.items() if at and at.place == own.place]

    def networks(self, sources: Iterable[str]) -> tuple[list[IPv4Network], list[IPv6Network]]:
        """The IPv4 and IPv6 networks that sources stand for, those that overlap in one; a source
        that is no network is a host or a group, and stands for all of its addresses that others
        see."""
        found4, found6 = list[IPv4Network](), list[IPv6Network]()
        for source in sources:
            is_network = "/" in source
            one = self.hosts.get(source)
            hosts = () if is_network else [one] if one else self.group(source).values()
            for text in [source] if is_network else (a for host in hosts for a in host.addresses):
                network = ip_network(text)
                if isinstance(network, IPv4Network):
                    found4.append(network)
                else:
                    found6.append(network)
        return list(collapse_addresses(found4)), list(collapse_addresses(found6))

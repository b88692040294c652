"""How callers reach a TURN pool, said in one place: port plan, URIs, configurations, packet filter,
certificates and probes all ask here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from callready.settings.fleet import Fleet
from callready.settings.models import HostSettings

Transport = Literal["udp", "tcp", "tls"]
EDGE = "haproxy.service"


@dataclass(frozen=True)
class Way:
    """One way into a TURN pool of a host: `unit` takes it, on its own port `listens_on`, which is
    another one than `port` where the host's packet filter redirects. Clients are told `advertised`
    ways only. `setting` is the key of the pool that decides about it."""

    transport: Transport
    port: int
    unit: str
    advertised: bool
    listens_on: int
    setting: str

    @property
    def proto(self) -> Literal["udp", "tcp"]:
        """What carries it."""
        return "udp" if self.transport == "udp" else "tcp"

    @property
    def over(self) -> str:
        """The transport as a person says it."""
        return self.transport + " on 443" * (self.setting == "tls_on_443")

    @property
    def path(self) -> str:
        """As a path of media is called by it: `TURN/UDP`, `TURN/TLS 443`."""
        return f"TURN/{self.over.replace(' on', '')}".upper()


def ways(host: HostSettings, pool_name: str) -> list[Way]:
    """Every way into a pool that runs on this host, advertised or not."""
    pool, coturn = host.turn_pools[pool_name], unit(pool_name)
    front = EDGE if behind_edge(host, pool_name) else coturn
    port, tls = pool.listening_port, pool.tls_listening_port
    found = [
        Way("udp", port, coturn, True, port, "listening_port"),
        Way("tcp", port, front, True, port, "listening_port"),
    ]
    if pool.tls:
        found.append(Way("tls", tls, front, not pool.tls_on_443, tls, "tls_listening_port"))
    if pool.tls_on_443:
        found.append(Way("tls", 443, front, True, 443 if front == EDGE else tls, "tls_on_443"))
    return found


def advertised(fleet: Fleet, pool_name: str | None) -> Iterator[tuple[HostSettings, Way]]:
    """What clients are told of a pool: each way of each of its hosts; nothing of no pool."""
    for host in fleet.pool(pool_name).values():
        yield from ((host, way) for way in ways(host, pool_name or "") if way.advertised)


def asked_by_caller(host: HostSettings, pool_name: str) -> tuple[int, str]:
    """How many allocations one caller may hold on a host, and that as a sum for people.

    A client allocates at every URI, for each address family, peer connection and local network,
    used or not: measured with Chromium 156 and livekit-client 2.23, which has two peer connections.
    Two networks are Wi-Fi and mobile of a phone.
    """
    uris = sum(way.advertised for way in ways(host, pool_name))
    families = 2 if host.address6 else 1
    number = uris * families * 2 * 2
    words = f"{families} address {'families' if families > 1 else 'family'}"
    return number, f"{uris} URIs x {words} x 2 peer connections x 2 networks = {number}"


def behind_edge(host: HostSettings, pool_name: str) -> bool:
    """Whether the edge of the same host takes TCP and TLS for the pool: both are on its 443."""
    return host.has_edge and host.turn_pools[pool_name].tls_on_443


def unit(pool_name: str) -> str:
    """The systemd unit of a pool's coturn."""
    return f"turnserver@{pool_name}.service"

"""How callers reach a TURN pool, said in one place: port plan, URIs, configurations, packet filter,
certificates and probes all ask here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from callready.settings.fleet import Fleet
from callready.settings.models import HostSettings

Transport = Literal["udp", "tcp", "tls"]
EDGE = "haproxy.service"
# The groups whose hosts tell callers of TURN: LiveKit itself, the app's backend, an app's settings.
Teller = Literal["livekit", "app", "android"]

MOST_HOSTS, MOST_URIS = 2, 4
"""TURN hosts, and URIs of STUN and TURN, that one caller is told of. A client allocates at every
one at once, used or not, and quotas count that; five make gathering slow, of which Firefox warns
(its PeerConnection.sys.mjs, which counts `stun:` URIs too)."""


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


def handed_out(
    fleet: Fleet, name: str, teller: Teller = "livekit"
) -> list[tuple[HostSettings, Way]]:
    """What the host `name` tells callers of the TURN pool that its LiveKit hands out, as one of the
    group `teller`: ways into at most MOST_HOSTS of the pool's hosts, MOST_URIS in all.

    Hosts of its own region come first. They are rotated over the hosts of the group in that region,
    in the inventory's order: the first names the first and the second of them, the second one the
    second and the third. Each keeps UDP, and TLS (TCP where there is none), and what is left of
    MOST_URIS is TCP.
    """
    own = fleet[name]
    pool = own.livekit.turn_pool if own.livekit else None
    tellers = [key for key, host in fleet.group(teller).items() if host.region == own.region]
    hosts = [host for host in fleet.pool(pool).values() if host.hand_out]
    near = [host for host in hosts if host.region == own.region]
    far = [host for host in hosts if host.region != own.region]
    turn = tellers.index(name)
    chosen = [*_rotated(near, turn), *_rotated(far, turn)][:MOST_HOSTS]
    found = [(host, way) for host in chosen for way in ways(host, pool or "") if way.advertised]

    def rank(index: int) -> int:
        host, way = found[index]
        stream = "tls" if host.turn_pools[pool or ""].tls else "tcp"
        return {"udp": 0, stream: 1}.get(way.transport, 2)

    kept = sorted(range(len(found)), key=rank)[:MOST_URIS]
    return [found[index] for index in sorted(kept)]


def _rotated(hosts: list[HostSettings], by: int) -> list[HostSettings]:
    first = by % len(hosts) if hosts else 0
    return hosts[first:] + hosts[:first]


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

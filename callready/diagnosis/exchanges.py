"""What a path needs of the network, from the settings of its hosts."""

from __future__ import annotations

from typing import Literal

from callready.diagnosis.model import Exchange, Flow, Path
from callready.settings.fleet import Fleet
from callready.settings.models import HostSettings
from callready.settings.pools import Way, ways
from callready.settings.uris import place

Family = Literal[0, 4, 6]


def signalling(host: str, settings: HostSettings, family: Family = 0) -> Exchange:
    """The WebSocket to an SFU."""
    assert settings.sfu
    port = settings.edge.port if settings.edge else place(settings.sfu.url)[1]
    return Exchange(Flow(host, "tcp", port, port, family))


def tcp(host: str, settings: HostSettings, port: int, family: Family = 0) -> Exchange:
    """Any service over TCP."""
    for pool in settings.turn_pools:
        for way in ways(settings, pool):
            if (way.proto, way.port) == ("tcp", port):
                return turn(host, way, family)
    return Exchange(Flow(host, "tcp", port, port, family))


def media(
    host: str,
    settings: HostSettings,
    proto: Literal["udp", "tcp"],
    family: Family,
    relay: Flow | None = None,
) -> Exchange:
    """Media to an SFU, straight or from a relay."""
    assert settings.sfu
    rtc = settings.sfu.rtc
    first, last = rtc.port_range_start, rtc.port_range_end
    if proto == "tcp":
        first = last = rtc.tcp_port
    return Exchange(Flow(host, proto, first, last, family), relay)


def turn(host: str, way: Way, family: Family = 0) -> Exchange:
    """A way into a TURN server."""
    behind = way.listens_on if way.listens_on != way.port else 0
    return Exchange(Flow(host, way.proto, way.port, way.port, family), behind=behind)


def relay_range(host: str, settings: HostSettings, pool: str, family: Family) -> Flow:
    """Where a pool's relays are on a host."""
    found = settings.turn_pools[pool]
    return Flow(host, "udp", found.min_port, found.max_port, family)


def of_path(fleet: Fleet, path: Path, relayed: Literal[4, 6] = 4) -> tuple[Exchange, ...]:
    """What media needs on a path, in its order; `relayed` is the relay's address family."""
    sfu = fleet[path.sfu] if path.sfu else None
    first = (signalling(path.sfu, sfu),) if sfu else ()
    if not path.turn:
        assert sfu
        return *first, media(path.sfu, sfu, "tcp" if path.way == "TCP" else "udp", path.family)
    host = fleet[path.turn]
    way = next(way for way in ways(host, path.pool) if way.path == path.way)
    found = *first, turn(path.turn, way, path.family)
    relay = relay_range(path.turn, host, path.pool, relayed)
    return *found, media(path.sfu, sfu, "udp", relayed, relay) if sfu else Exchange(relay, relay)

"""STUN and TURN URIs (RFC 7064, RFC 7065) as clients are told them, and where a URL leads."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from callready.settings.fleet import Fleet
from callready.settings.models import HostSettings
from callready.settings.pools import MOST_URIS, Teller, Way, handed_out


def stun_uri(host: HostSettings, way: Way) -> str:
    """The `stun:` URI of a way into a pool of this host."""
    return f"stun:{host.name}:{way.port}"


def turn_uri(host: HostSettings, way: Way) -> str:
    """The `turn:` or `turns:` URI of a way into a pool of this host."""
    scheme = "turns" if way.transport == "tls" else "turn"
    return f"{scheme}:{host.name}:{way.port}?transport={way.proto}"


def stun_uris(fleet: Fleet, name: str, teller: Teller = "livekit") -> list[str]:
    """`stun:` URIs of the hosts whose TURN a host hands out, arguments as `pools.handed_out`: as
    far as a caller may be told of more. TURN over UDP is STUN too (RFC 8656, section 7.3)."""
    livekit, told = fleet[name].livekit, handed_out(fleet, name, teller)
    others = livekit.rtc.stun_servers if livekit and teller == "livekit" else []
    room = max(0, MOST_URIS - len(told) - len(others))
    return [stun_uri(host, way) for host, way in told if way.transport == "udp"][:room]


def turn_uris(fleet: Fleet, name: str, teller: Teller = "livekit") -> list[str]:
    """`turn:` and `turns:` URIs that a host hands out, arguments as `pools.handed_out`."""
    return [turn_uri(host, way) for host, way in handed_out(fleet, name, teller)]


def place(url: str) -> tuple[str, int]:
    """The host and the port that an http(s):// or ws(s):// URL leads to."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme in ("https", "wss") else 80)


def peers(hosts: Mapping[str, HostSettings], name: str) -> tuple[str, ...]:
    """The other SFUs to which the URL of a host's SFU leads too, where both have an edge: each
    takes callers for another whose LiveKit does not. Those that come after it are first, so that
    not all have the same first one."""
    at = {each: place(host.sfu.url) for each, host in hosts.items() if host.sfu and host.edge}
    names = [each for each in at if at[each] == at.get(name)]
    here = names.index(name) if name in names else 0
    return (*names[here + 1 :], *names[:here])


def signalling_names(fleet: Fleet) -> list[str]:
    """The names by which callers reach LiveKit."""
    sfus = (host.livekit for host in fleet.group("livekit").values())
    return list(dict.fromkeys(place(livekit.url)[0] for livekit in sfus if livekit))


def clusters(fleet: Fleet) -> dict[str, list[str]]:
    """The SFUs that stand in for each other, by the name by which callers reach them."""
    found: dict[str, list[str]] = {}
    for name, host in fleet.hosts.items():
        if host.sfu and fleet.cluster(name):
            found.setdefault(place(host.sfu.url)[0], []).append(name)
    return {name: nodes for name, nodes in found.items() if len(nodes) > 1}


def spared_pools(fleet: Fleet) -> dict[str, list[str]]:
    """The TURN pools of SFUs of which callers are told more than one host, and these."""
    sfus = [host.sfu for host in fleet.hosts.values()]
    used = dict.fromkeys(sfu.turn_pool for sfu in sfus if sfu and sfu.turn_pool)
    told = {
        pool: [name for name, host in fleet.pool(pool).items() if host.hand_out] for pool in used
    }
    return {pool: hosts for pool, hosts in told.items() if len(hosts) > 1}


def app_names(fleet: Fleet) -> list[str]:
    """The names by which callers reach the app."""
    apps = (host.app for host in fleet.group("app").values())
    return list(dict.fromkeys(place(app.url)[0] for app in apps if app and app.url))

"""STUN and TURN URIs (RFC 7064, RFC 7065) as clients are told them, and where a URL leads."""

from __future__ import annotations

from urllib.parse import urlsplit

from callready.settings.fleet import Fleet
from callready.settings.models import HostSettings
from callready.settings.pools import Way, advertised


def stun_uri(host: HostSettings, way: Way) -> str:
    """The `stun:` URI of a way into a pool of this host."""
    return f"stun:{host.name}:{way.port}"


def turn_uri(host: HostSettings, way: Way) -> str:
    """The `turn:` or `turns:` URI of a way into a pool of this host."""
    scheme = "turns" if way.transport == "tls" else "turn"
    return f"{scheme}:{host.name}:{way.port}?transport={way.proto}"


def stun_uris(fleet: Fleet, pool: str | None) -> list[str]:
    """`stun:` URIs of every host of a pool."""
    found = advertised(fleet, pool)
    return [stun_uri(host, way) for host, way in found if way.transport == "udp"]


def turn_uris(fleet: Fleet, pool: str | None) -> list[str]:
    """`turn:` and `turns:` URIs of every host of a pool, over each of its transports."""
    return [turn_uri(host, way) for host, way in advertised(fleet, pool)]


def place(url: str) -> tuple[str, int]:
    """The host and the port that an http(s):// or ws(s):// URL leads to."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme in ("https", "wss") else 80)


def signalling_names(fleet: Fleet) -> list[str]:
    """The names by which callers reach LiveKit."""
    sfus = (host.livekit for host in fleet.group("livekit").values())
    return list(dict.fromkeys(place(livekit.url)[0] for livekit in sfus if livekit))

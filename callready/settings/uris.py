"""STUN and TURN URIs (RFC 7064, RFC 7065) as clients are told them, and where a URL leads."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from callready.settings.fleet import Fleet


def stun_uris(fleet: Fleet, pool: str | None) -> list[str]:
    """`stun:` URIs of every host of a pool."""
    return [
        f"stun:{turn.name}:{turn.turn_pools[pool].listening_port}"
        for turn in (fleet.pool(pool).values() if pool else ())
        if pool
    ]


def turn_uris(fleet: Fleet, pool: str | None) -> list[str]:
    """`turn:` and `turns:` URIs of every host of a pool, over each of its transports."""
    uris: list[str] = []
    for turn in fleet.pool(pool).values() if pool else ():
        item = turn.turn_pools[pool or ""]
        uris += [f"turn:{turn.name}:{item.listening_port}?transport={t}" for t in ("udp", "tcp")]
        if item.tls:
            uris.append(f"turns:{turn.name}:{item.advertised_tls_port}?transport=tcp")
    return uris


def place(url: str) -> tuple[str, int]:
    """The host and the port that an http(s):// or ws(s):// URL leads to."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme in ("https", "wss") else 80)

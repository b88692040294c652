"""What callers need of a host, from its settings: every probe that they lead to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from callready.probes import endpoint
from callready.probes.probe import Certificate, Health, Https, LiveKit, Probe, Stun, Turn
from callready.settings.models import HostSettings
from callready.settings.pools import ways
from callready.settings.uris import place


def trust(settings: HostSettings, verify: bool = True) -> dict[str, Any]:
    """Whom callers of a host trust, as `Probe` takes it."""
    ca = settings.tls.ca if settings.tls else None
    return {"ca": str(Path(ca).expanduser().absolute()) if ca else None, "verify": verify}


def probes(
    node: str, settings: HostSettings, addresses: list[str], certificates: bool = True
) -> list[Probe]:
    """What callers need of a host at its addresses, and of the app on it.

    Args:
        node: the host's name in the inventory.
        settings: what the inventory says about it.
        addresses: by which it is asked, one of each family.
        certificates: False takes any certificate: a host that waits for its authority shows one
            of its own making.
    """
    found: list[Probe] = []
    for address in addresses:
        common = {"node": node, "address": address, **trust(settings, certificates)}
        found += [*_turn(settings, common), *_livekit(settings, common)]
        found += [
            *_edge(settings, common),
            *(_certificates(settings, common) if certificates else ()),
        ]
    for check in settings.backend.health if settings.backend else ():
        host, port = place(check.url)
        common = {"node": node, "address": host, "port": port, **trust(settings, certificates)}
        found.append(Health(url=check.url, status=check.status, fields=check.fields, **common))
    return found


def _turn(settings: HostSettings, common: dict[str, Any]) -> Iterator[Probe]:
    for name, pool in settings.turn_pools.items():
        yield Stun(pool=name, port=pool.listening_port, **common)
        user, password = next(iter(pool.users.items()), ("", None))
        for way in ways(settings, name):
            yield Turn(
                pool=name,
                transport=way.transport,
                port=way.port,
                server_name=settings.name,
                secret=pool.secrets[0] if pool.secrets else None,
                user=user,
                password=password,
                **common,
            )


def _livekit(settings: HostSettings, common: dict[str, Any]) -> Iterator[Probe]:
    if not (livekit := settings.sfu):
        return
    address = common["address"]
    is_first = address == settings.address
    wanted = set(livekit.bind_addresses)
    reached = {address, "::"} | ({"0.0.0.0", settings.local_address} if is_first else set())
    name, port = place(livekit.url)
    if settings.edge:
        yield LiveKit(
            url=livekit.url, port=settings.edge.port, server_name=name, keys=livekit.keys, **common
        )
    elif not wanted or wanted & reached:
        url = f"ws://{endpoint(address, livekit.port)}"
        yield LiveKit(url=url, port=livekit.port, keys=livekit.keys, **common)
    elif is_first:  # someone else's proxy is before it: as the name leads
        common = {**common, "address": name}
        yield LiveKit(url=livekit.url, port=port, server_name=name, keys=livekit.keys, **common)


def _edge(settings: HostSettings, common: dict[str, Any]) -> Iterator[Probe]:
    if edge := settings.edge:
        for name in settings.edge_backends:
            yield Https(server_name=name, port=edge.port, **common)


def _certificates(settings: HostSettings, common: dict[str, Any]) -> Iterator[Probe]:
    served = [
        (settings.name, way.port)
        for name in settings.turn_pools
        for way in ways(settings, name)
        if way.transport == "tls"
    ]
    if settings.edge:
        served += [(name, settings.edge.port) for name in settings.edge_backends]
    for name, port in dict.fromkeys(served):
        yield Certificate(server_name=name, port=port, **common)

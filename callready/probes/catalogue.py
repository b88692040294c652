"""What callers need of a host, from its settings: every probe that they lead to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any, TypeVar

from pydantic import SecretStr

from callready.probes import endpoint
from callready.probes.kinds import (
    Call,
    Certificate,
    Health,
    Https,
    Join,
    LiveKit,
    Meet,
    Recording,
    Stun,
    Turn,
)
from callready.probes.probe import Measured, Probe
from callready.probes.storage import Storage
from callready.settings.endpoints import split_endpoint
from callready.settings.fleet import Fleet
from callready.settings.livekit import LiveKit as LiveKitSettings
from callready.settings.models import HostSettings
from callready.settings.pools import Transport, Way, handed_out, ways
from callready.settings.uris import clusters, place, stun_uri, stun_uris, turn_uri, turn_uris

MOST_PAIRS = 64
"""SFUs and TURN hosts that calls connect each with each: a round of twice as many paths takes too
long."""


def trust(settings: HostSettings, verify: bool = True) -> dict[str, Any]:
    """Whom callers of a host trust, and who says where names lead them, as `Probe` takes it."""
    ca = settings.tls.ca if settings.tls else None
    path = str(Path(ca).expanduser().absolute()) if ca else None
    return {"ca": path, "verify": verify, "resolver": settings.deploy.resolver}


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
        found.append(Health(**vars(check), **common))
    if settings.records and (livekit := settings.livekit):
        host, port = place(livekit.url)
        common = {"node": node, "address": host, "port": port, **trust(settings, certificates)}
        storage = Storage.of(settings.records.storage)
        found.append(Recording(url=livekit.url, keys=livekit.keys, storage=storage, **common))
    return found


def watched(
    fleet: Fleet, watcher: str, key: str | None = None, secret: SecretStr | None = None
) -> list[Measured]:
    """What the synthetic caller asks all the time: STUN, TURN and a join of every host, the app,
    whether those meet who come by two SFUs of one service, and a call on every path.

    Args:
        fleet: all hosts.
        watcher: the host that asks, over the address families that it has.
        key: which of LiveKit's it uses; default the first one.
        secret: that the pools accept beside their own, instead of the first of these.
    """
    families = {4, 6 if fleet[watcher].address6 else 4}
    found: list[Measured] = []
    for node, host in fleet.hosts.items():
        every = probes(node, host, _public(host))
        found += (each for each in every if isinstance(each, Measured) and each.kind != Health.kind)
        found += _app(node, host)
    return [
        replace(probe, **_credentials(probe, key, secret))
        for probe in (*found, *_meetings(fleet), *_calls(fleet))
        if probe.family in families
    ]


def _app(node: str, host: HostSettings) -> Iterator[Health]:
    """Its health checks, or where it has none whether its URL is answered: at each address of the
    host where its edge serves that name, else where the name leads."""
    if not (app := host.backend):
        return
    plain = [{"url": app.url}] if app.url else []
    for check in [vars(check) for check in app.health] or plain:
        name, port = place(check["url"])
        is_here = host.edge and name in host.edge_backends and port == host.edge.port
        for address in _public(host) if is_here else [name]:
            yield Health(node=node, address=address, port=port, **check, **trust(host))


def _credentials(probe: Measured, key: str | None, secret: SecretStr | None) -> dict[str, Any]:
    """Those fields of it, and no more than it needs."""
    if isinstance(probe, Join | Meet | Call) and probe.keys:
        key = key or next(iter(probe.keys))
        keys = {"keys": {key: probe.keys[key]}}
    else:
        keys = {}
    is_minted = isinstance(probe, Turn) and probe.secret and secret
    return keys | ({"secret": secret} if is_minted else {})


def _meetings(fleet: Fleet) -> Iterator[Meet]:
    """Of each SFU and the next one of its cluster, so that all of them are in a ring; over one
    address family, and not where a proxy chooses the SFU."""
    for service, nodes in clusters(fleet).items():
        entrances = []
        for node in nodes:
            host = fleet[node]
            common = {"node": node, "address": _public(host)[0], **trust(host)}
            found = (each for each in _livekit(host, common) if isinstance(each, Join))
            entrances += [each for each in found if each.address == common["address"]]
        for one, other in zip(entrances, [*entrances[1:], *entrances[:1]], strict=True):
            if one is not other:
                yield Meet(
                    node=one.node,
                    address=one.address,
                    port=one.port,
                    peer=other.node,
                    other=(other.address, other.port),
                    service=service,
                    url=one.url,
                    keys=one.keys,
                    **trust(fleet[one.node]),
                )


def _calls(fleet: Fleet) -> Iterator[Call]:
    """One for each path to an SFU, and between two relays of a pool that no SFU hands out."""
    sfus: dict[str, tuple[str, HostSettings, LiveKitSettings]] = {}
    for node, host in fleet.hosts.items():
        if livekit := host.sfu:
            sfus.setdefault(livekit.url, (node, host, livekit))
    for node, host, livekit in sfus.values():
        rtc = livekit.rtc
        ports: dict[Transport, int] = {"udp": rtc.port_range_start, "tcp": rtc.tcp_port}
        for address, transport in product(_public(host), ports):
            common = {"node": node, "address": address, **trust(host)}
            port = ports[transport]
            direct = Turn(pool="", server_name="", transport=transport, port=port, **common)
            yield _call(direct, node, livekit, host)
    for name in dict.fromkeys(name for host in fleet.hosts.values() for name in host.turn_pools):
        hosts = fleet.pool(name)
        using = [each for each in sfus.values() if each[2].turn_pool == name]
        to = using or [each for each in sfus.values() if _is_for_sfus(hosts, name)]
        for (sfu, other, livekit), (node, host) in _pairs(to, [*hosts.items()]):
            yield from (_call(turn, sfu, livekit, other) for turn in _turns(node, host, name))
        if not to:
            for node, host in hosts.items():
                yield from (_call(turn, node, None, host) for turn in _turns(node, host, name))


A = TypeVar("A")
B = TypeVar("B")


def _pairs(some: Sequence[A], others: Sequence[B]) -> Iterable[tuple[A, B]]:
    """All, or of very many so many that each of both is in one."""
    if len(some) * len(others) <= MOST_PAIRS:
        return product(some, others)
    most = max(len(some), len(others))
    return islice(zip(cycle(some), cycle(others), strict=False), most)


def _public(host: HostSettings) -> list[str]:
    return [each for each in (host.address, host.address6) if each]


def _is_for_sfus(hosts: Mapping[str, HostSettings], pool: str) -> bool:
    return all(host.turn_pools[pool].peers == "sfu" for host in hosts.values())


def _turns(node: str, host: HostSettings, pool: str) -> Iterator[Turn]:
    for address in _public(host):
        common = {"node": node, "address": address, **trust(host)}
        yield from (turn for _, turn in _ways(host, pool, common))


def _call(turn: Turn, node: str, livekit: LiveKitSettings | None, host: HostSettings) -> Call:
    """The call through it, to an SFU if one is given; `node` and `host` are the SFU's."""
    to = {"url": livekit.url, "keys": livekit.keys} if livekit else {}
    name = turn.node if turn.pool else ""
    return Call(**{**vars(turn), **to, "node": node, "turn": name}, max_loss=host.verify.max_loss)


def ice_servers(fleet: Fleet, node: str) -> dict[str, Probe]:
    """The ICE servers on other hosts that LiveKit on `node` tells callers of, each by its URI; over
    IPv4, which every caller has."""
    settings, found = fleet[node], dict[str, Probe]()
    livekit = settings.sfu
    if not livekit:
        return found
    told = {*stun_uris(fleet, node), *turn_uris(fleet, node)}
    handed = [host for host, _ in handed_out(fleet, node)]  # two of a pool that may be large
    for name, host in fleet.pool(livekit.turn_pool).items():
        if name == node or not any(host is each for each in handed):
            continue
        common = {"node": name, "address": host.address, **trust(host)}
        for way, turn in _ways(host, livekit.turn_pool or "", common):
            if (uri := turn_uri(host, way)) in told:
                found[uri] = turn
            if way.transport == "udp" and (uri := stun_uri(host, way)) in told:
                found[uri] = Stun(pool=turn.pool, port=way.port, **common)
    for server in livekit.rtc.stun_servers:
        address, port = split_endpoint(server)
        found[f"stun:{server}"] = Stun(node=address, pool="", address=address, port=port)
    return found


def _turn(settings: HostSettings, common: dict[str, Any]) -> Iterator[Probe]:
    for name, pool in settings.turn_pools.items():
        yield Stun(pool=name, port=pool.listening_port, **common)
        yield from (turn for _, turn in _ways(settings, name, common))


def _ways(settings: HostSettings, name: str, common: dict[str, Any]) -> Iterator[tuple[Way, Turn]]:
    pool = settings.turn_pools[name]
    user, password = next(iter(pool.users.items()), ("", None))
    for way in ways(settings, name):
        yield (
            way,
            Turn(
                pool=name,
                transport=way.transport,
                port=way.port,
                server_name=settings.name,
                secret=pool.secrets[0] if pool.secrets else None,
                user=user,
                password=password,
                **common,
            ),
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
        where = {"url": livekit.url, "port": settings.edge.port, "server_name": name}
    elif not wanted or wanted & reached:
        where = {"url": f"ws://{endpoint(address, livekit.port)}", "port": livekit.port}
    elif is_first:  # someone else's proxy is before it: as the name leads
        where = {"url": livekit.url, "port": port, "server_name": name, "address": name}
    else:
        return
    asked = {**common, **where, "keys": livekit.keys}
    yield LiveKit(**asked)
    own = [settings.name, settings.address, settings.address6]
    yield Join(own=tuple(filter(None, own)), media_port=livekit.rtc.port_range_start, **asked)


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

"""SFUs that share a Redis: whether each serves, whichever of them a caller comes to."""

from contextlib import suppress

import pytest

from callready.diagnosis.model import Cause, Place
from callready.probes import ProbeError, catalogue, livekit, webrtc
from callready.probes.kinds import LiveKit, Stun
from callready.release import refusals
from callready.release.plan import REDIS_NEAR
from callready.settings.uris import spared_pools
from tests.verify.check import Check, each, ms
from tests.verify.cluster import split
from tests.verify.servers import Server
from tests.verify.targets import Site

MOST = 8
"""Nodes by which a room of one is joined: all by all of many nodes would take too long."""


def nodes(site: Site) -> list[Server]:
    """The SFUs that another one stands in for."""
    return [host for host in site.hosts() if host.settings.sfu and site.fleet.cluster(host.name)]


@each(nodes)
def test_serving(server: Server, check: Check) -> None:
    """The node takes callers itself"""
    if not (way := server.entrance):
        check.figure("behind a proxy")
        return
    with check.probing():
        got = livekit.health(way.url, ca_file=server.ca, at=(way.address, way.port))
        check.figure(f"{got.status} in {ms(got.rtt)}")
        check.expect(
            not got.from_peer,
            f"calls go on without {server.name}: its edge hands callers to another SFU",
            f"livekit-server.service on {server.name}, and what curl -i http://127.0.0.1:"
            f"{server.settings.livekit and server.settings.livekit.port}/ says there",
            Cause(
                "sfu-not-serving",
                server.name,
                Place.UNIT,
                f"LiveKit on {server.name} takes no callers: its edge hands them to other SFUs",
                "its journal and its way to Redis; `show servers state` of haproxy's admin.sock, "
                "if somebody took it out there",
            ),
        )


@each(nodes)
def test_understood(server: Server, site: Site, check: Check) -> None:
    """Versions and clocks go with those of the other nodes"""
    rtt = server.facts.redis_rtt
    check.figure(f"Redis {ms(rtt)} away")
    mend = "bring both into one region, or give this region a service of its own; mtr shows the way"
    check.expect(
        rtt <= REDIS_NEAR,
        f"joins by {server.name} and messages of calls there are slow: Redis is {ms(rtt)} away",
        mend,
        Cause(
            "redis-far",
            server.name,
            Place.EDGE,
            f"Redis is {ms(rtt)} away from {server.name} (at most {ms(REDIS_NEAR)} are good): each "
            "message of a call goes there and back",
            mend,
        ),
    )
    seen = {}
    for node in nodes(site):
        with suppress(ProbeError):  # which its own checks say
            seen[node.name] = node.node, node.facts
    for name, why in refusals.of_cluster(seen):
        check.expect(
            name != server.name,
            f"rooms are split, or joins fail: {name}: {why}",
            "timedatectl and list-nodes of livekit-server on each node",
            Cause(
                "clocks-apart",
                name,
                Place.CLOCK,
                f"{name}: {why}",
                "timedatectl on each SFU: all have to ask time servers",
            )
            if "clock" in why
            else None,
        )


@each(nodes)
def test_rooms(server: Server, site: Site, check: Check) -> None:
    """A room on the node is joined through every node"""
    if not (node_id := server.node_id):
        check.figure("it does not say which node it is (livekit.logging.level)")
        return
    all_nodes = nodes(site)
    here = all_nodes.index(server)
    for other in [*all_nodes[here:], *all_nodes[:here]][:MOST]:
        if way := other.entrance:
            with check.probing():
                _join(server, node_id, other, way, check)
    check.figure(node_id)
    if check.findings and (cause := split(all_nodes)):
        check.causes.append(cause)


def _join(server: Server, node_id: str, other: Server, way: LiveKit, check: Check) -> None:
    settings = server.settings.sfu
    assert settings
    key, secret = next(iter(settings.keys.items()))
    at = way.address, way.port
    got = livekit.reach(way.url, key, secret, other.ca, at=at, node_id=node_id)
    for result in got.candidates.values():
        if isinstance(result, ProbeError):
            raise result
    own = {server.settings.address, server.settings.address6}
    offered = {each.address for each in got.candidates}
    check.expect(
        got.node_id == node_id and offered & own,
        f"callers who come to {other.name} do not meet those in a room on {server.name}: they get "
        f"to {', '.join(sorted(offered)) or 'no address'}",
        f"livekit.redis of both, and livekit-server.service on {server.name}",
    )
    check.expect(
        got.server_version == settings.version,
        f"{server.name} runs LiveKit {got.server_version}, the inventory says {settings.version}",
        "whether its last deploy ended well",
    )
    check.figure(f"by {other.name}")


@pytest.mark.lane("calls")
@each(nodes)
def test_first_joins(server: Server, site: Site, check: Check) -> None:
    """Two who open a room at the same moment, here and at another node, hear each other"""
    all_nodes = nodes(site)
    other = all_nodes[(all_nodes.index(server) + 1) % len(all_nodes)]
    settings, ways = server.settings.sfu, [each.entrance for each in (server, other)]
    doors = [webrtc.Door(way.url, way.address, way.port) for way in ways if way]
    if not settings or len(doors) < 2:
        check.figure("behind a proxy")
        return
    check.figure(f"and by {other.name}")
    try:
        pair = webrtc.tokens(*next(iter(settings.keys.items())))
        got = webrtc.call(settings.url, pair, ca_file=server.ca, duration=0, doors=doors)
        check.figure(f"heard after {ms(max(each.audio_seconds for each in got.participants))}")
    except ProbeError as error:
        check.expect(
            False,
            f"two who open a room at the same moment, by {server.name} and by {other.name}, do not "
            f"meet: {error.finding.shown}",
            "the checks above; if they pass: livekit.config.node_selector, and CreateRoom of "
            "LiveKit's API before anybody joins",
        )


def spared(server: Server, site: Site) -> list[str]:
    """Pools of a host of which callers are told other hosts too."""
    pools = spared_pools(site.fleet)
    return [pool for pool in server.settings.turn_pools if server.name in pools.get(pool, ())]


@each(lambda site: [server for server in site.hosts() if spared(server, site)])
def test_spare(server: Server, site: Site, check: Check) -> None:
    """Another host of its pools answers too"""
    for pool in spared(server, site):
        others = [name for name in spared_pools(site.fleet)[pool] if name != server.name]
        left = [name for name in others if answers(site.servers[name], pool)]
        check.figure(f"{pool}: {len(left)} of {len(others)} others")
        what = f"{server.name} is the last host of pool {pool} that answers"
        check.expect(
            left,
            f"when {server.name} fails too, nobody who needs a relay connects: of pool {pool} "
            f"{', '.join(others)} do not answer",
            f"turnserver@{pool} on {', '.join(others)}",
            Cause(
                "pool-of-one",
                server.name,
                Place.CAPACITY,
                what,
                f"bring back {', '.join(others)}",
                latent=True,
            ),
        )


def answers(server: Server, pool: str) -> bool:
    """Whether a pool on a host answers STUN over some address family."""
    probes = catalogue.probes(server.name, server.settings, list(server.addresses.values()))
    for probe in probes:
        if type(probe) is Stun and probe.pool == pool:
            with suppress(ProbeError):
                probe.ask()
                return True
    return False

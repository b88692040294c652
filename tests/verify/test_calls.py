"""Real calls of two participants: data and an audio track arrive both ways, or the probe fails."""

import statistics

import pytest

from callready.probes import webrtc
from callready.probes.peer import peer_to_peer, peer_to_peer_while
from callready.probes.turn import IceServer
from callready.probes.webrtc import Call
from tests.verify.check import Check, each, ms
from tests.verify.targets import Pair, Route, Sfu, Site, Turn

DURATION = 0.5  # seconds that a call goes on once both hear each other

calls = pytest.mark.lane("calls")


def _call(
    sfu: Sfu, way: Turn | None = None, duration: float = DURATION, video: bool = False
) -> Call:
    """A call as clients make it, or one forced through a single TURN URI."""
    servers = None
    if way:
        minted = way.credentials(duration)
        servers = [IceServer((way.by_name.uri,), minted.username, minted.password)]
    tokens = webrtc.tokens(*sfu.key)
    large = sfu.limits.max_loss if duration >= DURATION else None
    return webrtc.call(sfu.url, tokens, servers, way is not None, sfu.ca, duration, large, video)


def _figures(call: Call, check: Check) -> None:
    slower = max(call.participants, key=lambda each: each.connect_seconds)
    check.connected(slower.connect_seconds)
    check.figure(f"{ms(slower.connect_seconds)} to connect, RTT {ms(slower.rtt)}")
    check.figure(f"{slower.local}-{slower.remote} {slower.protocol}")


def _check_far_end(call: Call, sfu: Sfu, check: Check) -> None:
    """The SFU's end of the media path is one of its public addresses."""
    for each_side in call.participants:
        check.expect(
            each_side.remote_address in sfu.addresses,
            f"media goes to {each_side.remote_address}, which is not the SFU's "
            f"{' or '.join(sorted(sfu.addresses))}",
            "rtc.node_ip in livekit.yaml, and address and address6 in the inventory",
        )


@calls
@each(Site.sfus)
def test_direct(sfu: Sfu, site: Site, check: Check) -> None:
    """Call, direct"""
    site.expect_passing(sfu)
    got = _call(sfu)
    _figures(got, check)
    _check_far_end(got, sfu, check)
    gathered = got.participants[0].candidates
    check.figure(", ".join(f"{kind} {count}" for kind, count in sorted(gathered.items())))
    check.expect(
        "relay" not in {side.local for side in got.participants},
        "calls connect through a relay only: callers do not reach the SFU's media ports",
        "rtc.node_ip, and 50000-60000/udp and rtc.tcp_port in nftables and in the provider's "
        "firewall",
    )


@calls
@each(lambda site: site.pairs("udp", "tcp", "tls"))
def test_relayed(pair: Pair, site: Site, check: Check) -> None:
    """Call only through {pair.turn.name} over {pair.turn.way.over}"""
    site.expect_passing(pair.sfu, pair.turn)
    got = _call(pair.sfu, pair.turn)
    _figures(got, check)
    _check_far_end(got, pair.sfu, check)
    host = pair.turn.server.settings
    for side in got.participants:
        check.expect(
            side.local == "relay" and side.local_address in (host.address, host.address6),
            f"the call went {side.local} from {side.local_address}, not through {pair.turn.name}",
            "the probe (callready.probes.webrtc)",
        )
    check.expect(
        got.retries == got.reconnects == 0,
        f"calls connect after several attempts: {got.retries} retries, {got.reconnects} reconnects",
        "journalctl of livekit-server and of the pool at that time",
    )


@calls
@each(Site.internet_turns)
def test_peer_to_peer(pool: Turn, site: Site, check: Check) -> None:
    """Peer to peer, both relayed ({pool.pool_name})"""
    site.expect_passing(None, pool)
    got = peer_to_peer((pool.by_name, pool.credentials()), (pool.by_name, pool.credentials()))
    check.figure(f"{ms(got.connect_seconds)} to connect, RTT {ms(got.rtt)}")
    check.figure(f"{got.received}/{got.sent} packets")


@calls
@each(Site.neighbours)
def test_side_by_side(pair: Pair, site: Site, check: Check) -> None:
    """{pair.turn.pool_name} next to a call through {pair.sfu.livekit.turn_pool}"""
    turn, sfu = pair.turn, pair.sfu
    site.expect_passing(None, turn)
    way = next((other.turn for other in site.pairs() if other.sfu == sfu), None)
    site.expect_passing(sfu, way)
    sides = (turn.by_name, turn.credentials()), (turn.by_name, turn.credentials())
    peers, call = peer_to_peer_while(*sides, lambda: _call(sfu, way))
    check.figure(f"{peers.received}/{peers.sent} packets, longest gap {ms(peers.longest_gap)}")
    check.figure(f"call {ms(statistics.median(p.connect_seconds for p in call.participants))}")
    check.expect(
        peers.received >= 0.9 * peers.sent and call.reconnects == 0,
        f"calls and {turn.pool_name} disturb each other: {peers.received} of {peers.sent} packets "
        f"came through, {call.reconnects} reconnects",
        "whether both pools share a host, their relay ranges, and its load",
    )


@pytest.mark.lane("attempts")
@each(Site.sfus)
def test_attempts(sfu: Sfu, site: Site, check: Check) -> None:
    """Calls connect at the first attempt"""
    site.expect_passing(sfu)
    # Where a path is closed, every call waits until it takes another: one shows that.
    attempts = site.attempts or (1 if site.is_closed(sfu) else sfu.limits.attempts)
    got = webrtc.calls(attempts, lambda: _call(sfu, duration=0.1), give_up=1)
    check.figure(f"{got.succeeded} of {got.attempts}")
    check.connected(*got.connect_seconds)
    if got.median_connect_seconds and got.max_connect_seconds:
        check.figure(
            f"median {ms(got.median_connect_seconds)}, longest {ms(got.max_connect_seconds)}"
        )
    check.expect(
        got.succeeded == got.attempts,
        f"{got.attempts - got.succeeded} of {got.attempts} calls do not connect: "
        + "; ".join(dict.fromkeys(got.errors)),
        "the checks above, which try each path by itself",
    )


@pytest.mark.lane("soak")
@each(Site.soaks)
def test_soak(route: Route, site: Site, check: Check) -> None:
    """Call that lasts, {route.call}"""
    assert route.sfu
    got = _call(route.sfu, route.turn, site.soak, video=True)
    check.figure(f"loss {max(side.loss for side in got.participants):.1%}")
    check.figure(f"jitter {ms(max(side.jitter for side in got.participants))}")
    check.figure(f"{min(side.bitrate for side in got.participants) / 1000:.0f} kbit/s of video")
    check.findings.extend(webrtc.shortcomings(got, route.sfu.limits))

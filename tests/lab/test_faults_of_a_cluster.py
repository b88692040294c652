"""Three SFUs that are one service, their Redis, and two TURN hosts of one pool, as in
inventories/cluster: what callers notice of each fault, and who comes while it lasts.

With -s it prints the tables of docs/growing.md. Callers and hosts share this machine's processors.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import runpy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pprint import pformat
from typing import Any

import pytest
from livekit.protocol.rtc import LeaveRequest, SignalRequest, SignalResponse
from pydantic import SecretStr
from websockets.exceptions import WebSocketException

from callready.probes import ProbeError, livekit
from callready.probes.app import connected
from callready.probes.generator import Generator, Heard, Participant, Service
from callready.rollout.rollout import NODE_ID
from lab import Lab, ca, plan
from tests.support.archives import published
from tests.support.breakage import Packets, filtered, inside
from tests.support.continuity import RECOVERY, Calls, Continuity, calls_of
from tests.support.fleet import (
    DRAIN,
    REPOSITORY,
    Fleet,
    Host,
    build_generator,
    delivered,
    draining,
    eventually,
    verify,
)

pytestmark = pytest.mark.long

SFUS = ONE, TWO, THREE = tuple(map(Host, plan.SERVED_BY))  # Debian 13, 12, 13
TURNS = Host("turn1"), Host("turn2")
REDIS, APP = Host("redis1"), Host("app1")
URL = f"wss://{plan.SERVICE}"  # its first address is ONE's, where the SDK comes in
CA = str(ca.CA_CERTIFICATE)
KEY = "APIlab"
RELAYS = " ".join(f"turn:{host.fqdn}:3478?transport=udp" for host in TURNS)
PATIENCE = 15.0  # seconds a newcomer waits
MINUTE = 60.0
CALLS = 20
rows: list[str] = []
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """inventories/cluster, with secrets of its own, deployed to bare hosts."""
    with delivered(*(host.name for host in (*SFUS, *TURNS, REDIS, APP))):
        Lab().install_backend(APP.name)
        groups, data = (_public(f"inventories/{name}") for name in ("cluster", DATA))
        names = re.findall(r"'secret:([^']+)'", pformat(data))
        fleet = Fleet(tmp_path_factory.mktemp("service"), groups, data, [*dict.fromkeys(names)])
        fleet.deploy()
        yield fleet
    print("", *HEAD, *rows, sep="\n")


DATA = "group_data/cluster.py"
HEAD = (
    "| what | call | reconnects | longest gap | who comes meanwhile |",
    "|---|---|---|---|---|",
)


def _public(path: str) -> dict[str, Any]:
    found = runpy.run_path(str(REPOSITORY / path))
    return {name: value for name, value in found.items() if not name.startswith("_")}


@pytest.fixture(autouse=True)
def settled(service: Fleet) -> Iterator[None]:
    """All nodes take callers themselves, as the inventory says."""
    if service.unsettled:
        service.deploy()
    eventually(lambda: all(map(serves, SFUS)))
    yield
    service.restore()


def serves(host: Host) -> bool:
    """Whether a host's own LiveKit takes who comes by its edge."""
    try:
        return not livekit.health(URL, ca_file=CA, at=(host.ipv4, 443)).from_peer
    except ProbeError:
        return False


def node_ids() -> dict[str, str]:
    """The host of each node that runs."""
    running = (host for host in SFUS if Lab().state(host.name) in ("running", "cut"))
    return {host.root(NODE_ID, check=False): host.name for host in running}


def after(seconds: float) -> None:
    """Wait for so long: what happens to calls in that time is what is measured."""
    threading.Event().wait(seconds)


@dataclass(frozen=True)
class Arrival:
    """Somebody who came to a room by the edge of a host.

    Args:
        start, end: seconds since the fault.
        node: where the room was for them, empty if they did not get in.
        met: how many of the callers were there.
        why: they did not get in.
    """

    edge: Host
    start: float
    end: float
    node: str = ""
    met: int = 0
    why: str = ""


@dataclass
class Newcomers:
    """People who come to a room while a call goes on there, one a second by each edge, and leave
    as soon as they are in."""

    room: str
    secret: SecretStr
    found: list[Arrival] = field(default_factory=list)
    nodes: dict[str, str] = field(default_factory=node_ids)
    away: threading.Event = field(default_factory=threading.Event)  # nobody comes
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Newcomers:
        self._threads = [threading.Thread(target=self._come, args=(host,)) for host in SFUS]
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for each in self._threads:
            each.join()
        self.nodes |= node_ids()

    def _come(self, edge: Host) -> None:
        while not self._over.wait(1):
            if self.away.is_set():
                continue
            arrival = self.one(edge)
            if arrival.start >= 0:
                self.found.append(arrival)

    def one(self, edge: Host) -> Arrival:
        """How it goes for one who comes now."""
        start = time.monotonic()
        node, met, why = "", 0, ""
        try:
            node, met = asyncio.run(self._join(edge))
        except (OSError, WebSocketException, TimeoutError) as error:
            why = f"{type(error).__name__} {error}"
        return Arrival(edge, start - self.began, time.monotonic() - self.began, node, met, why)

    async def _join(self, edge: Host) -> tuple[str, int]:
        who = livekit.token(KEY, self.secret, self.room, f"newcomer-{next(numbers)}")
        options: dict[str, Any] = {
            "additional_headers": {"Authorization": f"Bearer {who.get_secret_value()}"},
            "open_timeout": PATIENCE,
            "close_timeout": 0.5,
        }
        url = f"{URL}/rtc?protocol=15&auto_subscribe=0"
        async with asyncio.timeout(PATIENCE), connected(url, CA, (edge.ipv4, 443), **options) as ws:
            while not (said := SignalResponse.FromString(await ws.recv(decode=False))).HasField(
                "join"
            ):
                pass
            await ws.send(SignalRequest(leave=LeaveRequest()).SerializeToString())
            others = [each.identity for each in said.join.other_participants]
            return said.join.server_info.node_id, sum(each.startswith("probe-") for each in others)

    def meet(self) -> bool:
        """Wait until somebody who comes now meets both callers, as long as callers take to come
        back; whether that came."""
        since = time.monotonic() - self.began
        with suppress(AssertionError):
            eventually(lambda: any(e.start > since and e.met == 2 for e in self.found), RECOVERY)
            return True
        return False

    def on(self, arrival: Arrival) -> str:
        """The host whose LiveKit had the room for them."""
        return self.nodes.get(arrival.node, "?")

    @property
    def in_short(self) -> Iterator[str]:
        """How it went by each edge, what is alike in one line."""
        for edge in SFUS:
            mine = sorted((each for each in self.found if each.edge == edge), key=lambda e: e.start)
            for (node, met, why), some in itertools.groupby(mine, lambda e: (e.node, e.met, e.why)):
                alike = list(some)
                where = f"on {self.on(alike[0])}, {met} met" if node else why
                times = f"{alike[0].start:.1f} to {alike[-1].end:.1f} s"
                yield f"  by {edge.name} {times}: {len(alike)} {where}"

    def __str__(self) -> str:
        got_in = [each for each in self.found if each.node]
        words = [f"{len(got_in)} of {len(self.found)} get in"]
        if got_in:
            slowest = max(each.end - each.start for each in got_in)
            words[0] += f", the slowest in {slowest:.1f} s"
        if failed := [each for each in self.found if not each.node]:
            edges = sorted({each.edge.name for each in failed})
            by = f" by {' and '.join(edges)}" if len(edges) < len(SFUS) else ""
            first, last = min(e.start for e in failed), max(e.end for e in failed)
            words.append(f"{len(failed)} do not{by}, from {first:.0f} to {last:.0f} s")
        alone = [each for each in got_in if each.met < 2]
        if alone:
            places = ", ".join(sorted({self.on(each) for each in alone}))
            first, last = min(e.start for e in alone), max(e.end for e in alone)
            words.append(
                f"{len(alone)} miss callers, on {places}, from {first:.0f} to {last:.0f} s"
            )
        if got_in and (newest := max(got_in, key=lambda each: each.end)) not in alone:
            words.append(f"in the end both callers are met, on {self.on(newest)}")
        return "; ".join(words)


@dataclass(frozen=True)
class Noticed:
    """What callers noticed of a fault, and who came meanwhile."""

    calls: Calls
    newcomers: Newcomers

    @property
    def all(self) -> list[Continuity]:
        """What each caller noticed."""
        return [each for both in self.calls.values() for each in both]

    @property
    def split(self) -> list[Arrival]:
        """Newcomers who did not meet both callers."""
        return [each for each in self.newcomers.found if each.node and each.met < 2]


def row(what: str, noticed: Noticed) -> None:
    """A line of the table for each call."""
    for number, (name, both) in enumerate(noticed.calls.items()):
        lost = " and lost" * any(each.gone for each in both)
        found = (
            "" if number else what,
            "direct" if name == "direct" else "TURN over UDP",
            f"{max(each.reconnects for each in both)}{lost}",
            gap(*both),
            "" if number else str(noticed.newcomers),
        )
        rows.append(f"| {' | '.join(found)} |")
        print(rows[-1], *both, sep="\n")
    print(*noticed.newcomers.in_short, sep="\n")


def gap(*callers: Continuity) -> str:
    """The longest, and that of sound if it is another one: media may go on without signalling."""
    longest = max(each.gap for each in callers) / 1000
    sound = max(each.audio_gap for each in callers) / 1000
    return f"{longest:.1f} s" + f", of sound {sound:.1f} s" * (longest > sound + 1)


@contextmanager
def watched(service: Fleet, node: Host) -> Iterator[Noticed]:
    """A direct call and a relayed one, in rooms on a node, for as long as the block runs; people
    come to the first one's room."""
    secret = SecretStr(service.secrets["livekit/api_secret"])
    room, node_id = f"continuity-{next(numbers)}", node.root(NODE_ID)
    ways = {RELAYS: service.secrets["turn/calls"]}
    with (
        calls_of(URL, KEY, secret.get_secret_value(), ways, CA, node_id, room) as calls,
        Newcomers(room, secret) as newcomers,
    ):
        assert newcomers.meet()
        newcomers.began = time.monotonic()
        newcomers.found.clear()
        yield Noticed(calls, newcomers)


def noticed_of(
    service: Fleet,
    what: str,
    node: Host,
    fault: Callable[[], object],
    lasting: AbstractContextManager[object] | None = None,
) -> Noticed:
    """A line of the table: what was noticed of a fault on a node that has calls. What is `lasting`
    is there until all hear each other again."""
    with ExitStack() as stack, watched(service, node) as noticed:
        stack.enter_context(lasting or nullcontext())
        fault()
        noticed.newcomers.meet()
    row(what, noticed)
    return noticed


def changed(service: Fleet, drain: float, **livekit_settings: Any) -> None:
    """Have something in the inventory that restarts LiveKit."""
    service.data["deploy"] = {"drain": drain}
    rooms = {"room": {"empty_timeout": 300 + next(numbers)}}
    service.data["livekit"] = {**service.data["livekit"], "config": rooms, **livekit_settings}
    service.unsettled = True


def failing(service: Fleet, report: Path, *checks: str) -> set[str]:
    """Those of the verification that fail, and that others pass."""
    found = verify(report, *checks, inventory=service.inventory)
    wrong = {name for name in found if found[name]}
    assert wrong < set(found)
    return wrong


def test_media_that_does_not_get_to_one_node_is_found(service: Fleet, tmp_path: Path) -> None:
    with filtered(inside(THREE), Packets("in", proto="udp", ports="50000-60000")):
        found = failing(service, tmp_path, "test_path")
    for way in ("udp", *(f"{host.fqdn}-calls-{over}" for host in TURNS for over in ("udp", "tls"))):
        for family in (4, 6):
            assert f"test_path[{THREE.fqdn}-{way}-ipv{family}]" in found, found
    assert all(f"[{THREE.fqdn}-" in name for name in found), found
    assert not any(f"[{THREE.fqdn}-tcp-" in name for name in found), found


def test_two_who_cannot_meet_are_found(service: Fleet, tmp_path: Path) -> None:
    ONE.root("systemctl stop haproxy")
    try:
        found = failing(service, tmp_path, "test_first_joins")
    finally:
        ONE.root("systemctl start haproxy")
    assert found == {f"test_first_joins[{host.fqdn}]" for host in (ONE, THREE)}


def test_a_drained_node_whose_calls_end_in_time(service: Fleet) -> None:
    changed(service, DRAIN)
    with watched(service, TWO) as noticed:
        process = service.start("--limit", TWO.fqdn)
        draining(process)
    said = process.communicate(timeout=DRAIN)
    row("a node is drained, and its calls end in time", noticed)
    assert process.returncode == 0, said
    assert all(each.undisturbed for each in noticed.all), noticed
    assert not noticed.split


def test_a_drained_node_whose_calls_go_on(service: Fleet) -> None:
    changed(service, 2)

    def deploy() -> None:
        service.deploy("--limit", TWO.fqdn)

    noticed = noticed_of(service, "the same, and they go on", TWO, deploy)
    assert all(each.reconnects and not each.gone for each in noticed.all), noticed


def test_a_node_is_killed(service: Fleet) -> None:
    def kill() -> None:
        TWO.root("systemctl kill -s KILL livekit-server")
        eventually(lambda: not serves(TWO))
        eventually(lambda: serves(TWO))

    noticed = noticed_of(service, "LiveKit on a node is killed", TWO, kill)
    assert all(each.reconnects and not each.gone for each in noticed.all), noticed


@pytest.mark.parametrize("node", [TWO, ONE], ids=["elsewhere", "where callers came in"])
def test_a_node_goes_away(service: Fleet, node: Host) -> None:
    """Its power is cut; it is on again when all hear each other."""

    @contextmanager
    def off() -> Iterator[None]:
        Lab().power_cut(node.name)
        yield
        Lab().boot(node.name)

    what = "a node's host is off" + ", by which callers came in" * (node == ONE)
    noticed = noticed_of(service, what, node, partial(after, 10), off())
    assert all(each.reconnects and not each.gone for each in noticed.all), noticed


def test_a_node_is_rebooted(service: Fleet) -> None:
    noticed = noticed_of(service, "a node's host reboots", TWO, partial(Lab().reboot, TWO.name))
    assert all(each.reconnects and not each.gone for each in noticed.all), noticed


def test_redis_is_restarted(service: Fleet) -> None:
    def restart() -> None:
        REDIS.root("systemctl restart callready-redis")
        eventually(lambda: all(map(serves, SFUS)))
        after(10)

    noticed = noticed_of(service, "Redis restarts", TWO, restart)
    assert not any(each.reconnects or each.gone for each in noticed.all), noticed
    assert not noticed.split


@pytest.mark.parametrize("seconds", [30, 60])
def test_redis_is_away(service: Fleet, seconds: int) -> None:
    def stop() -> None:
        REDIS.root("systemctl stop callready-redis")
        after(seconds)
        REDIS.root("systemctl start callready-redis")
        eventually(lambda: all(map(serves, SFUS)))
        after(5)

    noticed = noticed_of(service, f"Redis is away for {seconds} s", TWO, stop)
    assert noticed.newcomers.found[-1].node


def test_a_node_is_cut_off_from_redis(service: Fleet) -> None:
    def cut() -> None:
        with filtered(inside(TWO), Packets(proto="tcp", peer=REDIS.ipv4)):
            after(MINUTE)
        eventually(lambda: all(map(serves, SFUS)))
        after(10)

    noticed = noticed_of(service, "a node is cut off from Redis for a minute", TWO, cut)
    assert all(each.reconnects and not each.gone for each in noticed.all), noticed


def test_an_edge_is_down(service: Fleet) -> None:
    def stop() -> None:
        ONE.root("systemctl stop haproxy")
        after(20)
        ONE.root("systemctl start haproxy")

    what = "the edge by which callers came in is down for 20 s"
    noticed = noticed_of(service, what, TWO, stop)
    assert not any(each.gone for each in noticed.all), noticed
    assert not noticed.split


def busiest_turn() -> Host:
    """The TURN host by which the relayed call goes."""
    packets = "cat /sys/class/net/host0/statistics/rx_packets"
    before = [int(host.root(packets)) for host in TURNS]
    after(1)
    return max(TURNS, key=lambda host: int(host.root(packets)) - before[TURNS.index(host)])


def test_a_turn_host_goes_away(service: Fleet) -> None:
    hosts = list[Host]()

    def cut() -> None:
        hosts.append(busiest_turn())
        Lab().cut(hosts[0].name)

    @contextmanager
    def mended() -> Iterator[None]:
        yield
        Lab().mend(hosts[0].name)

    noticed = noticed_of(service, "the TURN host of a call is cut off", TWO, cut, mended())
    assert all(each.undisturbed for each in noticed.calls["direct"]), noticed
    relayed = noticed.calls[RELAYS]
    assert not any(hosts[0].fqdn in each.way or each.gone for each in relayed), noticed


def test_a_deploy_fails_on_the_second_of_three(service: Fleet) -> None:
    """Its gate gets no answer there; its calls, and those of the others, go on."""
    before = {host: host.root("readlink /etc/callready/confirmed") for host in SFUS}
    changed(service, 2)
    service.data["deploy"]["confirm_timeout"] = 20

    def deploy() -> None:
        gate = Packets("in", proto="tcp", ports="443", peer=plan.MACHINE.ipv4)
        with filtered(inside(TWO), gate):
            run = service.run()
        print(*run.text.splitlines()[-25:], sep="\n")
        assert run.status == 1, run.text

    noticed = noticed_of(service, "a deploy fails on the second of three SFUs", TWO, deploy)
    now = {host: host.root("readlink /etc/callready/confirmed") for host in SFUS}
    assert [now[host] == before[host] for host in SFUS] == [False, True, True]
    assert all(each.reconnects and not each.gone for each in noticed.all), noticed


def test_redis_loses_its_data(service: Fleet) -> None:
    """Whoever comes after that is elsewhere, until the node with those who were there before
    restarts."""
    with watched(service, TWO) as noticed:
        noticed.newcomers.away.set()  # the first node that is known again would be chosen
        REDIS.root(
            "systemctl stop callready-redis; rm -r /var/lib/callready-redis/*;"
            "systemctl start callready-redis"
        )
        eventually(lambda: all(map(serves, SFUS)))
        noticed.newcomers.away.clear()
        after(20)
        TWO.root("systemctl restart livekit-server")
        noticed.newcomers.meet()
    row("Redis has lost its data; 20 s later LiveKit on the room's node restarts", noticed)
    assert noticed.split and noticed.newcomers.found[-1].met == 2, noticed
    assert not any(each.gone for each in noticed.all), noticed


@contextmanager
def two_versions(service: Fleet, path: Path) -> Iterator[None]:
    """LiveKit 1.13.6, which is 1.13.5 with a byte more, can be had."""
    with published(path, {"1.13.6": None}) as where:
        changed(service, 2, version="1.13.6", base_url=where)
        yield


def test_the_fleet_is_on_two_versions(service: Fleet, tmp_path: Path) -> None:
    with two_versions(service, tmp_path):
        what = "one of three nodes gets another version, by which no caller came in"
        deploy = partial(service.deploy, "--limit", THREE.fqdn)
        noticed = noticed_of(service, what, TWO, deploy)
    assert not any(each.reconnects or each.gone for each in noticed.all), noticed
    assert not noticed.split


@pytest.mark.parametrize("drain", [DRAIN, 2], ids=["calls end in time", "calls go on"])
def test_no_call_is_lost_in_a_rolling_upgrade(service: Fleet, drain: float, tmp_path: Path) -> None:
    """20 calls: 17 of LiveKit's Go SDK, which only counts, and three that say how long they heard
    nothing."""
    build_generator()
    secret = SecretStr(service.secrets["livekit/api_secret"])
    pool = service.secrets["turn/calls"]
    at = Service(URL, KEY, secret, CA)
    rooms = [f"callready-load-{number}" for number in range(CALLS - 3)]
    who = [Participant(at, room, f"{room}-{n}", True, "") for room in rooms for n in (1, 2)]
    hosts = {address for host in (*SFUS, *TURNS) for address in (host.ipv4, host.ipv6)}
    ways = {RELAYS: pool, f"turns:{TURNS[1].fqdn}:443?transport=tcp": pool}
    many, heard = Generator.started("audio", hosts, CA, 900, Lab().client_prefix()), Heard()
    with ExitStack() as stack:
        stack.enter_context(two_versions(service, tmp_path))
        service.data["deploy"] = {"drain": drain}
        generator = stack.enter_context(many)
        generator.join(who, 5, heard)
        generator.measure(2, len(who), heard)
        assert not heard.failed and heard.streams == len(who), heard
        began, before = time.monotonic(), {host: host.media() for host in SFUS}
        with calls_of(URL, KEY, secret.get_secret_value(), ways, CA) as calls:
            if drain == DRAIN:
                process = service.start()
                draining(process)
            else:
                service.deploy()
        took = time.monotonic() - began
        heard.streams = 0
        # Its SDK waits up to half a minute until it believes that a node is gone.
        while heard.streams < len(who) and time.monotonic() < began + took + 2 * RECOVERY:
            generator.measure(3, len(who), heard)
    if drain == DRAIN:
        said = process.communicate(timeout=400)
        assert process.returncode == 0, said
    both = [each for pair in calls.values() for each in pair]
    print(before, heard, *both, sep="\n")
    again = max(each.reconnects for each in both)
    rows.append(
        f"| three SFUs upgraded under {CALLS} calls, drain {drain} s, in {took:.0f} s | {CALLS} | "
        f"{again} | {gap(*both)} | {heard.streams // 2 + 3} calls of {CALLS} go on |"
    )
    print(rows[-1])
    assert heard.streams == len(who) and not any(each.gone for each in both)
    if drain == DRAIN:
        assert not heard.broken and all(each.undisturbed for each in both)

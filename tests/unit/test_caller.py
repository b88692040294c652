"""The synthetic caller: what it counts as failed, and what its metrics say."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from base64 import b64decode
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from callready.probes import ProbeError, caller
from callready.probes.caller import Caller, labels
from callready.probes.catalogue import MOST_PAIRS, watched
from callready.probes.kinds import Call, Health, Https, Join, Meet, Stun, Turn
from callready.probes.probe import Measured, Measurement
from tests.support.inventories import SECRETS, SFU1, SHARED, TURN1, TURN2, Edit, load

SECRET = "planted-9f3b-in-no-output"
WRONG = ProbeError("callers get nothing", "the pool")


@dataclass(frozen=True, kw_only=True)
class Fake(Stun):
    """A probe that does what a test says."""

    does: Callable[[Measurement], Awaitable[None]]
    secret: SecretStr

    async def measure(self, into: Measurement) -> None:
        await self.does(into)


def fake(does: Callable[[Measurement], Awaitable[None]], node: str = "turn1") -> Fake:
    return Fake(
        node=node, address="192.0.2.1", port=3478, pool="calls", does=does, secret=SecretStr(SECRET)
    )


def one(does: Callable[[Measurement], Awaitable[None]]) -> tuple[Caller, Callable[[], str]]:
    """A caller of one probe, and what asks that once and says its metrics."""
    probe = fake(does)
    asking = Caller([probe])

    def ask() -> str:
        asyncio.run(asking.ask(labels(probe)))
        return asking.metrics()

    return asking, ask


async def passes(into: Measurement) -> None:
    into.begin("TCP")
    into.begin("allocate")
    into.rtt, into.loss = 0.25, 0.5


async def fails(_: Measurement) -> None:
    raise WRONG


def value(metrics: str, name: str, more: str = "") -> str | None:
    series = f'{{probe="stun",host="turn1",pool="calls",way="UDP",family="4"{more}}}'
    lines = [line for line in metrics.splitlines() if line.startswith(f"callready_probe_{name}{{")]
    return next((line.split()[-1] for line in lines if series in line), None)


@pytest.mark.parametrize(("count", "seconds"), [(500, 20.0), (1000, 40.0)])
def test_a_large_fleet_is_asked_more_rarely(count: int, seconds: float) -> None:
    asking = Caller([fake(passes, f"turn{n}") for n in range(count)])
    assert value(asking.metrics(), "interval_seconds") == repr(seconds)


def test_what_passes_is_one_with_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_600_000_000.5)
    asking, ask = one(passes)
    assert value(asking.metrics(), "success") is None, "it was not asked yet"
    assert value(asking.metrics(), "interval_seconds") == "20.0"
    found = ask()
    assert value(found, "success") == "1"
    assert value(found, "last_run_seconds") == "1600000000.5"
    assert value(found, "rtt_seconds") == "0.25"
    assert value(found, "loss_ratio") == "0.5"
    assert value(found, "seconds", ',phase="tcp"') is not None
    assert value(found, "seconds", ',phase="allocate"') is None, "it did not come through that"


def test_what_fails_is_none_and_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    turns = iter([fails, fails, passes, fails])
    _, ask = one(lambda into: next(turns)(into))
    assert [value(ask(), "success") for _ in range(4)] == ["0", "0", "1", "0"]
    words = f"STUN of pool calls on turn1 (IPv4): {WRONG.finding}"
    passing = "STUN of pool calls on turn1 (IPv4): passes again"
    assert capsys.readouterr().err.splitlines() == [words, passing, words]


def test_what_hangs_is_ended_and_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller, "LIMIT", 0.01)
    closed = []

    async def hangs(_: Measurement) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    _, ask = one(hangs)
    found = ask()
    assert value(found, "success") == "0"
    assert value(found, "last_run_seconds") is not None
    assert closed == [True]


def test_what_breaks_has_failed_and_its_secret_is_said_nowhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def breaks(_: Measurement) -> None:
        raise RuntimeError(f"it was {SECRET}")

    asking, ask = one(breaks)
    assert value(ask(), "success") == "0"
    said = capsys.readouterr().err
    assert "RuntimeError" in said
    assert SECRET not in said + asking.metrics() + repr(asking)


def test_labels_are_escaped() -> None:
    odd = Caller([fake(passes, 'a"b\\c\nd')]).metrics()
    assert 'host="a\\"b\\\\c\\nd"' in odd
    assert all(line.startswith(("#", "callready_probe_")) for line in odd.splitlines())


def test_everything_is_asked_again_and_again_and_calls_in_turn() -> None:
    asked = Counter[str]()
    order = []
    enough = asyncio.Event()

    def counted(name: str) -> Callable[[Measurement], Awaitable[None]]:
        async def count(_: Measurement) -> None:
            asked[name] += 1
            if name.startswith("call"):
                order.append(name)
            if min(asked.values()) > 2 and len(asked) == 5:
                enough.set()

        return count

    class FakeCall(Call):
        async def measure(self, into: Measurement) -> None:
            await counted(f"call {self.node}")(into)

    common: dict[str, Any] = {"address": "192.0.2.1", "port": 1, "pool": "", "server_name": ""}
    probes: list[Measured] = [fake(counted("a"), "a"), fake(counted("b"), "b")]
    probes += [FakeCall(node=name, max_loss=0.1, **common) for name in "xyz"]

    async def until_enough() -> None:
        asking = asyncio.create_task(Caller(probes, 0.002, 60_000).ask_all())
        async with asyncio.timeout(30):
            await enough.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(until_enough())
    assert order[:6] == ["call x", "call y", "call z"] * 2


def test_a_configuration_is_read_as_it_was_written(project: Path) -> None:
    probes = watched(load(), SFU1)
    data = json.loads(caller.configuration(probes, 6))
    assert SECRETS["turn/calls"] in json.dumps(data), "the caller needs it"
    read = caller.from_configuration(data)
    assert [*read.probes.values()] == probes
    calls = sum(isinstance(each, Call) for each in probes)
    assert f" {calls * 60 / 6!r}\n" in read.metrics(), "each call's turn"
    with pytest.raises(ValueError, match="reads version 1, that is 2"):
        caller.from_configuration({**data, "version": 2})
    health = {"kind": "https", "node": "x", "address": "192.0.2.1", "port": 1, "server_name": "x"}
    with pytest.raises(ValueError, match="of kind https does not measure itself"):
        caller.from_configuration({**data, "probes": [health]})


def test_a_fleet_is_called_on_every_path(project: Path) -> None:
    probes = watched(load((TURN1, "turn.tls_on_443", True)), SFU1)
    assert not any(isinstance(each, Https) for each in probes)
    assert len({labels(each) for each in probes}) == len(probes)
    calls = [dict(labels(each)) for each in probes if isinstance(each, Call)]
    ways = ("TURN/UDP", "TURN/TCP", "TURN/TLS", "TURN/TLS 443")
    assert {
        (each["host"], each.get("turn"), each.get("pool"), each["way"], each["family"])
        for each in calls
    } == {
        *((SFU1, None, None, way, family) for way in ("UDP", "TCP") for family in "46"),
        *((SFU1, TURN1, "calls", way, family) for way in ways for family in "46"),
        # A pool that no SFU hands out: from one relay to another.
        *((TURN2, TURN2, "avatar", way, "4") for way in ways[:3]),
    }
    joins = [each for each in probes if isinstance(each, Join)]
    assert [(each.node, each.family) for each in joins] == [(SFU1, 4), (SFU1, 6)]


URL, ELSEWHERE = "https://app.callready.test", "https://status.callready.test:8443/app"
HERE = [("192.0.2.11", 443), ("2001:db8::11", 443)]


@pytest.mark.parametrize(
    ("app", "asked"),
    [
        # Its edge is asked, at each address.
        ({"url": URL, "upstream": "127.0.0.1:8000"}, {URL: HERE}),
        (
            {
                "url": URL,
                "upstream": "127.0.0.1:8000",
                "health": [{"url": f"{URL}/health", "fields": {"ok": True}}, {"url": ELSEWHERE}],
            },
            {f"{URL}/health": HERE, ELSEWHERE: [("status.callready.test", 8443)]},
        ),
        # Somebody else's proxy is before it.
        ({"url": URL}, {URL: [("app.callready.test", 443)]}),
        ({}, {}),
    ],
)
def test_the_app_is_asked_by_its_health_or_else_its_url(
    app: dict[str, Any], asked: dict[str, list[tuple[str, int]]], project: Path
) -> None:
    edits: list[Edit] = [
        ("*", "edge", {} if "upstream" in app else None),
        (SFU1, "groups", ["livekit", "app"]),
        (SFU1, "app", {"env_file": "/srv/app/.env", **app}),
    ]
    probes = [each for each in watched(load(*edits), SFU1) if isinstance(each, Health)]
    assert {
        url: [(each.address, each.port) for each in probes if each.url == url]
        for url in dict.fromkeys(each.url for each in probes)
    } == asked
    for each in probes:
        is_checked = "health" in app
        assert (each.status, each.fields) == (
            200 if is_checked else None,
            {"ok": True} if each.url == f"{URL}/health" else {},
        )
        assert dict(labels(each)) == {
            "probe": "app",
            "host": SFU1,
            "way": "TCP",
            "family": str(each.family),
            "url": each.url,
        }
    assert len({labels(each) for each in probes}) == len(probes)


def test_callers_by_each_sfu_and_the_next_one_have_to_meet(project: Path) -> None:
    def asked(*edits: Edit) -> list[Meet]:
        return [each for each in watched(load(*edits), SFU1) if isinstance(each, Meet)]

    found = asked(*SHARED)
    assert [(each.node, each.address, each.peer, each.other) for each in found] == [
        (SFU1, "192.0.2.11", TURN1, ("192.0.2.21", 443)),
        (TURN1, "192.0.2.21", SFU1, ("192.0.2.11", 443)),
    ]
    assert dict(labels(found[0])) == {
        **{"probe": "meet", "host": SFU1, "peer": TURN1, "way": "TCP", "family": "4"},
        "service": "livekit.callready.test",
    }
    assert {*asked(*SHARED, ("*", "livekit.keys.APIcaller", "secret:livekit/second"))[0].keys} == {
        "APIunit"
    }
    assert asked() == []
    # Somebody else's proxy chooses the SFU.
    behind: list[Edit] = [("*", "edge", ...), ("*", "livekit.bind_addresses", ["127.0.0.1"])]
    assert asked(*SHARED, *behind) == []


@pytest.mark.parametrize("nodes", [("ND_1", "ND_1"), ("ND_1", "ND_2")])
def test_those_of_one_room_meet_on_one_node(
    monkeypatch: pytest.MonkeyPatch, nodes: tuple[str, str]
) -> None:
    at = {("192.0.2.11", 443): nodes[0], ("192.0.2.21", 443): nodes[1]}

    @asynccontextmanager
    async def joined(_: str, token: SecretStr, ca: str | None, where: Any, verify: bool) -> Any:
        rooms.add(
            json.loads(b64decode(token.get_secret_value().split(".")[1] + "=="))["video"]["room"]
        )
        yield SimpleNamespace(node_id=at[where]), None

    rooms = set[str]()
    monkeypatch.setattr("callready.probes.livekit.joined", joined)
    monkeypatch.setattr("callready.probes.livekit.create_room", lambda *_: None)
    meet = Meet(
        node="sfu1",
        address="192.0.2.11",
        port=443,
        peer="sfu2",
        other=("192.0.2.21", 443),
        service="livekit.callready.test",
        url="wss://livekit.callready.test",
        keys={"APIunit": SecretStr(SECRET)},
    )
    if nodes[0] == nodes[1]:
        meet.ask()
    else:
        with pytest.raises(ProbeError, match="by sfu1 is on node ND_1, who comes by sfu2 on ND_2"):
            meet.ask()
    assert len(rooms) == 1


def test_a_watcher_asks_over_the_families_that_it_has(project: Path) -> None:
    assert {each.family for each in watched(load(), TURN2)} == {4}


def test_a_watcher_has_credentials_of_its_own(project: Path) -> None:
    second = (SFU1, "livekit.keys.APIcaller", "secret:livekit/second")
    probes = watched(load(second), SFU1, "APIcaller", SecretStr("its secret"))
    written = caller.configuration(probes)
    assert [secret for secret in SECRETS.values() if secret in written] == [
        SECRETS["livekit/second"]
    ]
    turn = next(each for each in probes if isinstance(each, Turn) and each.secret)
    assert turn.secret == SecretStr("its secret")


def test_of_a_large_fleet_each_host_is_called(project: Path) -> None:
    edits: list[tuple[str, str, object]] = []
    sfus = [f"sfu{n}.callready.test" for n in range(2, 12)]
    turns = [f"turn{n}.callready.test" for n in range(3, 25)]
    for number, name in enumerate((*sfus, *turns)):
        is_sfu = name in sfus
        edits += [
            (name, "ssh_user", "debian"),
            (name, "address", f"192.0.2.{100 + number}"),
            (name, "groups", ["livekit" if is_sfu else "turn"]),
            (name, "tls", {"certificate": "certificates/chain.pem", "key": "certificates/key.pem"}),
        ]
        if not is_sfu:
            edits.append((name, "pools", ["calls"]))
        else:
            livekit = {"url": f"wss://{name}", "keys": {"APIunit": "secret:livekit/api_secret"}}
            edits.append((name, "livekit", livekit))
        pool = {"realm": "callready.test", "secrets": ["secret:turn/calls"]}
        edits.append((name, "turn", {"pools": {"calls": pool}}))
    calls = [each for each in watched(load(*edits), TURN2) if isinstance(each, Call) and each.pool]
    pairs = {(each.node, each.turn) for each in calls if each.pool == "calls"}
    assert len(pairs) <= MOST_PAIRS
    assert {sfu for sfu, _ in pairs} == {SFU1, *sfus}
    assert {turn for _, turn in pairs} == {TURN1, *turns}


def free_port(kind: int) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_what_it_found_and_ends_when_told(tmp_path: Path, number: int) -> None:
    nobody, port = free_port(socket.SOCK_DGRAM), free_port(socket.SOCK_STREAM)
    stun = Stun(node="turn1", address="127.0.0.1", port=nobody, pool="calls")
    config = tmp_path / "caller.json"
    config.write_text(caller.configuration([stun]))
    command = [sys.executable, "-m", "callready.probes.caller", "--config", str(config)]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stderr
        assert "Connection refused" in process.stderr.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4"
            assert value(answer.read().decode(), "success") == "0"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/")
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file or directory"),
        ("{", "Expecting property name"),
        ('{"version": 1, "calls_a_minute": 12, "probes": [{"kind": "x"}]}', "no such probe: x"),
        (
            '{"version": 1, "calls_a_minute": 1, "probes": [{"kind": "stun", "secret": "planted"}]}',
            "a probe of kind stun has other fields",
        ),
    ],
)
def test_a_configuration_that_cannot_be_read_is_said_without_its_text(
    tmp_path: Path, text: str | None, why: str
) -> None:
    config = tmp_path / "caller.json"
    if text:
        config.write_text(text)
    command = [sys.executable, "-m", "callready.probes.caller", "--config", str(config)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 1
    assert re.fullmatch(
        rf"{config}: .*{re.escape(why)}.*; callready's deploy writes it\n", done.stderr
    )
    assert "planted" not in done.stderr

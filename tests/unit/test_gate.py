"""What the health gate asks of a host, and what it tells an operator; the probes themselves are
tried on lab hosts."""

import dataclasses
import json
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import SecretStr

from callready.probes import ProbeError, ice
from callready.probes import __main__ as prober_process
from callready.probes import livekit as livekit_probes
from callready.probes.ice import Candidate
from callready.probes.kinds import Https, Join, LiveKit, Recording, Stun, Turn, from_json
from callready.probes.probe import Probe, as_json
from callready.probes.storage import Bucket, Storage
from callready.probes.turn import NoUri
from callready.release.manifest import Manifest, Promise
from callready.release.node import Node
from callready.rollout import gate
from callready.rollout.prober import Prober
from callready.settings.fleet import Fleet
from callready.settings.models import HostSettings
from tasks import declare
from tests.support.inventories import REC1, SECRETS, SFU1, TURN1, TURN2, Edit, box, load, recorded

pytestmark = pytest.mark.usefixtures("project")
REPOSITORY = Path(__file__).parents[2]
EDGE = [
    ("*", "edge", {}),
    (SFU1, "groups", ["livekit", "app"]),
    (
        SFU1,
        "app",
        {
            "env_file": "/srv/app/.env",
            "url": "https://app.callready.test",
            "upstream": "127.0.0.1:8000",
            "health": [{"url": "https://app.callready.test/health", "fields": {"ok": True}}],
        },
    ),
]
EVERYTHING = (SFU1, "groups", ["livekit", "turn", "app"])


def titled(fleet: Fleet, name: str, certificates: bool = True) -> dict[str, Probe]:
    found = gate.probes(Node(name, fleet), certificates)
    named = {probe.title: probe for probe in found}
    assert len(named) == len(found)
    return named


def places(found: dict[str, Probe]) -> dict[str, str]:
    return {title: f"{probe.address} {probe.port}/{probe.proto}" for title, probe in found.items()}


def kinds(found: Iterable[Probe]) -> dict[str, int]:
    return dict(Counter(probe.kind for probe in found))


@pytest.fixture(autouse=True)
def no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has no IPv6, unless a test says otherwise."""
    monkeypatch.setattr(gate, "local_address", lambda _: None)


def test_a_turn_host_is_asked_for_every_way_to_a_relay() -> None:
    fleet = load((TURN1, "turn.tls_on_443", True))
    at = "192.0.2.21"
    assert places(titled(fleet, TURN1)) == {
        f"STUN of pool calls on {TURN1} (IPv4)": f"{at} 3478/udp",
        f"TURN allocation over udp of pool calls on {TURN1} (IPv4)": f"{at} 3478/udp",
        f"TURN allocation over tcp of pool calls on {TURN1} (IPv4)": f"{at} 3478/tcp",
        f"TURN allocation over tls of pool calls on {TURN1} (IPv4)": f"{at} 5349/tcp",
        f"TURN allocation over tls on 443 of pool calls on {TURN1} (IPv4)": f"{at} 443/tcp",
        f"certificate of {TURN1} on port 5349 on {TURN1} (IPv4)": f"{at} 5349/tcp",
        f"certificate of {TURN1} on port 443 on {TURN1} (IPv4)": f"{at} 443/tcp",
    }


def test_ipv6_is_asked_for_where_the_prober_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_ipv6(*edits: tuple[str, str, object]) -> bool:
        return "2001:db8::21" in " ".join(places(titled(load(*edits), TURN1)).values())

    assert not by_ipv6()
    assert by_ipv6((TURN1, "deploy", {"gate_from": SFU1}))
    monkeypatch.setattr(gate, "local_address", lambda _: "2001:db8::1")
    assert by_ipv6()
    assert not by_ipv6((TURN1, "deploy", {"gate_from": TURN2}))


def test_a_host_that_records_has_to_record_a_call_from_here() -> None:
    """By the name that callers go by, with the app's key, to where recordings go."""
    s3 = {"bucket": "recordings", "access_key": "AKEXAMPLE", "secret": "secret:egress/s3"}
    fleet = recorded(("*", "egress.storage", {"prefix": "calls", "s3": s3}))
    found = titled(fleet, REC1)
    assert places(found) == {f"recording on {REC1}": "livekit.callready.test 443/tcp"}
    (probe,) = found.values()
    assert isinstance(probe, Recording)
    assert (probe.url, next(iter(probe.keys))) == ("wss://livekit.callready.test", "APIunit")
    secret = SecretStr(SECRETS["egress/s3"])
    assert probe.storage == Storage("calls", Bucket("recordings", "AKEXAMPLE", secret))
    node = declare(fleet, REC1)
    (promise,) = node.promises
    assert promise.key == probe.key and promise.key.kind == "recording"
    assert gate.promised(node, Manifest(promises=[promise])) == [probe]
    assert not gate.promised(declare(load(), TURN1), Manifest(promises=[promise]))


def test_no_call_from_here_can_be_recorded_where_probes_are_sent_from_elsewhere() -> None:
    assert not titled(recorded((REC1, "deploy", {"gate_from": SFU1})), REC1)


def test_livekit_is_asked_where_it_answers() -> None:
    def asked(*edits: tuple[str, str, object]) -> list[tuple[str, str]]:
        found = titled(load(*edits), SFU1)
        return [
            (f"{probe.address}:{probe.port}", probe.url)
            for probe in found.values()
            if type(probe) is LiveKit
        ]

    url = "wss://livekit.callready.test"
    assert asked() == [("192.0.2.11:7880", "ws://192.0.2.11:7880")]
    assert asked(*EDGE) == [("192.0.2.11:443", url)]
    behind = ("*", "livekit.bind_addresses", ["127.0.0.1"])
    assert asked(behind) == [("livekit.callready.test:443", url)]
    ports = (("*", "livekit.port", 7000), ("*", "livekit.bind_addresses", ["0.0.0.0"]))
    assert asked(*ports) == [("192.0.2.11:7000", "ws://192.0.2.11:7000")]


def test_one_box_is_asked_for_everything_once() -> None:
    found = titled(box(*EDGE, EVERYTHING), SFU1)
    assert kinds(found.values()) == {
        "stun": 2,
        "turn": 6,
        "livekit": 1,
        "join": 1,
        "https": 2,
        "certificate": 4,
        "app": 1,
    }
    health = found["health of the app at https://app.callready.test/health"]
    assert (health.address, health.port) == ("app.callready.test", 443)


def test_a_host_that_waits_for_its_authority_may_show_any_certificate() -> None:
    found = titled(load(), TURN1, certificates=False)
    assert kinds(found.values()).keys() == {"stun", "turn"}
    assert not any(probe.verify for probe in found.values())


def node(*edits: Edit) -> Node:
    return declare(load(*EDGE, *edits), SFU1)


def test_an_earlier_release_is_asked_for_what_it_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "local_address", lambda _: "2001:db8::1")
    before = node().release.manifest
    again = gate.promised(node(), before)
    assert {probe.key for probe in again} == {promise.key for promise in before.promises}
    assert {(p.title, p.verify) for p in again} == {
        (p.title, p.verify) for p in gate.probes(node())
    }, "over both families, with the credentials that the inventory still has"
    health = "health of the app at https://app.callready.test/health"
    now = gate.promised(node(("*", "livekit.url", "wss://other.callready.test")), before)
    assert len(now) == len(again) - 2, "a join needs a key"
    (livekit,) = {probe.url: probe for probe in now if isinstance(probe, LiveKit)}.values()
    assert (livekit.url, livekit.keys) == ("wss://livekit.callready.test:443", {})
    assert [probe.title for probe in now].count(health) == 1


def test_what_has_left_the_inventory_is_asked_for_what_needs_no_credential() -> None:
    before = declare(load(), TURN1).release.manifest
    bare = HostSettings.model_validate({"name": TURN1, "address": "192.0.2.21"})
    fleet = dataclasses.replace(load(), hosts={TURN1: bare})
    asked = gate.promised(Node(TURN1, fleet), before)
    assert kinds(asked) == {"stun": 1, "turn": 3, "certificate": 1}
    for probe in asked:
        if isinstance(probe, Turn):
            assert (probe.secret, probe.password, probe.server_name) == (None, None, TURN1)
            assert probe.address == "192.0.2.21"


def test_on_the_way_back_livekit_is_asked_with_the_keys_that_it_had() -> None:
    other = ("*", "livekit.keys", {"APIunit": "secret:livekit/second"})
    both = (
        "*",
        "livekit.keys",
        {"APIunit": "secret:livekit/api_secret", "APInew": "secret:livekit/second"},
    )

    def asked(before: Manifest, *edits: Edit) -> tuple[list[str], bool]:
        found = [p for p in gate.promised(node(*edits), before) if isinstance(p, LiveKit)]
        probe, *joins = found
        assert all(list(join.keys) == list(probe.keys) for join in joins)
        return list(probe.keys), probe.any_key

    manifest = node().release.manifest
    assert asked(manifest) == (["APIunit"], False)
    assert asked(manifest, both) == (["APIunit"], False)
    assert asked(manifest, other) == ([], False)
    promises = [Promise.of(each.key) for each in manifest.promises]
    first_format = dataclasses.replace(manifest, promises=promises)
    assert asked(first_format, both) == (["APIunit", "APInew"], True), "it does not say which"


@pytest.mark.parametrize(("any_key", "said"), [(True, None), (False, "refuses a token of key B")])
def test_one_key_will_do_on_the_way_back(
    monkeypatch: pytest.MonkeyPatch, any_key: bool, said: str | None
) -> None:
    from callready.probes import livekit

    monkeypatch.setattr(livekit, "health", lambda *_, **__: livekit.Health(200, 0))
    monkeypatch.setattr(livekit, "token", lambda key, *_, **__: key)
    monkeypatch.setattr(livekit, "validate", lambda _, key, **__: 200 if key == "A" else 401)
    probe = LiveKit(
        node="x",
        address="",
        port=1,
        url="ws://x",
        keys={"A": SecretStr("s"), "B": SecretStr("s")},
        any_key=any_key,
    )
    found = prober_process.found(probe, 0)
    assert found is None if said is None else found and said in str(found)


def test_fixed_users_are_asked_with_their_password() -> None:
    pool = {"realm": "x.test", "users": {"bob": "secret:turn/user"}}
    found = titled(load((TURN2, "turn.pools.avatar", pool)), TURN2)
    probe = found[f"TURN allocation over udp of pool avatar on {TURN2} (IPv4)"]
    assert isinstance(probe, Turn)
    assert (probe.user, probe.password) == ("bob", SecretStr(SECRETS["turn/user"]))


def test_no_secret_is_in_a_repr() -> None:
    shown = repr(titled(box(*EDGE, EVERYTHING), SFU1))
    assert "APIunit" in shown
    assert not [value for value in SECRETS.values() if value in shown]


# What comes of it, in the prober's process, on ports of loopback where nothing listens or answers.


@pytest.fixture
def prober() -> Prober:
    return Prober()


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture
def silent_port() -> Iterator[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        yield int(server.getsockname()[1])


def test_what_fails_is_a_finding_each_without_a_secret(prober: Prober, closed_port: int) -> None:
    found = [
        dataclasses.replace(probe, connect_to=("127.0.0.1", closed_port))
        for probe in titled(box(*EDGE, EVERYTHING), SFU1).values()
    ]
    said = prober.ask(found, within=0)
    assert len(said) == len(found)
    for probe, finding in zip(found, said, strict=True):
        assert finding and finding.evidence == "Connection refused", probe.title
        assert f"{finding}" == f"{finding.suffers}: Connection refused. Look at: {finding.look_at}"
        assert "127.0.0.1" not in str(finding), "it is named as callers know it"
        assert str(closed_port) not in str(finding)
        assert not [value for value in SECRETS.values() if value in str(finding)]
    stun = next(str(f) for p, f in zip(found, said, strict=True) if p.kind == "stun")
    assert "stun:192.0.2.11:3478 over udp" in stun
    assert "3478/udp in nftables" in stun


def test_a_secret_that_a_finding_would_show_is_hidden(prober: Prober, closed_port: int) -> None:
    probe = LiveKit(
        node="x",
        address="127.0.0.1",
        port=closed_port,
        url="ws://x/?key=do-not-tell",
        keys={"A": SecretStr("do-not-tell")},
    )
    (finding,) = prober.ask([probe], within=0)
    assert finding and "/?key=••••••" in finding.suffers


def test_a_prober_that_ends_is_a_failure_and_the_next_one_starts(
    prober: Prober, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prober.ask([]) == []
    probe = Stun(node="x", pool="x", address="127.0.0.1", port=closed_port)
    monkeypatch.setattr("callready.rollout.prober.as_json", lambda _: {"kind": "no such"})
    (finding, second) = prober.ask([probe, probe], within=0)
    assert str(finding).startswith("the probes did not run: no such probe: no such. Look at: ")
    assert second is None
    monkeypatch.undo()
    assert prober._process
    prober._process.kill()
    prober._process.wait()
    (finding,) = prober.ask([probe], within=0)
    assert finding and finding.evidence == "Connection refused"


def test_many_ask_one_prober_at_once(prober: Prober, closed_port: int) -> None:
    """Each gets its own answer."""
    probes = [
        Stun(node="x", pool="x", address="192.0.2.1", port=port, connect_to=("127.0.0.1", port))
        for port in (closed_port, 1, 2, 3, 4, 5)
    ]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda probe: prober.ask([probe], 0), probes))
    for probe, (finding,) in zip(probes, answers, strict=True):
        assert finding and f"stun:192.0.2.1:{probe.port} " in finding.suffers


def test_a_probe_is_tried_until_it_passes(prober: Prober) -> None:
    """The server tells no address to who asks for the first time."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server, ThreadPoolExecutor() as pool:
        server.bind(("127.0.0.1", 0))
        server.settimeout(60)
        probe = Stun(node="x", pool="x", address="127.0.0.1", port=server.getsockname()[1])
        said = pool.submit(prober.ask, [probe], 30)
        transactions: set[bytes] = set()
        while len(transactions) < 2:
            data, sender = server.recvfrom(2000)
            transactions.add(data[4:20])
            mapped = (bytes.fromhex("0020000800010000") + data[4:8]) * (len(transactions) - 1)
            server.sendto(bytes([1, 1, 0, len(mapped)]) + data[4:20] + mapped, sender)
        assert said.result() == [None]


def test_udp_that_comes_back_or_not(prober: Prober, closed_port: int, silent_port: int) -> None:
    def probe(kind: type[Stun], port: int) -> Stun:
        return kind(node="x", pool="x", address="127.0.0.1", port=port)

    tcp = Https(node="x", server_name="x", address="127.0.0.1", port=silent_port)
    found = [probe(Stun, port) for port in (closed_port, closed_port, silent_port, silent_port)]
    (said,) = gate.blocked(prober, [*found, tcp])
    assert said.startswith(
        f"STUN of pool x on x (IPv4): no answer over UDP from 127.0.0.1:{silent_port}. Look at: "
    )
    assert "deploy.gate_from" in said


def test_a_probe_survives_its_way_to_the_prober() -> None:
    for probe in titled(box(*EDGE, EVERYTHING), SFU1).values():
        again = from_json(json.loads(json.dumps(as_json(probe))))
        assert (again, again.key, again.title) == (probe, probe.key, probe.title)
    with pytest.raises(ValueError, match="kind stun has other fields: "):
        from_json({"kind": "stun", "node": "x", "secret": "do-not-tell"})


@pytest.mark.parametrize(
    ("name", "needless"), [(TURN1, "livekit|httpx|paramiko|pyinfra"), (SFU1, "paramiko|pyinfra")]
)
def test_the_prober_loads_no_more_than_its_probes_need(name: str, needless: str) -> None:
    found = titled(load(), name).values()
    request = {"version": 1, "id": 7, "within": 0, "probes": []}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "callready.probes"],
        cwd=REPOSITORY,
        text=True,
        input=json.dumps({**request, "kinds": [probe.kind for probe in found]}) + "\n",
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"version": 1, "id": 7, "findings": []}
    assert re.search(r"\| +(asyncio|livekit)\n", done.stderr)
    assert not re.search(rf"\| +({needless})\n", done.stderr)


def test_a_prober_of_another_version_says_so() -> None:
    request = {"version": 2, "id": 1, "within": 0, "kinds": [], "probes": []}
    done = subprocess.run(
        [sys.executable, "-m", "callready.probes"],
        cwd=REPOSITORY,
        text=True,
        input=json.dumps(request) + "\n",
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["error"] == "this prober speaks version 1"


UP = {
    Candidate("udp", "192.0.2.11", 50_001): 0.01,
    Candidate("tcp", "192.0.2.11", 7881): 0.01,
}
DOWN = ProbeError("no media", "the firewall")
OURS = "turn:sfu1.callready.test:3478?transport=udp"
OTHER = "turn:turn1.callready.test:3478?transport=udp"


@pytest.mark.parametrize(
    ("servers", "candidates", "counts"),
    [
        ({OURS: None}, UP, None),
        ({OURS: DOWN}, UP, True),
        ({OTHER: DOWN}, UP, False),
        ({"turn:192.0.2.11:3478?transport=udp": DOWN}, UP, True),
        ({"turn:answered.test:3478?transport=udp": DOWN}, UP, True),
        ({"stun:stun:x.test:3478": NoUri("no URI", "the setting")}, UP, True),
        ({}, {**UP, Candidate("udp", "192.0.2.11", 50_001): DOWN}, True),
        ({}, {**UP, Candidate("udp", "172.17.0.1", 50_002): DOWN}, None),
        ({}, {Candidate("udp", "192.0.2.11", 50_001): 0.01}, False),
        ({}, {Candidate("tcp", "192.0.2.11", 7881): DOWN}, True),
        ({}, {}, True),
        ({}, {Candidate(each.proto, "192.0.2.12", 1): 0.01 for each in UP}, False),
    ],
)
def test_what_counts_against_a_join(
    monkeypatch: pytest.MonkeyPatch,
    servers: ice.Gathered,
    candidates: dict[Candidate, float | ProbeError],
    counts: bool | None,
) -> None:
    """None: it passes without a word; False: with a warning."""
    reached = livekit_probes.Reached("ND_1", "1.13.5", servers, candidates)
    monkeypatch.setattr(livekit_probes, "reach", lambda *_: reached)
    monkeypatch.setattr(ice, "resolve", lambda name, _: None)
    join = Join(
        node=SFU1,
        address="192.0.2.11",
        port=7880,
        url="ws://192.0.2.11:7880",
        keys={"A": SecretStr("x" * 32)},
        own=("sfu1.callready.test", "192.0.2.11"),
        answering=("turn:answered.test:3478?transport=udp",),
    )
    try:
        finding = join.ask()
    except ProbeError as error:
        assert counts and not error.finding.warning
    else:
        assert (finding and finding.warning) == (None if counts is None else not counts)
    assert dataclasses.replace(join, keys={}).ask() is None
    elsewhere = dataclasses.replace(join, node_id="ND_2")
    with pytest.raises(ProbeError, match="is on ND_1"):
        elsewhere.ask()


def test_an_offer_is_read_with_what_came_after_it() -> None:
    sdp = (
        "v=0\r\na=ice-ufrag:name\r\na=ice-pwd:secret\r\n"
        "a=candidate:1 1 udp 2130706431 192.0.2.11 50001 typ host\r\n"
    )
    later = [
        "candidate:2 1 TCP 1671430143 2001:db8::11 7881 typ host tcptype passive ufrag name",
        "candidate:3 1 ssltcp 1 192.0.2.11 443 typ host",
        "",
    ]
    offer = ice.read_offer(sdp, [json.dumps({"candidate": text}) for text in later])
    assert (offer.username, offer.password) == ("name", "secret")
    assert [str(each) for each in offer.candidates] == [
        "192.0.2.11:50001/udp",
        "[2001:db8::11]:7881/tcp",
    ]
    assert "secret" not in repr(offer)
    assert f"a=ice-ufrag:{offer.own}\r\n" in ice.answer(offer)

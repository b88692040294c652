"""What the health gate asks of a host, and what it tells an operator; the probes themselves are
tried on lab hosts."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fleets import SECRETS, SFU1, TURN1, TURN2, Edit, box, deployed, load
from pydantic import SecretStr

from callready.operations import Back, Deployment
from callready.release.node import Node
from callready.rollout import gate
from callready.settings.fleet import Fleet
from tasks import declare

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


def specs(fleet: Fleet, name: str, certificates: bool = True) -> dict[str, gate.Spec]:
    found = gate.probes(Node(name, fleet), certificates)
    named = {spec["name"]: spec for spec in found}
    assert len(named) == len(found)
    return named


def places(found: dict[str, gate.Spec]) -> dict[str, str]:
    return {
        name: f"{spec['address']} {spec['port']}/{spec['transport']}"
        for name, spec in found.items()
    }


@pytest.fixture(autouse=True)
def no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has no IPv6, unless a test says otherwise."""
    monkeypatch.setattr(gate, "local_address", lambda _: None)


def test_a_turn_host_is_asked_for_every_way_to_a_relay() -> None:
    fleet = load((TURN1, "turn.tls_on_443", True))
    at = "192.0.2.21"
    assert places(specs(fleet, TURN1)) == {
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
        return "2001:db8::21" in " ".join(places(specs(load(*edits), TURN1)).values())

    assert not by_ipv6()
    assert by_ipv6((TURN1, "deploy", {"gate_from": SFU1}))
    monkeypatch.setattr(gate, "local_address", lambda _: "2001:db8::1")
    assert by_ipv6()
    assert not by_ipv6((TURN1, "deploy", {"gate_from": TURN2}))


def test_livekit_is_asked_where_it_answers() -> None:
    def asked(*edits: tuple[str, str, object]) -> list[tuple[str, str]]:
        found = specs(load(*edits), SFU1)
        return [
            (f"{spec['address']}:{spec['port']}", spec["url"])
            for spec in found.values()
            if spec["probe"] == "livekit"
        ]

    url = "wss://livekit.callready.test"
    assert asked() == [("192.0.2.11:7880", "ws://192.0.2.11:7880")]
    assert asked(*EDGE) == [("192.0.2.11:443", url)]
    behind = ("*", "livekit.bind_addresses", ["127.0.0.1"])
    assert asked(behind) == [("livekit.callready.test:443", url)]
    ports = (("*", "livekit.port", 7000), ("*", "livekit.bind_addresses", ["0.0.0.0"]))
    assert asked(*ports) == [("192.0.2.11:7000", "ws://192.0.2.11:7000")]


def test_one_box_is_asked_for_everything_once() -> None:
    found = specs(box(*EDGE, EVERYTHING), SFU1)
    kinds = [spec["probe"] for spec in found.values()]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "stun": 2,
        "turn": 6,
        "livekit": 1,
        "edge": 2,
        "certificate": 4,
        "app": 1,
    }
    health = found["health of the app at https://app.callready.test/health"]
    assert (health["address"], health["port"]) == ("app.callready.test", 443)


def test_a_host_that_waits_for_its_authority_may_show_any_certificate() -> None:
    found = specs(load(), TURN1, certificates=False)
    assert {spec["probe"] for spec in found.values()} == {"stun", "turn"}
    assert not any(spec["verify"] for spec in found.values())


def test_an_earlier_release_is_asked_for_what_it_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    def deployment(*edits: Edit) -> Deployment:
        here = declare(load(*EDGE, *edits), SFU1)
        return Deployment(here, deployed(here.release))

    before = deployment()
    promised = [("promise", line) for line in before.node.release.promises]
    monkeypatch.setattr(gate, "local_address", lambda _: "2001:db8::1")
    assert {s["promise"] for s in before.probes} == {line for _, line in promised}
    now = deployment(
        ("*", "livekit.url", "wss://turn.callready.test"), (SFU1, "name", "turn.callready.test")
    )
    now.back = Back("earlier", "run", promised)
    assert {spec["name"].partition(" on sfu1")[0] for spec in now.probes} == {
        "HTTPS of app.callready.test",
        "certificate of app.callready.test on port 443",
        "health of the app at https://app.callready.test/health",
    }
    assert len({spec["name"] for spec in now.probes}) == 5, "over both families"


@pytest.mark.parametrize(("any_key", "said"), [(True, None), (False, "refuses a token of key B")])
def test_one_key_will_do_on_the_way_back(
    monkeypatch: pytest.MonkeyPatch, any_key: bool, said: str | None
) -> None:
    from callready.probes import livekit

    monkeypatch.setattr(livekit, "health", lambda *_, **__: None)
    monkeypatch.setattr(livekit, "token", lambda key, *_, **__: key)
    monkeypatch.setattr(livekit, "validate", lambda _, key, **__: 200 if key == "A" else 401)
    spec = {
        "url": "ws://x",
        "keys": {"A": "s", "B": "s"},
        "any_key": any_key,
        "address": "",
        "port": 1,
        "ca": None,
        "verify": True,
        "probe": "livekit",
    }
    found = gate._attempts(spec, 0)
    assert found == said or (said and found and said in found)


def test_fixed_users_are_asked_with_their_password() -> None:
    pool = {"realm": "x.test", "users": {"bob": "secret:turn/user"}}
    found = specs(load((TURN2, "turn.pools.avatar", pool)), TURN2)
    spec = found[f"TURN allocation over udp of pool avatar on {TURN2} (IPv4)"]
    assert (spec["user"], spec["password"].get_secret_value()) == ("bob", SECRETS["turn/user"])


def test_no_secret_is_in_a_repr() -> None:
    shown = repr(specs(box(*EDGE, EVERYTHING), SFU1))
    assert "APIunit" in shown
    assert not [value for value in SECRETS.values() if value in shown]


# What comes of it, on ports of loopback where nothing listens or nothing answers.


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


def test_what_fails_is_a_sentence_each_without_a_secret(closed_port: int) -> None:
    fleet = box(*EDGE, EVERYTHING)
    found = [
        {**spec, "address": "127.0.0.1", "port": closed_port}
        for spec in specs(fleet, SFU1).values()
    ]
    said = gate.run(found, within=0)
    assert [text.partition(": ")[0] for text in said] == [
        spec["name"].partition(": ")[0] for spec in found
    ]
    assert all("Connection refused" in text and ". Look at: " in text for text in said)
    assert not [value for value in SECRETS.values() if value in "".join(said)]


def test_a_secret_that_a_sentence_would_show_is_hidden(closed_port: int) -> None:
    spec = {
        "name": "app",
        "probe": "app",
        "transport": "tcp",
        "address": "127.0.0.1",
        "port": closed_port,
        "status": 200,
        "fields": {},
        "ca": None,
        "verify": True,
        "url": "http://x/?key=do-not-tell",
        "key": SecretStr("do-not-tell"),
    }
    assert "http://x/?key=••••••" in gate.run([spec], within=0)[0]


def test_ports_that_lead_elsewhere_are_said_as_they_are_there(closed_port: int) -> None:
    spec = {
        **next(iter(specs(load(), TURN1).values())),
        "address": "127.0.0.1",
        "port": closed_port,
        "instead_of": ("2001:db8::21", 3478),
    }
    (said,) = gate.run([spec], within=0)
    assert "stun:[2001:db8::21]:3478 over udp" in said
    assert "3478/udp in nftables" in said
    assert str(closed_port) not in said


def test_probes_that_cannot_run_are_a_failure() -> None:
    (said,) = gate.run([{"name": "x", "probe": "no such", "transport": "udp"}], within=0)
    assert said == "x: the probes did not run: KeyError: 'no such'"
    assert gate.run([]) == []


def test_a_probe_is_tried_until_it_passes() -> None:
    """The server tells no address to who asks for the first time."""
    spec = next(iter(specs(load(), TURN1).values()))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server, ThreadPoolExecutor() as pool:
        server.bind(("127.0.0.1", 0))
        server.settimeout(60)
        here = {"address": "127.0.0.1", "port": server.getsockname()[1]}
        said = pool.submit(gate.run, [{**spec, **here}], 30)
        transactions: set[bytes] = set()
        while len(transactions) < 2:
            data, sender = server.recvfrom(2000)
            transactions.add(data[4:20])
            mapped = (bytes.fromhex("0020000800010000") + data[4:8]) * (len(transactions) - 1)
            server.sendto(bytes([1, 1, 0, len(mapped)]) + data[4:20] + mapped, sender)
        assert said.result() == []


def test_udp_that_comes_back_or_not(closed_port: int, silent_port: int) -> None:
    assert gate.udp_path("127.0.0.1", closed_port) is True
    assert gate.udp_path("127.0.0.1", silent_port) is None
    found = [
        {"name": "STUN on x", "transport": proto, "address": "127.0.0.1", "port": port}
        for port in (closed_port, silent_port)
        for proto in ("udp", "udp", "tcp")
    ]
    (said,) = gate.blocked(found)
    assert said.startswith(f"STUN on x: no answer over UDP from 127.0.0.1:{silent_port}: ")


@pytest.mark.parametrize(
    ("name", "needless"), [(TURN1, "livekit|httpx|paramiko|pyinfra"), (SFU1, "paramiko|pyinfra")]
)
def test_the_probes_import_no_more_than_they_need(name: str, needless: str) -> None:
    found = [{**spec, "port": 9, "address": "127.0.0.1"} for spec in specs(load(), name).values()]
    request = {"within": 0, "specs": found}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "callready.rollout.gate"],
        cwd=REPOSITORY,
        text=True,
        input=json.dumps(request, default=str),
        capture_output=True,
        check=True,
    )
    assert re.search(r"\| +(asyncio|livekit)\n", done.stderr)
    assert not re.search(rf"\| +({needless})\n", done.stderr)

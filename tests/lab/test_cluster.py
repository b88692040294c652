"""Two SFUs that share the Redis of a third host: a node is drained, and calls go elsewhere
meanwhile; Redis is restarted and its password rotated, and no call notices more than it must."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from pydantic import SecretStr

from callready.probes import ProbeError, livekit
from callready.rollout.rollout import NODE_ID
from lab import Lab
from tests.sabotage.catalogue import CATALOGUE
from tests.sabotage.judging import tried
from tests.sabotage.sabotage import Service
from tests.support.continuity import Continuity, calls_of
from tests.support.fleet import (
    DRAIN,
    REPOSITORY,
    Fleet,
    Host,
    delivered,
    draining,
    eventually,
    pair_inventory,
    probe,
    verify,
)

# Debian 12, 13 and 12.
HOSTS = ONE, OTHER = (Host("h21"), Host("h22"))
SHARED = Host("h23")
CLI = f"redis-cli --tls --cacert /etc/callready/fleet-ca.pem -h {SHARED.ipv4}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two SFUs, and their Redis and TURN."""
    with delivered(*(host.name for host in (*HOSTS, SHARED))):
        _, data, _ = pair_inventory()
        data["livekit"]["url"] = f"ws://{OTHER.fqdn}:7880"
        data["redis"] = {"livekit_password": "secret:redis/livekit"}
        data["fleet_ca"] = "secret:fleet/ca"
        data["host"] = {"other_listeners": ["5355/tcp", "5355/udp"], "max_clock_skew": 1.0}

        def entry(host: Host) -> tuple[str, dict[str, str]]:
            return host.fqdn, {"address": host.ipv4, "address6": host.ipv6}

        groups = {
            "livekit": [entry(host) for host in HOSTS],
            "turn": [(SHARED.fqdn, {**entry(SHARED)[1], "pools": ["calls"]})],
            "redis": [SHARED.fqdn],
        }
        secrets = ["livekit/api_secret", "turn/calls", "redis/livekit", "fleet/ca"]
        fleet = Fleet(tmp_path_factory.mktemp("cluster"), groups, data, secrets)
        fleet.deploy()
        yield fleet
        fleet.restore()


def served() -> bool:
    """Whether every node takes new calls: for two seconds after Redis comes back it does not."""
    with suppress(ProbeError):
        return all(livekit.health(f"ws://{host.fqdn}:7880").status == 200 for host in HOSTS)
    return False


@pytest.fixture
def settled(cluster: Fleet) -> Iterator[Fleet]:
    """The cluster as its inventory says."""
    if cluster.unsettled:
        cluster.deploy()
    eventually(served)
    yield cluster
    cluster.restore()


def ask(cluster: Fleet, *commands: str, password: str = "") -> list[str]:
    """What Redis answers LiveKit's user, asked where it is, line by line."""
    password = password or cluster.secrets["redis/livekit"]
    login = f"REDISCLI_AUTH={password} {CLI} --no-auth-warning --user livekit"
    lines = "\n".join(commands)
    said = SHARED.root(f"{login} <<'END' 2>&1\n{lines}\nEND", check=False)
    return [line for line in said.splitlines() if line]


def test_a_join_can_be_made_on_each_node(cluster: Fleet) -> None:
    """As a deploy does it for the node that it has just changed, whichever takes the signalling."""
    secret = SecretStr(cluster.secrets["livekit/api_secret"])
    for host in HOSTS:
        node_id = host.root(NODE_ID)
        for _ in range(5):
            url = f"ws://{OTHER.fqdn}:7880"
            found = livekit.reach(url, "APIfleet", secret, node_id=node_id)
            assert found.node_id == node_id
            assert {each.address for each in found.candidates} == {host.ipv4, host.ipv6}


@pytest.mark.parametrize("drain", [DRAIN, 2], ids=["calls end in time", "calls go on"])
def test_drained_node_takes_no_new_calls(settled: Fleet, drain: int) -> None:
    cluster = settled
    url, secret = cluster.data["livekit"]["url"], cluster.secrets["livekit/api_secret"]
    with calls_of(url, "APIfleet", secret, {}) as calls:
        node, other = sorted(HOSTS, key=Host.media, reverse=True)
        before = node.pids()
        cluster.data["deploy"] = {"drain": drain}
        cluster.data["livekit"]["logging"] = {"level": "debug" if drain == DRAIN else "warn"}
        process = cluster.start("--limit", node.fqdn)
        cluster.unsettled = True
        if drain == DRAIN:
            draining(process)
            was = node.media()
            for entrance in (f"ws://{host.fqdn}:7880" for host in (node, other, other, node)):
                call = probe("webrtc", entrance, secret=secret, LIVEKIT_API_KEY="APIfleet")
                assert call["ok"], call
                assert (node.media(), node.pids()) == (was, before)
        else:
            said = process.communicate(timeout=60)
    if drain == DRAIN:
        said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert ('these rooms reconnect once: "continuity-' in "".join(said)) == (drain == 2)
    assert node.pids() != before
    both = calls["direct"]
    print(*both, sep="\n")
    assert all(each.reconnects == (drain == 2) and not each.gone for each in both), calls


def test_redis_is_for_the_sfus(settled: Fleet, tmp_path: Path) -> None:
    """By name and password, for what they need; closed to others; verified."""
    answers = ask(settled, "ping", "hkeys nodes", "flushall", "config get dir", "shutdown")
    nodes = {host.root(NODE_ID) for host in HOSTS}
    assert answers[0] == "PONG" and {*answers[1:3]} == nodes
    assert all("NOPERM" in each for each in answers[3:]) and len(answers) == 6, answers
    assert "NOAUTH" in SHARED.root(f"{CLI} ping 2>&1", check=False)
    for address in (SHARED.ipv4, SHARED.ipv6, "127.0.0.1"):
        connect = f"timeout 2 bash -c '< /dev/tcp/{address}/6379' 2>&-"
        stranger = [*Lab().client_prefix(), "sh", "-c", connect]
        assert subprocess.run(stranger, check=False).returncode, address
        listens = SHARED.root(f"{connect} && echo yes", check=False) == "yes"
        assert listens == (address == SHARED.ipv4)
    files = SHARED.root("find /var/lib/callready-redis -printf '%m %u %y\\n' | sort -u")
    assert set(files.splitlines()) == {"600 redis f", "700 redis d"}
    assert SHARED.root("systemctl is-enabled redis-server", check=False) == "masked"
    found = verify(
        tmp_path,
        *("test_redis", "test_exposure", "test_health", "test_cluster"),
        inventory=settled.inventory,
    )
    assert not any(found.values()), found
    assert {name.partition("[")[0] for name in found} >= {"test_access", "test_saved"}


@pytest.mark.parametrize(
    "name",
    [
        "redis hung",
        "another password at redis",
        "redis far from an sfu",
        "an sfu cut off from redis",
    ],
)
def test_what_is_wrong_with_redis_is_named(settled: Fleet, name: str) -> None:
    settled.write()
    at = Service.of(str(settled.inventory))
    result = tried([name], at, "-k", CATALOGUE[name].checks)
    assert result.is_right, result


def test_a_restart_of_redis_loses_no_room(settled: Fleet) -> None:
    """Whoever joins a room that goes on gets to the node where it is."""
    url, secret = settled.data["livekit"]["url"], settled.secrets["livekit/api_secret"]
    with calls_of(url, "APIfleet", secret, {}) as calls:
        before = ask(settled, "hgetall room_node_map")
        assert any("continuity-" in line for line in before)
        SHARED.root("systemctl kill -s KILL callready-redis; systemctl restart callready-redis")
        assert [line for line in before if line not in ask(settled, "hgetall room_node_map")] == []
        eventually(served)
        call = probe("webrtc", url, secret=secret, LIVEKIT_API_KEY="APIfleet")
        assert call["ok"], call
    print(*calls["direct"], sep="\n")
    assert all(map(went_on, calls["direct"])), calls


def went_on(call: Continuity) -> bool:
    """Whether it lost nothing but what a busy machine may delay."""
    return not (call.reconnects or call.moved or call.gone)


def rotate(cluster: Fleet, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "callready.rotate", cluster.inventory, "redis"],
        cwd=REPOSITORY,
        env={**os.environ, "PYINFRA_YES": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    store = cluster.folder / "fleet.secrets.yaml"
    cluster.secrets = yaml.safe_load(store.read_text())
    assert cluster.marker not in done.stdout + done.stderr
    assert cluster.secrets["redis/livekit"] not in done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_password_is_rotated_under_calls(settled: Fleet) -> None:
    """Two are accepted at once; LiveKit restarts once, and Redis refuses the old one in the end. A
    call whose node restarts may go on at one that restarts later."""
    url, secret = settled.data["livekit"]["url"], settled.secrets["livekit/api_secret"]
    old = settled.secrets["redis/livekit"]
    settled.write()
    for phase, restarts in ((1, False), (2, True), (3, False)):
        before = [host.pids() for host in HOSTS]
        with calls_of(url, "APIfleet", secret, {}) as calls:
            said = rotate(settled)
            assert f"phase {phase} is complete" in said
            assert ("restarting livekit-server" in said) == restarts
            assert ("restarting callready-redis" in said) == (phase != 2)
        print(said, *calls["direct"], sep="\n")
        most = restarts * len(HOSTS)
        assert all(each.reconnects <= most and not each.gone for each in calls["direct"]), calls
        assert restarts or all(map(went_on, calls["direct"])), calls
        assert ([host.pids() for host in HOSTS] != before) == restarts
        both = [ask(settled, "ping", password=p) for p in (old, settled.secrets["redis/livekit"])]
        assert [answer[0] == "PONG" for answer in both] == [phase != 3, True]
        if phase == 1:
            assert "restarts LiveKit: running calls reconnect once" in said
        if phase == 2:
            past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
            settled.secrets["redis/livekit.until"] = past
            settled.write()
    settled._original = (settled.groups, settled.data, dict(settled.secrets))
    call = probe("webrtc", url, secret=secret, LIVEKIT_API_KEY="APIfleet")
    assert call["ok"], call

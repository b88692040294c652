"""Three SFUs with edges that are one service: what a caller gets whose way leads to one that takes
none, and who may come in by the port that the edges have for each other."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
from pydantic import SecretStr

from callready.probes import ProbeError, livekit
from callready.probes.app import get
from callready.release.authority import Authority, Identity
from callready.rollout.rollout import NODE_ID
from lab import Lab, ca
from tests.support.continuity import calls_of
from tests.support.fleet import (
    DRAIN,
    Fleet,
    Host,
    delivered,
    draining,
    eventually,
    idle,
    pair_inventory,
    probe,
    verify,
)

# Debian 12, 13 and 12.
HOSTS = ONE, NAMED, SHARED = Host("h21"), Host("h22"), Host("h23")
URL = f"wss://{NAMED.fqdn}"
CA = str(ca.CA_CERTIFICATE)
PORT = 7443
OWN = "/etc/callready/fleet/host/both.pem"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The name of one of them leads to the service; one has their Redis and TURN too."""
    with delivered(*(host.name for host in HOSTS)):
        _, data, _ = pair_inventory()
        data["livekit"]["url"] = URL
        data["edge"] = {}
        data["tls"] = {key: each.replace("{host}", "{name}") for key, each in data["tls"].items()}
        data["turn"]["min_port"] = 60001
        data["redis"] = {"livekit_password": "secret:redis/livekit"}
        data["fleet_ca"] = "secret:fleet/ca"
        data["host"] = {"other_listeners": ["5355/tcp", "5355/udp"]}

        def entry(host: Host) -> tuple[str, dict[str, object]]:
            return host.fqdn, {"address": host.ipv4, "address6": host.ipv6}

        groups = {
            "livekit": [entry(host) for host in HOSTS],
            "turn": [(SHARED.fqdn, {"pools": ["calls"]})],
            "redis": [SHARED.fqdn],
        }
        secrets = ["livekit/api_secret", "turn/calls", "redis/livekit", "fleet/ca"]
        fleet = Fleet(tmp_path_factory.mktemp("edges"), groups, data, secrets)
        fleet.deploy()
        yield fleet


def health(host: Host) -> livekit.Health | None:
    """What the edge of a host says of LiveKit; None where that is not 200."""
    try:
        return livekit.health(URL, ca_file=CA, at=(host.ipv4, 443))
    except ProbeError:
        return None


def is_own(host: Host) -> bool:
    """Whether a host's own LiveKit takes its callers."""
    found = health(host)
    return found is not None and not found.from_peer


def is_by_peer(host: Host) -> bool:
    """Whether another SFU takes a host's callers."""
    found = health(host)
    return found is not None and found.from_peer


@pytest.fixture(autouse=True)
def settled(cluster: Fleet) -> Iterator[None]:
    eventually(lambda: all(map(is_own, HOSTS)))
    yield
    cluster.restore()


@contextmanager
def stopped(host: Host, unit: str) -> Iterator[None]:
    host.root(f"systemctl stop {unit}")
    try:
        yield
    finally:
        host.root(f"systemctl start {unit}")


def asked(by: Host, of: Host, certificate: str = "") -> str:
    """What the port for peers answers to `GET /` of a host, with its status line first."""
    own = f"-cert {certificate} -key {certificate}" if certificate else ""
    request = f"GET / HTTP/1.1\\r\\nHost: {NAMED.fqdn}\\r\\nConnection: close\\r\\n\\r\\n"
    return by.root(
        f"printf '{request}' | timeout 20 openssl s_client -quiet -verify_return_error "
        f"-CAfile /etc/callready/fleet-ca.pem -connect {of.ipv4}:{PORT} {own} 2>&1",
        check=False,
    )


def test_every_node_is_verified_by_every_edge(cluster: Fleet, tmp_path: Path) -> None:
    cluster.write()
    checks = ("test_cluster", "test_exposure", "test_behind", "test_ports", "test_certificate")
    found = verify(tmp_path, *checks, inventory=cluster.inventory)
    assert not any(found.values()), found
    names = [name.partition("[")[0] for name in found]
    assert names.count("test_serving") == names.count("test_rooms") == len(HOSTS)


def test_a_caller_is_taken_by_another_where_livekit_is_down(cluster: Fleet, tmp_path: Path) -> None:
    """The name leads to its host; the others are no further away for it than that."""
    key = cluster.secrets["livekit/api_secret"]
    with stopped(NAMED, "livekit-server"):
        eventually(lambda: is_by_peer(NAMED))
        call = probe("webrtc", URL, "--ca-file", CA, secret=key, LIVEKIT_API_KEY="APIfleet")
        assert call["ok"], call
        assert is_own(ONE) and is_own(SHARED)
        # Where it is handed on from, it comes back to nobody.
        assert "503 Service Unavailable" in asked(ONE, NAMED, OWN)
        assert "200 OK" in asked(ONE, SHARED, OWN)
        said = verify(tmp_path, "test_serving", inventory=cluster.inventory)
        assert [name for name in said if said[name]] == [f"test_serving[{NAMED.fqdn}]"]
        assert "calls go on without" in said[f"test_serving[{NAMED.fqdn}]"]
    eventually(lambda: is_own(NAMED))


@contextmanager
def joined(cluster: Fleet, host: Host) -> Iterator[None]:
    """Keep a WebSocket that entered by this host's edge, which must be there afterwards too."""
    key = SecretStr(cluster.secrets["livekit/api_secret"])
    at, up, enough = (host.ipv4, 443), Event(), Event()

    async def stay() -> None:
        token = livekit.token("APIfleet", key, create=True)
        async with livekit.joined(URL, token, CA, at) as (_, socket):
            up.set()
            await asyncio.to_thread(enough.wait)
            await asyncio.wait_for(await socket.ping(), 10)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(asyncio.run, stay())
        try:
            eventually(lambda: up.is_set() or done.done())
            yield
        finally:
            enough.set()
        done.result()


def test_no_websocket_ends_because_a_check_failed(cluster: Fleet) -> None:
    """A LiveKit that answers nothing for a while gets no new callers, and keeps those it has."""
    with joined(cluster, NAMED):
        NAMED.root("systemctl kill -s STOP livekit-server")
        try:
            eventually(lambda: is_by_peer(NAMED))
        finally:
            NAMED.root("systemctl kill -s CONT livekit-server")
        eventually(lambda: is_own(NAMED))


def test_a_new_certificate_of_the_fleet_is_taken_up_without_a_cut(cluster: Fleet) -> None:
    serial = (
        f"openssl s_client -connect {ONE.ipv4}:{PORT} < /dev/null 2> /dev/null "
        "| openssl x509 -noout -serial"
    )
    before, master = NAMED.root(serial), ONE.root("systemctl show -p MainPID haproxy")
    with joined(cluster, ONE):
        ONE.root(f"rm {OWN}")
        said = cluster.deploy("--limit", ONE.fqdn)
        assert "certificate of the fleet" in said.text
        assert NAMED.root(serial) != before
        assert ONE.root("systemctl show -p MainPID haproxy") == master
        assert "200 OK" in asked(NAMED, ONE, OWN)


def test_without_redis_edges_go_on(cluster: Fleet) -> None:
    """Every node says 406 then, which is passed on and no 503; it is over when Redis is back."""
    log = "journalctl -o cat -u haproxy | grep -c 'backend to_.* has no server available' || true"
    before = {host: host.root(log) for host in HOSTS}
    statuses: set[int] = set()

    def all_down() -> bool:
        for host in HOSTS:
            statuses.add(get(f"https://{NAMED.fqdn}/", CA, at=(host.ipv4, 443))[0].status_code)
        return all(host.root(log) != before[host] for host in HOSTS)

    pids = [host.pids() for host in HOSTS]
    with stopped(SHARED, "callready-redis"):
        eventually(all_down)
        for host in HOSTS:
            answer, _ = get(f"https://{NAMED.fqdn}/", CA, at=(host.ipv4, 443))
            assert answer.status_code == 406, host
    assert statuses <= {200, 406}
    eventually(lambda: all(map(is_own, HOSTS)))
    assert [host.pids() for host in HOSTS] == pids  # nothing restarts LiveKit for that


def drained(cluster: Fleet, seconds: int) -> subprocess.Popen[str]:
    """A deploy that restarts the LiveKit of NAMED, by the time it waits for that."""
    levels = {"info": "debug", "debug": "info"}
    now = NAMED.root("sed -n 's/^  level: //p' /etc/livekit/livekit.yaml")
    cluster.data["deploy"] |= {"drain": seconds}
    cluster.data["livekit"]["logging"] = {"level": levels[now]}
    process = cluster.start("--limit", NAMED.fqdn)
    draining(process)
    return process


def test_a_drained_node_waits_for_what_it_relays(cluster: Fleet) -> None:
    """It has no participants, but a WebSocket that leads to a room on another node."""
    before, secret = NAMED.pids(), cluster.secrets["livekit/api_secret"]
    with calls_of(URL, "APIfleet", secret, {}, node_id=ONE.root(NODE_ID)) as calls:
        assert NAMED.media() == 0
        process = drained(cluster, DRAIN)
        # Its own edge gives new callers to others, and those give it none.
        eventually(lambda: is_by_peer(NAMED))
        assert "503 Service Unavailable" in asked(ONE, NAMED, OWN)
        NAMED.root("systemctl reload haproxy")
        eventually(lambda: is_by_peer(NAMED))
        call = probe("webrtc", URL, "--ca-file", CA, secret=secret, LIVEKIT_API_KEY="APIfleet")
        assert call["ok"], call
        # Alone it is used all the same.
        with stopped(ONE, "haproxy"), stopped(SHARED, "haproxy"):
            eventually(lambda: "200 OK" in asked(ONE, NAMED, OWN) and is_own(NAMED))
        assert NAMED.pids() == before
    said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    print(*calls["direct"], sep="\n")
    assert all(each.undisturbed for each in calls["direct"]), calls
    assert NAMED.pids() != before
    eventually(lambda: is_own(NAMED))


@pytest.mark.long
def test_what_a_node_relays_goes_on_when_its_last_participant_has_left(cluster: Fleet) -> None:
    """LiveKit ends then, and cuts what it relays: media goes on, clients connect anew."""
    before, secret = NAMED.pids(), cluster.secrets["livekit/api_secret"]
    nodes = ONE.root(NODE_ID), NAMED.root(NODE_ID)
    with calls_of(URL, "APIfleet", secret, {}, node_id=nodes[0]) as relayed:
        with calls_of(URL, "APIfleet", secret, {}, node_id=nodes[1]) as own:
            process = drained(cluster, 600)
            assert NAMED.pids() == before
        said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        eventually(lambda: is_own(NAMED))
    print(*own["direct"], *relayed["direct"], sep="\n")
    assert all(each.undisturbed for each in own["direct"]), own
    assert all(each.reconnects <= 1 and not each.gone for each in relayed["direct"]), relayed


@pytest.mark.parametrize(
    "then", ["its calls end", pytest.param("the next deploy", marks=pytest.mark.long)]
)
def test_ctrl_c_while_it_drains_leaves_a_node_that_serves(cluster: Fleet, then: str) -> None:
    before, secret = NAMED.pids(), cluster.secrets["livekit/api_secret"]
    node_id, release = NAMED.root(NODE_ID), NAMED.root("readlink /etc/callready/current")
    with calls_of(URL, "APIfleet", secret, {}, node_id=node_id) as calls:
        process = drained(cluster, 600)
        eventually(lambda: is_by_peer(NAMED))
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        eventually(lambda: idle(NAMED))
        # It takes no new rooms, but callers of others', and its calls go on.
        eventually(lambda: is_own(NAMED))
        assert (NAMED.pids(), NAMED.root("readlink /etc/callready/current")) == (before, release)
        if then == "the next deploy":
            process = drained(cluster, 12)
            said = "".join(process.communicate(timeout=60))
            assert process.returncode == 0 and 'reconnect once: "continuity-' in said, said
    print(*calls["direct"], sep="\n")
    if then == "the next deploy":
        assert all(each.reconnects == 1 and not each.gone for each in calls["direct"]), calls
    else:
        assert all(each.undisturbed for each in calls["direct"]), calls
    eventually(lambda: NAMED.pids() not in ({}, before))
    eventually(lambda: is_own(NAMED))
    call = probe("webrtc", URL, "--ca-file", CA, secret=secret, LIVEKIT_API_KEY="APIfleet")
    assert call["ok"], call


def test_the_port_of_the_edges_is_for_them_alone(cluster: Fleet) -> None:
    """By the packet filter, and by a certificate of the fleet in the name of one of them."""
    connect = f"timeout 2 bash -c '< /dev/tcp/{NAMED.ipv4}/%d' 2>&-"
    stranger = [*Lab().client_prefix(), "sh", "-c"]
    assert subprocess.run([*stranger, connect % 443], check=False).returncode == 0
    assert subprocess.run([*stranger, connect % PORT], check=False).returncode != 0
    assert ONE.root(connect % PORT) == ""
    found = asked(ONE, NAMED, OWN)
    assert "200 OK" in found and "callready-peer" in found
    assert "HTTP/1.1" not in asked(ONE, NAMED)
    signs = Authority(SecretStr(cluster.secrets["fleet/ca"]))
    both = b"".join(signs.issue(Identity("mon1.lab.test", (ONE.ipv4,), ("server", "client"))))
    ONE.root(f"umask 077; cat > /root/other.pem <<'END'\n{both.decode()}END")
    assert "403 Forbidden" in asked(ONE, NAMED, "/root/other.pem")

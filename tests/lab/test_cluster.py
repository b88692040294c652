"""Two SFUs that share a Redis: a node is drained, and calls go elsewhere meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import SecretStr

from callready.probes import livekit
from callready.rollout.rollout import NODE_ID
from tests.support.continuity import calls_of
from tests.support.fleet import DRAIN, Fleet, Host, delivered, draining, pair_inventory, probe

HOSTS = ONE, OTHER = (Host("h21"), Host("h22"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two SFUs, one of them with the Redis."""
    with delivered(*(host.name for host in HOSTS)):
        _, data, _ = pair_inventory()
        del data["turn"], data["tls"]
        address = f"{ONE.ipv4}:6379"
        data["firewall"] = {"extra_ports": ["6379/tcp"]}
        data["livekit"] |= {
            "url": f"ws://{OTHER.fqdn}:7880",
            "turn_pool": None,
            "redis": {"address": address, "password": "secret:redis"},
        }
        data["livekit"]["rtc"] = {"stun_servers": ["198.51.100.2:3478"]}
        groups = {
            "livekit": [
                (host.fqdn, {"address": host.ipv4, "address6": host.ipv6}) for host in HOSTS
            ]
        }
        fleet = Fleet(
            tmp_path_factory.mktemp("cluster"), groups, data, ["livekit/api_secret", "redis"]
        )
        ONE.root(
            "apt-get -qq update && apt-get -qq install -y --no-install-recommends redis-server"
        )
        ONE.root(
            "systemctl disable -q --now redis-server; systemd-run -q --unit=shared-redis "
            f"redis-server --bind {ONE.ipv4} --requirepass {fleet.secrets['redis']}"
        )
        fleet.deploy()
        yield fleet
        fleet.restore()


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


def media(host: Host) -> int:
    """UDP ports of calls that LiveKit has open."""
    return int(host.root("ss -Hlnup | grep -c livekit-server || true"))


@pytest.mark.parametrize("drain", [DRAIN, 2], ids=["calls end in time", "calls go on"])
def test_drained_node_takes_no_new_calls(cluster: Fleet, drain: int) -> None:
    url, secret = cluster.data["livekit"]["url"], cluster.secrets["livekit/api_secret"]
    with calls_of(url, "APIfleet", secret, {}) as calls:
        node, other = sorted(HOSTS, key=media, reverse=True)
        before = node.pids()
        cluster.data["deploy"] = {"drain": drain}
        cluster.data["livekit"]["logging"] = {"level": "debug" if drain == DRAIN else "warn"}
        process = cluster.start("--limit", node.fqdn)
        if drain == DRAIN:
            draining(process)
            was = media(node)
            for entrance in (f"ws://{host.fqdn}:7880" for host in (node, other, other, node)):
                call = probe("webrtc", entrance, secret=secret, LIVEKIT_API_KEY="APIfleet")
                assert call["ok"], call
                assert (media(node), node.pids()) == (was, before)
        else:
            said = process.communicate(timeout=60)
    if drain == DRAIN:
        said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert node.pids() != before
    both = calls["direct"]
    print(*both, sep="\n")
    assert all(each.reconnects == (drain == 2) and not each.gone for each in both), calls

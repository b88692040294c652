"""An SFU with its Redis beside it, on Debian 13: closed to everybody else, there before LiveKit,
and no reason to take no calls for as long as a deploy waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Lab
from tests.support.continuity import calls_of
from tests.support.fleet import (
    DRAIN,
    Fleet,
    Host,
    delivered,
    draining,
    pair_inventory,
    probe,
    verify,
)

BOX = Host("h22")
URL = f"ws://{BOX.fqdn}:7880"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The host after its first deploy."""
    with delivered(BOX.name):
        _, data, _ = pair_inventory()
        del data["turn"], data["tls"]
        data["livekit"] |= {"url": URL, "turn_pool": None}
        data["livekit"]["rtc"] = {"stun_servers": ["198.51.100.2:3478"]}
        data["redis"] = {"livekit_password": "secret:redis/livekit"}
        groups = {
            "livekit": [(BOX.fqdn, {"address": BOX.ipv4, "address6": BOX.ipv6})],
            "redis": [BOX.fqdn],
        }
        secrets = ["livekit/api_secret", "redis/livekit"]
        fleet = Fleet(tmp_path_factory.mktemp("box"), groups, data, secrets)
        fleet.deploy()
        yield fleet
        fleet.restore()


def call(box: Fleet) -> dict[str, object]:
    secret = box.secrets["livekit/api_secret"]
    return probe("webrtc", URL, secret=secret, LIVEKIT_API_KEY="APIfleet")


def test_it_is_for_this_host_and_there_before_livekit(box: Fleet, tmp_path: Path) -> None:
    assert not box.deploy().results["success"]
    sockets = "ss -Hltn sport = :6379 | awk '{ print $4 }'"
    for boots in (False, True):
        if boots:
            Lab().reboot(BOX.name)
        assert BOX.root(sockets) == "127.0.0.1:6379"
        assert "6379" not in BOX.root("nft list table inet callready")
        found = verify(
            tmp_path, "test_redis", "test_exposure", "test_units", inventory=box.inventory
        )
        assert not any(found.values()), found
        assert call(box)["ok"]
    order = "systemctl show -P ActiveEnterTimestampMonotonic callready-redis livekit-server"
    redis, livekit = map(int, BOX.root(order).split())
    assert 0 < redis < livekit
    assert BOX.root("systemctl show -P NRestarts livekit-server") == "0"


def test_alone_it_takes_new_calls_while_a_deploy_waits(box: Fleet) -> None:
    with calls_of(URL, "APIfleet", box.secrets["livekit/api_secret"], {}) as calls:
        before = BOX.pids()
        box.data["deploy"] = {"drain": DRAIN}
        box.data["livekit"]["logging"] = {"level": "debug"}
        process = box.start()
        draining(process)
        new = call(box)
        assert new["ok"], new
        assert BOX.pids() == before
    said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert BOX.pids() != before
    assert all(not each.reconnects and not each.gone for each in calls["direct"]), calls


def test_nothing_of_it_is_left(box: Fleet) -> None:
    box.restore()
    run = box.run(file="remove.py")
    assert run.status == 0, run.text
    state = "dpkg-query -W redis-server redis-tools; systemctl show -P LoadState redis-server"
    assert BOX.root(f"{state} callready-redis", check=False).split() == ["not-found"] * 2
    assert not BOX.root("find /etc/callready /etc/systemd/system -name '*redis*'", check=False)

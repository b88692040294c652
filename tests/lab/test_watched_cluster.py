"""Three SFUs that are one service, a pool of two TURN hosts, and the monitor that watches them:
what is wrong with a cluster is named by the verification, and people are told of it once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lab import plan
from tests.sabotage.catalogue import CATALOGUE
from tests.sabotage.judging import tried
from tests.sabotage.sabotage import CLUSTER, Service
from tests.support.fleet import (
    Fleet,
    Host,
    delivered,
    entry,
    eventually,
    found,
    watched_inventory,
)
from tests.support.sink import sink

pytestmark = pytest.mark.long
# Debian 12, 13, 12, 13 and 13.
HOSTS = SFU, NAMED, SHARED, TURN, MONITOR = tuple(map(Host, ("h15", "h16", "h17", "h24", "h26")))
SMTP, HTTP = 2532, 8094
FAULTS = [name for name, each in CATALOGUE.items() if each.layer == CLUSTER]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The name of one SFU leads to the service; another has their Redis and TURN too."""
    hosts = (host.name for host in HOSTS)
    with delivered(*hosts), sink(plan.MACHINE.ipv4, SMTP, HTTP):
        groups, data, secrets = watched_inventory(SHARED, MONITOR, SMTP, HTTP)
        groups["livekit"] = [entry(SFU), entry(NAMED), entry(SHARED, name=f"turn.{SHARED.fqdn}")]
        groups["turn"] = [(SHARED.fqdn, {"pools": ["calls"]}), entry(TURN, pools=["calls"])]
        groups["redis"] = [SHARED.fqdn]
        data["livekit"]["url"] = f"wss://{NAMED.fqdn}"
        data["redis"] = {"livekit_password": "secret:redis/livekit"}
        folder = tmp_path_factory.mktemp("watched-cluster")
        fleet = Fleet(folder, groups, data, [*secrets, "redis/livekit"])
        fleet.deploy()
        yield fleet


def test_every_node_is_seen_and_those_of_one_room_meet(cluster: Fleet) -> None:
    eventually(lambda: len(found(cluster, 'callready_probe_success{probe="meet"} == 1')) == 3)
    eventually(lambda: len(found(cluster, "callready_redis_reached == 1")) == 3)
    eventually(lambda: len(found(cluster, "callready:clock:ahead_seconds < 0.2")) == 3)
    eventually(lambda: len(found(cluster, 'callready_probe_success{probe="call",turn!=""}')) > 1)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(cluster: Fleet, name: str) -> None:
    result = tried([name], Service.of(str(cluster.inventory)), "-k", CATALOGUE[name].checks)
    assert result.is_right, result


# Faults that are there at the same time, each with its alert and what that is of. Clocks are those
# of one kernel, so nothing makes ClocksApart.
TOLD: list[dict[str, tuple[str, str]]] = [
    {"an sfu with another redis": ("RoomsSplit", NAMED.fqdn)},
    {"an sfu cut off from redis": ("SfuNotServing", SFU.fqdn)},
    {"one of the sfus hung": ("SfuNotServing", SFU.fqdn)},
    {
        "redis far from an sfu": ("RedisFar", SFU.fqdn),
        "all but one host of a pool stopped": ("PoolDegraded", TURN.fqdn),
    },
]


@pytest.mark.parametrize("faults", TOLD, ids=", ".join)
def test_people_are_told_of_a_fault_once(
    cluster: Fleet, faults: dict[str, tuple[str, str]]
) -> None:
    """And nobody is paged where others take the callers."""
    at, wanted = Service.of(str(cluster.inventory)), set(faults.values())

    def told(more: str = "") -> set[tuple[str, str]]:
        query = f'ALERTS{{alertstate="firing",alertname!~"Watchdog|CpuHigh"{more}}}'
        names = (each["metric"] for each in found(cluster, query))
        return {(each["alertname"], each["host"]) for each in names}

    eventually(lambda: not told(), 600)
    with ExitStack() as broken:
        for name in faults:
            broken.enter_context(CATALOGUE[name].do(at))
        eventually(lambda: wanted <= told(), 900)
        assert told() == wanted
        assert told(',severity="page"') == {each for each in wanted if each[0] == "RoomsSplit"}

"""The fleet that the tests of the deploy share: four hosts, booted bare, deployed once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from lab import Lab, plan
from tests.support.fleet import (
    FLEET,
    HOSTS,
    LAB_INVENTORY,
    PAIR,
    REPOSITORY,
    SFU,
    Fleet,
    Host,
    delivered,
    deploy_lab,
    eventually,
    idle,
    inventory,
    pair_inventory,
)

# Tests with hosts in common run one after the other, whatever runs beside them: by the fixture that
# has the hosts, or by file.
GROUPS = {"lab_fleet": "fleet", "deployed_pair": "pair", "good": "lab"}
SHARED = {
    "test_lab": "h17-h20",
    "test_load": "h17-h20",
    "test_acme": "h17-h20",
    "test_rotation": "h17-h20",
    "test_pool": "h17-h20",
    "test_format": "h17-h20",
    "test_refusals": "fleet",
    "test_redis": "test_cluster",
    "test_edges_of_a_cluster": "test_cluster",
    "test_recorder": "test_gate",
}


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        names = getattr(item, "fixturenames", ())
        group = next((GROUPS[name] for name in names if name in GROUPS), item.path.stem)
        item.add_marker(pytest.mark.xdist_group(SHARED.get(group, group)))


@pytest.fixture(scope="session")
def lab_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Hosts as delivered and an inventory for them."""
    with delivered(*FLEET):
        yield Fleet(tmp_path_factory.mktemp("operator"), *inventory())


@pytest.fixture(scope="session")
def deployed_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """An SFU and a TURN host after their first deploy."""
    with delivered(*(host.name for host in PAIR)):
        fleet = Fleet(tmp_path_factory.mktemp("pair"), *pair_inventory())
        fleet.deploy()
        yield fleet


def settle(fleet: Fleet, hosts: tuple[Host, ...]) -> None:
    """Have hosts be as their inventory says, as soon as nobody works on them."""
    if fleet.unsettled:
        for host in hosts:
            eventually(partial(idle, host), 150)
        fleet.deploy()


@pytest.fixture
def pair(deployed_pair: Fleet) -> Iterator[Fleet]:
    """The pair exactly as its inventory says."""
    settle(deployed_pair, PAIR)
    yield deployed_pair
    deployed_pair.restore()


@pytest.fixture
def bare_fleet(lab_fleet: Fleet) -> Iterator[Fleet]:
    """The fleet before its first deploy."""
    if lab_fleet.first:
        for name in FLEET:
            Lab().reset(name)
        lab_fleet.unsettled = True
    yield lab_fleet
    lab_fleet.restore()


@pytest.fixture(scope="session")
def deployed_fleet(lab_fleet: Fleet) -> Fleet:
    """The fleet after a first deploy of bare hosts, as talkative as pyinfra can be; `first` is how
    it went."""
    # What an earlier, hand-made installation may have left.
    SFU.root("mkdir -p /etc/livekit; umask 077; echo 'port: 1' > /etc/livekit/livekit.yaml")
    SFU.root("mkdir -p /srv/app; echo 'DEBUG=1\nLIVEKIT_API_KEY=old\nPORT=80' > /srv/app/.env")
    lab_fleet.first = lab_fleet.run("-vvv", "--debug", "--diff")
    lab_fleet.unsettled = False
    return lab_fleet


@pytest.fixture
def fleet(deployed_fleet: Fleet) -> Iterator[Fleet]:
    """The fleet exactly as its inventory says; a test may change what it likes."""
    settle(deployed_fleet, HOSTS)
    yield deployed_fleet
    deployed_fleet.restore()


@pytest.fixture(scope="session")
def good() -> Iterator[None]:
    """The lab as `make demo` leaves it; hosts that were not there before go again."""
    if os.geteuid():
        pytest.skip("the lab needs root")
    lab = Lab()
    made = [name for name in plan.DEFAULT_HOSTS if lab.state(name) == "absent"]
    lab.up()
    subprocess.run(
        [sys.executable, "-m", "callready.secrets", LAB_INVENTORY], cwd=REPOSITORY, check=True
    )
    deploy_lab()
    yield
    for name in made:
        lab.destroy(name)

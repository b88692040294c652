"""The fleet that the tests of the deploy share: four hosts, booted bare, deployed once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from fleet import FLEET, HOSTS, STATE, Fleet, inventory

from lab import Lab


@pytest.fixture(scope="session")
def bare_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Hosts as delivered and an inventory for them; hosts that were not there before go again."""
    if os.geteuid():
        pytest.skip("the lab needs root")
    lab = Lab()
    made = [name for name in FLEET if lab.state(name) == "absent"]
    lab.up(FLEET)
    for name in set(FLEET) - set(made):
        lab.reset(name)
    yield Fleet(tmp_path_factory.mktemp("operator"), *inventory())
    for name in made:
        lab.destroy(name)


@pytest.fixture
def fleet(deployed_fleet: Fleet) -> Iterator[Fleet]:
    """The fleet exactly as its inventory says; a test may change what it likes."""
    if deployed_fleet.unsettled:
        deployed_fleet.deploy()
    yield deployed_fleet
    deployed_fleet.restore()

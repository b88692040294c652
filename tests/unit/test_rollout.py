"""The order in which hosts change."""

from typing import Any

import pytest

from callready.release.facts import Facts
from callready.release.manifest import Manifest
from callready.release.node import Node
from callready.release.plan import NONE, plan, plan_return
from callready.rollout.deployment import Deployment
from callready.rollout.prober import Prober
from callready.rollout.rollout import Rollout
from tasks import declare
from tests.support.inventories import SFU1, TURN1, TURN2, bare, box, deployed

pytestmark = pytest.mark.usefixtures("project")

MORE = ("turn3.callready.test", "turn4.callready.test", "turn5.callready.test")


@pytest.fixture
def hosts() -> dict[str, Deployment]:
    """Six bare hosts of two roles, deployed two at a time."""
    fleet = box(
        (SFU1, "groups", ["livekit"]),
        (SFU1, "pools", []),
        ("*", "deploy.batch", 2),
        *[
            edit
            for number, name in enumerate(MORE)
            for edit in (
                (name, "groups", ["turn"]),
                (name, "address", f"192.0.2.{30 + number}"),
                (name, "pools", ["calls"]),
                *inherited(name),
            )
        ],
    )
    return {name: deployment(declare(fleet, name)) for name in fleet.hosts}


def deployment(node: Node, facts: Facts | None = None) -> Deployment:
    facts = facts or bare()
    return Deployment(node, facts, plan(node.release, facts))


def inherited(name: str) -> list[tuple[str, str, Any]]:
    from tests.support.inventories import GROUP

    return [(name, key, value) for key, value in GROUP.items()]


def waves(deployments: dict[str, Deployment]) -> list[list[str]]:
    return list(Rollout({}, deployments, Prober(), True).waves)


def test_turn_comes_first_and_of_each_role_one_host_alone(hosts: dict[str, Deployment]) -> None:
    assert waves(hosts) == [[TURN1], [TURN2, MORE[0]], [*MORE[1:]], [SFU1]]


def test_the_way_back_is_the_other_way_round(hosts: dict[str, Deployment]) -> None:
    for deployment in hosts.values():
        release = deployment.node.release
        deployment.plan = plan_return(release, NONE, Manifest(), deployed(release), "rollback")
    assert waves(hosts)[0] == [SFU1]
    assert waves(hosts)[1] == [TURN1]


def test_a_host_that_needs_nothing_is_no_canary(hosts: dict[str, Deployment]) -> None:
    here = hosts[TURN1].node
    hosts[TURN1] = deployment(here, deployed(here.release))
    assert waves(hosts)[0] == [TURN2]

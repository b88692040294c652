"""The order in which hosts change."""

from typing import Any

import pytest

from callready.release.facts import Facts
from callready.release.manifest import Manifest
from callready.release.node import Node
from callready.release.plan import NONE, Step, plan, plan_return, step
from callready.rollout.deployment import Deployment
from callready.rollout.prober import Prober
from callready.rollout.rollout import Failed, Rollout, Stopped, Untouched
from tasks import declare
from tests.support.inventories import SFU1, TURN1, TURN2, bare, box, deployed, load

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


def test_redis_comes_before_those_who_need_it() -> None:
    fleet = load(
        ("*", "turn.pools.avatar", ...),
        ("*", "fleet_ca", "secret:fleet/ca"),
        ("*", "redis", {"livekit_password": "secret:redis/livekit"}),
        (TURN2, "groups", ["redis"]),
        (TURN2, "pools", []),
    )
    found = {name: deployment(declare(fleet, name)) for name in fleet.hosts}
    assert waves(found) == [[TURN2], [TURN1], [SFU1]]


def test_sfus_that_are_one_service_change_one_by_one() -> None:
    others = [
        edit
        for number, name in enumerate(MORE)
        for edit in (
            (name, "groups", ["livekit"]),
            (name, "address", f"192.0.2.{30 + number}"),
            *inherited(name),
        )
    ]
    redis = ("*", "livekit.redis", {"address": "192.0.2.9:6379"})
    fleet = load(*others, redis)
    found = {name: deployment(declare(fleet, name)) for name in fleet.hosts}
    assert waves(found)[-4:] == [[SFU1], *([name] for name in MORE)]


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


# The phases, with scripts that are only noted: which host is asked to do what, and which is not.


class Hosts(dict[str, Any]):
    """A host of every name."""

    print_prefix = ""

    def __missing__(self, _name: str) -> "Hosts":
        return self


class Noted(Rollout):
    """Runs no script; the ones that begin with `fails` on a host fail."""

    def __init__(self, deployments: dict[str, Deployment], fails: str = "", whole: bool = True):
        super().__init__(Hosts(), deployments, Prober(), whole)
        self.fails, self.ran = fails, list[str]()

    def _look_ahead(self, name: str) -> None:
        self._probes[name] = []

    def _unreachable(self, name: str, families: object) -> list[str]:
        return []

    def _script(self, name: str, steps: list[Step]) -> None:
        phase = "install" if self.deployments[name].plan.installing == steps else steps[-1].function
        self.ran.append(f"{phase} {name}")
        if self.ran[-1] == self.fails:
            raise Stopped("it failed")

    def play(self) -> dict[str, list[bool]]:
        """What pyinfra asks for, a phase at a time, of the hosts that have not failed."""
        active, done = list(self.changing), dict[str, list[bool]]()
        for phase in ("install", "switch", "prune"):
            results = {name: getattr(self, phase)(name) for name in active}
            active = [name for name, ok in results.items() if ok]
            done[phase] = list(results.values())
        return done


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("callready.rollout.ssh.families", lambda *_: {4: "192.0.2.1"})


@pytest.fixture
def two(hosts: dict[str, Deployment], reachable: None) -> dict[str, Deployment]:
    """Two bare TURN hosts, each with an old secret to be pruned."""
    chosen = {name: hosts[name] for name in (TURN1, TURN2)}
    for each in chosen.values():
        each.plan.prune = [step("write_rows", "/x.db")]
    return chosen


def ran(rollout: Noted, phase: str) -> list[str]:
    return [line.partition(" ")[2] for line in rollout.ran if line.startswith(phase)]


def test_all_phases_of_all_hosts(two: dict[str, Deployment]) -> None:
    rollout = Noted(two)
    assert all(all(results) for results in rollout.play().values()) and rollout.is_well
    assert [ran(rollout, what) for what in ("install", "confirm", "write_rows")] == [[*two]] * 3


def test_where_a_program_cannot_be_installed_nothing_is_switched_anywhere(
    two: dict[str, Deployment],
) -> None:
    rollout = Noted(two, f"install {TURN2}")
    assert not any(rollout.play()["install"]) and not rollout.is_well
    assert {line.partition(" ")[0] for line in rollout.ran} == {"install"}
    assert rollout.outcomes == {TURN1: Untouched((TURN2,)), TURN2: Failed("it failed")}
    assert rollout.switch(TURN1) is False, "although pyinfra goes on"


def test_when_a_host_fails_the_next_waves_are_untouched_and_no_secret_goes(
    two: dict[str, Deployment],
) -> None:
    rollout = Noted(two, f"confirm {TURN1}")
    assert rollout.play()["switch"] == [False, False]
    assert ran(rollout, "confirm") == [TURN1] and ran(rollout, "write_rows") == []
    assert rollout.outcomes == {TURN1: Failed("it failed"), TURN2: Untouched((TURN1,))}
    rollout = Noted(two, f"confirm {TURN2}")
    assert rollout.play()["switch"] == [True, False]
    assert ran(rollout, "write_rows") == [], "the host that failed may use the old secret"


def test_a_part_of_the_fleet_takes_no_secret_away(two: dict[str, Deployment]) -> None:
    rollout = Noted(two, whole=False)
    assert rollout.play()["prune"] == [True, True]
    assert ran(rollout, "write_rows") == []

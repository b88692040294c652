"""A deploy dies at every one of its steps: its controller is killed, its line cut, its host's
power cut. Whatever was left: one release, whole, reachable, serving; and the next run completes it.

The steps are taken from the plan of the deploy itself, so that a new one is swept by itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from callready.release import plan
from lab import Lab
from lab.run import say
from tests.support.fleet import eventually
from tests.support.place import LONG_TIMER, TIMER, EndedBefore, Node, Place, Places

CONTROLLER = ("look", "connect", "gate")  # held_deploy.CONTROLLER
# What else is done on a host, where it is done to death.
ELSEWHERE = {
    "install_placeholder request_certificate take_up start_timer unask": (
        "need an authority: tests/lab/test_acme.py"
    ),
    "drain": "changes nothing: tests/lab/test_continuity.py, test_cluster.py",
    "drain_egress": "changes nothing: tests/lab/test_recordings_kept.py",
    "unload_firewall": "of a firewall that is switched off",
    "reserve_ids install_image": "of hosts that record: tests/lab/test_recording.py",
}


def kill_controller(place: Place, process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, 9)
    place.release()


def cut_line(place: Place, process: subprocess.Popen[str]) -> None:
    Lab().cut(place.host.name)
    place.release()
    time.sleep(1)  # whatever it does then, nobody hears of it
    with suppress(AssertionError):  # apt-get tries for minutes
        eventually(place.settled, LONG_TIMER)
    Lab().mend(place.host.name)
    process.wait(timeout=90)


def cut_power(place: Place, process: subprocess.Popen[str]) -> None:
    Lab().power_cut(place.host.name)
    place.release(alive=False)
    Lab().boot(place.host.name)
    process.wait(timeout=90)


CUTS: dict[str, Callable[[Place, subprocess.Popen[str]], None]] = {
    "controller killed": kill_controller,
    "line cut": cut_line,
    "power cut": cut_power,
}


@dataclass(frozen=True)
class Trip:
    """A way from one state to another: `none` is a host without callready."""

    start: str
    end: str
    verb: str = "deploy"

    @property
    def inventory(self) -> str:
        return "A" if self.end == "none" else self.end


TRIPS: tuple[Trip, ...] = (
    Trip("A", "B"),
    Trip("B", "A"),
    Trip("B", "A", "rollback"),
    Trip("A", "none", "remove"),
    Trip("none", "A"),
    Trip("A", "C"),
    Trip("C", "A"),
)


@dataclass(frozen=True)
class Cell:
    """One cut: before a step on the host or at a point of the controller."""

    point: str
    step: str
    cut: str
    may_be_kept: bool  # it is at the confirmation or after it


@dataclass
class Sweep:
    """What is left to be cut on a kind of host, and what came of it."""

    kind: str
    hosts = 1
    everywhere = True  # on every host of the kind
    trips = TRIPS
    seen: ClassVar[set[str]] = set()  # the steps of all trips
    left: dict[Trip, list[Cell]] = field(default_factory=dict)
    results: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __str__(self) -> str:
        return self.kind

    def cells(self, place: Place, trip: Trip, long: bool) -> list[Cell]:
        """Every step of a trip with every cut in the long sweep; else those that no trip had
        before, with one kind of cut each."""
        phases = place.steps(trip.inventory, trip.verb)
        steps = [line.split()[0] for phase in phases for line in phase]
        confirmed = steps.index("confirm")
        names = [(f"{name}#{steps[:n].count(name)}", name) for n, name in enumerate(steps)]
        cells = []
        for n, (point, name) in enumerate(names + [(p, p) for p in CONTROLLER]):
            if long or name not in self.seen:
                cuts = list(CUTS) if long else [list(CUTS)[n % len(CUTS)]]
                cells += [Cell(point, name, cut, n in range(confirmed, len(steps))) for cut in cuts]
            self.seen.add(name)
        return cells

    def run(self, places: Places, place: Place, *_: Place) -> None:
        """Go to and fro on one host until nothing is left."""
        for more in place.states.keys() - place.good.keys():
            place.reach_state(more)
            place.good[more] = place.snapshot()
        place.ready(state := "A")
        while not places.over and (move := self.next(place, state, places.long)):
            trip, cell = move
            state = trip.end
            if cell is None:
                place.reach_state(state)
                continue
            result = {
                "host": str(self),
                "way": f"{trip.start} to {trip.end} ({trip.verb})",
                "step": cell.step,
                "cut": cell.cut,
            }
            try:
                result["left"] = cut(place, trip, cell)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                result["torn"] = f"{place.host.name}: {error}"
                Lab().mend(place.host.name)
                place.now = ""
                place.ready(state)
            self.results.append(result)
            places.note(**result)
            say(" · ".join(result.values()))

    def next(self, place: Place, state: str, long: bool) -> tuple[Trip, Cell | None] | None:
        """The next trip from a state, with its cut or on the way to others; None at the end."""
        with self.lock:
            trips = [
                trip for trip in self.trips if {trip.start, trip.end} <= {"none", *place.states}
            ]
            for trip in (trip for trip in trips if trip.start == state):
                if trip.start == "A" and trip.end == "B":
                    place.forget()
                if trip not in self.left:
                    self.left[trip] = self.cells(place, trip, long)
                if self.left[trip]:
                    return trip, self.left[trip].pop(0)
            wanted = {trip.start for trip in trips if self.left.get(trip, True)}
            ways = [trip for trip in trips if trip.start == state and trip.verb != "rollback"]
            ways.sort(key=lambda trip: trip.end not in wanted)
            return (ways[0], None) if wanted else None


def cut(place: Place, trip: Trip, cell: Cell) -> str:
    """Cut a deploy and assert what must hold; the state that was left."""
    for timer in (TIMER, LONG_TIMER):
        place.use(trip.inventory, timer)
        try:
            with place.deploying(verb=trip.verb, hold=cell.point) as process:
                CUTS[cell.cut](place, process)
            break
        except EndedBefore as early:  # this machine was too slow for the timer, so it went back
            assert place.sound() == trip.start and timer == TIMER, early
            place.reach_state(trip.start)  # certificate and rows, too
    left = place.sound()
    if process.returncode == 0:
        assert left == trip.end, "it claimed a success that is none"
    elif not cell.may_be_kept:
        assert left == trip.start, "the host kept what nobody confirmed"
    if trip.verb == "rollback" and left != trip.end:  # which leaves certificate and rows alone
        place.reach_state(trip.end, trip.verb)
    place.converges(trip.end)
    return left


class OfCluster(Sweep):
    """A node of a cluster, which is drained before it is switched; the first host of two."""

    hosts = 2
    everywhere = False
    trips = TRIPS[:3]
    seen: ClassVar[set[str]] = set()

    def __str__(self) -> str:
        return "cluster"

    def cells(self, place: Place, trip: Trip, long: bool) -> list[Cell]:
        """In the short sweep what a drain has done is cut off, and no more."""
        cells = super().cells(place, trip, True)
        if not long:
            drained = trip == self.trips[0]
            cells = [c for c in cells if drained and (c.step, c.cut) == ("arm", next(iter(CUTS)))]
        return cells

    def run(self, places: Places, place: Place, *others: Place) -> None:
        node = Node(place, *others)
        try:
            node.learn()
            super().run(places, node)
        finally:
            for each in (place, *others):
                each.now = ""


SWEEPS = [Sweep("turn"), Sweep("sfu"), OfCluster("sfu")]


@pytest.mark.parametrize("job", SWEEPS, ids=str)
def test_every_step_may_be_the_last(
    running: dict[str, list[Future[None]]], request: pytest.FixtureRequest, job: Sweep
) -> None:
    for future in running[request.node.nodeid]:
        future.result()
    assert not [result for result in job.results if "torn" in result]
    assert not any(job.left.values())


def test_no_step_was_forgotten() -> None:
    """Every function of apply.sh that the plan calls was among the steps."""
    if not all(sweep.left for sweep in SWEEPS):
        pytest.skip("nothing was swept")
    calls = re.findall(r"""\bstep\(\s*"(\w+)\"""", Path(plan.__file__).read_text())
    assert set(calls) - Sweep.seen - OfCluster.seen == set(" ".join(ELSEWHERE).split())

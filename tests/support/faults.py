"""A fault: how it is made on one host, and what must hold afterwards whatever it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab import Lab
from lab.run import say
from tests.support.place import LONG_TIMER, TIMER, EndedBefore, Place, Places


@dataclass(frozen=True)
class Fault:
    """`make` makes it on a host that goes from `place.source` to `place.target`, asserts what an
    operator is told, and returns that in a few words for the table."""

    name: str
    kind: str
    make: Callable[..., str]
    start: str
    hosts: int
    timer: int
    everywhere = False  # one host will do

    def __str__(self) -> str:
        return self.name

    def run(self, places: Places, *hosts: Place) -> None:
        """Make it, and assert the invariant for the first host."""
        place = hosts[0]
        try:
            try:
                said = self._made(hosts, self.timer)
            except EndedBefore:  # this machine was too slow for the timer: again, from the start
                for each in hosts:
                    each.now = ""
                said = self._made(hosts, LONG_TIMER)
            left = place.sound()
            assert left == place.source or place.status == 0, "it kept what nobody confirmed"
            place.converges(place.target)
            say(f"{self.name}: {said}")
        except BaseException as error:
            say(f"{self.name}: {place.host.name}: {error!r:.2000}")
            for each in hosts:
                each.now = ""
                Lab().mend(each.host.name)
            raise
        kept = {place.source: "nothing changed", place.target: "all of the new release"}
        places.note(
            fault=self.name,
            how=" ".join((self.make.__doc__ or "").split()),
            said=said,
            left=kept[left],
            test=f"tests/faults/test_faults.py::test_fault[{self.name}]",
        )

    def _made(self, hosts: tuple[Place, ...], timer: int) -> str:
        for each in hosts:
            each.ready(self.start, timer)
        return self.make(*hosts)


FAULTS: list[Fault] = []


def fault(
    name: str, kind: str = "turn", start: str = "", hosts: int = 1, timer: int = TIMER
) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register a fault; `start` is A, B or none, where it needs that one."""

    def register(make: Callable[..., str]) -> Callable[..., str]:
        FAULTS.append(Fault(name, kind, make, start, hosts, timer))
        return make

    return register

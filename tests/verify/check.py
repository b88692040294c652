"""What a check says: its figures, and everything it found wrong, at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from callready.probes import Finding, ProbeError
from tests.verify.targets import Server, Site

CHECK = pytest.StashKey["Check"]()


class Check:
    """One check of one thing; given to the check's function as `check`."""

    def __init__(self) -> None:
        self.figures: list[str] = []
        self.seconds = 0.0
        self.findings: list[Finding] = []

    def figure(self, text: str) -> None:
        """Something measured, for the report's last column."""
        self.figures.append(text)

    def expect(self, is_right: object, suffers: str, look_at: str) -> None:
        """Note what a caller suffers, and what to look at, unless it is right."""
        if not is_right:
            self.findings.append(Finding(suffers, look_at))

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Note a probe's error and go on with the next one."""
        try:
            yield
        except ProbeError as error:
            self.findings.append(error.finding)

    def conclude(self) -> None:
        """Raise CheckFailed if anything was noted."""
        if self.findings:
            raise CheckFailed(*self.findings)


class CheckFailed(Exception):
    """What a check found wrong: its arguments are findings."""


def params_of(item: pytest.Item) -> dict[str, Any]:
    """What a check was made for, by the name of its argument."""
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec else {}


def each(source: Callable[[Site], Sequence[Any]]) -> pytest.MarkDecorator:
    """One check for each thing that `source` finds in the inventory; none if it finds nothing."""
    return pytest.mark.each.with_args(source)


def having(condition: Callable[[Server], object]) -> Callable[[Site], list[Server]]:
    """A source for `each`: the hosts that this is true of."""
    return lambda site: [server for server in site.hosts() if condition(server)]


def ms(seconds: float) -> str:
    """Seconds as milliseconds, with a digit behind the point where that matters."""
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"

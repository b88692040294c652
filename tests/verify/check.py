"""What a check says: its figures, and everything it found wrong, at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from callready.diagnosis.diagnose import blind
from callready.diagnosis.model import Cause, Fails, Flow, Tried
from callready.probes import Finding, ProbeError
from tests.verify.servers import Server, Unseen
from tests.verify.targets import Site

CHECK = pytest.StashKey["Check"]()


class Check:
    """One check of one thing; given to the check's function as `check`."""

    def __init__(self) -> None:
        self.figures: list[str] = []
        self.connects: list[float] = []
        self.seconds = 0.0
        self.passed = False
        self.findings: list[Finding] = []
        self.causes: list[Cause] = []
        self.tried: list[Tried] = []
        self.fails: Fails = ""
        self.step = ""  # of a path, that failed
        self.closed: list[Flow] = []  # that nobody answers

    def figure(self, text: str) -> None:
        """Something measured, for the report's last column."""
        self.figures.append(text)

    def connected(self, *seconds: float) -> None:
        """How long calls took to connect, each in seconds; the slower of a call's two sides."""
        self.connects += seconds

    def expect(
        self, is_right: object, suffers: str, look_at: str, cause: Cause | None = None
    ) -> None:
        """Note what a caller suffers, and what to look at, unless it is right; and the cause, if
        this is one and not what follows from it."""
        if not is_right:
            self.findings.append(Finding(suffers, look_at))
            if cause:
                self.causes.append(cause)

    def found(self, suffers: str, cause: Cause) -> None:
        """Note a cause that was found by looking at it, and what callers suffer from it."""
        self.expect(False, suffers, cause.mend, cause)

    @contextmanager
    def probing(
        self, cause_of: Callable[[ProbeError], Cause | None] | None = None
    ) -> Iterator[None]:
        """Note a probe's error, and its cause if that can be told from it; go on with the next."""
        try:
            yield
        except ProbeError as error:
            self.findings.append(error.finding)
            if cause_of and (cause := cause_of(error)):
                self.causes.append(cause)

    def conclude(self) -> None:
        """Raise CheckFailed if anything was noted."""
        if self.findings:
            raise CheckFailed(*self.findings)
        self.passed = True


def unseen(error: ProbeError) -> Cause | None:
    """The cause of a check that could not look at its host."""
    return blind(error.host, error.why) if isinstance(error, Unseen) else None


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

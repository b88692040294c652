"""What verifications found, kept as JSON beside the page, and what changed since the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from callready.diagnosis.model import Diagnosis, Symptom, Tried
from callready.probes import Finding

KEPT = 20
"""Runs of each inventory."""


@dataclass(frozen=True)
class Name:
    """Which check it is: its host, its function, its title for people."""

    host: str
    check: str
    title: str


@dataclass(frozen=True)
class Row:
    """One check, and how it ended; `connects` are the seconds that its calls took to connect."""

    host: str
    check: str
    title: str
    ok: bool
    figure: str = ""
    findings: tuple[Finding, ...] = ()
    connects: tuple[float, ...] = ()

    @property
    def name(self) -> Name:
        """Which check it is."""
        return Name(self.host, self.check, self.title)


@dataclass(frozen=True)
class Found:
    """A cause in words, and the checks that failed because of it; as `model.Cause`."""

    key: str
    host: str
    place: str
    what: str
    mend: str
    evidence: tuple[str, ...] = ()
    ruled_out: tuple[str, ...] = ()
    latent: bool = False
    symptoms: tuple[Name, ...] = ()


@dataclass(frozen=True)
class Machine:
    """A host, and what it is: `SFU`, `TURN calls`, `App`, `Edge`."""

    name: str
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """A verification: all that its report shows."""

    inventory: str
    when: datetime
    seconds: float
    selected: int
    rows: tuple[Row, ...]
    paths: tuple[Tried, ...] = ()
    causes: tuple[Found, ...] = ()
    unexplained: tuple[Name, ...] = ()
    notes: tuple[str, ...] = ()
    hosts: tuple[Machine, ...] = ()

    @property
    def failed(self) -> list[Row]:
        """The checks that failed."""
        return [row for row in self.rows if not row.ok]

    @property
    def missing(self) -> int:
        """How many checks did not run."""
        return self.selected - len(self.rows)

    @property
    def is_good(self) -> bool:
        """Whether every check ran and passed."""
        return not self.failed and not self.missing

    @property
    def verdict(self) -> str:
        """How it went, in one line."""
        counts = f"{len(self.rows) - len(self.failed)} passed, {len(self.failed)} failed"
        return counts + (f", {self.missing} did not run" if self.missing else "")

    def by_host(self) -> dict[str, list[Row]]:
        """The rows of each host."""
        return {host: list(rows) for host, rows in groupby(self.rows, lambda row: row.host)}

    def hidden(self, hide: Callable[[str], str]) -> Run:
        """It with `hide` done to every text."""

        def deep(value: Any) -> Any:
            if isinstance(value, str):
                return hide(value)
            if isinstance(value, dict):
                return {key: deep(each) for key, each in value.items()}
            return [deep(each) for each in value] if isinstance(value, (list, tuple)) else value

        return _RUN.validate_python(deep(_RUN.dump_python(self)))


@dataclass(frozen=True)
class _History:
    runs: list[Run] = field(default_factory=list)


_RUN, _HISTORY = TypeAdapter(Run), TypeAdapter(_History)


@dataclass(frozen=True)
class Changes:
    """What is otherwise than in the run before."""

    since: datetime
    failed: tuple[Name, ...]
    mended: tuple[Name, ...]
    causes: tuple[Found, ...]
    gone: tuple[Found, ...]
    slower: tuple[tuple[Tried, float], ...]
    """Paths whose round trip takes over twice as long; with the seconds of before."""

    def __bool__(self) -> bool:
        return any((self.failed, self.mended, self.causes, self.gone, self.slower))

    def __str__(self) -> str:
        words = [
            f"{len(found)} {what}"
            for found, what in (
                (self.failed, "newly failed"),
                (self.mended, "mended"),
                (self.slower, "paths over twice as slow"),
            )
            if found
        ]
        words += [f"new cause {cause.key} {cause.host}".rstrip() for cause in self.causes]
        words += [f"gone {cause.key} {cause.host}".rstrip() for cause in self.gone]
        return ", ".join(dict.fromkeys(words)) or "nothing changed"


def diagnosed(diagnosis: Diagnosis, rows: Sequence[Row]) -> dict[str, Any]:
    """A diagnosis as the fields of a run; what no cause explains of the rows is unexplained."""

    def names(symptoms: tuple[Symptom, ...]) -> tuple[Name, ...]:
        return tuple(dict.fromkeys(Name(s.host, s.check, s.title) for s in symptoms))

    causes = [
        Found(
            cause.key,
            cause.host,
            cause.place.value,
            cause.what,
            cause.mend,
            cause.evidence,
            cause.ruled_out,
            cause.latent,
            names(symptoms),
        )
        for cause, symptoms in ((each.cause, each.symptoms) for each in diagnosis.causes)
    ]
    explained = {name for cause in causes for name in cause.symptoms}
    return {
        "paths": diagnosis.paths,
        "causes": tuple(causes),
        "unexplained": tuple(r.name for r in rows if not r.ok and r.name not in explained),
        "notes": diagnosis.notes,
    }


def load(file: Path) -> list[Run]:
    """The runs that a file holds, oldest first; none if it holds something else."""
    try:
        return _HISTORY.validate_json(file.read_bytes()).runs
    except (OSError, ValidationError):
        return []


def save(file: Path, runs: list[Run]) -> None:
    """Write the runs, of each inventory its last ones."""
    kept = [
        run
        for index, run in enumerate(runs)
        if sum(later.inventory == run.inventory for later in runs[index:]) <= KEPT
    ]
    written = file.with_suffix(".new")
    written.write_bytes(_HISTORY.dump_json(_History(kept)))
    written.replace(file)


def changes(runs: list[Run]) -> Changes | None:
    """What the last run found otherwise than the one before of its inventory, of what both
    looked at; None if it is the first."""
    *before, now = runs
    last = next((run for run in reversed(before) if run.inventory == now.inventory), None)
    if last is None:
        return None
    was = {row.name: row.ok for row in last.rows}
    turned = [row for row in now.rows if was.get(row.name, row.ok) != row.ok]
    known, remaining = ({(c.key, c.host) for c in run.causes} for run in (last, now))
    return Changes(
        since=last.when,
        failed=tuple(row.name for row in turned if not row.ok),
        mended=tuple(row.name for row in turned if row.ok),
        causes=tuple(
            cause for cause in _comparable(now, last) if (cause.key, cause.host) not in known
        ),
        gone=tuple(
            cause for cause in _comparable(last, now) if (cause.key, cause.host) not in remaining
        ),
        slower=tuple(_slower(last, now)),
    )


def _comparable(run: Run, other: Run) -> list[Found]:
    """The causes of a run that the other one would have found as well: `-k` leaves checks out."""
    names = {row.name for row in other.rows}
    return [cause for cause in run.causes if not cause.symptoms or names & {*cause.symptoms}]


def _slower(last: Run, now: Run) -> Iterator[tuple[Tried, float]]:
    was = {tried.path: tried.rtt for tried in last.paths if tried.ok}
    for tried in now.paths:
        before = was.get(tried.path)
        # Below a few milliseconds it is the machine's own load that is seen.
        if tried.ok and tried.rtt and before and tried.rtt > max(2 * before, before + 0.02):
            yield tried, before

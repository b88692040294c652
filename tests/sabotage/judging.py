"""One sabotage after the other: broken, verified, undone; what the verification said of each, and
the table of that in docs/sabotage.md."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from lab import Lab
from lab.run import LabError
from tests.sabotage.clients import disagreements
from tests.sabotage.sabotage import CATALOGUE, Sabotage, Service
from tests.support.fleet import REPOSITORY
from tests.verify.history import Found, Run, load

SECONDS = 300  # of a verification, at the very most


def verify(at: Service, before: Sequence[str] = (), *options: str) -> Run:
    """A verification from where callers are, by the command `before`, with its options."""
    with TemporaryDirectory() as report:
        command = [sys.executable, "-m", "callready.verify", at.inventory, "--report", report]
        done = subprocess.run(
            [*Lab().client_prefix(), *before, *command, *options],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        runs = load(Path(report, "verify.json"))
    assert runs, done.stdout + done.stderr
    assert bool(done.returncode) != runs[-1].is_good, done.stdout
    return runs[-1]


@dataclass(frozen=True)
class Result:
    """What came of a sabotage, or of a pair.

    Args:
        names: of the sabotages.
        caught: whether the verification failed.
        ranks: of each, which of the causes is right for it, counted from 1; 0: none.
        false: causes that are right for none of them, as `key of host`.
        said: all causes, the same way. failed: how many checks failed.
        unexplained: how many of them no cause explains.
        seconds: of the verification.
        error: why it could not be tried or undone.
        asked: whether other clients were. disagree: where they find a path otherwise.
    """

    names: tuple[str, ...]
    caught: bool = False
    ranks: tuple[int, ...] = ()
    false: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    failed: int = 0
    unexplained: int = 0
    seconds: float = 0.0
    error: str = ""
    asked: bool = False
    disagree: tuple[str, ...] = ()

    @property
    def is_named(self) -> bool:
        """Whether every cause is among the first two."""
        return bool(self.ranks) and all(0 < rank <= 2 for rank in self.ranks)

    @property
    def is_right(self) -> bool:
        """Whether nothing is missing of what is to reach."""
        wrong = (*self.false, *self.disagree, self.error)
        return self.caught and self.is_named and not any(wrong)


def words(cause: Found) -> str:
    """A cause in short."""
    return f"{cause.key} of {cause.host.split('.')[0] or 'this network'}"


def is_right(cause: Found, sabotage: Sabotage, at: Service) -> bool:
    """Whether a cause is one that a sabotage has."""
    host = at.host(sabotage.role)
    where = sabotage.role in ("any", "android") or cause.host == (host.fqdn if host else "")
    return cause.key in sabotage.causes and where


def judged(sabotages: Sequence[Sabotage], at: Service, run: Run) -> Result:
    """What a verification's causes are worth."""
    ranks = (
        next((n for n, cause in enumerate(run.causes, 1) if is_right(cause, sabotage, at)), 0)
        for sabotage in sabotages
    )
    false = (
        words(cause)
        for cause in run.causes
        if not any(is_right(cause, each, at) or cause.key in each.also for each in sabotages)
    )
    return Result(
        tuple(each.name for each in sabotages),
        not run.is_good,
        tuple(ranks),
        tuple(false),
        tuple(map(words, run.causes)),
        len(run.failed),
        len(run.unexplained),
        round(run.seconds, 1),
    )


def tried(names: Sequence[str], at: Service, *options: str, ask: bool = False) -> Result:
    """Break it in these ways, verify, with `ask` let other clients look, undo. What fails on the
    way is in the result."""
    sabotages = [CATALOGUE[name] for name in names]
    result = Result(tuple(names))
    try:
        with ExitStack() as broken:
            before = [broken.enter_context(each.do(at)) for each in sabotages]
            run = verify(at, [word for words in before for word in words or ()], *options)
            result = judged(sabotages, at, run)
            if ask:
                disagree = tuple(disagreements(at.inventory, run))
                result = replace(result, asked=True, disagree=disagree)
    except (AssertionError, LabError, OSError, subprocess.SubprocessError) as error:
        return Result(tuple(names), error=" ".join(str(error).split())[-300:])
    return result


@dataclass
class Results:
    """Of a whole run.

    Args:
        tried: sabotages and pairs. clean: what verifications of the whole service said, which
            should be nothing; each as its causes and failed checks. clean_disagree: where other
            clients found a path otherwise then; None: they were not asked.
        days: on which it was.
    """

    tried: list[Result] = field(default_factory=list)
    clean: list[tuple[str, ...]] = field(default_factory=list)
    clean_seconds: list[float] = field(default_factory=list)
    clean_disagree: tuple[str, ...] | None = None
    days: tuple[str, ...] = ()

    def after(self, earlier: Results) -> Results:
        """With those of an earlier run; of what was tried in both, what came of it here."""
        again = {each.names for each in self.tried}
        disagree = self.clean_disagree
        return Results(
            [*(each for each in earlier.tried if each.names not in again), *self.tried],
            [*earlier.clean, *self.clean],
            [*earlier.clean_seconds, *self.clean_seconds],
            earlier.clean_disagree if disagree is None else disagree,
            tuple(sorted({*earlier.days, *self.days})),
        )

    def look(self, at: Service, ask: bool = False) -> bool:
        """Verify the whole service, with `ask` let other clients look; whether all is green."""
        try:
            run = verify(at)
            if ask:
                self.clean_disagree = tuple(disagreements(at.inventory, run))
            said = (*map(words, run.causes), *(f"{row.check} of {row.host}" for row in run.failed))
            self.clean_seconds.append(round(run.seconds, 1))
        except (AssertionError, subprocess.SubprocessError) as error:
            said = (str(error)[-300:],)
        self.clean.append(said)
        return not said


def share(part: int, of: int) -> str:
    """A part of some, for people."""
    return f"{part} of {of} ({100 * part / of:.0f} %)" if of else "none"


def page(results: Results) -> str:
    """docs/sabotage.md."""
    singles = [each for each in results.tried if len(each.names) == 1]
    pairs = [each for each in results.tried if len(each.names) > 1]
    lines = [
        "# Sabotages",
        "",
        "Ways to break a deployed service, and what the verification says of each. "
        "They are made on lab hosts, one after the other and in pairs, by `make sabotage`, which "
        "writes this page. Each is a function in `tests/sabotage`, with the cause that is right.",
        "",
        f"Tried on {' and '.join(results.days)}; of what was tried again, the last time counts.",
        "",
        "| | Sabotages | Pairs |",
        "|---|---|---|",
        *_totals(singles, pairs),
        "",
        f"False alarms over {len(results.clean)} verifications of the whole service: "
        f"{sum(map(bool, results.clean))}.",
        "",
        "Cause: which of the causes that the verification names is the right one (1: the first).",
        "",
    ]
    for layer in dict.fromkeys(each.layer for each in CATALOGUE.values()):
        lines += _table(
            layer.capitalize(), (r for r in singles if CATALOGUE[r.names[0]].layer == layer)
        )
    return "\n".join([*lines, *_table("Two at once", pairs), *_clients(results)])


def _clients(results: Results) -> list[str]:
    asked = [(" and ".join(each.names), each.disagree) for each in results.tried if each.asked]
    if results.clean_disagree is not None:
        asked.insert(0, ("nothing", results.clean_disagree))
    if not asked:
        return []
    return [
        "## Other clients",
        "",
        "Headless Chromium with livekit-client, LiveKit's SDK and `turnutils_uclient` were "
        "asked about each path while this was broken. Where they find one otherwise than the "
        "verification:",
        "",
        "| Broken | Found otherwise |",
        "|---|---|",
        *(f"| {name} | {'; '.join(disagree) or 'none'} |" for name, disagree in asked),
        "",
    ]


def _totals(singles: list[Result], pairs: list[Result]) -> Iterable[str]:
    def row(title: str, *counts: str) -> str:
        return f"| {title} | {' | '.join(counts)} |"

    both = (singles, pairs)
    yield row("Tried", *(f"{len(each)}" for each in both))
    yield row("Caught", *(share(sum(r.caught for r in each), len(each)) for each in both))
    named = (share(sum(r.is_named for r in each), len(each)) for each in both)
    yield row("The cause among the first two", *named)
    yield row("False causes", *(f"{sum(len(r.false) for r in each)}" for each in both))
    yield row(
        "Slowest verification", *(f"{max((r.seconds for r in e), default=0):.0f} s" for e in both)
    )


def _table(title: str, results: Iterable[Result]) -> list[str]:
    rows = []
    for each in results:
        caught = "yes" if each.caught else "**no**"
        rank = ", ".join(f"{rank}" if rank else "**none**" for rank in each.ranks)
        wrong = ", ".join(each.false) or each.error
        name = " and ".join(each.names)
        rows.append(f"| {name} | {caught} | {rank} | {wrong} | {each.seconds:.0f} s |")
    if not rows:
        return []
    head = ["| Sabotage | Caught | Cause | Named wrongly | Time |", "|---|---|---|---|---|"]
    return [f"## {title}", "", *head, *rows, ""]

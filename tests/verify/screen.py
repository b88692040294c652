"""How a verification ended, on one screen of the terminal: paths, hosts, causes, what changed."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from callready.diagnosis.model import Tried
from callready.probes import Finding
from tests.verify.check import ms
from tests.verify.history import Changes, Found, Row, Run

# A column of the matrix: a host, and what of it.
Column = tuple[str, str]

_WAYS = ("UDP", "TCP", "TLS", "TLS 443")
_WATCHED = ("test_targets", "test_alerts", "test_test_calls", "test_password")
_GAP, _CELL = 2, 9  # characters
_HOSTS, _CAUSES = 20, 4  # so many are told in full
_SCREEN, _END = 40, 6  # lines; those below what is not explained
# Where the terminal shows ASCII only; of the same width, so that columns stay columns.
_ASCII = str.maketrans({"✓": "+", "✗": "X", "○": "o", "…": ".", "·": ",", "•": "*"})


class Screen:
    """Writes to pytest's terminal writer."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self._width = min(out.fullwidth, 120) or 80
        self._lines = 0
        self._is_ascii = not (getattr(sys.stdout, "encoding", "") or "").lower().startswith("utf")

    def rows(self, run: Run) -> None:
        """Every check with its figure, and what it found."""
        hosts = max(len(row.host) for row in run.rows)
        titles = max(len(row.title) for row in run.rows)
        self._line()
        self._line(f"{'HOST':<{hosts}}  {'CHECK':<{titles}}  RESULT  FIGURE", bold=True)
        for row in run.rows:
            self._write(f"{row.host:<{hosts}}  {row.title:<{titles}}  ")
            self._write("ok      " if row.ok else "FAILED  ", green=row.ok, red=not row.ok)
            self._line(row.figure)
            for finding in row.findings:
                self._line(f"    {finding.shown}", red=True)
                self._line(f"    Look at: {finding.look_at}")

    def show(self, run: Run, changed: Changes | None, page: str) -> None:
        """The screen; `page` is the page's address."""
        self._line()
        self._lines = 0
        self._paths(run.paths)
        self._hosts(run)
        causes = sorted(run.causes, key=lambda cause: cause.latent)
        for number, cause in enumerate(causes, 1):
            self._cause(number, cause, is_short=number > _CAUSES)
        self._unexplained([row for row in run.failed if row.name in {*run.unexplained}])
        for note in run.notes:
            self._wrapped(note, "")
        self._monitors(run.rows)
        if changed is not None:
            self._wrapped(f"Since {changed.since.astimezone():%Y-%m-%d %H:%M}: {changed}", "")
        self._write(run.verdict, green=run.is_good, red=not run.is_good, bold=True)
        self._line(f" in {run.seconds:.0f} s")
        self._line(page)

    def _write(self, text: str, **markup: bool) -> None:
        self._out.write(text.translate(_ASCII) if self._is_ascii else text, **markup)

    def _line(self, text: str = "", **markup: bool) -> None:
        self._write(text, **markup)
        self._out.line()
        self._lines += 1

    def _wrapped(self, text: str, first: str, most: int | None = None, **markup: bool) -> None:
        """Lines that begin below the end of `first`, so many at most."""
        indent = " " * len(first)
        for line in textwrap.wrap(
            text,
            self._width,
            initial_indent=first,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
            max_lines=most,
            placeholder=" …",
        ):
            self._line(line, **markup)

    def _monitors(self, rows: Sequence[Row]) -> None:
        """What each monitor sees, and where it shows that."""
        for host in dict.fromkeys(row.host for row in rows if row.check == _WATCHED[0]):
            said = {row.check: row.figure for row in rows if row.host == host}
            figures = filter(None, map(said.get, _WATCHED))
            self._wrapped(f"{host}: {', '.join(figures)}", "")

    def _paths(self, paths: Sequence[Tried]) -> None:
        columns: dict[Column, list[Tried]] = {}
        for tried in sorted(paths, key=lambda each: bool(each.path.turn)):
            columns.setdefault(column(tried), []).append(tried)
        label = max((len(way(tried)) for tried in paths), default=0) + _GAP
        at_once = max(1, (self._width - label) // (2 * (_CELL + _GAP)))
        names = list(columns)
        if len(names) > 2 * at_once:
            self._compressed(columns)
            return
        for start in range(0, len(names), at_once):
            self._matrix({name: columns[name] for name in names[start : start + at_once]}, label)

    def _matrix(self, columns: dict[Column, list[Tried]], label: int) -> None:
        both = 2 * (_CELL + _GAP)
        for part in zip(*columns, strict=True):
            self._line(" " * label + "".join(f"{fit(text, both - 2):<{both}}" for text in part))
        families = "".join(f"{f'IPv{family}':<{_CELL + _GAP}}" for family in (4, 6))
        self._line(" " * label + families * len(columns))
        for name in ways(chain(*columns.values())):
            self._write(f"{name:<{label}}")
            for tried in columns.values():
                for family in (4, 6):
                    of_cell = [t for t in tried if way(t) == name and t.path.family == family]
                    text, markup = cell(of_cell)
                    self._write(f"{text:<{_CELL + _GAP}}", **markup)
            self._line()
        self._line()

    def _compressed(self, columns: dict[Column, list[Tried]]) -> None:
        """One line a column, as two ticks a way: IPv4, IPv6; of many, those that fail."""
        names = ways(chain(*columns.values()))
        wrong = {name: all_ for name, all_ in columns.items() if any(t.ok is False for t in all_)}
        shown = columns if len(columns) <= _HOSTS else wrong
        width = max((len(f"{host} {what}") for host, what in shown), default=0) + _GAP
        if shown:
            head = "".join(f"{name:<{len(name) + _GAP}}" for name in names)
            self._line(f"{'IPv4, IPv6':<{width}}{head}")
        for (host, what), tried in shown.items():
            self._write(f"{f'{host} {what}':<{width}}")
            for name in names:
                for family in (4, 6):
                    of_cell = [t for t in tried if way(t) == name and t.path.family == family]
                    text, markup = cell(of_cell)
                    self._write(text[:1] or " ", **markup)
                self._write(" " * (len(name) + _GAP - 2))
            self._line(times(tried))
        if rest := len(columns) - len(shown):
            every = [t for name, all_ in columns.items() if name not in shown for t in all_]
            self._line(f"✓ {rest} other{'s' * (rest > 1)}, {times(every)}", green=True)
        self._line()

    def _hosts(self, run: Run) -> None:
        counts = run.by_host()
        if len(counts) > _HOSTS:
            fine = [host for host, rows in counts.items() if all(row.ok for row in rows)]
            total = sum(len(counts.pop(host)) for host in fine)
            self._line(f"{len(fine)} hosts  {total} ok", green=True)
        width = max(map(len, counts), default=0)
        pieces = [(f"{host:<{width}}  ", rows) for host, rows in counts.items()]
        column_width = width + 22
        at_once = max(1, self._width // column_width) if len(pieces) > 6 else 1
        for start in range(0, len(pieces), at_once):
            for host, rows in pieces[start : start + at_once]:
                failed = sum(not row.ok for row in rows)
                good = f"{len(rows) - failed} ok"
                bad = f", {failed} failed" if failed else ""
                self._write(host)
                self._write(good, green=not failed)
                self._write(bad, red=True)
                self._write(" " * (column_width - len(host + good + bad)) if at_once > 1 else "")
            self._line()
        self._line()

    def _cause(self, number: int, cause: Found, is_short: bool) -> None:
        where = f"{cause.place}, {cause.host}" if cause.host else cause.place
        title = f"{'LATER' if cause.latent else 'CAUSE'} {number}  "
        colour = {"yellow" if cause.latent else "red": True}
        if is_short:
            self._wrapped(cause.what, title, 1, **colour)
            return
        self._wrapped(where, title, bold=True, **colour)
        self._wrapped(cause.what, "  ")
        if cause.evidence:
            self._wrapped(cause.evidence[0], "  Seen: ", 2)
        # On one line, so that it can be copied.
        self._write("  Mend: ")
        self._line(cause.mend, bold=True)
        if count := len(cause.symptoms):
            self._line(f"  explains {count} failed check{'s' * (count > 1)}")
        self._line()

    def _unexplained(self, rows: list[Row]) -> None:
        """As many as there is room for, and one at least."""
        if not rows:
            return
        self._line("NOT EXPLAINED by any cause that is known", bold=True, red=True)
        said = set[Finding]()
        for number, row in enumerate(rows):
            if number and self._lines > _SCREEN - _END - 5:
                rest = len(rows) - number
                self._line(f"  and {rest} more: on the page, and here with -v")
                break
            self._wrapped(f"{row.host}: {row.title}", "  ✗ ", 1)
            for finding in row.findings[:1]:
                if finding in said:
                    self._line("    as above")
                    continue
                said.add(finding)
                self._wrapped(finding.shown, "    ", 2, red=True)
                self._wrapped(finding.look_at, "    Look at: ", 2)
        self._line()


def ways(tried: Iterable[Tried]) -> list[str]:
    """The ways of these, quickest first."""
    return sorted({way(each) for each in tried}, key=lambda name: (*_WAYS, name).index(name))


def way(tried: Tried) -> str:
    """Over what, whether directly or to a TURN server."""
    return tried.path.way.removeprefix("TURN/")


def column(tried: Tried) -> Column:
    """The host that a caller's packets go to, and what it is."""
    path = tried.path
    return (path.turn, f"TURN {path.pool}") if path.turn else (path.sfu, "SFU")


def seconds(tried: Tried) -> float:
    """How long the connection took, or as far as it came."""
    return max((step.start + step.seconds for step in tried.steps), default=tried.rtt or 0.0)


def cell(tried: Sequence[Tried]) -> tuple[str, dict[str, bool]]:
    """Several paths as one mark, with the longest round trip, and its colour."""
    known = [each for each in tried if each.ok is not None]
    failed = sum(not each.ok for each in known)
    if not known:
        return "○" if tried else "", {}
    if failed:
        return f"✗ {failed} of {len(known)}" if len(known) > 1 else "✗", {"red": True, "bold": True}
    slowest = max((each.rtt or 0.0 for each in known), default=0.0)
    return f"✓ {ms(slowest)}" if slowest else "✓", {"green": True}


def times(tried: Sequence[Tried]) -> str:
    """The shortest and the longest round trip."""
    found = [each.rtt for each in tried if each.ok and each.rtt]
    return f"{ms(min(found))} to {ms(max(found))}" if found else ""


def fit(text: str, width: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= width else text[: width - 1] + "…"

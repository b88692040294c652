"""The report of a verification: a table at the end of the terminal, and one HTML file."""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import pytest

from callready import __version__
from callready.probes import Finding
from tests.verify.check import CHECK, CheckFailed, params_of
from tests.verify.targets import Site

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One check: what of which host, and how it ended."""

    host: str
    title: str
    ok: bool
    figure: str
    findings: tuple[Finding, ...] = ()


class Report:
    """A pytest plugin that collects the rows and writes them."""

    def __init__(self, site: Site, page: Path) -> None:
        self.site, self.page = site, page
        self.rows: list[Row] = []
        self.selected = 0
        self.started = time.time()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.selected = len(session.items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Function, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        report: pytest.TestReport = yield  # type: ignore[assignment]
        error = call.excinfo.value if call.excinfo else None
        findings = self._found(error) if error else ()
        if isinstance(error, CheckFailed) or (error and item.config.option.tbstyle == "no"):
            # Short, the same everywhere, and without the values that a traceback would show.
            report.longrepr = "\n".join(f"{f.shown}\nLook at: {f.look_at}" for f in findings)
        if report.when == "call" or error:
            report.duration = item.stash[CHECK].seconds
            host, title = describe(item, self.site)
            figure = dict(item.user_properties).get("figure", "")
            self.rows.append(Row(host, title, error is None, str(figure), findings))
        return report  # type: ignore[return-value]

    def _found(self, error: BaseException) -> tuple[Finding, ...]:
        if isinstance(error, CheckFailed):
            found = error.args
        else:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if Path(frame.filename).parent == FOLDER] or frames
            found = (
                Finding(
                    "the check itself failed",
                    f"{ours[-1].filename}:{ours[-1].lineno}; run it alone with --tb=short and tell "
                    "callready's authors",
                    f"{type(error).__name__}: {error}",
                ),
            )
        hide = self.site.hide
        return tuple(
            Finding(hide(each.suffers), hide(each.look_at), hide(each.evidence)) for each in found
        )

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        if self.rows:
            order = [self.site.inventory, *self.site.servers]
            self.rows.sort(key=lambda row: order.index(row.host))
            self._write_page()
            self._write_table(config.get_terminal_writer())

    @property
    def failed(self) -> int:
        """How many checks failed."""
        return sum(not row.ok for row in self.rows)

    @property
    def verdict(self) -> str:
        """How it went, in one line."""
        counts = f"{len(self.rows) - self.failed} passed, {self.failed} failed"
        missing = self.selected - len(self.rows)
        return counts + (f", {missing} did not run" if missing else "")

    @property
    def is_good(self) -> bool:
        """Whether every check ran and passed."""
        return not self.failed and len(self.rows) == self.selected

    def by_host(self) -> list[tuple[str, list[Row]]]:
        """The rows in the inventory's order of hosts."""
        return [(host, list(rows)) for host, rows in groupby(self.rows, lambda row: row.host)]

    def _write_table(self, out: Any) -> None:
        hosts = max(len(row.host) for row in self.rows)
        titles = max(len(row.title) for row in self.rows)
        out.line()
        out.line(f"{'HOST':<{hosts}}  {'CHECK':<{titles}}  RESULT  FIGURE", bold=True)
        said: set[Finding] = set()
        for host, rows in self.by_host():
            for row in rows:
                out.write(f"{host:<{hosts}}  {row.title:<{titles}}  ")
                out.write("ok      " if row.ok else "FAILED  ", green=row.ok, red=not row.ok)
                out.line(row.figure)
                if row.findings and set(row.findings) <= said:
                    out.line("    as above", red=True)
                    continue
                for finding in row.findings:
                    out.line(f"    {finding.shown}", red=True)
                    out.line(f"    Look at: {finding.look_at}")
                said.update(row.findings)
        out.line()
        verdict = f"{self.verdict} in {time.time() - self.started:.0f} s"
        out.write(verdict, green=self.is_good, red=not self.is_good, bold=True)
        out.line(f"; report: {self.page}")

    def _write_page(self) -> None:
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(FOLDER),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        page = environment.get_template("report.html.j2").render(
            report=self,
            inventory=self.site.inventory,
            when=datetime.fromtimestamp(self.started).astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            seconds=time.time() - self.started,
            caller=platform.node(),
            version=__version__,
        )
        self.page.write_text(page)


def describe(item: pytest.Function, site: Site) -> tuple[str, str]:
    """The host and the title of a check."""
    params = params_of(item)
    doc = (item.function.__doc__ or item.name).strip().splitlines()[0].rstrip(".")
    host = next((str(getattr(value, "name", value)) for value in params.values()), site.inventory)
    return host, doc.format(**params)

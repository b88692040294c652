"""The report of a verification: a table at the end of the terminal, one HTML file, and the JSON
that the next report compares with."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from callready.diagnosis.model import Diagnosis, Tried
from callready.probes import Finding
from tests.verify import history
from tests.verify.check import CHECK, CheckFailed, params_of
from tests.verify.history import Machine, Row, Run
from tests.verify.page import page
from tests.verify.screen import Screen
from tests.verify.targets import Site

FOLDER = Path(__file__).parent


class Report:
    """A pytest plugin that collects the rows and writes them."""

    def __init__(self, site: Site, file: Path) -> None:
        self.site, self.page = site, file
        self.rows: list[Row] = []
        self.diagnosis = Diagnosis()
        self.tried: list[Tried] = []
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
            self.tried += item.stash[CHECK].tried
            connects = tuple(item.stash[CHECK].connects)
            name = item.function.__name__
            self.rows.append(Row(host, name, title, not error, str(figure), findings, connects))
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
        if not self.rows:
            return
        run = self._run()
        file = self.page.with_suffix(".json")
        runs = [*history.load(file), run.hidden(self.site.hide_caller)]
        history.save(file, runs)
        changed = history.changes(runs)
        self.page.write_text(page(runs[-1], changed))
        screen = Screen(config.get_terminal_writer())
        if config.option.verbose >= 0:
            screen.rows(run)
        screen.show(run, changed, self.page.resolve().as_uri())

    def _run(self) -> Run:
        apps = (app.name for app in self.site.checkouts)
        order = list(dict.fromkeys([self.site.inventory, *self.site.servers, *apps]))
        rows = tuple(sorted(self.rows, key=lambda row: order.index(row.host)))
        found = history.diagnosed(self.diagnosis, rows)
        return Run(
            inventory=self.site.inventory,
            when=datetime.fromtimestamp(self.started).astimezone(),
            seconds=time.time() - self.started,
            selected=self.selected,
            rows=rows,
            hosts=tuple(Machine(each.name, each.roles) for each in self.site.hosts()),
            **{**found, "paths": self.diagnosis.paths or tuple(self.tried)},
        ).hidden(self.site.hide)


def describe(item: pytest.Function, site: Site) -> tuple[str, str]:
    """The host and the title of a check."""
    params = params_of(item)
    doc = (item.function.__doc__ or item.name).strip().splitlines()[0].rstrip(".")
    host = next((str(getattr(value, "name", value)) for value in params.values()), site.inventory)
    return host, doc.format(**params)

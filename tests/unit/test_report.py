"""What the verification's report says, from runs as they are kept."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from _pytest._io import TerminalWriter
from markupsafe import escape

from callready.diagnosis.model import Cause, Diagnosis, Explained, Place, Symptom, Tried
from callready.diagnosis.model import Path as MediaPath
from callready.probes import Finding
from callready.probes.legs import Step
from callready.settings.fleet import Fleet
from tests.support import runs
from tests.support.runs import WHEN
from tests.verify import history
from tests.verify.history import Name, Row, Run
from tests.verify.page import distribution, page, topology
from tests.verify.report import Report
from tests.verify.screen import Screen
from tests.verify.targets import Site

DIRECT = Tried(MediaPath("sfu1", "UDP", 4), True, (Step("ICE", 0.004, 0.002),), 0.002)
GOOD = Row("sfu1", "test_direct", "Call, direct", True, "158 ms to connect", connects=(0.158,))
CLEAN = Run("inventories/prod", WHEN, 12.3, 1, (GOOD,), (DIRECT,))
STOPPED = Cause(
    "unit-stopped",
    "sfu1",
    Place.UNIT,
    "livekit-server is stopped",
    "systemctl start livekit-server",
)


def failing(*causes: Cause) -> Run:
    bad = replace(GOOD, ok=False, findings=(Finding("no call", "LiveKit", "refused"),))
    symptom = Symptom(bad.check, bad.host, bad.title)
    diagnosis = Diagnosis(tuple(Explained(cause, (symptom, symptom)) for cause in causes))
    return replace(
        CLEAN, when=WHEN + timedelta(hours=1), rows=(bad,), **history.diagnosed(diagnosis, [bad])
    )


# History


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    runs = [CLEAN, failing(STOPPED)]
    history.save(tmp_path / "verify.json", runs)
    assert history.load(tmp_path / "verify.json") == runs
    assert [path.name for path in tmp_path.iterdir()] == ["verify.json"]


def test_each_inventory_keeps_its_last_runs(tmp_path: Path) -> None:
    other = replace(CLEAN, inventory="inventories/staging")
    runs = [other, *(replace(CLEAN, seconds=float(number)) for number in range(30))]
    history.save(tmp_path / "verify.json", runs)
    kept = history.load(tmp_path / "verify.json")
    assert kept == [other, *runs[-history.KEPT :]]


def test_a_file_that_holds_something_else_is_no_history(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    assert history.load(file) == []
    for text in ("", "{", '{"runs": [{"when": 1}]}', "[]"):
        file.write_text(text)
        assert history.load(file) == []


def test_changes_name_what_failed_what_was_mended_and_the_causes() -> None:
    bad = failing(STOPPED)
    name = Name("sfu1", "test_direct", "Call, direct")
    worse = history.changes([CLEAN, bad])
    assert worse and (worse.since, worse.failed, worse.mended) == (WHEN, (name,), ())
    assert [cause.key for cause in worse.causes] == ["unit-stopped"] and not worse.gone
    better = history.changes([CLEAN, bad, CLEAN])
    assert better and (better.failed, better.mended) == ((), (name,))
    assert [cause.key for cause in better.gone] == ["unit-stopped"] and not better.causes


def test_changes_are_those_of_what_both_runs_looked_at() -> None:
    other = replace(CLEAN, inventory="inventories/staging", rows=())
    assert history.changes([CLEAN]) is history.changes([other, CLEAN]) is None
    same = history.changes([CLEAN, other, CLEAN])
    assert same is not None and not same
    fewer = history.changes([CLEAN, replace(failing(), rows=())])
    assert fewer is not None and not fewer


def test_a_path_is_slower_when_its_round_trip_doubles_and_people_would_notice() -> None:
    def since(before: float, now: float) -> list[float]:
        runs = [
            replace(CLEAN, paths=(replace(DIRECT, rtt=seconds),), causes=())
            for seconds in (before, now)
        ]
        found = history.changes(runs)
        assert found
        return [was for _, was in found.slower]

    assert since(0.03, 0.08) == [0.03]
    quick = history.changes(
        [replace(CLEAN, paths=(replace(DIRECT, rtt=s),)) for s in (0.001, 0.01)]
    )
    assert quick is not None and not quick.slower


def test_a_check_is_once_among_the_symptoms_of_a_cause() -> None:
    (cause,) = failing(STOPPED).causes
    assert cause.place == "unit"
    assert cause.symptoms == (Name("sfu1", "test_direct", "Call, direct"),)


def test_hiding_goes_through_every_text() -> None:
    run = failing(replace(STOPPED, evidence=("poison",), ruled_out=("the poison",)))
    shown = repr(run.hidden(lambda text: text.replace("poison", "-").replace("sfu1", "one")))
    assert "poison" not in shown and "sfu1" not in shown and "one" in shown


# The page


class Parsed(HTMLParser):
    """The tags of a page, each closed where it was opened."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())


LAB = runs.fleet(1, 2)
SSH = Row(
    "app1.lab.test",
    "test_ssh",
    "SSH takes keys only",
    False,
    findings=(Finding("passwords can be guessed", "sshd -T"),),
)
ODD = Row(
    "turn2.lab.test",
    "test_media",
    "Two relayed callers hear each other (avatar)",
    False,
    findings=(Finding("callers hear each other badly", "coturn's log", "41 of 50 packets"),),
)
BROKEN = runs.run(
    LAB,
    [runs.PASSWORD, runs.FOREIGN, runs.STOPPED],
    lambda path: path.turn != "turn1.lab.test" and (path.way, path.family) != ("UDP", 6),
    [SSH, ODD],
)
SAMPLES = {
    "clean": runs.run(LAB),
    "broken": BROKEN,
    "later": runs.run(LAB, [runs.PASSWORD], rows=[SSH]),
    "IPv4 only": runs.run(LAB, is_ok=lambda path: True if path.family == 4 else None),
    "one box": runs.run(runs.fleet(1, 0)),
    "twenty": runs.run(
        runs.fleet(4, 14, 2),
        [replace(runs.STOPPED, host="turn9.lab.test")],
        lambda path: path.turn != "turn9.lab.test",
    ),
    "nothing tried": CLEAN,
}


@pytest.mark.parametrize("run", SAMPLES.values(), ids=SAMPLES)
def test_a_page_is_whole_and_loads_nothing(run: Run) -> None:
    text = page(run, history.changes([CLEAN, run]))
    parsed = Parsed(text)
    attributes = [(name, value) for _, each in parsed.tags for name, value in each.items()]
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "img", "iframe", "object"}
    for name, value in attributes:
        assert name not in ("src", "srcset", "onclick", "onload"), name
        assert name != "href" or (value or "").startswith("#"), value
    assert "url(" not in text and "@import" not in text
    identities = [value for name, value in attributes if name == "id"]
    assert len(identities) == len({*identities})
    named = {value for name, value in attributes if name in ("aria-labelledby", "href")}
    assert {(value or "").removeprefix("#") for value in named} <= {*identities}
    assert all(each.get("aria-label") for tag, each in parsed.tags if each.get("role") == "img")


def test_a_page_tells_each_cause_once_and_folds_what_follows_from_it() -> None:
    text = page(BROKEN, history.changes([SAMPLES["clean"], BROKEN]))
    for cause in (runs.STOPPED, runs.FOREIGN, runs.PASSWORD):
        assert text.count(f"<code>{escape(cause.mend)}</code>") == 1
        assert all(str(escape(said)) in text for said in (*cause.evidence, *cause.ruled_out))
    assert "Explains 8 failed checks" in text and "8 checks failed" in text
    # What breaks calls comes before what breaks them later.
    assert text.index('id="causes"') < text.index('id="later"') < text.index('id="unexplained"')
    assert text.index("41 of 50 packets") > text.index('id="unexplained"')
    assert "11 of 26 checks failed" in text and "3 of 12 open" in text
    assert text.count('class="cross"') > 0
    assert "All 24 checks passed" in page(SAMPLES["clean"], None)
    assert "Calls connect; 1 thing will fail later" in page(SAMPLES["later"], None)


def test_a_page_draws_every_path_and_of_many_what_is_well_together() -> None:
    clean, twenty, unknown = (SAMPLES[name] for name in ("clean", "twenty", "IPv4 only"))
    for width in (320, 940):
        assert str(topology(clean, width)).count('class="pill ok"') == 12 + 3
        assert str(topology(unknown, width)).count('class="pill na"') == 6
        drawn = str(topology(twenty, width))
        assert "12 hosts · TURN calls" in drawn and "turn9.lab.test · TURN calls" in drawn
        assert drawn.count('class="cross"') == 4 * 2 < drawn.count('class="pill ok"') < 40
    assert not topology(replace(CLEAN, paths=()), 320)


def test_a_failed_path_is_cut_where_it_failed() -> None:
    def cross(step: str) -> float:
        path = MediaPath("sfu1", "TURN/UDP", 4, "calls", "turn1")
        found = Tried(path, False, (Step("DNS", 0, 0.1),), why=f"{step}: no answer in time")
        drawn = str(topology(replace(CLEAN, paths=(found,)), 940))
        return float(drawn.partition('class="cross" d="M')[2].split()[0])

    assert cross("TLS") == cross("allocate") < 0.72 * 940
    assert 0.88 * 940 < cross("permission") == cross("ICE 1200 B") == cross("loss")


def test_the_times_to_connect_are_those_of_all_calls() -> None:
    found = distribution(replace(CLEAN, rows=(replace(GOOD, connects=(0.1, 0.3, 0.2)), GOOD)))
    assert found and (found.count, found.longest) == (4, 0.3)
    assert found.median == pytest.approx(0.179)
    assert str(found.narrow).count("<circle") == str(found.wide).count("<circle") == 4
    assert distribution(replace(CLEAN, rows=())) is None


# The terminal


def shown(run: Run, changed: history.Changes | None = None, width: int = 80) -> list[str]:
    text = io.StringIO()
    out = TerminalWriter(text)
    out.fullwidth = width
    Screen(out).show(run, changed, "file:///report/verify.html")
    return text.getvalue().splitlines()


@pytest.mark.parametrize("run", SAMPLES.values(), ids=SAMPLES)
def test_a_screen_fits_the_terminal(run: Run) -> None:
    lines = shown(run, history.changes([SAMPLES["clean"], run]))
    assert len(lines) <= 41, "a blank one, and forty"
    assert all(len(line) <= 80 for line in lines)
    assert lines[-1] == "file:///report/verify.html"
    assert shown(run, width=200)


def test_a_screen_has_the_paths_the_hosts_and_the_causes() -> None:
    changed = history.changes([SAMPLES["clean"], BROKEN])
    text = "\n".join(line.rstrip() for line in shown(BROKEN, changed))
    assert re.search(r"^ +sfu1\.lab\.test +turn1\.lab\.test$", text, re.MULTILINE)
    assert re.search(r"^UDP +✓ 1\.5 ms +✗ +✗ +✗$", text, re.MULTILINE)
    assert re.search(r"^TCP +✓ 4\.5 ms +✓ 6\.0 ms +✗ +✗$", text, re.MULTILINE)
    assert re.search(r"^sfu1\.lab\.test +7 ok, 9 failed$", text, re.MULTILINE)
    assert re.search(r"^CAUSE 1 +a filter on the host, sfu1\.lab\.test$", text, re.MULTILINE)
    assert f"Mend: {runs.FOREIGN.mend}\n  explains 1 failed check\n" in text
    assert re.search(r"^LATER 3 +the next start, app1\.lab\.test$", text, re.MULTILINE)
    assert "NOT EXPLAINED" in text and "41 of 50 packets" in text
    assert "11 newly failed" not in text and "9 newly failed" in text
    assert "15 passed, 11 failed in 12 s" in text


def test_much_that_is_wrong_still_fits_the_screen() -> None:
    wrong = [replace(ODD, title=f"{ODD.title} {number}") for number in range(30)]
    causes = [replace(runs.FOREIGN, host=f"sfu{number}.lab.test") for number in range(9)]
    run = runs.run(LAB, causes, lambda path: path.way != "UDP", wrong)
    text = "\n".join(shown(run, width=80))
    assert len(text.splitlines()) <= 60
    assert "CAUSE 9  rule of table inet operator" in text
    assert re.search(r"and \d+ more: on the page, and here with -v", text)


def test_a_screen_of_many_hosts_has_one_line_each() -> None:
    lines = [line.rstrip() for line in shown(SAMPLES["twenty"])]
    assert sum(line.startswith("turn9.lab.test TURN calls   ✗✗   ✗✗") for line in lines) == 1
    many = [line.rstrip() for line in shown(runs.run(runs.fleet(2, 40)))]
    assert "✓ 41 others" in "\n".join(many) and len(many) < 20


def test_a_screen_says_what_the_monitor_sees() -> None:
    figures = {
        "test_password": "at https://mon1.lab.test",
        "test_targets": "16 of 16 targets up",
        "test_alerts": "28 of 28 alerts quiet",
        "test_test_calls": "12 of 12 calls so far, 2 of 2 joins so far",
    }
    rows = [Row("mon1.lab.test", check, check, True, text) for check, text in figures.items()]
    text = " ".join(shown(replace(CLEAN, rows=tuple(rows))))
    assert (
        "mon1.lab.test: 16 of 16 targets up, 28 of 28 alerts quiet, 12 of 12 calls so far, 2 of 2 "
        "joins so far, at https://mon1.lab.test"
    ) in text
    assert "targets up" not in " ".join(shown(SAMPLES["clean"]))


def test_a_terminal_without_these_characters_gets_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    text = "\n".join(shown(BROKEN))
    assert text.isascii() and "UDP      + 1.5 ms   X" in text


# The plugin


def fleet_of(secrets: list[str]) -> Fleet:
    return Fleet("inventories/prod", {}, secrets=frozenset(secrets))


def test_nothing_that_is_written_has_a_secret_or_the_callers_address(tmp_path: Path) -> None:
    caller, secret = "203.0.113.7", "poison-0123456789"
    site = Site("inventories/prod", fleet_of([secret]), {}, mapped={caller})
    everywhere = f"{secret} {caller}"
    report = Report(site, tmp_path / "verify.html")
    cause = Cause(
        "unit-stopped",
        everywhere,
        Place.UNIT,
        everywhere,
        everywhere,
        (everywhere,),
        ruled_out=(everywhere,),
    )
    row = Row(
        site.inventory, "test_x", everywhere, False, everywhere, (Finding(*3 * (everywhere,)),)
    )
    path = MediaPath(everywhere, everywhere, 4, everywhere, everywhere)
    step = Step(everywhere, 0.0, 0.1)
    tried = Tried(path, False, (step,), why=everywhere)
    symptom = Symptom(row.check, row.host, row.title)
    report.rows = [row, replace(row, title=f"{everywhere} alone")]
    report.diagnosis = Diagnosis((Explained(cause, (symptom,)),), (), (tried,), (everywhere,))
    text = io.StringIO()
    option = SimpleNamespace(verbose=0)
    config = SimpleNamespace(option=option, get_terminal_writer=lambda: TerminalWriter(text))
    for _ in range(2):
        report.pytest_unconfigure(cast(pytest.Config, config))
    assert secret not in text.getvalue() and caller in text.getvalue()
    assert {path.name for path in tmp_path.iterdir()} == {"verify.html", "verify.json"}
    for file in tmp_path.iterdir():
        assert "the caller's address" in file.read_text().replace("&#39;", "'")
        assert secret not in file.read_text() and caller not in file.read_text()


def test_only_the_callers_addresses_are_hidden() -> None:
    addresses = {"203.0.113.7", "2001:db8::7"}
    site = Site("x", fleet_of([]), {}, mapped=addresses)
    others = "203.0.113.70, 1203.0.113.7, 203.0.113.7.5, 2001:db8::71, 2001:db8::7:1"
    assert site.hide_caller(others) == others
    for text in ("203.0.113.7", "203.0.113.7:5000", "2001:db8::7"):
        assert site.hide_caller(f"from {text}.") == "from the caller's address."
    assert site.hide_caller("[2001:db8::7]:5") == "[the caller's address]:5"

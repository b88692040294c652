import gzip
import subprocess
from pathlib import Path

import pytest

from bench import contenders, report, scale, service, verification
from bench.__main__ import main
from bench.report import Case, Table, markdown
from bench.watching import Metrics, write_monitor
from bench.world import HOSTS, BenchError
from callready.release import facts
from callready.release.plan import plan
from lab.plan import SUITES, find_host
from tasks import declare
from tests.support.inventories import TURN1, load

CHANGE = Case("change", 10, 50)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hosts", "21"], "--hosts 21: not from 1 to 20; there are 20 hosts\n"),
        (["--hosts", "0"], "--hosts 0: not from 1 to 20; there are 20 hosts\n"),
        (
            ["--hosts", "11", "--against", "HEAD"],
            "--hosts 11: not from 1 to 10; there are 20 hosts, and --against takes twice as many\n",
        ),
    ],
)
def test_more_hosts_than_there_are_is_an_error_before_any_boots(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


def test_both_halves_of_the_hosts_have_the_same_debian_versions() -> None:
    suites = [find_host(name).suite for name in HOSTS]
    assert suites[:10] == suites[10:]
    assert set(suites[:2]) == set(SUITES)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with two commits of deploy.py, `old` and then `new`."""
    folder = tmp_path / "repository"
    monkeypatch.setattr(contenders, "ROOT", folder)
    git = ["git", "-C", f"{folder}", "-c", "user.name=a", "-c", "user.email=a@example"]
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    for text in ("old", "new"):
        (folder / "deploy.py").write_text(text)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "--message", text], check=True)
    return folder


def test_a_commit_is_laid_out_apart_from_the_repository(repository: Path, tmp_path: Path) -> None:
    older = contenders.at_commit(contenders.find_commit("HEAD~1"), tmp_path)
    assert older.folder and older.folder.parent == tmp_path
    assert (older.folder / "deploy.py").read_text() == "old"
    assert (repository / "deploy.py").read_text() == "new"
    assert older.name == contenders.find_commit(older.name)  # the hash that the report names


def test_a_commit_that_does_not_exist_is_an_error(repository: Path) -> None:
    with pytest.raises(BenchError, match="bad revision 'nope'"):
        contenders.find_commit("nope")


@pytest.mark.parametrize(
    ("today", "older", "ratio"),
    [
        ([5.0, 5.1, 5.2], [9.9, 10.2, 10.3], "0.50 faster"),
        ([10.2, 10.3, 10.4], [9.9, 10.0, 10.1], "1.03 slower"),
        ([10.2, 10.3, 10.4], [9.7, 10.0, 10.1], "1.03"),
        ([10.0, 10.3, 10.4], [9.9, 10.0, 10.1], "1.03"),
    ],
)
def test_the_report_compares_with_the_other_commit(
    today: list[float], older: list[float], ratio: str
) -> None:
    table = Table(10, 3, "", "364c183")
    for name, runs in (("callready", today), ("364c183", older), ("floor", [2.0])):
        for seconds in runs:
            table.add(CHANGE, name, seconds)
    head, _, row = [line for line in markdown(table).splitlines() if line.startswith("| ")][:3]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["callready / 364c183"] == ratio
    assert "364c183 is callready at that commit" in markdown(table)


def test_the_report_leaves_out_who_was_not_measured() -> None:
    table = Table(10, 1, "")
    table.add(CHANGE, "callready", 3.0)
    table.add(CHANGE, "floor", 2.0)
    head = next(line for line in markdown(table).splitlines() if line.startswith("| "))
    assert head == "|  | hosts | RTT | callready | floor | callready / floor |"


def test_the_verification_has_a_part_of_the_page_which_the_rest_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PAGE", tmp_path / "bench.md")
    report.PAGE.write_text("old\n")
    report.write("# Deploys\n")
    assert report.PAGE.read_text() == "# Deploys\n"
    seconds = {"floor": [2.0, 4.0], "passing": [9.0, 9.2], "coturn stopped": [30.0, 30.1]}
    known = {"hosts": 4, "calls": 12, "checks": 100, "media": "1-2"}
    text = verification.section(seconds, known, "A machine.")
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows == [
        "| floor | 2.0 | 3.0 | 4.0 | 1.0 | - |  |",
        "| passing | 9.0 | 9.1 | 9.2 | 3.0 | at most 15 | PASS |",
        "| coturn stopped | 30.0 | 30.1 | 30.1 | 10.0 | at most 30 | MISS |",
    ]
    report.write_part(text)
    report.write("# Deploys again\n")
    assert report.PAGE.read_text() == f"# Deploys again\n\n{text}"
    report.write_part(text)
    assert report.PAGE.read_text() == f"# Deploys again\n\n{text}"


def test_each_measurement_replaces_its_own_part_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PAGE", tmp_path / "bench.md")
    report.PAGE.write_text("# Deploys\n")
    for heading in reversed(report.PARTS):
        report.write_part(f"{heading}\nold\n")
    report.write_part(f"{report.SERVICE}\nnew\n")
    parts = [f"{each}\n{'new' if each == report.SERVICE else 'old'}\n" for each in report.PARTS]
    assert report.PAGE.read_text() == "\n".join(["# Deploys\n", *parts])
    report.write("# Deploys again\n")
    assert report.PAGE.read_text() == "\n".join(["# Deploys again\n", *parts])


def test_another_number_of_hosts_is_a_part_of_its_own() -> None:
    table = Table(20, 3, "A machine.")
    table.add(Case("nothing", 20, 0), "callready", 2.5)
    text = report.more(table)
    assert text.startswith(report.MORE) and text.endswith("`--only`.\n")
    assert "| nothing to change | 20 | 0 ms | 2.50 |\n\nA machine. Rounds: 3.\n" in text


def test_a_service_is_judged_within_each_round() -> None:
    results, names = service.Results(), (service.CALLREADY, service.PROXY, service.PLAIN)
    # A busy machine doubles a round for all of them.
    for name, values in zip(
        names, ([1.04, 2.2, 1.0], [1.0, 2.0, 1.0], [0.9, 1.8, 0.9]), strict=True
    ):
        results.rounds[service.Figure("processor", "direct", "ms")][name] = values
        for how in (service.DIRECT, service.RELAYED):
            results.joins[how, name] = [values[0] * each for each in range(1, 41)]
    for name, value in zip(
        (service.CALLREADY, *service.WITHOUT), (2.2, 2.0, 2.1, 2.2), strict=True
    ):
        results.rounds[service.Figure("join, median", "by TURN", "s")][name] = [value]
    for name in names[1:]:
        results.rounds[service.Figure("join, median", "by TURN", "s")][name] = [2.0]
    rows = [each for each in service.section(results, "A machine.", 3).splitlines() if "| " in each]
    assert "| processor | direct | 1.040 ms | 1.000 ms | 0.900 ms | 1.04 PASS | 1.16 MISS |" in rows
    assert (
        "| join, 95 % | by TURN | 39.520 s | 38.000 s | 34.200 s | 1.04 PASS | 1.16 MISS |" in rows
    )


@pytest.mark.usefixtures("project")
def test_a_stand_in_is_as_declared() -> None:
    node = declare(load(), TURN1)
    lines = [*scale.surveyed(node).splitlines(), "clock\t1.5", "end"]
    planned = plan(node.release, facts.parse(lines))
    assert (planned.changes, planned.steps) == ([], [])
    fleet = load(("*", "turn.pools.calls.user_quota", 7))
    assert plan(declare(fleet, TURN1).release, facts.parse(lines)).steps


def test_a_large_fleet_is_judged_by_a_small_one() -> None:
    costs = {
        ("connect", 20): [scale.Cost(1.0, 2.0, 90.0, 0.0)],
        ("connect", 300): [scale.Cost(9.0, 33.0, 120.4, 0.0)],
    }
    row = "| connect | 300 | 9.0 | 33.0 | 110.0 | 1.10 | 120 | 0 |\n"
    assert row in scale.section(costs, 3, "A machine.", 1)


def test_a_fleet_on_loopback_says_what_a_host_does(tmp_path: Path) -> None:
    said = '# TYPE a_total counter\na_total{{x="1 2"}} {}\n# TYPE b gauge\nb 1.5\nc NaN\n'
    metrics = Metrics(said.format(5), said.format(8))
    for _ in range(3):
        before = metrics.now['a_total{x="1 2"}']
        metrics.change()
        assert metrics.now['a_total{x="1 2"}'] - before in (1, 2, 3, 4, 5)
    assert gzip.decompress(metrics.body).decode().endswith("b 1.5\n")
    write_monitor(tmp_path, ["127.1.0.3", "127.1.0.4"])
    config = (tmp_path / "prometheus.yml").read_text()
    assert config.count('"127.1.0.3:') == 3 and config.count('"127.1.0.4:') == 1

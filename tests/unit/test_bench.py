import gzip
import subprocess
from pathlib import Path

import pytest

from bench import contenders, report, verification
from bench.__main__ import main
from bench.report import Case, Table, markdown
from bench.watching import Metrics, write_monitor
from bench.world import HOSTS, BenchError
from lab.plan import SUITES, find_host

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

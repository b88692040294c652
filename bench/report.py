"""The measurements as a page of Markdown, with what was to be reached."""

import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from bench.world import BenchError
from lab import LabError

PAGE = Path(__file__).parents[1] / "docs" / "bench.md"
VERIFICATION = "## How long a verification takes\n"
SERVICE = "## What hardening and the edge cost\n"
MORE = "## More hosts\n"
SCALE = "## What a large fleet costs\n"
PARTS = (VERIFICATION, SERVICE, MORE, SCALE)
"""The headings of the page's last parts, which other measurements write, in their order."""
CONTENDERS = ("empty.py", "floor", "pyinfra's operations", "Ansible")
TITLES = {"fresh": "bare host", "nothing": "nothing to change", "change": "one file changed"}


class Case(NamedTuple):
    """What was measured: `what` is fresh, nothing or change; `rtt` in ms."""

    what: str
    hosts: int
    rtt: int


@dataclass
class Table:
    """Wall seconds of every run, by case and contender; `many` is the larger number of hosts,
    `older` the commit of callready that today's was measured against."""

    many: int
    rounds: int
    machine: str
    older: str | None = None
    seconds: dict[Case, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, case: Case, name: str, seconds: float) -> None:
        """Note one run."""
        self.seconds.setdefault(case, {}).setdefault(name, []).append(seconds)

    def median(self, case: Case, name: str) -> float | None:
        """In seconds; None if it was not measured."""
        runs = self.seconds.get(case, {}).get(name)
        return statistics.median(runs) if runs else None

    def ratio(self, case: Case, over: str, under: str) -> float | None:
        """Of two medians."""
        a, b = self.median(case, over), self.median(case, under)
        return a / b if a and b else None

    def difference(self, case: Case, more: str, less: str) -> float | None:
        """Of two medians, in seconds."""
        a, b = self.median(case, more), self.median(case, less)
        return a - b if a and b else None

    def beyond_noise(self, case: Case, one: str, other: str) -> str:
        """Whether one is " slower" or " faster" than the other; empty if that may be noise: their
        medians are no further apart than the fastest and the slowest run of one of them."""
        difference = self.difference(case, one, other)
        if difference is None or self.rounds == 1:
            return ""
        both = [self.seconds[case][name] for name in (one, other)]
        if abs(difference) <= max(max(runs) - min(runs) for runs in both):
            return ""
        return " slower" if difference > 0 else " faster"


INTRODUCTION = """# How long a deploy takes

Wall seconds, medians, of the same work on the same hosts: the resources of one TURN host (six
packages, a user, a masked unit, kernel settings, two folders, certificate and key, coturn's
configuration, the firewall's rules and loader, two units that run). "One file changed" is another
`user-quota` in coturn's configuration, which means a restart.

- **callready**: `pyinfra` with `deploy.py`.
- **empty.py**: `pyinfra` with an empty deploy file: what pyinfra itself takes to start
  and to connect.
- **floor**: one `ssh` a host, all at once, running one script that does it all (`bench/floor.sh`).
- **pyinfra's operations**: the same as a usual pyinfra deploy (`bench/ordinary.py`), pyinfra as it
  comes (without callready's TCP_NODELAY).
- **Ansible**: the same as a playbook (`bench/playbook.yml`): pipelining on, a fork a host, facts
  gathered as by default, no connection left over from the run before.
"""
METHOD = """Repeat it with `make bench`; `python -m bench --quick` is a short run with two hosts.
`--hosts N` takes up to 20 hosts, and `--against REV` (`make bench AGAINST=REV`) measures another
commit of callready in the same run.

The hosts are booted for the run (`python -m lab`). With 0 ms they are reached directly; with
50 ms through a forwarder that holds every packet back for 25 ms each way and limits no throughput
(`bench/delay.py`). Every run is checked: hosts reached, changes made, and after a change the file
and the unit on each host. callready also does what the others leave out: it compares secret rows
and the certificate that is served, refuses hosts it must not touch, and waits after a restart
until every port is open. A host that changes keeps the change only after new SSH connections and a
caller's probes (STUN, TURN over each transport, certificates) have worked, and one host goes before
the others do: that is what "one file changed" costs it.
"""
OLDER = """
{older} is callready at that commit, measured in the same turns, with the same settings and the same
Python environment. It has as many hosts of its own, with the same Debian versions in the same
order: on shared hosts each of the two would find a release of the other and replace it first. The
hosts of both run all the time. "faster" or "slower" beside the ratio means more than noise: the
medians are further apart than the fastest and the slowest run of either.
"""


def markdown(table: Table) -> str:
    """The whole page."""
    parts = [INTRODUCTION, times(table), "## Targets\n", targets(table), spread(table)]
    setting = (
        f"{table.machine} Rounds: {table.rounds}, Ansible in every second one; the contenders take "
        "turns in random order, after one run each that is not counted.\n"
    )
    method = METHOD + (OLDER.format(older=table.older) if table.older else "")
    return "\n".join([*parts, "## Where this was measured\n", setting, method])


def more(table: Table) -> str:
    """The page's part for another number of hosts."""
    rounds = f"{table.machine} Rounds: {table.rounds}."
    repeat = (
        f"Repeat it with `.venv/bin/python -m bench --hosts {table.many} --part`, and `--only`."
    )
    return "\n".join(
        [
            MORE,
            "Wall seconds, medians, of the same work as above.\n",
            times(table),
            rounds,
            "",
            f"{repeat}\n",
        ]
    )


def write(text: str) -> None:
    """The whole page but for the parts that other measurements write."""
    _, *parts = _split()
    PAGE.write_text("\n".join([text, *parts]))


def part(measure: Callable[[], str], write: bool) -> int:
    """Measure one of these parts, print it, and write it if wanted; 1 if something did not run."""
    try:
        text = measure()
    except (BenchError, LabError, AssertionError, subprocess.CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(text)
    if write:
        write_part(text)
    return 0


def write_part(text: str) -> None:
    """One of these parts, in place of what is there of it."""
    own, *parts = _split()
    of = {part.partition("\n")[0] + "\n": part for part in (*parts, text)}
    PAGE.write_text("\n".join([own, *(of[each] for each in PARTS if each in of)]))


def _split() -> list[str]:
    headings = "|".join(map(re.escape, PARTS))
    return re.split(f"\n(?={headings})", PAGE.read_text())


def times(table: Table) -> str:
    """Medians and ratios of those who were measured, a line a case."""
    older = [table.older] if table.older else []
    measured = {name for by_name in table.seconds.values() for name in by_name}
    names = [name for name in ("callready", *older, *CONTENDERS) if name in measured]
    pairs = [("callready", name) for name in (*older, "empty.py", "floor")]
    pairs = [pair for pair in (*pairs, ("Ansible", "callready")) if measured.issuperset(pair)]
    head = ["", "hosts", "RTT", *names, *(f"{over} / {under}" for over, under in pairs)]
    rows = []
    for case in sorted(table.seconds, key=lambda case: list(TITLES).index(case.what)):
        medians = [number(table.median(case, name)) for name in names]
        ratios = [
            number(table.ratio(case, over, under))
            + (table.beyond_noise(case, over, under) if under in older else "")
            for over, under in pairs
        ]
        rows.append([TITLES[case.what], str(case.hosts), f"{case.rtt} ms", *medians, *ratios])
    return rows_of(head, rows)


def targets(table: Table) -> str:
    """What was to be reached, and whether it was."""
    far = Case("nothing", table.many, 50)
    bare = Case("fresh", 1, 0)
    judged: list[tuple[str, str, float, float | None]] = [
        *(
            (
                f"callready / empty.py, nothing to change, 1 host, {rtt} ms",
                "at most",
                1.3,
                table.ratio(Case("nothing", 1, rtt), "callready", "empty.py"),
            )
            for rtt in (0, 50)
        ),
        (
            f"callready / floor, nothing to change, {far.hosts} hosts, 50 ms",
            "at most",
            1.5,
            table.ratio(far, "callready", "floor"),
        ),
        (
            f"Ansible / callready, nothing to change, {far.hosts} hosts, 50 ms",
            "at least",
            15,
            table.ratio(far, "Ansible", "callready"),
        ),
        (
            "fresh deploy, seconds more than installing its packages and copying its files",
            "at most",
            5,
            table.difference(bare, "callready", "bare"),
        ),
    ]
    rows = []
    for words, side, limit, value in judged:
        reached = value is not None and (value <= limit if side == "at most" else value >= limit)
        verdict = "not measured" if value is None else "PASS" if reached else "MISS"
        rows.append([words, f"{side} {limit:g}", number(value), verdict])
    return rows_of(["", "target", "measured", ""], rows)


def spread(table: Table) -> str:
    """Fastest and slowest runs: how far the medians can be trusted."""
    rows = [
        [
            TITLES[case.what],
            str(case.hosts),
            f"{case.rtt} ms",
            name,
            f"{min(runs):.2f}",
            f"{statistics.median(runs):.2f}",
            f"{max(runs):.2f}",
            str(len(runs)),
        ]
        for case, by_name in table.seconds.items()
        for name, runs in sorted(by_name.items())
    ]
    head = ["", "hosts", "RTT", "", "fastest", "median", "slowest", "runs"]
    return f"## All runs, seconds\n\n{rows_of(head, rows)}"


def rows_of(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float | None) -> str:
    """For people; a dash for what was not measured."""
    return "-" if value is None else f"{value:.2f}"


def machine(ansible: Path | None) -> str:
    """What it runs on, with versions; `ansible` is ansible-playbook if it is measured."""
    core = ""
    if ansible:  # asking it would leave ~/.ansible behind
        info = next(ansible.parent.parent.glob("lib/*/site-packages/ansible_core-*.dist-info"))
        core = f"ansible-core {info.stem.partition('-')[2]}, "
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    ssh = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False).stderr
    return (
        f"{os.cpu_count()} cores ({cpu[1] if cpu else platform.machine()}), {memory:.0f} GiB, "
        f"Linux {platform.release()}, load average at the start {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, pyinfra {version('pyinfra')}, "
        f"paramiko {version('paramiko')}, {core}{ssh.split(',')[0]}; "
        "the hosts are the lab's Debian 12 and 13 in turn, on the same cores."
    )

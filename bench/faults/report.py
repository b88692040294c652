"""docs/faults.md, from the results of runs (python -m bench.faults.report RESULTS)."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTRODUCTION = """# Faults

What a deploy survives, as %s last found it. Of every fault the same was asserted: a
new SSH connection works over IPv4 and IPv6; every file of the release, live link, unit, process,
rule and binary is wholly of the old release or wholly of the new one, compared by hash with both;
callers get what they need (the probes of the health gate); the exit status is 0 only if the host
has the new release; the next run completes it and one more changes nothing. The host's timer is
5 s here, and longer where what is tested must come before it.
"""
# Made by other tests: by file, the test that makes it.
ELSEWHERE = {
    "tests/lab/test_interrupted.py": {
        "test_hosts_that_go_away_are_named_and_the_others_are_deployed": "blackhole",
        "test_power_cut_while_packages_are_installed": "power cut while packages are installed",
        "test_killed_deploy_is_completed_by_the_next": "both ends of a deploy killed",
        "test_second_deploy_of_a_host_is_told_of_the_first": "second deploy while one runs",
    },
    "tests/lab/test_refusals.py": {
        "test_clock_that_is_off_is_refused": "clock skew",
        "test_port_of_another_program_is_refused": "port already taken",
        "test_every_mistake_of_every_host_is_told_at_once": "short secret",
        "test_missing_secret_is_named_with_what_to_run": "missing secret",
        "test_certificate_that_cannot_be_served_is_refused": "key of another certificate",
        "test_notrack_is_refused_where_another_table_does_nat": "notrack beside Docker's NAT",
        "test_active_ufw_is_refused_and_an_inactive_one_is_not": "active ufw",
    },
    "tests/lab/test_acme.py": {
        "test_what_the_authority_would_refuse_is_refused_before": "wrong DNS",
        "test_failed_renewal_leaves_the_old_one_and_is_seen": "renewal that fails",
    },
}
NOT_MADE = {
    "unsynced writes lost in a power cut": "the host's page cache is the machine's and lives on, "
    "so a missing fsync cannot be seen here",
    "short of memory on the whole host": "the hosts share this machine's memory; the test sends "
    "the OOM killer's signal instead",
}


def write(results: Path) -> None:
    """The page, from a file of results."""
    (ROOT / "docs" / "faults.md").write_text(markdown(json.loads(results.read_text())))


def markdown(found: list[dict[str, str]]) -> str:
    """What the tests found, and plain pyinfra beside it."""
    plain = [result for result in found if "plain" in result]
    cells = [result for result in found if "step" in result]
    faults = sorted(  # they end in another order each time
        (result for result in found if "fault" in result), key=lambda r: r["fault"].lower()
    )
    return (
        "\n\n".join(
            part.strip()
            for part in (
                INTRODUCTION
                % ("`make faults`" if is_long(cells) else "the short run of `make test`"),
                beside(cells, faults, plain),
                sweep(cells),
                own(faults),
                elsewhere(),
                table("## Not made", ("fault", "why"), NOT_MADE.items()),
            )
        )
        + "\n"
    )


def table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [title, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def beside(
    cells: list[dict[str, str]], faults: list[dict[str, str]], plain: list[dict[str, str]]
) -> str:
    ours = {result["fault"]: f"whole: {result['left']}" for result in faults}
    for cut in {cell["cut"] for cell in cells}:
        hit = [cell for cell in cells if cell["cut"] == cut]
        torn = sum("torn" in cell for cell in hit)
        ours[cut] = f"{torn} torn" if torn else f"whole at each of {len(hit)} points"
    rows = [
        (
            r["plain"],
            ours.get(r["plain"], "not run"),
            f"{r['left']} (exit {r['status']})",
            r["again"],
        )
        for r in plain
    ]
    return table(
        "## Beside plain pyinfra\n\nThe same states of a TURN host, deployed with `files.put`, "
        "`nft -f` and `systemd.service` (`bench/faults/plain.py`), judged 20 s after the fault by "
        "the same snapshots and probes. A cut strikes when half of the files are new.",
        ("fault", "callready", "plain operations leave", "and the next run"),
        rows,
    )


def is_long(cells: list[dict[str, str]]) -> bool:
    """Whether every step was cut in every way."""
    cuts = len({c["cut"] for c in cells}) * len({(c["host"], c["way"], c["step"]) for c in cells})
    return len(cells) >= cuts


def sweep(cells: list[dict[str, str]]) -> str:
    ways = Counter((c["host"], c["way"]) for c in cells)
    rows = []
    for (kind, way), count in sorted(ways.items()):
        own = [c for c in cells if (c["host"], c["way"]) == (kind, way)]
        steps = ", ".join(dict.fromkeys(c["step"] for c in own))
        held = sum("torn" not in c for c in own)
        left = Counter(c["left"] for c in own if "left" in c)
        kept = ", ".join(f"{n} x {state}" for state, n in sorted(left.items()))
        rows.append((kind, way, steps, f"{held} of {count}", kept))
    return table(
        "## Every step may be the last\n\nThe controller killed, the line cut, the host's power "
        "cut before each step of a deploy (`tests/faults/test_sweep.py`; steps as the release "
        "itself plans them, then the points of the controller: before it looks, opens a new "
        "connection, probes). A and B differ in configuration, firewall, binary, secret rows and "
        "certificate; C is A with a monitor on the same host; cluster is an SFU that is one of two "
        "with edges, and is drained first."
        + (
            ""
            if is_long(cells)
            else "\n\nThis run was the short one of `make test`: each "
            "step once, with one of the three cuts."
        ),
        ("host", "way", "before", "held", "left"),
        rows,
    )


def own(faults: list[dict[str, str]]) -> str:
    return table(
        "## Faults",
        ("fault", "how it is made", "what the operator is told", "left", "test"),
        [(f["fault"], f["how"], f["said"], f["left"], f"`{f['test']}`") for f in faults],
    )


def elsewhere() -> str:
    rows = []
    for path, tests in ELSEWHERE.items():
        text = (ROOT / path).read_text()
        for test, fault in tests.items():
            if not re.search(rf"^def {test}\(", text, re.MULTILINE):
                raise SystemExit(f"bench.faults: {path}::{test} is gone")
            rows.append((fault, f"`{path}::{test}`"))
    return table("## Faults that other tests make", ("fault", "test"), rows)


if __name__ == "__main__":
    write(Path(sys.argv[1]))

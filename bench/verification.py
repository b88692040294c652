"""python -m bench.verification: how long a verification takes, passing and failing, beside the
least that it could take; on a deployed lab."""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from bench import report
from bench.__main__ import say, shuffled
from bench.contenders import timed
from bench.world import ROOT, BenchError
from callready.secrets.loading import load_fleet
from lab import Lab
from lab.hosts import SSH_CONFIG
from tests.sabotage.judging import verify
from tests.sabotage.network import MEDIA
from tests.sabotage.sabotage import Broken, Service
from tests.sabotage.services import coturn_stopped
from tests.support.breakage import Packets, filtered, inside
from tests.support.fleet import LAB_INVENTORY

FLOOR, PASSING = "floor", "passing"
FAILING: Mapping[str, Callable[[Service], Broken]] = {
    "coturn stopped": coturn_stopped,
    "media dropped": lambda at: filtered(inside(at.sfu), Packets("in", proto="udp", ports=MEDIA)),
}
TARGETS = {PASSING: 15.0} | dict.fromkeys(FAILING, 30.0)  # seconds, on two idle cores
INTRODUCTION = """
Wall seconds of `make verify`, from where callers are, with {hosts} hosts that are deployed.

- **floor**: one `ssh HOST true` to each, all at once, then as many calls as the verification makes
  ({calls}), by hand, one after the other (`callready.probes.webrtc` with `--attempts`).
- **passing**: nothing is wrong. Its {checks} checks are more than the floor does.
- **coturn stopped**: on one TURN host. **media dropped**: a filter of somebody else on the SFU
  drops UDP to {media}; calls connect over TCP. A run counts only if it names a cause.
"""
METHOD = """
{machine} Rounds: {rounds}, in random order, after one passing run that is not counted.

Repeat it with `make bench-verification`.
"""


def main(arguments: Sequence[str]) -> int:
    """Measure and report; exit status 1 if something did not run."""
    parser = argparse.ArgumentParser(prog="python -m bench.verification", description=__doc__)
    parser.add_argument("--inventory", default=LAB_INVENTORY, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="write its part of docs/bench.md")
    options = parser.parse_args(arguments)
    return report.part(
        partial(compare, Service.of(options.inventory), options.rounds), options.write
    )


def compare(at: Service, rounds: int) -> str:
    """Everyone in turns, in another order every round; the page's part."""
    machine = report.machine(None)
    first = verify(at)
    calls = sum(len(row.connects) for row in first.rows)
    entrants: dict[str, Callable[[], float]] = {
        FLOOR: partial(floor, at, calls),
        PASSING: partial(passing, at),
        **{name: partial(failing, at, do) for name, do in FAILING.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in entrants}
    for number in range(rounds):
        for name in shuffled(entrants):
            seconds[name].append(entrants[name]())
        say(f"verification: round {number + 1} of {rounds}")
    known = {"hosts": len(at.hosts), "calls": calls, "checks": len(first.rows), "media": MEDIA}
    return section(seconds, known, machine)


def floor(at: Service, calls: int) -> float:
    """Wall seconds of logging in everywhere and of so many calls."""
    fleet = load_fleet(at.inventory)
    sfu = next(iter(fleet.group("livekit").values()))
    assert sfu.livekit and sfu.tls
    key, secret = next(iter(sfu.livekit.keys.items()))
    who = {"LIVEKIT_API_KEY": key, "LIVEKIT_API_SECRET": secret.get_secret_value()}
    began = time.perf_counter()
    logins = [
        subprocess.Popen(["ssh", "-F", SSH_CONFIG, host.name, "true"], stdin=subprocess.DEVNULL)
        for host in at.hosts
    ]
    if any([login.wait() for login in logins]):
        raise BenchError("ssh does not log in everywhere")
    there = [*Lab().client_prefix(), sys.executable, "-m", "callready.probes.webrtc"]
    options = ["--attempts", f"{calls}", "--duration", "0.5"]
    trust = ["--ca-file", sfu.tls.ca] if sfu.tls.ca else []
    timed([*there, sfu.livekit.url, *options, *trust], ROOT, {**os.environ, **who})
    return time.perf_counter() - began


def passing(at: Service) -> float:
    """Wall seconds of a verification that finds nothing."""
    began = time.perf_counter()
    if not (run := verify(at)).is_good:
        failed = ", ".join(row.title for row in run.rows if not row.ok)
        raise BenchError(f"nothing was broken, and these failed: {failed}")
    return time.perf_counter() - began


def failing(at: Service, do: Callable[[Service], Broken]) -> float:
    """Wall seconds of a verification that finds the cause of something."""
    with do(at):
        began = time.perf_counter()
        if not verify(at).causes:
            raise BenchError("something was broken, and no cause was named")
        return time.perf_counter() - began


def section(
    seconds: Mapping[str, Sequence[float]], known: Mapping[str, object], machine: str
) -> str:
    """The page's part, from the wall seconds of every run by what was measured."""
    least = statistics.median(seconds[FLOOR])
    rows = []
    for name, runs in seconds.items():
        median, target = statistics.median(runs), TARGETS.get(name)
        verdict = "" if target is None else "PASS" if median <= target else "MISS"
        most = "-" if target is None else f"at most {target:g}"
        times = [f"{each:.1f}" for each in (min(runs), median, max(runs))]
        rows.append([name, *times, f"{median / least:.1f}", most, verdict])
    head = ["", "fastest", "median", "slowest", "/ floor", "target", ""]
    rounds = len(seconds[FLOOR])
    parts = [
        report.VERIFICATION,
        INTRODUCTION.format(**known),
        report.rows_of(head, rows),
        METHOD.format(machine=machine, rounds=rounds),
    ]
    return "\n".join([parts[0], *(part.strip("\n") + "\n" for part in parts[1:])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""python -m bench: how long deploys take, side by side; a full run writes docs/bench.md."""

import argparse
import random
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

from bench import report
from bench.contenders import (
    ALL,
    ANSIBLE,
    CALLREADY,
    EMPTY,
    Contender,
    ansible_playbook,
    at_commit,
    find_commit,
)
from bench.report import Case, Table
from bench.world import HOSTS, BenchError, Line, World, borrowed, packages
from callready.release.bundle import pack
from lab import Lab, LabError

Item = TypeVar("Item")
RTTS = (0, 50)
STARTED = time.monotonic()
BARE = """
set -eu
export DEBIAN_FRONTEND=noninteractive
ln -s /dev/null /etc/systemd/system/coturn.service
apt-get -qq update
apt-get -y -qq --no-install-recommends install $PACKAGES > /dev/null 2> /root/apt.log ||
    { tail -n 5 /root/apt.log >&2; exit 1; }
mkdir /root/files
printf %s "$BUNDLE" | base64 -d | tar -xz -C /root/files
echo end
"""


def main(arguments: Sequence[str]) -> int:
    """Measure and report; exit status 1 if something did not run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two hosts, few rounds, no file")
    parser.add_argument("--hosts", type=int, metavar="N", help="instead of 10 (quick: 2)")
    parser.add_argument("--rounds", type=int, metavar="N", help="instead of 5 (quick: 3)")
    names = [contender.name for contender in ALL]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=", ".join(names))
    parser.add_argument(
        "--part", action="store_true", help="write only the page's part for --hosts"
    )
    parser.add_argument("--against", metavar="REV", help="another commit, on N hosts of its own")
    options = parser.parse_args(arguments)
    many = options.hosts if options.hosts is not None else 2 if options.quick else 10
    rounds = options.rounds or (3 if options.quick else 5)
    most = len(HOSTS) // 2 if options.against else len(HOSTS)
    if not 1 <= many <= most:
        twice = ", and --against takes twice as many" if options.against else ""
        parser.error(f"--hosts {many}: not from 1 to {most}; there are {len(HOSTS)} hosts{twice}")
    contenders = [c for c in ALL if not options.only or c.name in options.only]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: remove the hosts
    try:
        commit = find_commit(options.against) if options.against else None
        setting = report.machine(ansible_playbook() if ANSIBLE in contenders else None)
        table = Table(many, rounds, setting, commit)
        compare(contenders, table, bare=not options.only)
    except (BenchError, LabError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(text := report.markdown(table))
    if options.part:
        report.write_part(report.more(table))
    elif not options.quick and not options.only:
        report.write(text)
        print("written to docs/bench.md")
    return 0


def compare(contenders: Iterable[Contender], table: Table, bare: bool) -> None:
    """Measure all cases on hosts booted for it; `bare` ones too, if asked."""
    many = table.many
    # Debian 12 and 13 in turn: both halves begin with the same.
    names = [*HOSTS[:many], *(HOSTS[len(HOSTS) // 2 :][:many] if table.older else ())]
    with borrowed(names) as (folder, hosts), ExitStack() as slow_lines:
        today = World(folder / "today", hosts[:many], RTTS)
        entrants: dict[Contender, World] = dict.fromkeys(contenders, today)
        deployers: dict[Contender, World] = {CALLREADY: today}
        if table.older:
            older = at_commit(table.older, folder)
            entrants[older] = deployers[older] = World(folder / "older", hosts[many:], RTTS)
        for world in deployers.values():
            world.prepare(sorted({1, many}))
            slow_lines.enter_context(world.slow_lines())
        if bare:
            fresh(deployers, table)
        make_ready(deployers, python=ANSIBLE in entrants)
        for count in sorted({1, many}):
            for rtt in RTTS:
                measure(entrants, count, rtt, table)


def fresh(deployers: Mapping[Contender, World], table: Table) -> None:
    """A bare host deployed by callready, and the same packages and files by hand, in turns."""
    case = Case("fresh", 1, 0)
    for _ in range(min(table.rounds, 3)):
        for contender in shuffled([*deployers, None]):
            line = Line(deployers[contender or CALLREADY], case.hosts, case.rtt)
            Lab().reset(line.hosts[0].name)
            seconds = contender.measure(line, change=True) if contender else by_hand(line)
            name = contender.name if contender else "bare"
            table.add(case, name, seconds)
            say(f"fresh host: {name} {seconds:.2f} s")


def by_hand(line: Line) -> float:
    """Wall seconds of installing callready's packages and copying its files to one host."""
    host = line.hosts[0]
    release = line.world.declared[host.fqdn].release
    script = (
        f"PACKAGES={shlex.quote(' '.join(packages(release.packages)))}\n"
        f"BUNDLE={pack({p.strip('/'): f.content for p, f in release.files.items()})}\n{BARE}"
    )
    began = time.perf_counter()
    line.run({host.fqdn: script})
    return time.perf_counter() - began


def make_ready(deployers: Mapping[Contender, World], python: bool) -> None:
    """Let callready deploy all hosts; give them Python if Ansible wants it."""
    install = (
        "DEBIAN_FRONTEND=noninteractive apt-get -qq install python3 python3-apt > /dev/null 2>&1"
    )
    for contender, world in deployers.items():
        line = Line(world, len(world.hosts), 0)
        contender.run(line)
        if python:
            line.run({host.fqdn: install for host in line.hosts})


def measure(entrants: Mapping[Contender, World], count: int, rtt: int, table: Table) -> None:
    """Everyone in turns, in another order every round, the first round not counted."""
    lines = {contender: Line(world, count, rtt) for contender, world in entrants.items()}
    for contender, line in lines.items():
        # Ansible has nothing to warm up that it did not have without the delay.
        if contender is not ANSIBLE or rtt == RTTS[0]:
            contender.run(line)
    for number in range(table.rounds):
        for change in (False, True):
            case = Case("change" if change else "nothing", count, rtt)
            for contender in shuffled(lines):
                if change and contender is EMPTY:
                    continue
                if contender is ANSIBLE and number % 2:
                    continue  # it takes longest and varies least: every second round
                table.add(case, contender.name, contender.measure(lines[contender], change))
        say(f"{count} hosts, {rtt} ms: round {number + 1} of {table.rounds}")


def shuffled(items: Iterable[Item]) -> list[Item]:
    """The same in another order, so that nobody always comes after the same neighbour."""
    everyone = list(items)
    random.shuffle(everyone)
    return everyone


def say(message: str) -> None:
    """Print one line of progress."""
    print(f"[bench {time.monotonic() - STARTED:6.1f} s] {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

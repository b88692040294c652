"""python -m bench: how long deploys take, side by side; a full run writes docs/bench.md."""

import argparse
import random
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from typing import TypeVar

from bench import report
from bench.contenders import ALL, ANSIBLE, CALLREADY, EMPTY, Contender, ansible_playbook
from bench.report import Case, Table
from bench.world import HOSTS, ROOT, BenchError, Line, World, borrowed, bundle, packages
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


def main() -> int:
    """Measure and report; exit status 1 if something did not run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two hosts, few rounds, no file")
    parser.add_argument("--hosts", type=int, metavar="N", help="instead of 10 (quick: 2)")
    parser.add_argument("--rounds", type=int, metavar="N", help="instead of 5 (quick: 3)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join(c.name for c in ALL))
    options = parser.parse_args()
    many = options.hosts if options.hosts is not None else 2 if options.quick else 10
    rounds = options.rounds or (3 if options.quick else 5)
    if not 1 <= many <= len(HOSTS):
        parser.error(f"--hosts {many}: not from 1 to {len(HOSTS)}")
    contenders = [c for c in ALL if not options.only or c.name in options.only]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: remove the hosts
    try:
        setting = report.machine(ansible_playbook())
        with borrowed(HOSTS[:many]) as (folder, hosts):
            world = World(folder / "today", hosts, RTTS)
            world.prepare(sorted({1, many}))
            with world.slow_lines():
                table = Table(many, rounds, setting)
                if not options.only:
                    fresh(world, table, min(rounds, 3))
                make_ready(world)
                for count in sorted({1, many}):
                    for rtt in RTTS:
                        measure(Line(world, count, rtt), contenders, rounds, table)
    except (BenchError, LabError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(text := report.markdown(table))
    if not options.quick and not options.only:
        (ROOT / "docs" / "bench.md").write_text(text)
        print("written to docs/bench.md")
    return 0


def fresh(world: World, table: Table, rounds: int) -> None:
    """A bare host deployed by callready, and the same packages and files by hand, in turns."""
    line = Line(world, 1, 0)
    host = line.hosts[0]
    release = world.declared[host.fqdn].release
    bare = (
        f"PACKAGES={shlex.quote(' '.join(packages(release.packages)))}\n"
        f"BUNDLE={bundle({p.strip('/'): f.content for p, f in release.files.items()})}\n{BARE}"
    )
    for _ in range(rounds):
        for name in shuffled(("callready", "bare")):
            Lab().reset(host.name)
            if name == "callready":
                seconds = CALLREADY.measure(line, change=True)
            else:
                began = time.perf_counter()
                line.run({host.fqdn: bare})
                seconds = time.perf_counter() - began
            table.add(Case("fresh", 1, 0), name, seconds)
            say(f"fresh host: {name} {seconds:.2f} s")


def make_ready(world: World) -> None:
    """Let callready deploy all hosts; give them what Ansible wants."""
    line = Line(world, len(world.hosts), 0)
    CALLREADY.run(line)
    python = (
        "DEBIAN_FRONTEND=noninteractive apt-get -qq install python3 python3-apt > /dev/null 2>&1"
    )
    line.run({host.fqdn: python for host in line.hosts})


def measure(line: Line, contenders: Sequence[Contender], rounds: int, table: Table) -> None:
    """Everyone in turns, in another order every round, the first round not counted."""
    for contender in contenders:
        # Ansible has nothing to warm up that it did not have without the delay.
        if contender is not ANSIBLE or line.rtt == RTTS[0]:
            contender.run(line)
    for number in range(rounds):
        for change in (False, True):
            for contender in shuffled(contenders):
                if change and contender is EMPTY:
                    continue
                if contender is ANSIBLE and number % 2:
                    continue  # it takes longest and varies least: every second round
                seconds = contender.measure(line, change)
                table.add(
                    Case("change" if change else "nothing", line.count, line.rtt),
                    contender.name,
                    seconds,
                )
        say(f"{line.count} hosts, {line.rtt} ms: round {number + 1} of {rounds}")


def shuffled(items: Sequence[Item]) -> list[Item]:
    """The same in another order, so that nobody always comes after the same neighbour."""
    return random.sample(items, len(items))


def say(message: str) -> None:
    """Print one line of progress."""
    print(f"[bench {time.monotonic() - STARTED:6.1f} s] {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""python -m bench.scale: what a deploy of a large fleet costs the machine that it runs on.

The hosts are stand-ins, many on each of a few lab hosts: each has an address of its own, where a
real sshd and a real coturn answer. What callready sends there is read and not run; the survey's
answer is that of a host which is exactly as declared, so that all of the controller's part is real.
"""

import argparse
import ctypes
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench import report
from bench.__main__ import say
from bench.contenders import PYINFRA
from bench.world import POOL, ROOT, SSH_DATA, BenchError, borrowed
from callready.release.bundle import pack
from callready.release.facts import Facts
from callready.release.node import Node
from callready.secrets.loading import load_fleet
from lab import Host, ca, hosts
from tasks import declare
from tests.support import fleet as lab_fleet
from tests.support.inventories import deployed

DOMAIN = "many.lab.test"
# RFC 2544: set apart for measurements of networks; a /24 on each lab host.
NETWORK = "198.18.{}.{}"
PORT = 2222  # of the stand-ins' sshd; the lab host's own has 22 on all addresses
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, prctl(2)
RUNS = {
    "connect": ["empty.py"],
    "nothing to change": ["deploy.py"],
    "a change, --dry": ["deploy.py", "--dry"],
    "a change everywhere": ["deploy.py"],
}
# What is asked for by the address that was called: the survey, a bundle, `true`.
STAND_IN = r"""#!/bin/sh
set -- $SSH_CONNECTION
case $SSH_ORIGINAL_COMMAND in
    *incoming*) cat > /dev/null ;;
    *"sh -s"*)
        printf 'clock\t%s\n' "$(date +%s.%N)"
        cat > /dev/null
        cat "/srv/many/$3"
        printf 'clock\t%s\nend\n' "$(date +%s.%N)"
        ;;
esac
"""
SSHD = """HostKey /etc/ssh/ssh_host_ed25519_key
UsePAM no
ForceCommand /srv/stand-in
"""
UNITS = {
    "many.socket": "[Socket]\nAccept=yes\nMaxConnections=4096\nTriggerLimitIntervalSec=0\n"
    "Backlog=1024\nFreeBind=yes\n{listen}",
    "many@.service": "[Service]\nExecStart=-/usr/sbin/sshd -i -f /srv/sshd_config\n"
    "StandardInput=socket\nStandardError=journal\n",
    "many-turn.service": "[Service]\nLimitNOFILE=16384\n"
    "ExecStart=/usr/bin/turnserver -c /srv/turnserver.conf\n",
}
PREPARE = """set -eu
export DEBIAN_FRONTEND=noninteractive
ln -sf /dev/null /etc/systemd/system/coturn.service
apt-get -qq update
apt-get -y -qq --no-install-recommends install coturn > /dev/null 2>&1
usermod -p '*' debian
mkdir -p /run/sshd
base64 -d | tar -xz -C / --no-same-owner
chmod -R a+rX /srv
chmod 755 /srv/stand-in
for address in $ADDRESSES; do ip address add "$address/32" dev host0; done
systemctl daemon-reload
systemctl start many.socket many-turn.service
until ss -Hltn "sport = :3478" | grep -q .; do sleep 0.1; done
"""
INTRODUCTION = """
What the machine that deploys spends on fleets of TURN hosts. The hosts are stand-ins on {labs} lab
hosts, each with an address, an sshd and a coturn that answer in earnest; what callready sends there
is read and not run, and the survey's answer is that of a host which is as declared. So connections,
surveys, plans, bundles, new SSH connections and the probes are real, and what hosts do themselves
takes no time: the seconds here are the controller's, on processors that it shares with the
stand-ins.

- **connect**: `pyinfra` with an empty deploy file.
- **nothing to change**, **a change everywhere** (another `user-quota`; hosts change in waves of
  five, after the first one), and its **`--dry`**.

**Processor** is that of pyinfra and of the process with the probes, **memory** the most that each
of the two has had. It is linear where a host costs no more than in the smallest fleet. A
verification of so many hosts is not in it; its probes are those of the change.
"""
METHOD = """
{machine} Rounds: {rounds}; medians.

Repeat it with `.venv/bin/python -m bench.scale --write`.
"""


class Cost(NamedTuple):
    """Of a run: wall seconds, seconds of processor, and MiB of memory of pyinfra and the probes."""

    wall: float
    processor: float
    memory: float
    of_probes: float


@dataclass
class Fleet:
    """The stand-ins, and an inventory in a folder."""

    folder: Path
    labs: Sequence[Host]
    quota: int = 100

    def names(self, count: int) -> dict[str, tuple[Host, str]]:
        """Each with its lab host and address; the first ones on every lab host."""
        found = {}
        for number in range(count):
            at, own = number % len(self.labs), number // len(self.labs)
            address = NETWORK.format(at, own + 1)
            found[f"m{number + 1:03}.{DOMAIN}"] = self.labs[at], address
        return found

    def write(self, count: int) -> Path:
        """The inventory of so many."""
        (self.folder / "group_data").mkdir(exist_ok=True)
        pair = ca.CERTIFICATES / f"*.{DOMAIN}"
        data = {
            **SSH_DATA,
            "ssh_port": PORT,
            "ssh_known_hosts_file": str(self.folder / "known_hosts"),
            "turn": {"pools": {"calls": {**POOL, "user_quota": self.quota}}},
            "tls": {
                "ca": f"{ca.CA_CERTIFICATE}",
                "certificate": f"{pair}.pem",
                "key": f"{pair}.key",
            },
        }
        text = "".join(f"{key} = {value!r}\n" for key, value in data.items())
        (self.folder / "group_data/turn.py").write_text(text)
        named = self.names(count).items()
        entries = [
            (name, {"address": at, "ssh_hostname": at, "pools": ["calls"]})
            for name, (_, at) in named
        ]
        inventory = self.folder / f"hosts-{count}"
        inventory.write_text(f"turn = {entries!r}\n")
        keys = {
            lab: (hosts.HOST_KEYS / f"{lab.name}.pub").read_text().rsplit(" ", 1)[0]
            for lab in self.labs
        }
        known = "".join(f"[{address}]:{PORT} {keys[lab]}\n" for _, (lab, address) in named)
        (self.folder / "known_hosts").write_text(known)
        (self.folder / "empty.py").write_text("")
        return inventory

    def answer(self, count: int) -> None:
        """Have every stand-in say that it is as declared now."""
        fleet = load_fleet(str(self.write(count)))
        members: dict[Host, dict[str, bytes]] = {lab: {} for lab in self.labs}
        for name, (lab, address) in self.names(count).items():
            text = surveyed(declare(fleet, name))
            members[lab][f"srv/many/{address}"] = text.encode()
        for lab, files in members.items():
            inside(
                lab,
                "base64 -d | tar -xz -C / --no-same-owner; chmod -R a+rX /srv/many",
                pack(files),
            )


def inside(lab: Host, script: str, stdin: str) -> None:
    """Run a script as root on a lab host; raises BenchError."""
    command = lab_fleet.Host(lab.name).inside(script)
    done = subprocess.run(command, input=stdin, text=True, capture_output=True, check=False)
    if done.returncode:
        raise BenchError(f"{lab.name}: {done.stderr[-1000:]}")


def surveyed(node: Node) -> str:
    """What `survey.sh` prints on a host that is exactly as declared, but for its clock and end."""
    release, facts = node.release, deployed(node.release)
    turn = [(proto, 3478) for proto in ("udp", "tcp")] + [("tcp", 5349)]
    lines: list[Sequence[object]] = [
        ("os", facts.os, facts.os_version),
        ("arch", facts.arch),
        *(("package", name, number, "ii ") for name, number in facts.packages.items()),
        *(("user", name) for name in facts.users),
        ("current", facts.folder),
        ("confirmed", facts.folder),
        ("left",),
        ("format", facts.manifest.format),
        *(("manifest", line) for line in facts.manifest.text.splitlines()),
        *(("template", *each) for each in facts.templates.items()),
        *files(facts),
        *(
            ("unit", name, u.load, u.active, u.enabled, u.pid, "no", u.fingerprint, u.binary, given)
            for name, u in facts.units.items()
            for given in ["".join(f"{each}," for each in u.given) or "-"]
        ),
        *(
            ("listen", proto, node.settings.address, port, "turnserver", "turnserver@calls.service")
            for proto, port in turn
        ),
        ("listen", "tcp", "0.0.0.0", PORT, "sshd", "ssh.service"),
        ("ssh", PORT),
        ("address", node.settings.address),
        ("table", "inet", "callready"),
        ("ruleset", facts.ruleset),
        *(("sysctl", *each) for each in facts.sysctls.items()),
        *(("database", path) for path in facts.databases),
        *(("row", path, row) for path, rows in facts.rows.items() for row in rows),
        *(("pair", c.name, c.digest, c.serial, "") for c in release.certificates.values()),
        *(("served", *at, serial) for at, serial in facts.served.items()),
    ]
    return "".join("\t".join(map(str, line)) + "\n" for line in lines)


def files(facts: Facts) -> Iterator[Sequence[object]]:
    """The lines of files and links."""
    for path, file in facts.files.items():
        yield "link", path, file.link
        if file.sha256:
            yield "stat", path, f"{file.mode:o}", file.owner, file.group
            yield "sha", path, file.sha256


def prepare(lab: Host, number: int, count: int) -> None:
    """Make a lab host so many stand-ins."""
    addresses = [NETWORK.format(number, own + 1) for own in range(count)]
    pair = ca.CERTIFICATES / f"*.{DOMAIN}"
    turn = [
        *(f"{what}-ip={address}" for address in addresses for what in ("listening", "relay")),
        "use-auth-secret",
        f"static-auth-secret={os.environ['CALLREADY_SECRET_TURN_CALLS']}",
        f"realm={POOL['realm']}",
        "cert=/srv/pair.pem",
        "pkey=/srv/pair.key",
        "no-cli",
        "fingerprint",
        "log-file=/dev/null",
    ]
    members = {
        "srv/stand-in": STAND_IN,
        "srv/sshd_config": SSHD,
        "srv/turnserver.conf": "".join(f"{line}\n" for line in turn),
        "srv/pair.pem": Path(f"{pair}.pem").read_text(),
        "srv/pair.key": Path(f"{pair}.key").read_text(),
        **{
            f"etc/systemd/system/{name}": text.replace(
                "{listen}", "".join(f"ListenStream={address}:{PORT}\n" for address in addresses)
            )
            for name, text in UNITS.items()
        },
    }
    packed = pack({name: text.encode() for name, text in members.items()})
    inside(lab, f"ADDRESSES='{' '.join(addresses)}'\n{PREPARE}", packed)


@contextmanager
def routes(labs: Sequence[Host]) -> Iterator[None]:
    """From this machine to the stand-ins' addresses, and to no other place."""
    ways = [["unreachable", NETWORK.format(0, 0) + "/15"]]
    ways += [[f"{NETWORK.format(n, 0)}/24", "via", lab.ipv4] for n, lab in enumerate(labs)]
    try:
        for way in ways:
            subprocess.run(["ip", "route", "replace", *way], check=True)
        yield
    finally:
        for way in reversed(ways):
            subprocess.run(["ip", "route", "del", *way], capture_output=True, check=False)


def spent(command: Sequence[str | Path], folder: Path, log: Path) -> Cost:
    """Run a command and what it leaves running to the end; what they cost. Raises BenchError."""
    environment = {**os.environ, "PYINFRA_YES": "1", "PYTHONPATH": str(folder)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # Only now: a lab host that boots meanwhile would be a child of ours, too.
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    own = of_probes = 0.0
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        # Not ru_maxrss: it begins with what the parent had.
        while process.poll() is None:
            own = max(own, most(process.pid))
            of_probes = max(of_probes, *map(most, children(process.pid)), 0.0)
            time.sleep(0.02)
    wall = time.perf_counter() - began
    with suppress(ChildProcessError):
        while True:  # the prober ends when its input does
            os.wait()
    ctypes.CDLL(None).prctl(SUBREAPER, 0, 0, 0, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise BenchError(f"exit {process.returncode}: {log.read_text()[-3000:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, used, own, of_probes)


def most(process: int) -> float:
    """The most memory that a process has had, in MiB (VmHWM of proc(5)); 0 if it is gone."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    with suppress(OSError):
        files = Path(f"/proc/{process}/task").glob("*/children")
        return [int(each) for file in files for each in file.read_text().split()]
    return []


def measure(fleet: Fleet, count: int, what: str) -> Cost:
    """One run with so many hosts, checked. Raises BenchError."""
    inventory = fleet.write(count)
    if changes := "change," in what or "everywhere" in what:
        fleet.quota += 1
        fleet.write(count)
    own = fleet.folder if what == "connect" else ROOT
    log = fleet.folder / "log"
    cost = spent([PYINFRA, inventory, *RUNS[what]], own, log)
    text = log.read_text()
    reached = text.count("] Connected\n"), text.count("nothing to change\n")
    announced = text.count("/etc/coturn/calls.conf")
    wanted = 0 if what == "connect" or changes else count
    if reached != (count, wanted) or announced < count * changes:
        raise BenchError(f"{what}: connected, unchanged {reached} of {count}: {text[-2000:]}")
    if changes:
        if "everywhere" not in what:
            fleet.quota -= 1
        fleet.answer(count)
    return cost


def compare(names: Sequence[str], counts: Sequence[int], rounds: int) -> str:
    """Fleets of every size in turns; the page's part."""
    machine = report.machine(None)
    found: dict[tuple[str, int], list[Cost]] = {}
    os.environ["CALLREADY_SECRET_TURN_CALLS"] = "many" * 10
    with borrowed(names) as (folder, labs), routes(labs):
        ca.issue(f"*.{DOMAIN}")
        fleet = Fleet(folder, labs)
        most = -(-max(counts) // len(labs))
        with ThreadPoolExecutor() as threads:
            jobs = [threads.submit(prepare, lab, at, most) for at, lab in enumerate(labs)]
        for job in jobs:
            job.result()
        for number in range(rounds):
            for count in counts:
                fleet.answer(count)
                for what in RUNS:
                    cost = measure(fleet, count, what)
                    found.setdefault((what, count), []).append(cost)
                    say(f"{count} hosts, {what}: {cost.wall:.1f} s, {cost.processor:.1f} s used")
            say(f"scale: round {number + 1} of {rounds}")
    return section(found, len(names), machine, rounds)


def section(
    found: Mapping[tuple[str, int], Sequence[Cost]], labs: int, machine: str, rounds: int
) -> str:
    """The page's part."""
    rows = []
    least = min(count for _, count in found)
    for (what, count), costs in sorted(
        found.items(), key=lambda item: list(RUNS).index(item[0][0])
    ):
        cost = Cost(*map(statistics.median, zip(*costs, strict=True)))
        base = statistics.median(each.processor for each in found[what, least])
        each = cost.processor / count
        figures = [cost.wall, cost.processor, 1000 * each]
        rows.append(
            [
                what,
                str(count),
                *(f"{figure:.1f}" for figure in figures),
                f"{each / (base / least):.2f}",
                f"{cost.memory:.0f}",
                f"{cost.of_probes:.0f}",
            ]
        )
    head = ["", "hosts", "seconds", "processor, s", "ms a host", f"/ that of {least} hosts"]
    parts = [
        INTRODUCTION.format(labs=labs),
        report.rows_of([*head, "memory, MiB", "probes, MiB"], rows),
        METHOD.format(machine=machine, rounds=rounds),
    ]
    return "\n".join([report.SCALE, *(part.strip("\n") + "\n" for part in parts)])


def main(arguments: Sequence[str]) -> int:
    """Measure and report; exit status 1 if something did not run."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    add = parser.add_argument
    add("--hosts", type=int, nargs="+", default=[20, 100, 300], metavar="N", help="%(default)s")
    add("--on", nargs="+", default=["h01", "h02", "h03"], metavar="HOST", help="%(default)s")
    add("--rounds", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--write", action="store_true", help="write its part of docs/bench.md")
    options = parser.parse_args(arguments)
    return report.part(partial(compare, options.on, options.hosts, options.rounds), options.write)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

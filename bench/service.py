"""python -m bench.service: what calls cost that callready's deployment carries, beside LiveKit and
coturn of the same versions started by hand, on the same lab hosts in the same run."""

import argparse
import secrets
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pydantic import SecretStr

from bench import report
from bench.__main__ import say, shuffled
from bench.world import BenchError, borrowed
from callready.load import Wanted, addresses, p95, participants, processor
from callready.probes.generator import Generator, Heard, Service
from callready.secrets.loading import load_fleet
from callready.settings.capacity import Calls
from lab import Lab, ca, hosts
from lab.plan import Host as Planned
from lab.plan import find_host
from tests.support.fleet import Fleet, Host, entry, inventory

SFU, TURN = Host("h20"), Host("h19")
CALLREADY, PROXY, PLAIN = "callready", "by hand, HAProxy", "by hand, ws://"
DIRECT, RELAYED = "direct", "by TURN"
ROOMS, ROOM, RATE, HOLD = 4, 4, 10.0, 4.0  # participants a room, joins a second, seconds
MOST = 1.05  # what a ratio may be
KEY = "APIfleet"
OURS = {
    SFU: ("callready-firewall.service", "livekit-server.service", "haproxy.service"),
    TURN: ("callready-firewall.service", "turnserver@calls.service"),
}
# What upstream's and Debian's pages have people write, and no more; the lab has no other STUN.
LIVEKIT = """
port: 7880
rtc:
  stun_servers: ["{turn}:3478"]
  turn_servers:
    - {{ host: {turn}, port: 3478, protocol: udp, username: byhand, credential: {secret} }}
keys:
  {key}: {secret}
"""
COTURN = """
realm=calls.lab.test
lt-cred-mech
user=byhand:{secret}
"""
# The least by which a browser, which takes no ws://, reaches LiveKit.
HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 50s
    timeout server 50s
    timeout tunnel 1h
frontend https
    bind :443 ssl crt /root/pair.pem
    default_backend livekit
backend livekit
    server livekit 127.0.0.1:7880
"""
NO_SECCOMP = ["SystemCallFilter", "SystemCallArchitectures", "RestrictAddressFamilies"]
# Each of these has systemd install a filter of its own.
NO_SECCOMP_OF = [
    "RestrictNamespaces",
    "RestrictRealtime",
    "RestrictSUIDSGID",
    "LockPersonality",
    "MemoryDenyWriteExecute",
    "ProtectHostname",
    "ProtectClock",
    "ProtectKernelModules",
    "ProtectKernelLogs",
    "ProtectKernelTunables",
    "PrivateDevices",
]
# callready's deployment less one thing: what its units are told instead.
WITHOUT = {
    "the packet filter": [],
    "IPAddressDeny": ["IPAddressDeny="],
    "seccomp": [
        *(f"{key}=" for key in NO_SECCOMP),
        *(f"{key}=no" for key in NO_SECCOMP_OF),
    ],
}
LISTENS = "until ss -Hlntu 'sport = :{}' | grep -q .; do sleep 0.1; done\n"
INTRODUCTION = """
What calls cost on two lab hosts, an SFU and a TURN server: as callready deploys them, and with the
same LiveKit and coturn started by hand. In each turn {callers} callers join {rooms} rooms, each
sends sound and hears {others} others ({packets:,.0f} packets a second arrive), first directly, then
each of them by TURN over UDP.

- **{callready}**: hardened units, the packet filter, HAProxy with TLS in front of LiveKit, the pool
  of coturn as deployed; callers are told of TURN over UDP, TCP and TLS, by hand over UDP alone.
- **{plain}**: `livekit-server` with a port, keys and the TURN server, coturn with Debian's unit and
  configuration plus realm and user. No filter, no TLS: LiveKit has none of its own, and no browser
  takes that.
- **{proxy}**: the same behind an HAProxy of ten lines, the least that a browser takes.

**Processor** is what the whole host has used, by its control group, for 1,000 packets that it has
sent; the kernel's work for a packet that comes in may count for who sent it, so the generator, the
bridge and both hosts together are there too. **Joins** are the seconds until a path of media has
answered, by LiveKit's Go SDK. coturn by hand is the same in both columns: as far as its two figures
are apart, any ratio here may be off.
"""
METHOD = """
{machine} Rounds: {rounds}, everyone in turns in random order. A ratio is the median of the rounds'
ratios: within a round all have the same neighbours on the machine.

Repeat it with `make load/generator`, then `.venv/bin/python -m bench.service --write`.
"""


class Figure(NamedTuple):
    """Something measured: `what`, how calls go, and its unit."""

    what: str
    how: str
    unit: str


@dataclass
class Results:
    """Each figure of each contender, a value a round; joins of all rounds, in seconds."""

    rounds: dict[Figure, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    joins: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def ratio(self, figure: Figure, over: str, under: str) -> float:
        """The median of the rounds' ratios."""
        pairs = zip(self.rounds[figure][over], self.rounds[figure][under], strict=True)
        return statistics.median(a / b for a, b in pairs)


def main(arguments: Sequence[str]) -> int:
    """Measure and report; exit status 1 if something did not run."""
    parser = argparse.ArgumentParser(prog="python -m bench.service", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="write its part of docs/bench.md")
    options = parser.parse_args(arguments)
    return report.part(partial(compare, options.rounds), options.write)


def compare(rounds: int) -> str:
    """Everyone in turns, in another order every round; the page's part."""
    machine, results = report.machine(None), Results()
    with borrowed([SFU.name, TURN.name]) as (folder, _):
        fleet = deployed(folder)
        byhand = secrets.token_hex(20)
        prepare(byhand)
        services = {
            CALLREADY: (f"wss://{SFU.fqdn}", fleet.secrets["livekit/api_secret"]),
            PROXY: (f"wss://{SFU.fqdn}", byhand),
            PLAIN: (f"ws://{SFU.fqdn}:7880", byhand),
        }
        allowed = addresses(load_fleet(str(fleet.inventory)))
        for number in range(-1, rounds):
            # The first time, which does not count, files are read and names looked up.
            for name in shuffled([*services, *(WITHOUT if number >= 0 else ())]):
                url, secret = services[CALLREADY if name in WITHOUT else name]
                switch(name)
                told = Service(url, KEY, SecretStr(secret), str(ca.CA_CERTIFICATE))
                turn(name, told, allowed, results if number >= 0 else Results())
            say(f"service: round {number + 1} of {rounds}")
    return section(results, machine, rounds)


def deployed(folder: Path) -> Fleet:
    """The two hosts as callready deploys them."""
    _, data, names = inventory()
    del data["app"]
    data["livekit"]["url"] = f"wss://{SFU.fqdn}"
    data["edge"] = {}
    data["turn"] = {"pools": {"calls": data["turn"]["pools"]["calls"]}}
    groups = {"livekit": [entry(SFU)], "turn": [entry(TURN, pools=["calls"])]}
    fleet = Fleet(folder, groups, data, names[:2])
    fleet.deploy()
    return fleet


def prepare(secret: str) -> None:
    """Put on the hosts what somebody would write who starts the same programs by hand."""
    files = {
        SFU: {
            "livekit.yaml": LIVEKIT.format(turn=TURN.fqdn, key=KEY, secret=secret),
            "haproxy.cfg": HAPROXY,
            "pair.pem": "".join(
                (ca.CERTIFICATES / f"{SFU.fqdn}.{end}").read_text() for end in ("pem", "key")
            ),
        },
        TURN: {"more.conf": COTURN.format(secret=secret)},
    }
    for host, written in files.items():
        for name, text in written.items():
            subprocess.run(
                host.inside(f"umask 077; cat > /root/{name}"), input=text, text=True, check=True
            )
    TURN.root(
        "cat /etc/turnserver.conf /root/more.conf > /root/turnserver.conf\n"
        "install -m 640 -g turnserver /root/turnserver.conf /etc/byhand.conf\n"
        "sed 's|/etc/turnserver.conf|/etc/byhand.conf|' /lib/systemd/system/coturn.service "
        "> /run/systemd/system/byhand.service\n"
        "systemctl daemon-reload"
    )


def switch(name: str) -> None:
    """Have one of them run and not the others."""
    less = "".join(f"{line}\\n" for line in WITHOUT.get(name, ()))
    for host, units in OURS.items():
        names = " ".join(units)
        script = (
            f"systemctl stop {names} byhand.service byhand-livekit byhand-haproxy 2>&- || true\n"
        )
        for unit in units[1:]:
            folder = f"/run/systemd/system/{unit}.d"
            script += f"mkdir -p {folder}; printf '[Service]\\n{less}' > {folder}/bench.conf\n"
        script += "systemctl daemon-reload\nnft delete table inet callready 2>&- || true\n"
        if name == CALLREADY or name in WITHOUT:
            script += f"systemctl start {names}\n"
        if name == "the packet filter":
            script += "nft delete table inet callready\n"
        if name in (PROXY, PLAIN) and host == TURN:
            script += "systemctl start byhand.service\n"
        elif name in (PROXY, PLAIN):
            run = "systemd-run -q --collect --unit=byhand-{0} {1}\n"
            binary = "$(readlink -f /usr/local/bin/livekit-server)"
            script += run.format("livekit", f"{binary} --config /root/livekit.yaml")
            if name == PROXY:
                script += run.format("haproxy", "/usr/sbin/haproxy -W -f /root/haproxy.cfg")
        ports = [3478] if host == TURN else [7880] if name == PLAIN else [7880, 443]
        host.root(script + "".join(map(LISTENS.format, ports)))


class Reading(NamedTuple):
    """Counters: microseconds of processor and packets sent by host; ticks of the whole machine."""

    hosts: Mapping[Host, tuple[int, int]]
    machine: int

    @classmethod
    def now(cls) -> "Reading":
        """As they are."""
        return cls({host: counted(find_host(host.name)) for host in OURS}, processor()[0])


def counted(host: Planned) -> tuple[int, int]:
    """Microseconds of processor that a host has used, and packets that it has sent."""
    leader = hosts.leader(host)
    stat = (hosts.group(host).folders[0] / "cpu.stat").read_text().split()
    lines = Path(f"/proc/{leader}/net/dev").read_text().splitlines()
    sent = next(line.split()[10] for line in lines if line.strip().startswith("host0:"))
    return int(stat[stat.index("usage_usec") + 1]), int(sent)


def calls(how: str, service: Service, allowed: set[str]) -> tuple[Heard, Reading, Reading]:
    """Make them; what was heard, and the counters before and after. Raises BenchError."""
    share = float(how == RELAYED)
    wanted = Wanted(Calls("audio", ROOM, ROOM, share), ROOMS, 1, HOLD, RATE, ["udp"])
    heard, streams = Heard(), wanted.streams(ROOMS)
    before = Lab().client_prefix()
    with Generator.started("audio", allowed, service.ca, 120, before) as generator:
        for number in range(ROOMS):
            who = participants(wanted, service, number)
            service.create(who[0].room)
            generator.join(who, RATE, heard)
        time.sleep(1)  # what joining costs is over
        first = Reading.now()
        generator.measure(HOLD, streams, heard)
        last = Reading.now()
    if heard.failed or heard.broken or heard.lost(streams) > 0.01:
        raise BenchError(
            f"{service.url}, {how}: {len(heard.failed)} joins failed {heard.failed[:1]}, "
            f"{heard.broken} calls broke, {heard.lost(streams):.1%} lost"
        )
    return heard, first, last


def turn(name: str, service: Service, allowed: set[str], results: Results) -> None:
    """Calls of both kinds; what they cost. Those that a busy machine spoils are made again."""
    for how in (RELAYED,) if name in WITHOUT else (DIRECT, RELAYED):
        for left in (2, 1, 0):
            try:
                heard, first, last = calls(how, service, allowed)
                break
            except BenchError as error:
                say(str(error))
                if not left:
                    raise
        results.joins[how, name] += heard.joins
        add = results.rounds
        add[Figure("join, median", how, "s")][name].append(statistics.median(heard.joins))
        for host, what in ((SFU, "processor of the SFU"), (TURN, "processor of the TURN server")):
            if host == TURN and how == DIRECT:
                continue
            used, sent = (b - a for a, b in zip(first.hosts[host], last.hosts[host], strict=True))
            add[Figure(what, how, "ms")][name].append(used / sent)
        ticks = 10_000 * (last.machine - first.machine)
        add[Figure("processor of all", how, "ms")][name].append(ticks / heard.received)


def section(results: Results, machine: str, rounds: int) -> str:
    """The page's part."""
    names = (CALLREADY, PROXY, PLAIN)
    rows, parts = [], []
    for figure, of in sorted(results.rounds.items()):
        medians = [f"{statistics.median(of[name]):.3f} {figure.unit}" for name in names]
        ratios = [results.ratio(figure, CALLREADY, name) for name in names[1:]]
        judged = [f"{each:.2f} {'PASS' if each <= MOST else 'MISS'}" for each in ratios]
        rows.append([figure.what, figure.how, *medians, *judged])
        if figure.how == RELAYED and figure.what != "processor of all":
            ratios = [results.ratio(figure, CALLREADY, less) for less in WITHOUT]
            parts.append([figure.what, *(f"{each:.2f}" for each in ratios)])
    for how in (DIRECT, RELAYED):
        slowest = [p95(results.joins[how, name]) for name in names]
        ratios = [slowest[0] / each for each in slowest[1:]]
        judged = [f"{each:.2f} {'PASS' if each <= MOST else 'MISS'}" for each in ratios]
        rows.append(["join, 95 %", how, *(f"{each:.3f} s" for each in slowest), *judged])
    head = ["", "calls", *names, *(f"callready / {name} (at most {MOST})" for name in names[1:])]
    known = {
        "callers": ROOMS * ROOM,
        "rooms": ROOMS,
        "others": ROOM - 1,
        "packets": 50 * ROOMS * ROOM * (ROOM - 1),
        "callready": CALLREADY,
        "plain": PLAIN,
        "proxy": PROXY,
    }
    texts = [
        INTRODUCTION.format(**known),
        report.rows_of(head, sorted(rows)),
        "Of calls by TURN, what that is made of: callready's deployment / itself less one thing.",
        report.rows_of(["", *WITHOUT], parts),
        METHOD.format(machine=machine, rounds=rounds),
    ]
    return "\n".join([report.SERVICE, *(text.strip("\n") + "\n" for text in texts)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

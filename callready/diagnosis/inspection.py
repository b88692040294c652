"""What about a host's own state can keep calls from connecting: read in one round trip by
`inspect.sh`, which says what its lines are."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files
from ipaddress import ip_address
from typing import Any, NamedTuple

from pyinfra.api.host import Host

from callready.release.facts import columns, host_script
from callready.release.node import Node
from callready.rollout.remote import as_root
from callready.settings.app import Workers
from callready.settings.pools import EDGE
from callready.settings.pools import unit as turn_unit

SCRIPT = files("callready.diagnosis").joinpath("inspect.sh")
OWN_UNITS = ("callready-firewall.service", "callready-boot.service", "callready-revert.service")


SLICES = ("system.slice", "system-turnserver.slice")


class Limit(NamedTuple):
    """Below `least` or above `most` a kernel setting breaks calls: in the way `means` says."""

    least: int
    most: int
    means: str


_ANY = 2**63
KERNEL = {
    "net.core.rmem_max": Limit(65536, _ANY, "packets are lost in short buffers"),
    "net.core.wmem_max": Limit(65536, _ANY, "packets are lost in short buffers"),
    "net.core.rmem_default": Limit(8192, _ANY, "packets are lost in short buffers"),
    "net.core.wmem_default": Limit(8192, _ANY, "packets are lost in short buffers"),
    "net.core.somaxconn": Limit(64, _ANY, "connections are refused when callers come together"),
    "net.core.netdev_max_backlog": Limit(100, _ANY, "packets are dropped on arrival"),
    "net.ipv4.tcp_max_syn_backlog": Limit(16, _ANY, "connections are refused"),
    "net.ipv4.udp_rmem_min": Limit(1, _ANY, "packets are lost in short buffers"),
    "net.ipv4.ip_default_ttl": Limit(30, 255, "packets do not reach callers far away"),
    "net.ipv6.conf.all.hop_limit": Limit(30, 255, "packets do not reach callers far away"),
    "net.ipv4.icmp_echo_ignore_all": Limit(0, 1, ""),
    "net.ipv4.ip_no_pmtu_disc": Limit(0, 1, "packets of video's size are lost on some ways"),
    "net.netfilter.nf_conntrack_max": Limit(4096, _ANY, "new callers are dropped"),
    "net.netfilter.nf_conntrack_udp_timeout": Limit(10, _ANY, "calls that pause break off"),
    "net.netfilter.nf_conntrack_udp_timeout_stream": Limit(30, _ANY, "calls that pause break off"),
    "net.netfilter.nf_conntrack_tcp_timeout_established": Limit(
        600, _ANY, "calls over TCP that pause break off"
    ),
    "fs.file-max": Limit(8192, _ANY, "no socket can be opened"),
    "kernel.threads-max": Limit(512, _ANY, "no thread can be started"),
    "kernel.pid_max": Limit(512, _ANY, "no process can be started"),
}


@dataclass(frozen=True)
class Process:
    """A process of a unit: its state as in proc_pid_stat(5), nice value, scheduling policy
    (sched(7)), how many processors it may use (0: unknown), open files and how many it may have."""

    pid: int
    unit: str
    state: str
    nice: int
    policy: int
    cpus: int
    files: int
    files_max: int


@dataclass(frozen=True)
class Read:
    """A file that a unit opens or runs at its start, as `user`: `answer` is yes, no or missing;
    `blocked` the mode and owner that keep it from that."""

    unit: str
    user: str
    path: str
    answer: str
    blocked: str


@dataclass(frozen=True)
class Disk:
    """Where services write; in bytes and inodes."""

    path: str
    kind: str
    size: int
    free: int
    inodes: int
    inodes_free: int
    read_only: bool


@dataclass(frozen=True)
class Inspection:
    """A host's state; JSON is as nft(8), ip(8) and tc(8) print it."""

    units: dict[str, dict[str, str]] = field(default_factory=dict)
    drop_ins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    processes: tuple[Process, ...] = ()
    frozen: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()
    """Units whose process has another binary than there is at its path."""
    exposure: dict[str, float] = field(default_factory=dict)
    """Of each service, as systemd-analyze(1) scores it."""
    said: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The first lines of each service since its start."""
    given: tuple[tuple[str, str, str], ...] = ()
    """Service, name and SHA-256 of the credentials that it was started with."""
    versions: dict[str, str] = field(default_factory=dict)
    limits: tuple[tuple[str, str, str], ...] = ()
    """Unit, file of its control group or one around it, value."""
    cpus: int = 0
    uptime: float = 0.0
    clock: int = 0
    starts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of each unit in the last half hour, in seconds since the epoch."""
    deploys: tuple[float, ...] = ()
    """When a release was confirmed, or returned to; the same way."""
    reads: tuple[Read, ...] = ()
    pairs: dict[str, tuple[bool, int]] = field(default_factory=dict)
    """By name: whether key and certificate fit, and when it ends (0: no certificate)."""
    rules: tuple[tuple[str, str], ...] = ()
    """Lines of table inet callready that its file has not (`+`), and that it lacks (`-`)."""
    ruleset: tuple[dict[str, Any], ...] = ()
    texts: dict[tuple[str, str, int], str] = field(default_factory=dict)
    """Of rules, by family, table and handle."""
    xtables: tuple[tuple[int, str, str], ...] = ()
    """Family, program and line of what iptables-save prints."""
    ssh: tuple[tuple[str, str, str], ...] = ()
    ssh_files: tuple[str, ...] = ()
    disks: tuple[Disk, ...] = ()
    kernel: dict[str, str] = field(default_factory=dict)
    sockets: dict[str, int] = field(default_factory=dict)
    links: tuple[dict[str, Any], ...] = ()
    routes: tuple[dict[str, Any], ...] = ()
    ip_rules: tuple[dict[str, Any], ...] = ()
    qdiscs: tuple[dict[str, Any], ...] = ()
    tc_filters: tuple[tuple[str, str], ...] = ()
    ways: dict[str, str] = field(default_factory=dict)
    xfrm: tuple[str, ...] = ()
    neighbours: dict[str, str] = field(default_factory=dict)
    """Those that somebody has set, by address."""
    target: str = ""
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    clocks: dict[str, str] = field(default_factory=dict)
    children: dict[str, int] = field(default_factory=dict)
    foreign_rows: tuple[tuple[str, str, str], ...] = ()
    """Database, table and row."""
    egress: dict[str, int] = field(default_factory=dict)
    """What the host knows of its recordings: its metrics callready_egress_…, by their names."""

    def unit(self, name: str) -> dict[str, str]:
        """A unit's properties; empty if it was not looked at."""
        return self.units.get(name, {})


def workers(node: Node) -> list[Workers]:
    """The worker processes that the app has on a host."""
    app = node.settings.app
    return app.workers if app and node.release.environments else []


def script(node: Node, callers: Iterable[str] = ()) -> str:
    """What a root shell on the host is sent; `callers` are addresses that it has to reach."""
    host, release = node.settings, node.release
    of_app = [item.unit for item in workers(node)]
    environments = release.environments.items()
    units = [
        *release.services,
        *OWN_UNITS,
        *SLICES,
        *release.timers,
        *release.timers.values(),
        *release.masks,
        *(unit for _, environment in environments for unit in environment.units),
        *of_app,
    ]
    reads = [
        f"{unit},{_user(unit)},{c.path(file)}"
        for c in release.certificates.values()
        for unit in dict.fromkeys(unit for _, unit in c.endpoints)
        for file in (("both.pem",) if unit == EDGE else ("fullchain.pem", "privkey.pem"))
    ]
    reads += [f"{turn_unit(name)},turnserver,/var/lib/turn/{name}.db" for name in host.turn_pools]
    reads += [f"{path},{environment.owner},{path}" for path, environment in environments]
    if release.archive:
        reads.append(f"livekit-server.service,livekit,{release.archive.binary}")
    reads += [f"{turn_unit(name)},turnserver,/usr/bin/turnserver" for name in host.turn_pools]
    fleet = node.fleet.hosts.values()
    peers = [*callers, *(a for each in fleet for a in (each.address, each.address6) if a)]
    variables: dict[str, Iterable[str]] = {
        "UNITS": dict.fromkeys(units),
        "SERVICES": release.services,
        "PROGRAMS": [release.archive.binary] if release.archive else [],
        "READS": reads,
        "KERNEL": KERNEL,
        "RANGES": dict.fromkeys(use.ports for use in node.ports if use.relay),
        "PEERS": dict.fromkeys(peers),
        "NAMES": dict.fromkeys(each.name for each in fleet if each.name),
        "WORKERS": dict.fromkeys(of_app),
        "DATABASES": release.survey_variables()["DATABASES"],
    }
    head = "".join(f"{key}={shlex.quote(' '.join(items))}\n" for key, items in variables.items())
    return head + host_script("common.sh").decode() + SCRIPT.read_text()


def _user(unit: str) -> str:
    return {"livekit-server.service": "livekit", EDGE: "root"}.get(unit, "turnserver")


def parse(lines: Iterable[str]) -> Inspection:
    """Read what `inspect.sh` printed. Raises SurveyError if the end is missing."""
    of = columns(lines, "inspection")
    units: dict[str, dict[str, str]] = defaultdict(dict)
    for unit, key, *value in of["unit"]:
        units[unit][key] = " ".join(value)
    drop_ins: dict[str, tuple[str, ...]] = defaultdict(tuple)
    for path, *text in of["dropin"]:
        drop_ins[path] += ("\t".join(text),)
    starts: dict[str, tuple[int, ...]] = defaultdict(tuple)
    for unit, at in of["start"]:
        starts[unit] += (int(at),)
    said: dict[str, tuple[str, ...]] = defaultdict(tuple)
    for unit, *words in of["said"]:
        said[unit] += (" ".join(words),)
    uptime, clock = of["clock"][0] if of["clock"] else ("0", "0")
    return Inspection(
        units=dict(units),
        drop_ins=dict(drop_ins),
        processes=tuple(
            Process(
                int(pid),
                unit,
                state,
                int(nice),
                int(policy),
                _bits(cpus),
                int(opened),
                int(most) if most.isdigit() else 0,
            )
            for pid, unit, state, nice, policy, cpus, opened, most in of["process"]
        ),
        frozen=frozenset(unit for (unit,) in of["frozen"]),
        replaced=frozenset(unit for (unit,) in of["replaced"]),
        exposure={unit: float(score) for unit, score in of["exposure"] if score},
        said=dict(said),
        given=tuple((unit, name, digest) for unit, name, digest in of["given"]),
        versions={path: " ".join(words) for path, *words in of["version"]},
        limits=tuple((unit, file, value) for unit, file, value in of["limit"]),
        cpus=_bits(of["cpus"][0][0]) if of["cpus"] else 0,
        uptime=float(uptime),
        clock=int(clock),
        starts=dict(starts),
        deploys=tuple(datetime.fromisoformat(at).timestamp() for (at,) in of["deploy"]),
        reads=tuple(Read(*columns) for columns in of["read"]),
        pairs={name: (fits == "yes", int(end)) for name, fits, end in of["pair"]},
        rules=tuple((sign, "\t".join(rule)) for sign, *rule in of["rule"]),
        ruleset=tuple(each for table in _json(of["ruleset"]) for each in table.get("nftables", [])),
        texts={
            (family, table, int(handle)): "\t".join(text)
            for family, table, handle, *text in of["text"]
        },
        xtables=tuple(
            (int(family), program, "\t".join(text)) for family, program, *text in of["xtables"]
        ),
        ssh=tuple((user, key, value) for user, key, value in of["ssh"]),
        ssh_files=tuple(path for (path,) in of["sshfile"]),
        disks=tuple(
            Disk(
                path,
                kind,
                int(block) * int(blocks),
                int(block) * int(free),
                int(inodes),
                int(inodes_free),
                mode == "ro",
            )
            for path, kind, block, blocks, free, inodes, inodes_free, mode in of["disk"]
        ),
        kernel={key.replace("/", "."): " ".join(value) for key, *value in of["kernel"]},
        sockets={ports: int(count) for ports, count in of["sockets"]},
        links=_json(of["links"]),
        routes=_json(of["routes"]),
        ip_rules=_json(of["rules"]),
        qdiscs=_json(of["qdiscs"]),
        tc_filters=tuple((device, "\t".join(text)) for device, *text in of["tcfilter"]),
        ways={peer: words.strip() for peer, words in of["way"]},
        neighbours={address: words for address, words in of["neighbour"]},
        target=of["target"][0][0] if of["target"] else "",
        xfrm=tuple(words for (words,) in of["xfrm"]),
        names={
            name: tuple(sorted(addresses.split(), key=lambda a: (ip_address(a).version, a)))
            for name, addresses in of["name"]
        },
        hosts=tuple(" ".join(words) for words in of["hosts"]),
        clocks={unit: state for unit, state in of["clocks"]},
        children={unit: int(count) for unit, count in of["children"]},
        foreign_rows=tuple((path, table, row) for path, table, row in of["foreign"]),
        egress={name: int(value) for name, value in of["egress"]},
    )


def inspect(host: Host, node: Node, callers: Iterable[str]) -> Inspection:
    """Look at a host, in one round trip. Raises SurveyError if it was cut short."""
    _ok, output = as_root(host, node, script(node, callers))
    return parse(output.stdout_lines)


def _bits(mask: str) -> int:
    """How many processors taskset(1) names."""
    return int(mask.replace(",", ""), 16).bit_count() if mask.strip("-") else 0


def _json(lines: list[list[str]]) -> tuple[dict[str, Any], ...]:
    """The objects of one line, which may hold several documents after another."""
    text, found, decoder = "".join("\t".join(line) for line in lines), [], json.JSONDecoder()
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found += value if isinstance(value, list) else [value]
        text = text[end:]
    return tuple(each for each in found if each)

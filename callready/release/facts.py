"""What a host is like now, read in one round trip by `host/survey.sh`."""

from __future__ import annotations

import shlex
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from statistics import mean

from callready.release.manifest import Manifest

SURVEY = files("callready.release").joinpath("host/survey.sh")


@dataclass(frozen=True)
class FileFact:
    """A managed path: what its link leads to (empty for a plain file) and what is there."""

    link: str = ""
    mode: int = 0
    owner: str = ""
    group: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class UnitFact:
    """A unit and its main process; `fingerprint` names what the process was started with, `given`
    are the SHA-256 of the credentials that systemd gave it (sorted)."""

    load: str
    active: str
    enabled: str
    pid: int
    needs_reload: bool
    fingerprint: str
    binary: str
    given: tuple[str, ...] = ()

    @property
    def is_running(self) -> bool:
        """Whether it is up (or a one-shot that succeeded)."""
        return self.active == "active"


@dataclass(frozen=True)
class Listener:
    """A listening socket and the process and unit behind it."""

    proto: str
    address: str
    port: int
    process: str
    unit: str

    @property
    def is_loopback(self) -> bool:
        """Whether only the host itself can reach it."""
        return self.address.startswith("127.") or self.address == "::1"


@dataclass(frozen=True)
class EnvironmentFact:
    """The app's environment file: `sha256` is of our keys' sorted lines, `applied` the hash that
    its units were last restarted with."""

    mode: int
    owner: str
    sha256: str
    applied: str


@dataclass
class Facts:
    """One host's survey; `skew` is its clock minus the controller's, in seconds; `folder` the
    running release, `confirmed` what it boots with, `pending` a release that waits for its
    confirmation, by whom and since when; stuck without the timer that ends that; `has_state`,
    whether anything of callready is on it; `linked`, environment files that are links."""

    os: str = ""
    os_version: str = ""
    arch: str = ""
    skew: float = 0.0
    folder: str = ""
    confirmed: str = ""
    pending: str = ""
    is_stuck: bool = False
    has_state: bool = False
    ruleset: str = ""
    manifest: Manifest = field(default_factory=Manifest)
    templates: dict[str, str] = field(default_factory=dict)
    format: int = 0
    packages: dict[str, str] = field(default_factory=dict)
    candidates: dict[str, str] = field(default_factory=dict)
    users: set[str] = field(default_factory=set)
    files: dict[str, FileFact] = field(default_factory=dict)
    units: dict[str, UnitFact] = field(default_factory=dict)
    listeners: list[Listener] = field(default_factory=list)
    ssh_ports: set[int] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)
    nat_tables: set[str] = field(default_factory=set)
    firewalls: set[str] = field(default_factory=set)
    sysctls: dict[str, str] = field(default_factory=dict)
    databases: set[str] = field(default_factory=set)
    rows: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    pairs: dict[str, str] = field(default_factory=dict)
    serials: dict[str, str] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    served: dict[tuple[str, str], str] = field(default_factory=dict)
    environments: dict[str, EnvironmentFact] = field(default_factory=dict)
    linked: set[str] = field(default_factory=set)
    binaries: set[str] = field(default_factory=set)

    @property
    def current(self) -> str:
        """The id of the running release; its folder may carry a number after it."""
        return self.folder.partition("-")[0]


class SurveyError(Exception):
    """The survey did not come back whole."""


def script(variables: Mapping[str, Iterable[str]]) -> str:
    """The survey as a shell script with its variables set; the items hold no white space."""
    head = "".join(f"{key}={shlex.quote(' '.join(items))}\n" for key, items in variables.items())
    return head + SURVEY.read_text()


def parse(lines: Iterable[str], sent_at: float | None = None) -> Facts:
    """Read the survey's output.

    Arguments: `lines` as printed; `sent_at`, the controller's clock when the survey was sent, in
    seconds since the epoch (the skew is that of RFC 5905 section 8, from four timestamps).
    Raises SurveyError if the end is missing: something cut it short.
    """
    facts = Facts()
    received_at = time.time()
    raw: dict[str, dict[str, str]] = defaultdict(dict)
    whole = False
    clocks: list[float] = []
    lines_of_manifest: list[list[str]] = []
    for line in lines:
        kind, *f = line.split("\t")
        match kind:
            case "os":
                facts.os, facts.os_version = f
            case "current":
                facts.folder = f[0]
            case "pending":
                facts.pending, facts.is_stuck = f[0], f[1] != "active"
            case "arch" | "confirmed" | "ruleset":
                setattr(facts, kind, f[0])
            case "clock":  # when it begins and when it ends
                clocks.append(float(f[0]))
            case "manifest":
                lines_of_manifest.append(f)
            case "template":
                facts.templates[f[0]] = f[1]
            case "format":
                facts.format = int(f[0])
            case "package":
                facts.packages[f[0]] = f[1]
            case "candidate":
                facts.candidates[f[0]] = f[1]
            case "user":
                facts.users.add(f[0])
            case "link":
                raw[f[0]]["link"] = f[1]
            case "stat":
                raw[f[0]].update(mode=f[1], owner=f[2], group=f[3])
            case "sha":
                raw[f[0]]["sha256"] = f[1]
            case "unit":
                if f[0] == "firewalld.service" and f[2] == "active":
                    facts.firewalls.add("firewalld")
                facts.units[f[0]] = UnitFact(
                    f[1], f[2], f[3], int(f[4]), f[5] == "yes", f[6], f[7], tuple(f[8].split())
                )
            case "listen":
                facts.listeners.append(Listener(f[0], f[1], int(f[2]), f[3], f[4]))
                if f[3] == "sshd" or f[4] in ("ssh.service", "ssh.socket"):
                    facts.ssh_ports.add(int(f[2]))
            case "ssh":
                facts.ssh_ports.add(int(f[0]))
            case "table":
                facts.tables.add(f"{f[0]} {f[1]}")
            case "nat":
                facts.nat_tables.add(f"{f[0]} {f[1]}")
            case "firewall":
                facts.firewalls.add(f[0])
            case "sysctl":
                facts.sysctls[f[0]] = f[1]
            case "database":
                facts.databases.add(f[0])
            case "row":
                facts.rows[f[0]].add(f[1])
            case "served":
                facts.served[f[0], f[1]] = f[2]
            case "pair":
                facts.pairs[f[0]], facts.serials[f[0]] = f[1], f[2]
                facts.asked[f[0]] = f[3]
            case "environment":
                facts.environments[f[0]] = EnvironmentFact(int(f[1], 8), f[2], f[3], f[4])
            case "linked":
                facts.linked.add(f[0])
            case "left":
                facts.has_state = True
            case "binary":
                facts.binaries.add(f[0])
            case "end":
                whole = True
    if not whole:
        raise SurveyError("the survey was cut short")
    facts.manifest = Manifest.read(lines_of_manifest)
    if clocks:
        facts.skew = mean(clocks) - mean((sent_at or received_at, received_at))
    for path, item in raw.items():
        facts.files[path] = FileFact(
            item.get("link", ""),
            int(item.get("mode", "0"), 8),
            item.get("owner", ""),
            item.get("group", ""),
            item.get("sha256", ""),
        )
    return facts

"""What a host is like now, read in one round trip by `host/survey.sh`."""

from __future__ import annotations

import base64
import shlex
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from statistics import mean

from callready.release.manifest import Manifest

HOST = files("callready.release").joinpath("host")
OF_RECORDINGS = ("egress.sh", "release.sh", "survey.sh")


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
    """The app's environment file: `sha256` is of the sorted lines by which its readers have our
    keys, `applied` the hash that its units were last restarted with."""

    mode: int
    owner: str
    sha256: str
    applied: str


@dataclass(frozen=True)
class IdentityFact:
    """A certificate of the fleet's authority (DER), and whether the key beside it is its own."""

    certificate: bytes
    has_key: bool


@dataclass
class Facts:
    """One host's survey; `skew` is its clock minus the controller's, in seconds, which may be off
    by `skew_error`; `redis_rtt`, how far the Redis of its SFU is, in seconds; `folder` the running
    release, `confirmed` what it boots with, `pending` a release that waits for its confirmation, by
    whom and since when; stuck without the timer that ends that; `has_state`, whether anything of
    callready is on it, and `format`, in which one (0: nothing, or that of an older callready);
    `elsewhere`, what kernel settings are without callready, and the file that says so (`-` for
    none); `outdated`, units that have a certificate of the fleet from before; `obstacles`, what
    stands where it puts files: kind and words; `subordinates`, the lines of subuid(5) and
    subgid(5), by file; `cores` of the processor (0 where nothing asks); `recordings`, how many run,
    and `held`, while egress starts none: the bytes that are free, and the least."""

    os: str = ""
    os_version: str = ""
    arch: str = ""
    skew: float = 0.0
    skew_error: float = 0.0
    redis_rtt: float = 0.0
    folder: str = ""
    confirmed: str = ""
    pending: str = ""
    is_stuck: bool = False
    has_state: bool = False
    format: int = 0
    ruleset: str = ""
    manifest: Manifest = field(default_factory=Manifest)
    templates: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    candidates: dict[str, str] = field(default_factory=dict)
    users: set[str] = field(default_factory=set)
    files: dict[str, FileFact] = field(default_factory=dict)
    units: dict[str, UnitFact] = field(default_factory=dict)
    listeners: list[Listener] = field(default_factory=list)
    ssh_ports: set[int] = field(default_factory=set)
    addresses: set[str] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)
    nat_tables: set[str] = field(default_factory=set)
    firewalls: set[str] = field(default_factory=set)
    sysctls: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, tuple[str, str]] = field(default_factory=dict)
    databases: set[str] = field(default_factory=set)
    rows: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    pairs: dict[str, str] = field(default_factory=dict)
    serials: dict[str, str] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    served: dict[tuple[str, str], str] = field(default_factory=dict)
    identities: dict[str, IdentityFact] = field(default_factory=dict)
    outdated: set[str] = field(default_factory=set)
    environments: dict[str, EnvironmentFact] = field(default_factory=dict)
    obstacles: dict[str, tuple[str, str]] = field(default_factory=dict)
    binaries: set[str] = field(default_factory=set)
    images: set[str] = field(default_factory=set)
    subordinates: dict[str, set[str]] = field(default_factory=dict)
    cores: int = 0
    recordings: int = 0
    held: tuple[int, int] | None = None

    @property
    def current(self) -> str:
        """The id of the running release; its folder may carry a number after it."""
        return self.folder.partition("-")[0]


class SurveyError(Exception):
    """The survey did not come back whole."""


def host_script(name: str) -> bytes:
    """A script of `host/` as it is sent or installed: whole, after what it shares with others."""
    shared = ("common.sh", "recordings.sh") if name in OF_RECORDINGS else ("common.sh",)
    return b"".join(HOST.joinpath(part).read_bytes() for part in (*shared, name))


def script(variables: Mapping[str, Iterable[str]]) -> str:
    """The survey as a shell script with its variables set; the items hold no white space."""
    head = "".join(f"{key}={shlex.quote(' '.join(items))}\n" for key, items in variables.items())
    return head + host_script("survey.sh").decode()


def columns(lines: Iterable[str], what: str) -> dict[str, list[list[str]]]:
    """The lines of each kind that a script on a host printed, without their kind; what somebody's
    login prints is of none. Raises SurveyError if the end of it, called `what`, is missing."""
    of: dict[str, list[list[str]]] = defaultdict(list)
    for line in lines:
        kind, *rest = line.split("\t")
        of[kind].append(rest)
    if "end" not in of:
        raise SurveyError(f"the {what} was cut short")
    return of


def parse(lines: Iterable[str], sent_at: float | None = None) -> Facts:
    """Read the survey's output, whose columns `host/survey.sh` names.

    Arguments: `lines` as printed; `sent_at`, the controller's clock when the survey was sent, in
    seconds since the epoch (the skew is that of RFC 5905 section 8, from four timestamps, and its
    error at most half of the time on the way).
    Raises SurveyError if the end is missing: something cut it short.
    """
    received_at = time.time()
    of = columns(lines, "survey")

    def word(kind: str, column: int = 0) -> str:
        """A column of the only line of a kind; empty if there is none."""
        return of[kind][0][column] if of[kind] else ""

    def words(kind: str) -> set[str]:
        return {line[0] for line in of[kind]}

    clocks = [float(clock) for (clock,) in of["clock"]]
    ours = sent_at or received_at, received_at
    on_the_way = (ours[1] - ours[0]) - (clocks[-1] - clocks[0]) if clocks else 0.0
    rows: dict[str, set[str]] = defaultdict(set)
    for database, row in of["row"]:
        rows[database].add(row)
    units = {
        unit: UnitFact(
            load,
            active,
            enabled,
            int(pid),
            needs_reload == "yes",
            fingerprint,
            binary,
            tuple(given.split(",")[:-1]),
        )
        for unit, load, active, enabled, pid, needs_reload, fingerprint, binary, given in of["unit"]
    }
    subordinates: dict[str, set[str]] = defaultdict(set)
    for file, line in of["subordinate"]:
        subordinates[file].add(line)
    firewalld = units.get("firewalld.service")
    listeners = [
        Listener(proto, address, int(port), process, unit)
        for proto, address, port, process, unit in of["listen"]
    ]
    sshd = [i for i in listeners if i.process == "sshd" or i.unit in ("ssh.service", "ssh.socket")]
    return Facts(
        os=word("os"),
        os_version=word("os", 1),
        arch=word("arch"),
        skew=mean(clocks) - mean(ours) if clocks else 0.0,
        skew_error=max(0.0, on_the_way / 2),
        redis_rtt=float(word("redis") or 0),
        folder=word("current"),
        confirmed=word("confirmed"),
        pending=word("pending"),
        is_stuck=bool(of["pending"]) and word("pending", 1) != "active",
        has_state=bool(of["left"]),
        format=int(word("format") or 0),
        ruleset=word("ruleset"),
        manifest=Manifest.read(of["manifest"]),
        templates={path: digest for path, digest in of["template"]},
        packages={name: version for name, version, _ in of["package"]},
        candidates={name: version for name, version in of["candidate"]},
        users=words("user"),
        files=_files(of["link"], of["stat"], of["sha"]),
        units=units,
        listeners=listeners,
        ssh_ports={int(port) for (port,) in of["ssh"]} | {i.port for i in sshd},
        addresses=words("address"),
        tables={" ".join(table) for table in of["table"]},
        nat_tables={" ".join(table) for table in of["nat"]},
        firewalls=words("firewall")
        | ({"firewalld"} if firewalld and firewalld.is_running else set()),
        sysctls={key: " ".join(values) for key, *values in of["sysctl"]},
        elsewhere={
            key: (" ".join(values), file) for key, *values, file in of["elsewhere"] if any(values)
        },
        databases=words("database"),
        rows=rows,
        pairs={name: digest for name, digest, _, _ in of["pair"]},
        serials={name: serial for name, _, serial, _ in of["pair"]},
        asked={name: asked for name, _, _, asked in of["pair"]},
        served={(endpoint, name): serial for endpoint, name, serial in of["served"]},
        identities={
            kind: IdentityFact(base64.b64decode(der), has_key == "yes")
            for kind, has_key, der in of["identity"]
        },
        outdated=words("outdated"),
        environments={
            path: EnvironmentFact(int(mode, 8), owner, sha256, applied)
            for path, mode, owner, sha256, applied in of["environment"]
        },
        obstacles={path: (kind, words) for path, kind, words in of["obstacle"]},
        binaries=words("binary"),
        images=words("image"),
        subordinates=subordinates,
        cores=int(word("cores") or 0),
        recordings=int(word("recordings") or 0),
        held=(int(word("held")), int(word("held", 1))) if of["held"] else None,
    )


def _files(
    links: list[list[str]], stats: list[list[str]], sums: list[list[str]]
) -> dict[str, FileFact]:
    target = {path: target for path, target in links}
    stat = {path: (int(mode, 8), owner, group) for path, mode, owner, group in stats}
    sha256 = {path: digest for path, digest in sums}
    return {
        path: FileFact(target.get(path, ""), *stat.get(path, (0, "", "")), sha256.get(path, ""))
        for path in target | stat | sha256
    }

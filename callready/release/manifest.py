"""A release's manifest: what a release is, as the text that stands beside it on the host.

Tab-separated lines, the kind first; `host/release.sh` names the columns that the shell reads. What
is written here is read by later callreadys for as long as a host keeps the release: a change of it
is a new FORMAT, with recorded test data of the one before (tests/data).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from callready.probes.probe import Key
from callready.settings.uris import place

FORMAT = 2
"""1 had no line for itself, and promised by the words that probes were shown with."""


@dataclass(frozen=True)
class FileLine:
    """A file at its live path."""

    mode: int
    owner: str
    group: str
    sha256: str


@dataclass(frozen=True)
class UnitLine:
    """A unit with what its process was started with, and the ports it listens on."""

    fingerprint: str
    credentials: tuple[str, ...]
    reloads: bool
    listens: tuple[str, ...]


@dataclass(frozen=True)
class EnvironmentLine:
    """Our keys in an application's environment file, by hash, and what reads it."""

    owner: str
    sha256: str
    units: tuple[str, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Promise:
    """What a release has for callers: the key of a probe, and digests of the credentials that it
    accepts, where a release has them in its files (LiveKit's keys; a pool's are rows)."""

    key: Key
    credentials: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """A release's parts, by path or name."""

    format: int = FORMAT
    files: dict[str, FileLine] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    units: dict[str, UnitLine] = field(default_factory=dict)
    timers: list[str] = field(default_factory=list)
    environments: dict[str, EnvironmentLine] = field(default_factory=dict)
    certificates: list[str] = field(default_factory=list)
    databases: list[str] = field(default_factory=list)
    promises: list[Promise] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether the release has anything."""
        return any((self.files, self.links, self.units, self.environments))

    @property
    def text(self) -> str:
        """The manifest as it is written."""
        lines: list[Sequence[str]] = [("format", str(self.format))]
        lines += [
            ("file", path, f"{f.mode:04o}", f.owner, f.group, f.sha256)
            for path, f in sorted(self.files.items())
        ]
        lines += [("link", path, target) for path, target in sorted(self.links.items())]
        for unit, u in self.units.items():
            how, given = (
                "reload" if u.reloads else "restart",
                "".join(f"{c}," for c in u.credentials),
            )
            lines.append(("unit", unit, u.fingerprint, given or "-", how, _words(u.listens)))
        lines += [("timer", unit) for unit in self.timers]
        lines += [
            ("environment", path, e.owner, e.sha256, _words(e.units), *e.commands)
            for path, e in self.environments.items()
        ]
        lines += [("certificate", name) for name in self.certificates]
        lines += [("database", path) for path in self.databases]
        for (kind, transport, port, name), credentials in sorted(
            (promise.key, promise.credentials) for promise in self.promises
        ):
            lines.append(("promise", kind, transport, str(port), name or "-", _words(credentials)))
        return "".join("\t".join(line) + "\n" for line in lines)

    @property
    def id(self) -> str:
        """The release's name: what it is made of."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @classmethod
    def read(cls, lines: Iterable[Sequence[str]]) -> Manifest:
        """The manifest of lines that are split at their tabs, of this format or an earlier one;
        lines of a later one are passed over (a host that has them is refused)."""
        lines = list(lines)
        number = next((int(line[1]) for line in lines if line[0] == "format"), 1)
        found = cls(number if lines else FORMAT)
        for kind, *values in lines:
            match kind, values:
                case "file", [path, mode, owner, group, sha256]:
                    found.files[path] = FileLine(int(mode, 8), owner, group, sha256)
                case "link", [path, target]:
                    found.links[path] = target
                case "unit", [unit, fingerprint, given, how, listens]:
                    credentials = tuple(filter(None, given.removesuffix("-").split(",")))
                    found.units[unit] = UnitLine(
                        fingerprint, credentials, how == "reload", _split(listens)
                    )
                case "timer", [unit]:
                    found.timers.append(unit)
                case "environment", [path, owner, sha256, units, *commands]:
                    found.environments[path] = EnvironmentLine(
                        owner, sha256, _split(units), tuple(commands)
                    )
                case "certificate", [name]:
                    found.certificates.append(name)
                case "database", [path]:
                    found.databases.append(path)
                case "promise", [words]:
                    if key := _promised_in_words(words):
                        found.promises.append(Promise(key))
                case "promise", [kind, transport, port, name, credentials]:
                    key = Key(kind, transport, int(port), name.removeprefix("-"))
                    found.promises.append(Promise(key, _split(credentials)))
        return found


# The words of format 1 (0.1.0), which will not change any more.
_WORDS = (
    (re.compile(r"STUN of pool (?P<name>\S+) udp/(?P<port>\d+)"), "stun", "udp"),
    (
        re.compile(
            r"TURN allocation over (?P<over>udp|tcp|tls)(?: on 443)? of pool (?P<pool>\S+) "
            r"(?:udp|tcp)/(?P<port>\d+) (?P<host>\S+)"
        ),
        "turn",
        "",
    ),
    (re.compile(r"LiveKit tcp/(?P<port>\d+)(?: (?P<name>\S+))?"), "livekit", "tcp"),
    (re.compile(r"LiveKit by (?P<url>\S+) tcp/(?P<port>\d+)"), "livekit", "tcp"),
    (re.compile(r"HTTPS of (?P<name>\S+) tcp/(?P<port>\d+)"), "https", "tcp"),
    (
        re.compile(r"certificate of \S+ on port \d+ tcp/(?P<port>\d+) (?P<name>\S+)"),
        "certificate",
        "tcp",
    ),
    (re.compile(r"health of the app at (?P<health>\S+)"), "app", "tcp"),
)


def _promised_in_words(words: str) -> Key | None:
    for pattern, kind, transport in _WORDS:
        if not (found := pattern.fullmatch(words)):
            continue
        said = found.groupdict()
        if "pool" in said:
            return Key(kind, said["over"], int(said["port"]), f"{said['pool']}@{said['host']}")
        if "health" in said:
            return Key(kind, transport, place(said["health"])[1], said["health"])
        name = place(said["url"])[0] if "url" in said else said["name"] or ""
        return Key(kind, transport, int(said["port"]), name)
    return None


def _words(items: Iterable[str]) -> str:
    return " ".join(items) or "-"


def _split(words: str) -> tuple[str, ...]:
    return () if words == "-" else tuple(words.split())

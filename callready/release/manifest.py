"""A release's manifest: what a release is, as the text that stands beside it on the host.

Tab-separated lines, the kind first; `host/release.sh` says which columns the shell reads. What is
written here is read by later callreadys for as long as a host keeps the release: a change of it is
a new FORMAT, with recorded test data of the one before (tests/data/releases).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from callready.probes.probe import Key
from callready.settings.uris import place

FORMAT = 2
"""1 had no line for itself, and promised by the words that probes were shown with."""


class FileLine(NamedTuple):
    """A file at its live path."""

    path: str
    mode: str
    owner: str
    group: str
    sha256: str


class LinkLine(NamedTuple):
    """A link at its live path."""

    path: str
    target: str


class UnitLine(NamedTuple):
    """A unit, what its process was started with, whether it takes new inputs by `reload` or
    `restart`, and the ports it listens on."""

    unit: str
    fingerprint: str
    credentials: str
    how: str
    listens: str


class EnvironmentLine(NamedTuple):
    """Our keys in an application's environment file, by hash, and what reads it; each command is a
    column."""

    path: str
    owner: str
    sha256: str
    units: str
    commands: str


class NameLine(NamedTuple):
    """A timer, a certificate or a database."""

    name: str


class Promise(NamedTuple):
    """What a release has for callers: the key of a probe, and digests of the credentials that it
    accepts, where a release has them in its files (LiveKit's keys; a pool's are rows)."""

    kind: str
    transport: str
    port: str
    name: str = "-"
    credentials: str = "-"

    @property
    def key(self) -> Key:
        """Of the probe that asks for it."""
        return Key(self.kind, self.transport, int(self.port), self.name.removeprefix("-"))

    @classmethod
    def of(cls, key: Key, credentials: Iterable[str] = ()) -> Promise:
        """What a probe of this key asks for."""
        return cls(key.kind, key.transport, str(key.port), key.name or "-", words(credentials))


@dataclass(frozen=True)
class Manifest:
    """A release's parts, by their first column."""

    format: int = FORMAT
    files: dict[str, FileLine] = field(default_factory=dict)
    links: dict[str, LinkLine] = field(default_factory=dict)
    units: dict[str, UnitLine] = field(default_factory=dict)
    timers: dict[str, NameLine] = field(default_factory=dict)
    environments: dict[str, EnvironmentLine] = field(default_factory=dict)
    certificates: dict[str, NameLine] = field(default_factory=dict)
    databases: dict[str, NameLine] = field(default_factory=dict)
    promises: list[Promise] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether the release has anything."""
        return any((self.files, self.links, self.units, self.environments))

    @property
    def text(self) -> str:
        """The manifest as it is written."""
        lines = [f"format\t{self.format}"]
        for kind, (part, _) in KINDS.items():
            lines += [
                "\t".join((kind, *line)).rstrip("\t") for line in getattr(self, part).values()
            ]
        lines += ["\t".join(("promise", *promise)) for promise in sorted(self.promises)]
        return "".join(f"{line}\n" for line in lines)

    @property
    def id(self) -> str:
        """The release's name: what it is made of."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @classmethod
    def read(cls, lines: Iterable[Sequence[str]]) -> Manifest:
        """The manifest of lines that are split at their tabs, of this format or an earlier one;
        what a later one has more is passed over (a host that has it is refused)."""
        lines = list(lines)
        number = next((int(line[1]) for line in lines if line[0] == "format"), 1)
        manifest = cls(number if lines else FORMAT)
        for kind, *columns in lines:
            if kind == "promise" and len(columns) == 1:
                manifest.promises.extend(_promised_in_words(columns[0]))
            elif kind == "promise":
                manifest.promises.append(Promise(*columns[:5]))
            elif kind in KINDS:
                part, record = KINDS[kind]
                if kind == "environment":
                    columns = [*columns[:4], "\t".join(columns[4:])]
                getattr(manifest, part)[columns[0]] = record(*columns[: len(record._fields)])
        return manifest


KINDS: dict[str, tuple[str, Any]] = {
    "file": ("files", FileLine),
    "link": ("links", LinkLine),
    "unit": ("units", UnitLine),
    "timer": ("timers", NameLine),
    "environment": ("environments", EnvironmentLine),
    "certificate": ("certificates", NameLine),
    "database": ("databases", NameLine),
}
"""The part of a manifest that a line of each kind is in, and its columns."""

# The words of format 1 (0.1.0), which will not change any more.
_WORDS = {
    "stun": r"STUN of pool (?P<name>\S+) (?P<transport>udp)/(?P<port>\d+)",
    "turn": r"TURN allocation over (?P<transport>\w+)(?: on 443)? of pool (?P<name>\S+) "
    r"\w+/(?P<port>\d+) (?P<host>\S+)",
    "livekit": r"LiveKit(?: by (?P<url>\S+))? tcp/(?P<port>\d+)(?: (?P<name>\S+))?",
    "https": r"HTTPS of (?P<name>\S+) tcp/(?P<port>\d+)",
    "certificate": r"certificate of \S+ on port \d+ tcp/(?P<port>\d+) (?P<name>\S+)",
    "app": r"health of the app at (?P<name>(?P<url>\S+))",
}


def _promised_in_words(text: str) -> Iterable[Promise]:
    for kind, pattern in _WORDS.items():
        if match := re.fullmatch(pattern, text):
            said = match.groupdict()
            host, port = place(said.get("url") or "")
            name = said["name"] or host
            if "host" in said:
                name = f"{name}@{said['host']}"
            key = Key(kind, said.get("transport", "tcp"), int(said.get("port", port)), name)
            yield Promise.of(key)


def words(items: Iterable[str]) -> str:
    """A column of several words; `-` for none."""
    return " ".join(items) or "-"

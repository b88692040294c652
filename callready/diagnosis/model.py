"""What a diagnosis is made of: flows, symptoms, causes and the paths that callers can take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch
from typing import Literal, NamedTuple

from callready.diagnosis.keys import KEYS
from callready.probes import Finding
from callready.probes.legs import Step

Fails = Literal["", "all", "large", "some", "here"]
"""What does not pass: every packet, large ones only, some of them; or this machine sends none."""


class Place(StrEnum):
    """Where a cause is."""

    HERE = "this machine's network"
    EDGE = "the network before the host, or the provider's edge"
    FILTER = "a filter on the host"
    NETWORK = "the host's network"
    UNIT = "unit"
    CONFIGURATION = "configuration"
    CREDENTIAL = "credential"
    CERTIFICATE = "certificate"
    NAME = "name"
    CLOCK = "clock"
    CAPACITY = "capacity"
    APP = "the app"
    NEXT = "the next start"


class Flow(NamedTuple):
    """Packets that callers exchange with a host: its name in the inventory, protocol, the ports
    there (one port: first == last), and the address family; 0 is either."""

    host: str
    proto: Literal["udp", "tcp"]
    first: int
    last: int
    family: Literal[0, 4, 6] = 0

    def meets(self, other: Flow) -> bool:
        """Whether some packets are of both."""
        return (
            (self.host, self.proto) == (other.host, other.proto)
            and self.first <= other.last
            and other.first <= self.last
            and 0 in (self.family, other.family, self.family - other.family)
        )

    def __str__(self) -> str:
        ports = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        return f"{ports}/{self.proto}" + (f" over IPv{self.family}" if self.family else "")


def in_words(flows: Iterable[Flow]) -> str:
    """Flows for people: `50000-60000/udp over IPv4 and IPv6`."""
    families: dict[str, set[int]] = {}
    for flow in flows:
        families.setdefault(str(flow._replace(family=0)), set()).add(flow.family)
    return ", ".join(
        ports
        + ("" if 0 in found else f" over {' and '.join(f'IPv{each}' for each in sorted(found))}")
        for ports, found in families.items()
    )


@dataclass(frozen=True)
class Exchange:
    """Packets that go to a host and are answered.

    Args:
        flow: at the host that answers.
        relay: at the TURN host that they come from; None: they come from here.
        behind: the port that the host's packet filter leads them to, if that is another one.
    """

    flow: Flow
    relay: Flow | None = None
    behind: int = 0


@dataclass(frozen=True)
class Cause:
    """What is wrong, so that somebody can mend it.

    Args:
        key: what kind it is, of KEYS.
        host: where, by its name in the inventory; empty for this machine or the whole fleet.
        place: where on the way of a call.
        what: what is wrong, in a sentence without its full stop.
        mend: the one command or setting that mends it.
        evidence: how it showed, most telling first.
        breaks: flows that suffer from it.
        checks: patterns of checks of the same host that fail because of it (`test_units`), or of
            any host (`*:test_call*`).
        ruled_out: what was looked at and is well.
        latent: nothing suffers yet: it shows at the next start, renewal or rotation.
        only: what of these flows suffers, if that is not every packet.
    """

    key: str
    host: str
    place: Place
    what: str
    mend: str
    evidence: tuple[str, ...] = ()
    breaks: tuple[Flow, ...] = ()
    checks: tuple[str, ...] = ()
    ruled_out: tuple[str, ...] = ()
    latent: bool = False
    only: Fails = ""

    def __post_init__(self) -> None:
        assert self.key in KEYS, self.key


@dataclass(frozen=True)
class Symptom:
    """A check that failed.

    Args:
        check: name of the check's function.
        host: by its name in the inventory.
        title: for people.
        exchanges: what it needs of the network, each only after the ones before it.
        fails: as `Tried.fails`, of what needs these exchanges alone; empty where that is not
            known.
        findings: what it says.
        causes: what it found to be the cause by looking at it.
        apart: its exchanges do not need each other, and all of them failed.
    """

    check: str
    host: str
    title: str
    exchanges: tuple[Exchange, ...] = ()
    fails: Fails = ""
    findings: tuple[Finding, ...] = ()
    causes: tuple[Cause, ...] = ()
    apart: bool = False

    def follows_from(self, cause: Cause) -> bool:
        """Whether the cause explains it."""
        if cause in self.causes:
            return True
        for pattern in cause.checks:
            host, _, check = pattern.rpartition(":")
            if fnmatch(self.check, check) and (host == "*" or self.host == (host or cause.host)):
                return True
        # Small packets over UDP pass; over TCP they wait for a large one before them.
        some = cause.only == "large" and self.fails == "all"
        return any(
            flow.meets(other)
            for flow in cause.breaks
            for other in self.flows
            if not (some and other.proto == "udp")
        )

    @property
    def flows(self) -> list[Flow]:
        """The flows that it needs."""
        return [
            flow for each in self.exchanges for flow in (each.flow, each.relay) if flow is not None
        ]


@dataclass(frozen=True)
class Path:
    """A way that media can take between a caller and an SFU.

    Args:
        sfu: its host.
        way: `UDP` or `TCP` (ICE/TCP) for direct ones, else over what the TURN server is reached:
            `TURN/UDP`, `TURN/TCP`, `TURN/TLS`, `TURN/TLS 443`.
        family: address family of the caller's packets.
        pool, turn: TURN pool and host that relay; empty for direct ones.
    """

    sfu: str
    way: str
    family: Literal[4, 6]
    pool: str = ""
    turn: str = ""


@dataclass(frozen=True)
class Tried:
    """How a path was found.

    Args:
        path: which one.
        ok: whether media passes; None: it could not be tried from here.
        steps: of its connection, as far as it came.
        rtt: seconds that a packet to the SFU and its answer take.
        why: why not, where it is not `ok`.
        fails: what does not pass.
    """

    path: Path
    ok: bool | None
    steps: tuple[Step, ...] = ()
    rtt: float | None = None
    why: str = ""
    fails: Fails = ""


@dataclass(frozen=True)
class Explained:
    """A cause of a diagnosis, and the symptoms that follow from it."""

    cause: Cause
    symptoms: tuple[Symptom, ...]


@dataclass(frozen=True)
class Diagnosis:
    """The causes, most likely first, and the symptoms that nothing known explains."""

    causes: tuple[Explained, ...] = ()
    unexplained: tuple[Symptom, ...] = ()
    paths: tuple[Tried, ...] = ()
    notes: tuple[str, ...] = ()

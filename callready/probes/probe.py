"""What callers need of a host, one typed probe each. A probe has a key, which stays the same when
its words change: by that a release promises what it has for callers. Words are made when shown."""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import SecretStr

from callready.probes import Finding, ProbeError, reason
from callready.secrets.masking import HIDDEN
from callready.settings.android import address
from callready.settings.pools import Transport

if TYPE_CHECKING:
    pass


class Key(NamedTuple):
    """Which probe it is: its kind, the transport and port that it is about, and a name (of a pool
    and its host, of an HTTPS site, the URL of the app's health; empty where the port is enough)."""

    kind: str
    transport: str
    port: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Probe(ABC):
    """One thing that callers need of a host.

    Args:
        node: the host's name in the inventory, for people.
        address, port, transport: as callers reach it; errors name these.
        connect_to: where to connect to instead, if a tunnel leads there.
        resolver: name server that says where callers are led, if the address is a name.
        ca: PEM file of the authorities to trust; None: the system's.
        verify: False takes any certificate.
    """

    kind: ClassVar[str]
    module: ClassVar[str]
    """The module of callready.probes that it needs; the prober loads no other."""
    words: ClassVar[str]
    """Its title for people, and below the last part of its key, with its fields in braces."""
    names: ClassVar[str] = ""

    node: str
    address: str
    port: int
    transport: Transport = "tcp"
    connect_to: tuple[str, int] | None = None
    resolver: str | None = None
    ca: str | None = None
    verify: bool = True

    @property
    def proto(self) -> Literal["udp", "tcp"]:
        """The protocol of its packets."""
        return "udp" if self.transport == "udp" else "tcp"

    @property
    def family(self) -> Literal[4, 6]:
        """The address family that it is asked over."""
        return 6 if ":" in self.address else 4

    @property
    def key(self) -> Key:
        """What stays the same when its words change."""
        return Key(self.kind, self.transport, self.port, self.names.format(**vars(self)))

    @property
    def title(self) -> str:
        """What is probed of which host, for people."""
        where = f"on {self.node} (IPv{self.family})"
        on_443 = " on 443" * ((self.transport, self.port) == ("tls", 443))
        return self.words.format(**vars(self), where=where, on_443=on_443)

    @abstractmethod
    def ask(self) -> Finding | None:
        """Ask once; raises ProbeError if callers would not get what they need, and returns a
        warning if they would get it less well."""

    @property
    def way(self) -> str:
        """How its packets get there, as a path of media is called by it."""
        return self.proto.upper()

    @property
    def _at(self) -> tuple[str, int]:
        at = self.address
        if self.resolver and not self.connect_to and not address(at):
            from callready.probes import names

            at = min(names.addresses(at, self.resolver), key=lambda each: ":" in each, default=at)
        return self.connect_to or (at, self.port)

    @property
    def _http(self) -> dict[str, Any]:
        """Arguments of the probes that go by a URL."""
        return {"ca_file": self.ca, "at": self._at, "verify": self.verify}


class Measurement:
    """What a probe measures of itself.

    Args:
        phases: seconds of each part that it came through, by its name.
        rtt: a round trip (s). loss: share of the packets without an answer.
    """

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.rtt: float | None = None
        self.loss: float | None = None
        self._at: tuple[str, float] | None = None

    def begin(self, phase: str) -> None:
        """The phase before has passed, and another begins, if it has a name."""
        now = time.perf_counter()
        if self._at:
            self.phases[self._at[0]] = now - self._at[1]
        self._at = (phase.lower(), now) if phase else None

    async def led(self, *names: str | None) -> None:
        """As callers are led: these names are not what the packets are sent to. Empty ones are
        none."""
        self.begin("dns")
        for name in filter(None, names):
            try:
                await asyncio.get_running_loop().getaddrinfo(name, None)
            except OSError as error:
                raise ProbeError(
                    f"callers are not led to {name}", "the name's A and AAAA records", reason(error)
                ) from None
        self.begin("")


class Measured(Probe):
    """One that can be asked all the time, beside many others, and measures itself."""

    @abstractmethod
    async def measure(self, into: Measurement) -> None:
        """Ask once; raises ProbeError if callers would not get what they need."""


def broken(error: Exception) -> Finding:
    """What is said where a probe raises anything but ProbeError."""
    return Finding(
        "the probe itself broke",
        "callready's issues, with this line",
        f"{type(error).__name__}: {reason(error)}",
    )


def hidden(finding: Finding, probes: Iterable[Probe]) -> Finding:
    """A finding without the secrets of these probes."""
    texts = [finding.suffers, finding.look_at, finding.evidence]
    for secret in itertools.chain.from_iterable(map(_secrets, probes)):
        texts = [text.replace(secret, HIDDEN) for text in texts]
    suffers, look_at, evidence = texts
    return Finding(suffers, look_at, evidence, finding.warning)


def _secrets(value: object) -> Iterator[str]:
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, dict) or is_dataclass(value):
        for each in (value if isinstance(value, dict) else vars(value)).values():
            yield from _secrets(each)


def as_json(probe: Probe) -> dict[str, Any]:
    """A probe as JSON data for the prober, its secrets readable."""

    def plain(value: Any) -> Any:
        if isinstance(value, SecretStr):
            return value.get_secret_value()
        if is_dataclass(value):
            return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return value

    return {"kind": probe.kind, **plain(probe)}

"""What callers need of a host, one typed probe each. A probe has a key, which stays the same when
its words change: by that a release promises what it has for callers. Words are made when shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import SecretStr, TypeAdapter, ValidationError

from callready.probes import ProbeError, endpoint
from callready.settings.uris import place

Way = Literal["udp", "tcp", "tls"]


class Key(NamedTuple):
    """Which probe it is: its kind, the transport and port that it is about, and a name (of a pool
    and its host, of an HTTPS site, the URL of the app's health; empty where the port is enough)."""

    kind: str
    transport: str
    port: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One thing that callers need of a host.

    Args:
        node: the host's name in the inventory, for people.
        address, port: as callers reach it; errors name these.
        connect_to: where to connect to instead, if a tunnel leads there.
        ca: PEM file of the authorities to trust; None: the system's.
        verify: False takes any certificate.
    """

    kind: ClassVar[str]
    module: ClassVar[str]
    """The module of callready.probes that it needs; the prober loads no other."""

    node: str
    address: str
    port: int
    connect_to: tuple[str, int] | None = None
    ca: str | None = None
    verify: bool = True

    @property
    def transport(self) -> Literal["udp", "tcp"]:
        """The protocol of its packets."""
        return "tcp"

    @property
    def name(self) -> str:
        """The last part of its key."""
        return ""

    @property
    def key(self) -> Key:
        """What stays the same when its words change."""
        return Key(self.kind, self.transport, self.port, self.name)

    @property
    def what(self) -> str:
        """What it is about, for people."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """What is probed of which host, for people."""
        return f"{self.what} on {self.node} (IPv{6 if ':' in self.address else 4})"

    def ask(self) -> None:
        """Ask once; raises ProbeError if callers would not get what they need."""
        raise NotImplementedError

    @property
    def _http(self) -> dict[str, Any]:
        """Arguments of the probes that go by a URL."""
        at = self.connect_to or (self.address, self.port)
        return {"ca_file": self.ca, "at": at, "verify": self.verify}


@dataclass(frozen=True, kw_only=True)
class Stun(Probe):
    """A STUN server answers over UDP."""

    kind = "stun"
    module = "stun"
    pool: str

    @property
    def transport(self) -> Literal["udp"]:
        return "udp"

    @property
    def name(self) -> str:
        return self.pool

    @property
    def what(self) -> str:
        return f"STUN of pool {self.pool}"

    def ask(self) -> None:
        from callready.probes import stun

        stun.binding(self.address, self.port, connect_to=self.connect_to)


@dataclass(frozen=True, kw_only=True)
class UdpPath(Probe):
    """UDP gets to a port on which something listens, and something comes back; `title` is of the
    probe that would need it."""

    kind = "udp-path"
    module = "stun"
    title: str = ""

    def ask(self) -> None:
        from callready.probes import stun

        if not stun.comes_back(*(self.connect_to or (self.address, self.port))):
            raise ProbeError(
                f"no answer over UDP from {endpoint(self.address, self.port)}",
                "this network, or a filter on the way, which lets no UDP through; deploy.gate_from "
                "names a host to probe from",
            )


@dataclass(frozen=True, kw_only=True)
class Turn(Probe):
    """A TURN server allocates a relay of the address's family. With `secret`, credentials are
    minted; without it and without `user` it is asked as nobody, which it must refuse with 401."""

    kind = "turn"
    module = "turn"
    pool: str
    over: Way
    server_name: str
    secret: SecretStr | None = None
    user: str = ""
    password: SecretStr | None = None

    @property
    def transport(self) -> Literal["udp", "tcp"]:
        return "udp" if self.over == "udp" else "tcp"

    @property
    def key(self) -> Key:
        return Key(self.kind, self.over, self.port, self.name)

    @property
    def name(self) -> str:
        return f"{self.pool}@{self.server_name}"

    @property
    def what(self) -> str:
        over = self.over + " on 443" * (self.over == "tls" and self.port == 443)
        return f"TURN allocation over {over} of pool {self.pool}"

    def ask(self) -> None:
        from callready.probes import turn

        server = turn.TurnServer(
            self.address,
            self.port,
            self.over,
            self.server_name,
            self.ca,
            self.verify,
            self.connect_to,
        )
        credentials = None
        if self.secret:
            credentials = turn.mint(self.secret, 60)
        elif self.password:
            credentials = turn.Credentials(self.user, self.password.get_secret_value())
        # 486 is said after the password was checked: callers have used the quota up.
        well = 486 if credentials else 401
        try:
            turn.allocate(server, credentials, 6 if ":" in self.address else 4)
        except turn.TurnRefused as refused:
            if refused.code != well:
                raise


@dataclass(frozen=True, kw_only=True)
class LiveKit(Probe):
    """LiveKit is well and takes a token of each key; of one of them, if `any_key`: an earlier
    release does not know the keys that were added since."""

    kind = "livekit"
    module = "livekit"
    url: str
    server_name: str = ""
    keys: Mapping[str, SecretStr] = field(default_factory=dict)
    any_key: bool = False

    @property
    def name(self) -> str:
        return self.server_name

    @property
    def what(self) -> str:
        return "LiveKit"

    def ask(self) -> None:
        from callready.probes import livekit

        livekit.health(self.url, **self._http)
        refused = {}
        for key, secret in self.keys.items():
            token = livekit.token(key, secret, ttl=60)
            status = livekit.validate(self.url, token, **self._http)
            if status != 200:
                refused[key] = status
        if refused and not (self.any_key and len(refused) < len(self.keys)):
            key, status = next(iter(refused.items()))
            raise ProbeError(
                f"no call starts: {self.url} refuses a token of key {key} with {status}",
                livekit.REFUSED_TOKEN,
            )


@dataclass(frozen=True, kw_only=True)
class Https(Probe):
    """The edge answers for a name, whether what is behind it is there yet or not."""

    kind = "https"
    module = "app"
    server_name: str

    @property
    def name(self) -> str:
        return self.server_name

    @property
    def what(self) -> str:
        return f"HTTPS of {self.server_name}"

    def ask(self) -> None:
        from callready.probes import app

        # As nobody: the edge answers that itself.
        app.get(f"https://{self.server_name}/", headers={"Host": "nobody.invalid"}, **self._http)


@dataclass(frozen=True, kw_only=True)
class Certificate(Probe):
    """A certificate that callers accept for a name."""

    kind = "certificate"
    module = "tls"
    server_name: str

    @property
    def name(self) -> str:
        return self.server_name

    @property
    def what(self) -> str:
        return f"certificate of {self.server_name} on port {self.port}"

    def ask(self) -> None:
        from callready.probes import tls

        tls.served(self.address, self.port, self.server_name, self.ca, connect_to=self.connect_to)


@dataclass(frozen=True, kw_only=True)
class Health(Probe):
    """The app answers with a status and JSON fields; without `status`, with any below 500."""

    kind = "app"
    module = "app"
    url: str
    status: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.url

    @property
    def what(self) -> str:
        return f"health of the app at {self.url}"

    @property
    def title(self) -> str:
        return self.what

    def ask(self) -> None:
        from callready.probes import app

        if self.status is not None:
            app.health(self.url, self.status, self.fields, **self._http)
            return
        response, _ = app.get(self.url, **self._http)
        if response.status_code >= 500:
            raise ProbeError(
                f"the app is not well: {self.url}", app.LOOK_AT, f"status is {response.status_code}"
            )


KINDS: dict[str, type[Probe]] = {
    kind.kind: kind for kind in (Stun, UdpPath, Turn, LiveKit, Https, Certificate, Health)
}


def without_credentials(key: Key, node: str, address: str, **trust: Any) -> Probe | None:
    """The probe of a key that can be asked without any credential: STUN, 401 on allocate, an HTTP
    status, a TLS handshake. None for a key of a kind that is not known.

    Args:
        key: what was promised.
        node, address, trust: as `Probe` takes them.
    """
    common: dict[str, Any] = {"node": node, "address": address, "port": key.port, **trust}
    match key.kind:
        case "stun":
            return Stun(pool=key.name, **common)
        case "turn":
            pool, _, server = key.name.partition("@")
            return Turn(pool=pool, server_name=server, over=key.transport, **common)  # type: ignore[arg-type]
        case "livekit":
            scheme = "wss" if key.name else "ws"
            url = f"{scheme}://{endpoint(key.name or address, key.port)}"
            return LiveKit(url=url, server_name=key.name, **common)
        case "https":
            return Https(server_name=key.name, **common)
        case "certificate":
            return Certificate(server_name=key.name, **common)
        case "app":
            return Health(url=key.name, **{**common, "address": place(key.name)[0]})
    return None


def as_json(probe: Probe) -> dict[str, Any]:
    """A probe as JSON data for the prober, its secrets readable."""

    def plain(value: Any) -> Any:
        if isinstance(value, SecretStr):
            return value.get_secret_value()
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return value

    fields = {item.name: plain(getattr(probe, item.name)) for item in dataclasses.fields(probe)}
    return {"kind": probe.kind, **fields}


def from_json(data: Mapping[str, Any]) -> Probe:
    """The probe that `as_json` wrote; raises ValueError for anything else."""
    fields = dict(data)
    kind = KINDS.get(fields.pop("kind", ""))
    if kind is None:
        raise ValueError(f"no such probe: {data.get('kind')}")
    try:
        return TypeAdapter(kind).validate_python(fields)
    except ValidationError as error:  # its text quotes values
        wrong = sorted({str(item["loc"][0]) for item in error.errors(include_input=False)})
        raise ValueError(f"a probe of kind {kind.kind} has other fields: {wrong}") from None

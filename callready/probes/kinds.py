"""The kinds of probes: STUN, TURN, LiveKit, its calls and recordings, the edge, and the app."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import SecretStr, TypeAdapter, ValidationError

from callready.probes import Finding, ProbeError, endpoint
from callready.probes.probe import Key, Measured, Measurement, Probe
from callready.probes.storage import Storage
from callready.settings.pools import Transport
from callready.settings.uris import place

if TYPE_CHECKING:
    from callready.probes.ice import Candidate
    from callready.probes.legs import Leg
    from callready.probes.turn import Credentials, TurnServer
    from callready.probes.webrtc import Call as WebRtcCall


@dataclass(frozen=True, kw_only=True)
class Stun(Measured):
    """A STUN server answers over UDP."""

    kind, module, words, names = "stun", "stun", "STUN of pool {pool} {where}", "{pool}"
    transport: Transport = "udp"
    pool: str

    def ask(self) -> None:
        asyncio.run(self.measure(Measurement()))

    async def measure(self, into: Measurement) -> None:
        from callready.probes import stun

        into.rtt = (await stun.bound(self.address, self.port, connect_to=self.connect_to)).rtt


@dataclass(frozen=True, kw_only=True)
class UdpPath(Probe):
    """UDP gets to a port on which something listens, and something comes back; `of` is the title
    of the probe that would need it."""

    kind, module, words = "udp-path", "stun", "{of}"
    transport: Transport = "udp"
    of: str

    def ask(self) -> None:
        from callready.probes import stun

        if not stun.comes_back(*self._at):
            raise ProbeError(
                f"no answer over UDP from {endpoint(self.address, self.port)}",
                "this network, or a filter on the way, which lets no UDP through; deploy.gate_from "
                "names a host to probe from",
            )


@dataclass(frozen=True, kw_only=True)
class Turn(Measured):
    """A TURN server allocates a relay of the address's family. With `secret`, credentials are
    minted; without it and without `user` it is asked as nobody, which it must refuse with 401."""

    kind, module, names = "turn", "turn", "{pool}@{server_name}"
    words = "TURN allocation over {transport}{on_443} of pool {pool} {where}"
    pool: str
    server_name: str
    secret: SecretStr | None = None
    user: str = ""
    password: SecretStr | None = None

    @property
    def way(self) -> str:
        return f"TURN/{self._server.way}"

    @property
    def _server(self) -> TurnServer:
        from callready.probes.turn import TurnServer

        way = self.address, self.port, self.transport
        return TurnServer(*way, self.server_name, self.ca, self.verify, self.connect_to)

    @property
    def _credentials(self) -> Credentials | None:
        from callready.probes import turn

        if self.secret:
            return turn.mint(self.secret, 60)
        if self.password:
            return turn.Credentials(self.user, self.password.get_secret_value())
        return None

    def ask(self) -> None:
        from callready.probes.turn import TurnRefused

        try:
            asyncio.run(self.measure(Measurement()))
        except TurnRefused as refused:
            # Said after the password was checked: callers have used the quota up.
            if refused.code != 486 or not (self.secret or self.password):
                raise

    async def measure(self, into: Measurement) -> None:
        from callready.probes import turn

        credentials = self._credentials
        try:
            await turn.allocated(self._server, credentials, self.family, into.begin)
        except turn.TurnRefused as refused:
            if credentials or refused.code != 401:
                raise
        into.begin("")


@dataclass(frozen=True, kw_only=True)
class LiveKit(Probe):
    """LiveKit is well and takes a token of each key; of one of them, if `any_key`: an earlier
    release does not know the keys that were added since."""

    kind, module, words, names = "livekit", "livekit", "LiveKit {where}", "{server_name}"
    url: str
    server_name: str = ""
    keys: Mapping[str, SecretStr] = field(default_factory=dict)
    any_key: bool = False

    def ask(self) -> Finding | None:
        from callready.probes import livekit

        if livekit.health(self.url, **self._http).from_peer:
            raise ProbeError(
                f"calls go on without {self.node}: its edge hands callers to another SFU",
                "livekit-server.service there, and whether curl -i http://127.0.0.1:7880/ says 200",
            )
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
        return None


@dataclass(frozen=True, kw_only=True)
class Join(LiveKit, Measured):
    """A join as a browser makes it: every ICE server that it is told of answers, and LiveKit's own
    candidates do over UDP and TCP. A server on another host is that host's affair: if it does not
    answer, this is a warning, unless it is one of `answering`. Without a key nothing is asked.

    Args:
        own: this host's name and addresses.
        answering: URIs of ICE servers on other hosts that answered before.
        media_port: a UDP port of LiveKit's range.
        node_id: of a cluster's node, to have the room there.
        forwarder: path of the Unix socket that tells the ways through a tunnel, if there is one
            (callready/rollout/tunnel.py).
    """

    kind, words = "join", "join through LiveKit {where}"
    own: tuple[str, ...] = ()
    answering: tuple[str, ...] = ()
    media_port: int = 0
    node_id: str = ""
    forwarder: str | None = None

    def ask(self) -> Finding | None:
        from callready.probes import livekit

        if not self.keys:
            return None
        key, secret = next(iter(self.keys.items()))
        found = livekit.reach(
            self.url,
            key,
            secret,
            self.ca,
            self._at,
            self.verify,
            self.family,
            self.node_id,
            self._via,
        )
        wrong: list[Finding] = []
        doubtful: list[Finding] = []
        for counts, finding in self._media(found.candidates):
            (wrong if counts else doubtful).append(finding)
        for uri, result in found.servers.items():
            if isinstance(result, ProbeError):
                (wrong if self._counts(uri, result) else doubtful).append(result.finding)
        addresses = {each.address for each in found.candidates}
        if addresses and addresses.isdisjoint(self.own):
            doubtful.append(
                Finding(
                    f"LiveKit's candidates are not this host's: {', '.join(sorted(addresses))}",
                    "rtc.node_ip; in a cluster livekit.logging.level: from info on the log names "
                    "the node to have the room on",
                )
            )
        if self.node_id and found.node_id != self.node_id:
            wrong.append(
                Finding(
                    f"a room that was made on node {self.node_id} is on {found.node_id}",
                    "livekit.redis, and LiveKit's log",
                )
            )
        if wrong:
            raise ProbeError(*_joined(wrong))
        return Finding(*_joined(doubtful), warning=True) if doubtful else None

    async def measure(self, into: Measurement) -> None:
        """Join, take LiveKit's offer and leave; what that leads to is for other probes to say."""
        from callready.probes import livekit

        key, secret = next(iter(self.keys.items()))
        at = await asyncio.to_thread(lambda: self._at)
        into.begin("signalling")
        async with livekit.offered(self.url, key, secret, self.ca, at, self.verify, self.node_id):
            into.begin("")

    def _media(
        self, candidates: Mapping[Candidate, float | ProbeError]
    ) -> Iterator[tuple[bool, Finding]]:
        """What is wrong with the ways to LiveKit, and whether that counts: callers have to reach
        one over UDP and one over TCP; one that is not offered they may do without."""
        for proto in ("udp", "tcp"):
            results = [result for each, result in candidates.items() if each.proto == proto]
            failed = [result.finding for result in results if isinstance(result, ProbeError)]
            if not results:
                missing = Finding(
                    f"calls get no media over {proto.upper()} (IPv{self.family})",
                    "the host's addresses, and rtc in livekit.yaml",
                    "LiveKit offers no such candidate",
                )
                yield self.family == 4 and not candidates, missing
            elif len(failed) == len(results):
                yield True, failed[0]

    def _counts(self, uri: str, error: ProbeError) -> bool:
        from callready.probes.ice import resolve
        from callready.probes.turn import NoUri, TurnServer

        if isinstance(error, NoUri) or uri in self.answering:
            return True
        name = TurnServer.from_uri(uri.replace("stun:", "turn:", 1)).address
        return name in self.own or resolve(name, self.family) in self.own

    def _via(self, proto: str, address: str, port: int) -> tuple[str, int]:
        if self.forwarder is None:
            return address, port
        with socket.socket(socket.AF_UNIX) as asked:
            asked.connect(self.forwarder)
            asked.sendall(f"{proto} {address} {port}\n".encode())
            near = asked.makefile().readline()
        if not near:
            raise ProbeError(
                f"nothing is sent to {endpoint(address, port)}/{proto}",
                "deploy.gate_from, which has to pass it on",
            )
        return "127.0.0.1", int(near)


@dataclass(frozen=True, kw_only=True)
class Meet(Measured):
    """Two who come to a room by two SFUs are on the same node: media goes there from both, so they
    hear each other.

    Args:
        node: the SFU's host by which the first one comes.
        peer: that of the second one. other: its address and port.
        service: the name by which callers reach all of them.
        url: of LiveKit.
        keys: of LiveKit; the first one is used.
    """

    kind, module, words = "meet", "livekit", "callers by {node} and by {peer} meet"
    peer: str
    other: tuple[str, int]
    service: str
    url: str
    keys: Mapping[str, SecretStr]

    def ask(self) -> None:
        asyncio.run(self.measure(Measurement()))

    async def measure(self, into: Measurement) -> None:
        from callready.probes import livekit

        key, secret = next(iter(self.keys.items()))
        room, at = livekit.new_room(), await asyncio.to_thread(lambda: self._at)
        one, two = (livekit.token(key, secret, room, ttl=60, create=True) for _ in range(2))
        into.begin("signalling")
        common = self.ca, at, self.verify
        await asyncio.to_thread(livekit.create_room, self.url, one, room, "", *common)
        async with (
            livekit.joined(self.url, one, *common) as (here, _),
            livekit.joined(self.url, two, self.ca, self.other, self.verify) as (there, _),
        ):
            into.begin("")
        if here.node_id != there.node_id:
            raise ProbeError(
                f"those of one room do not meet: who comes by {self.node} is on node "
                f"{here.node_id}, who comes by {self.peer} on {there.node_id}",
                "whether both SFUs have the same Redis (list-nodes of livekit-server on both)",
            )


@dataclass(frozen=True, kw_only=True)
class Call(Turn):
    """Media passes on exactly one path: packets of several sizes there and back, of which few are
    lost, and then a call of two participants over it. ICE/TCP has the packets alone, because no
    setting holds LiveKit's SDK to it, and a path from one relay of a pool to another has no SFU
    that would join a call. A path without `pool` is direct.

    Args:
        node: the SFU's host, or the TURN server's where no SFU is at the other end.
        url: of LiveKit; empty where no SFU is at the other end.
        keys: of LiveKit; the first one is used.
        turn: the TURN server's host, for people.
        max_loss: share of lost packets above which it has failed.
    """

    kind, module, words, names = "call", "webrtc", "", "{pool}@{turn}"
    url: str = ""
    keys: Mapping[str, SecretStr] = field(default_factory=dict)
    turn: str = ""
    max_loss: float

    @property
    def way(self) -> str:
        return super().way if self.pool else self.proto.upper()

    @property
    def title(self) -> str:
        through = f" through {self.turn}" * bool(self.pool)
        return f"call over {self.way}{through} on {self.node} (IPv{self.family})"

    def ask(self) -> None:
        asyncio.run(self.measure(Measurement()))

    async def measure(self, into: Measurement) -> None:
        await into.led(urlsplit(self.url).hostname, self.server_name)
        leg = await self._leg(into)
        into.rtt, into.loss = leg.rtt, leg.loss
        into.phases |= {s.name.lower(): s.seconds for s in leg.steps if not s.name.endswith(" B")}
        if leg.error:
            raise ProbeError(leg.error.suffers, leg.error.look_at, leg.error.evidence)
        if self.url and self.way != "TCP":
            call = await asyncio.to_thread(self._call)
            sides = call.participants
            into.phases["connect"] = max(each.connect_seconds for each in sides)
            into.phases["media"] = max(each.audio_seconds for each in sides)
            if self.pool and any(each.local != "relay" for each in sides):
                raise ProbeError(
                    f"a call that shall be relayed over {self.way} is not",
                    "the probe (callready.probes.webrtc)",
                )

    async def _leg(self, into: Measurement) -> Leg:
        from callready.probes import legs

        credentials = self._credentials
        through = []
        if self.pool and credentials:
            through.append(legs.Through(self._server, credentials, self.family))
        if not self.url:
            (leg,) = await legs.relays_tried(through, self.max_loss)
            return leg
        way = self.proto, self.family
        found = await legs.all_tried(
            self.url,
            *next(iter(self.keys.items())),
            through,
            self.ca,
            self.verify,
            self.max_loss,
            lambda each: not through and (each.proto, each.family) == way,
        )
        into.phases["signalling"] = found.time_to_offer
        # LiveKit may offer addresses of networks that callers are not in.
        tried = sorted((*found.direct, *found.relayed), key=lambda each: each.error is not None)
        if not tried:
            raise ProbeError(
                f"{self.url} offers no {self.way} candidate of IPv{self.family}",
                "rtc.node_ip, rtc.tcp_port and the interfaces that LiveKit may use",
            )
        return tried[0]

    def _call(self) -> WebRtcCall:
        from callready.probes import livekit, turn, webrtc

        key, secret = next(iter(self.keys.items()))
        room = livekit.new_room()
        maker = livekit.token(key, secret, room, ttl=60, create=True)
        livekit.create_room(self.url, maker, room, ca_file=self.ca, verify=self.verify)
        servers = []
        if self.pool and (who := self._credentials):
            server = self._server
            if self.transport == "tls":  # libwebrtc looks for the URI's name in the certificate
                server = replace(server, address=self.server_name)
            servers.append(turn.IceServer((server.uri,), who.username, who.password))
        pair = webrtc.tokens(key, secret, room)
        return webrtc.call(self.url, pair, servers, bool(servers), self.ca, 0.3)


def _joined(findings: list[Finding]) -> tuple[str, str]:
    """Several findings as the words of one."""
    texts = ([each.shown for each in findings], [each.look_at for each in findings])
    shown, look_at = ("; ".join(dict.fromkeys(text)) for text in texts)
    return shown, look_at


@dataclass(frozen=True, kw_only=True)
class Recording(Probe):
    """The host records a short call, its sound only, and that is in the file. Where no call can be
    made from here, or the file cannot be looked at, this is a warning.

    Args:
        url: of LiveKit. keys: its keys; the first one is used.
        storage: where recordings go.
        shell: path of the Unix socket that runs scripts on hosts (callready/rollout/shell.py).
        others: hosts that it leads to too, and that may take a recording instead.
    """

    kind, module, words = "recording", "recording", "recording on {node}"
    url: str
    keys: Mapping[str, SecretStr]
    storage: Storage
    shell: str = ""
    others: tuple[str, ...] = ()

    def ask(self) -> Finding | None:
        from callready.probes import recording

        key, secret = next(iter(self.keys.items()))
        api = recording.Api(self.url, key, secret, self.ca, verify=self.verify)
        host, *others = (
            recording.Host(name, partial(self._run, name)) for name in (self.node, *self.others)
        )
        with ExitStack() as stack:
            try:
                call = recording.talking(self.url, key, secret, self.ca, None, self.verify)
                room = stack.enter_context(call)
            except ProbeError as error:
                suffers = f"nothing was recorded: {error.finding.suffers}"
                return replace(error.finding, suffers=suffers, warning=True)
            try:
                what: recording.Kind = "audio_room_composite"
                limit = recording.SHORT
                proof = recording.prove(api, room, what, 3, host, self.storage, others, limit)
            except recording.Elsewhere as error:
                return replace(error.finding, warning=True)
        if proof.found:
            return None
        look_at = "make verify, from where the storage is reached"
        return Finding("nobody has looked at what is recorded", look_at, proof.why, warning=True)

    def _run(self, name: str, script: str) -> str:
        with socket.socket(socket.AF_UNIX) as asked:
            asked.connect(self.shell)
            asked.sendall(f"{name}\n{script}".encode())
            asked.shutdown(socket.SHUT_WR)
            with asked.makefile() as answer:
                status, _, text = answer.read().partition("\n")
        if status != "0":
            raise ProbeError(f"{name} cannot be looked at", "SSH and sudo there", text.strip())
        return text


@dataclass(frozen=True, kw_only=True)
class Https(Probe):
    """The edge answers for a name, whether what is behind it is there yet or not."""

    kind, module, words, names = "https", "app", "HTTPS of {server_name} {where}", "{server_name}"
    server_name: str

    def ask(self) -> None:
        from callready.probes import app

        # As nobody: the edge answers that itself.
        app.get(f"https://{self.server_name}/", headers={"Host": "nobody.invalid"}, **self._http)


@dataclass(frozen=True, kw_only=True)
class Certificate(Probe):
    """A certificate that callers accept for a name."""

    kind, module, names = "certificate", "tls", "{server_name}"
    words = "certificate of {server_name} on port {port} {where}"
    server_name: str

    def ask(self) -> None:
        from callready.probes import tls

        name, to = self.server_name, self.connect_to
        tls.served(self.address, self.port, name, self.ca, connect_to=to)


@dataclass(frozen=True, kw_only=True)
class Health(Measured):
    """The app answers with a status and JSON fields; without `status`, with any below 500."""

    kind, module, words, names = "app", "app", "health of the app at {url}", "{url}"
    url: str
    status: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def ask(self) -> None:
        from callready.probes import app

        if self.status is not None:
            app.health(self.url, self.status, self.fields, **self._http)
            return
        response, _ = app.get(self.url, **self._http)
        if response.status_code >= 500:
            status = f"status is {response.status_code}"
            raise ProbeError(f"the app is not well: {self.url}", app.LOOK_AT, status)

    async def measure(self, into: Measurement) -> None:
        await into.led(urlsplit(self.url).hostname)
        into.begin("http")
        await asyncio.to_thread(self.ask)
        into.begin("")


KINDS: dict[str, type[Probe]] = {
    kind.kind: kind
    for kind in (
        Stun,
        UdpPath,
        Turn,
        LiveKit,
        Join,
        Meet,
        Call,
        Recording,
        Https,
        Certificate,
        Health,
    )
}


def without_credentials(key: Key, **common: Any) -> Probe | None:
    """The probe of a key that can be asked without any credential: STUN, 401 on allocate, an HTTP
    status, a TLS handshake. None for a key of a kind that is not known; `common` as `Probe`."""
    kind, transport, port, name = key
    common |= {"port": port, "transport": transport}
    match kind:
        case "stun":
            return Stun(pool=name, **common)
        case "turn":
            pool, _, server = name.partition("@")
            return Turn(pool=pool, server_name=server, **common)
        case "livekit":
            where = endpoint(name or common["address"], port)
            return LiveKit(url=f"{'wss' if name else 'ws'}://{where}", server_name=name, **common)
        case "https":
            return Https(server_name=name, **common)
        case "certificate":
            return Certificate(server_name=name, **common)
        case "app":
            return Health(url=name, **{**common, "address": place(name)[0]})
    return None


def from_json(data: Mapping[str, Any]) -> Probe:
    """The probe that `as_json` wrote; raises ValueError for anything else."""
    values = dict(data)
    kind = KINDS.get(values.pop("kind", ""))
    if kind is None:
        raise ValueError(f"no such probe: {data.get('kind')}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:  # its text quotes values
        wrong = sorted({str(item["loc"][0]) for item in error.errors(include_input=False)})
        raise ValueError(f"a probe of kind {kind.kind} has other fields: {wrong}") from None

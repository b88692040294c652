"""ICE as a browser does it (RFC 8445): asks the servers that a join hands out, and makes a
connectivity check to each of LiveKit's candidates."""

from __future__ import annotations

import json
import re
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

from aioice import stun as messages

from callready.probes import TIMEOUT, ProbeError, endpoint, reason, stun, turn
from callready.probes.turn import Family, IceServer, TurnRefused, TurnServer

Via = Callable[[Literal["udp", "tcp"], str, int], tuple[str, int]]
"""Where to connect to instead, for packets to this address and port."""

Found = stun.Binding | turn.Allocation | ProbeError | None
Gathered = dict[str, Found]
"""What was found by the URI that was asked."""

# Of a peer-reflexive candidate (RFC 8445, section 5.1.2): what a check from an unknown port is.
_PRIORITY = (110 << 24) | (65_535 << 8) | 255
_OPTIONAL = (
    "PADDING"  # of a number whose attributes are passed over if unknown (RFC 8489, section 14)
)
messages.ATTRIBUTES_BY_NAME[_OPTIONAL] = (
    0xFFFE,
    _OPTIONAL,
    messages.pack_bytes,
    messages.unpack_bytes,
)
_RETRANSMIT = 0.5  # seconds (RFC 8489, section 6.2.1)


def direct(_proto: str, address: str, port: int) -> tuple[str, int]:
    """The way without a tunnel."""
    return address, port


@dataclass(frozen=True)
class Candidate:
    """Where LiveKit says that it takes media."""

    proto: Literal["udp", "tcp"]
    address: str
    port: int

    @property
    def family(self) -> Family:
        """The address family of its address."""
        return 6 if ":" in self.address else 4

    @property
    def way(self) -> str:
        """How callers say it: ``UDP`` or ``TCP``."""
        return self.proto.upper()

    def __str__(self) -> str:
        return f"{endpoint(self.address, self.port)}/{self.proto}"


@dataclass(frozen=True)
class Offer:
    """What LiveKit offers a caller, and the name that the caller gave itself in the answer."""

    username: str
    password: str = field(repr=False)
    own: str
    candidates: tuple[Candidate, ...]


def read_offer(sdp: str, trickled: Iterable[str]) -> Offer:
    """An offer from its SDP (RFC 8839) and the candidates that came after it, as JSON of
    RTCIceCandidateInit; candidates of other kinds than addresses are passed over."""
    username, password = (
        found[1] if (found := re.search(rf"^a=ice-{name}:(\S+)", sdp, re.MULTILINE)) else ""
        for name in ("ufrag", "pwd")
    )
    lines = re.findall(r"^a=(candidate:\S.*?)\r?$", sdp, re.MULTILINE)
    lines += [json.loads(each)["candidate"] for each in trickled]
    candidates = []
    for line in lines:  # candidate:FOUNDATION COMPONENT PROTO PRIORITY ADDRESS PORT …
        words = line.split()
        if len(words) > 5 and words[2].lower() in ("udp", "tcp"):
            proto: Literal["udp", "tcp"] = "udp" if words[2].lower() == "udp" else "tcp"
            candidates.append(Candidate(proto, words[4], int(words[5])))
    return Offer(username, password, secrets.token_hex(4), tuple(candidates))


def answer(offer: Offer) -> str:
    """The SDP of a caller who takes the offer and sends nothing; LiveKit answers connectivity
    checks of callers whose answer it has, of no other."""
    fingerprint = ":".join(f"{byte:02X}" for byte in secrets.token_bytes(32))
    lines = [
        *("v=0", "o=- 1 1 IN IP4 0.0.0.0", "s=-", "t=0 0", "a=group:BUNDLE 0"),
        *("m=application 9 UDP/DTLS/SCTP webrtc-datachannel", "c=IN IP4 0.0.0.0", "a=mid:0"),
        *("a=setup:active", "a=sctp-port:5000", f"a=ice-ufrag:{offer.own}"),
        *(f"a=ice-pwd:{secrets.token_hex(16)}", f"a=fingerprint:sha-256 {fingerprint}"),
    ]
    return "".join(f"{line}\r\n" for line in lines)


def request(offer: Offer, size: int = 0) -> messages.Message:
    """A connectivity check (RFC 8445, section 7.2), padded to `size` bytes."""
    message = messages.Message(messages.Method.BINDING, messages.Class.REQUEST)
    message.attributes["USERNAME"] = f"{offer.username}:{offer.own}"
    message.attributes["PRIORITY"] = _PRIORITY
    message.attributes["ICE-CONTROLLED"] = secrets.randbits(64)
    # Behind it come MESSAGE-INTEGRITY and FINGERPRINT.
    if (missing := size - len(bytes(message)) - 4 - 24 - 8) > 0:
        message.attributes[_OPTIONAL] = bytes(missing)
    message.add_message_integrity(offer.password.encode())
    message.add_fingerprint()
    return message


def check(offer: Offer, candidate: Candidate, via: Via = direct) -> float:
    """One connectivity check; seconds until its answer.

    Raises:
        ProbeError: none came that LiveKit has signed.
    """
    message = request(offer)
    ask = _over_udp if candidate.proto == "udp" else _over_tcp
    start = time.perf_counter()
    try:
        ask(
            message,
            offer.password.encode(),
            via(candidate.proto, candidate.address, candidate.port),
        )
    except OSError as error:
        raise ProbeError(
            f"calls get no media over {candidate.proto.upper()} (IPv{candidate.family})",
            "port_range_start to port_range_end (udp) and tcp_port (tcp) of livekit.rtc in "
            "nftables and in the provider's firewall, whether that address leads to this host, "
            "and deploy.gate_from where this network lets no UDP out",
            f"LiveKit's candidate {candidate} does not answer: {reason(error)}",
        ) from None
    return time.perf_counter() - start


def _over_udp(message: messages.Message, key: bytes, to: tuple[str, int]) -> None:
    with socket.socket(_family(to[0]), socket.SOCK_DGRAM) as channel:
        channel.settimeout(_RETRANSMIT)
        channel.connect(to)
        end = time.monotonic() + TIMEOUT / 2
        while time.monotonic() < end:
            channel.send(bytes(message))
            try:
                while not _is_answer(channel.recv(65_535), message, key):
                    pass
                return
            except TimeoutError:
                continue
    raise TimeoutError


def _over_tcp(message: messages.Message, key: bytes, to: tuple[str, int]) -> None:
    """Framed as RFC 4571 says (RFC 6544, section 3)."""
    with socket.create_connection(to, TIMEOUT / 2) as channel:
        channel.sendall(struct.pack("!H", len(bytes(message))) + bytes(message))
        stream = channel.makefile("rb")
        while head := stream.read(2):
            if _is_answer(stream.read(*struct.unpack("!H", head)), message, key):
                return
    raise ConnectionResetError("it closed the connection")


def answered(data: bytes, key: bytes) -> bytes | None:
    """The transaction of the check that this answers, signed with the offer's password; None of
    its own check of us, or somebody else's packet."""
    try:
        found = messages.parse_message(data)
    except ValueError:
        return None
    is_answer = found.message_class in (messages.Class.RESPONSE, messages.Class.ERROR)
    return found.transaction_id if is_answer and found.check_message_integrity(key) else None


def _is_answer(data: bytes, message: messages.Message, key: bytes) -> bool:
    return answered(data, key) == message.transaction_id


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def resolve(name: str, family: Family) -> str | None:
    """The first address of a name in a family, or None."""
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    try:
        found = socket.getaddrinfo(name, None, kind, socket.SOCK_DGRAM)
    except OSError:
        return None
    return str(found[0][4][0])


def ask_server(
    uri: str,
    given: IceServer,
    ca_file: str | None = None,
    verify: bool = True,
    family: Family | None = None,
    via: Via = direct,
) -> stun.Binding | turn.Allocation | None:
    """What a STUN or TURN server gives a caller: its own address, or a relay.

    Args:
        uri: one of the URIs of `given`.
        given: with the credentials.
        ca_file: PEM file of the authorities to trust; default the system's.
        verify: False takes any certificate.
        family: asked over this address family; default as the system chooses.
        via: the way there.

    Returns:
        None where there is nothing to be had for this caller and nothing wrong either: the name
        has no IPv6 address, or the quota is used up (said to those only whose password was right).

    Raises:
        NoUri: nobody can ask there.
        ProbeError: it does not answer, or refuses.
    """
    server = TurnServer.from_uri(re.sub("^stun:", "turn:", uri), ca_file)
    if (address := resolve(server.address, family) if family else server.address) is None:
        if family == 6 or ":" in server.address:
            return None
        why = "the name has no IPv4 address"
        raise ProbeError(f"callers get nothing from {uri}", "the name's A record", why)
    to = via(server.protocol, address, server.port)
    if uri.startswith("stun:"):
        return stun.binding(server.address, server.port, connect_to=to)
    try:
        credentials = turn.Credentials(given.username, given.credential)
        return turn.allocate(replace(server, verify=verify, connect_to=to), credentials)
    except TurnRefused as refused:
        if refused.code != 486:
            raise
        return None


def gather(
    ice_servers: Iterable[IceServer],
    ca_file: str | None = None,
    verify: bool = True,
    family: Family | None = None,
    via: Via = direct,
) -> Gathered:
    """What each STUN and TURN URI gives a caller, or why it gives nothing; arguments as
    `ask_server`."""

    def ask(each: tuple[str, IceServer]) -> Found:
        try:
            return ask_server(*each, ca_file, verify, family, via)
        except ProbeError as error:
            return error

    asked = {uri: given for given in ice_servers for uri in given.urls}
    with ThreadPoolExecutor(max(1, len(asked))) as threads:
        return dict(zip(asked, threads.map(ask, asked.items()), strict=True))

"""One caller at a TURN server: connect, allocate, permit, bind, and leave nothing behind.

Built on aioice's TURN client, which knows the protocol; here are the things a probe needs and it
hides: error codes, the address family, a certificate that fails.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

from aioice import stun as messages
from aioice.turn import UDP_TRANSPORT

from callready.probes import ProbeError, endpoint
from callready.probes.stun import Channel, NoAnswer, connect, request
from callready.probes.tls import client_context

# RFC 8656 section 18.6; aioice does not know it: its own client only relays over IPv4.
_FAMILY = "REQUESTED-ADDRESS-FAMILY"
messages.ATTRIBUTES_BY_NAME[_FAMILY] = (
    0x0017,
    _FAMILY,
    messages.pack_unsigned,
    messages.unpack_unsigned,
)

# What a caller suffers by code, and what to look at (RFC 8656 section 19).
_REFUSALS = {
    400: (
        "finds the request malformed",
        "the pool's realm (a comment behind it in the file gives 400)",
    ),
    401: (
        "does not accept the credentials",
        "whether the secret is the one in the pool's userdb, the expiry in the user name and "
        "the clocks of both sides",
    ),
    403: ("forbids this peer", "denied-peer-ip and allowed-peer-ip of the pool"),
    437: ("finds the allocation mismatched", "the server's log: it lost or kept an allocation"),
    438: ("keeps calling the nonce stale", "stale-nonce, and whether two servers share an address"),
    440: ("relays nothing of this address family", "relay-ip of the pool: one for each family"),
    441: ("sees other credentials than the allocation's", "whether two servers share an address"),
    442: ("does not relay over TCP", "no-tcp-relay, which is meant"),
    443: ("does not take a peer of the other address family", "the family of the allocation"),
    486: ("has reached this user's quota", "user-quota, and whether every call has its own name"),
    508: (
        "has no capacity left",
        "min-port and max-port, total-quota, and whether relay-ip is an address of the host",
    ),
}


@dataclass(frozen=True)
class TurnServer:
    """One way into a TURN server.

    Args:
        address: host name or IP address; its family is the one the caller uses.
        port: 3478, or 5349 over TLS (RFC 7065).
        transport: how the caller reaches it: ``udp``, ``tcp`` or ``tls``.
        server_name: the name its certificate must carry; default `address`.
        ca_file: PEM file of the authorities to trust; default the system's.
        verify: False takes any certificate.
        connect_to: where to connect to instead, if a tunnel leads there.
    """

    address: str
    port: int = 3478
    transport: Literal["udp", "tcp", "tls"] = "udp"
    server_name: str | None = None
    ca_file: str | None = None
    verify: bool = True
    connect_to: tuple[str, int] | None = None

    @classmethod
    def from_uri(cls, uri: str, ca_file: str | None = None) -> TurnServer:
        """The server that a TURN URI (RFC 7065) names.

        Raises:
            ProbeError: it is none.
        """
        found = re.fullmatch(
            r"(turns?):(\[[0-9a-fA-F:.]+\]|[^:?/@\[\]]+)(?::(\d+))?(?:\?transport=(udp|tcp))?", uri
        )
        if not found or (found[1] == "turns" and found[4] == "udp"):
            raise ProbeError(
                f"callers can do nothing with {uri!r}: it is no TURN URI over udp, tcp or tls",
                "where it was configured; turn:turn.example.com:3478?transport=udp is one",
            )
        secure = found[1] == "turns"
        port = int(found[3] or (5349 if secure else 3478))
        transport: Literal["udp", "tcp"] = "tcp" if found[4] == "tcp" else "udp"
        return cls(found[2].strip("[]"), port, "tls" if secure else transport, None, ca_file)

    @property
    def uri(self) -> str:
        """The TURN URI (RFC 7065) that a client would be given."""
        scheme, over = ("turns", "tcp") if self.transport == "tls" else ("turn", self.transport)
        return f"{scheme}:{endpoint(self.address, self.port)}?transport={over}"


@dataclass(frozen=True)
class Credentials:
    """A user name and password; the password never shows in a repr or a result."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class IceServer:
    """STUN or TURN URIs (RFC 7064, RFC 7065) as a client gets them, with their credentials."""

    urls: tuple[str, ...]
    username: str = ""
    credential: str = field(default="", repr=False)


@dataclass(frozen=True)
class Allocation:
    """A granted allocation: relayed and mapped transport address, lifetime, time it took (s)."""

    relayed_address: str
    relayed_port: int
    mapped_address: str
    mapped_port: int
    lifetime: int
    time_to_allocate: float


class TurnRefused(ProbeError):
    """The server answered with an error code (`code`, `reason` as it sent them)."""

    def __init__(self, server: TurnServer, code: int, reason: str, about: str = "") -> None:
        does, look_at = _REFUSALS.get(code, ("refuses", "the pool's log"))
        super().__init__(
            f"callers get no relay through {server.uri}: it {does}{about} ({code} {reason})",
            look_at,
        )
        self.code = code
        self.reason = reason


class Client:
    """One caller at a TURN server; `client` opens and closes it."""

    def __init__(self, server: TurnServer, channel: Channel, started: float) -> None:
        self.server = server
        self.channel = channel
        self._started = started
        self._allocated = False

    async def ask(
        self, method: messages.Method, attributes: dict[str, Any], about: str = ""
    ) -> dict[str, Any]:
        """The attributes of the success response to a request with these attributes."""
        message = messages.Message(method, messages.Class.REQUEST, attributes=attributes)
        try:
            return (await request(self.channel, message)).attributes
        except NoAnswer as error:
            raise _unreachable(self.server, error) from None
        except messages.TransactionFailed as error:
            code, why = error.response.attributes.get("ERROR-CODE", (0, "without a code"))
            raise TurnRefused(self.server, code, why.rstrip("\0 "), about) from None

    async def allocate(
        self, family: Literal[4, 6] = 4, transport: int = UDP_TRANSPORT
    ) -> Allocation:
        """Ask for a relayed address (RFC 8656 section 7)."""
        wanted = {"REQUESTED-TRANSPORT": transport, "LIFETIME": 600}
        if family == 6:  # without the attribute a server relays over IPv4, and browsers send none
            wanted[_FAMILY] = 0x02000000
        got = await self.ask(messages.Method.ALLOCATE, wanted)
        self._allocated = True
        took = time.perf_counter() - self._started
        relayed: tuple[str, int] = got["XOR-RELAYED-ADDRESS"]
        mapped: tuple[str, int] = got["XOR-MAPPED-ADDRESS"]
        allocation = Allocation(*relayed, *mapped, got["LIFETIME"], took)
        if ipaddress.ip_address(allocation.relayed_address).version != family:
            raise ProbeError(
                f"{self.server.uri} relays through {allocation.relayed_address}, not over "
                f"IPv{family} as asked",
                "allocation-default-address-family and relay-ip of the pool",
            )
        return allocation

    async def permit(self, peer: str) -> None:
        """Ask for permission to exchange data with a peer (RFC 8656 section 10)."""
        await self.ask(
            messages.Method.CREATE_PERMISSION, {"XOR-PEER-ADDRESS": (peer, 9)}, f" {peer}"
        )

    async def bind(self, peer: tuple[str, int]) -> None:
        """Bind a channel to a peer (RFC 8656 section 12), for ``channel.send_data``."""
        number = self.channel.channel_number
        attributes = {"CHANNEL-NUMBER": number, "XOR-PEER-ADDRESS": peer}
        await self.ask(messages.Method.CHANNEL_BIND, attributes, f" {peer[0]}")
        self.channel.channel_to_peer[number] = peer
        self.channel.peer_to_channel[peer] = number
        self.channel.channel_refresh_at[number] = float("inf")

    async def close(self) -> None:
        """Give the allocation back (a Refresh with lifetime 0) and close the connection."""
        try:
            if self._allocated:
                await self.ask(messages.Method.REFRESH, {"LIFETIME": 0})
        except ProbeError:
            pass  # the probe has its result already; the server frees it when it expires
        finally:
            self.channel.transport.close()


@contextlib.asynccontextmanager
async def client(server: TurnServer, credentials: Credentials | None) -> AsyncIterator[Client]:
    """A connected caller, anonymous without credentials; leaves no allocation behind.

    Raises:
        ProbeError: no connection, or TLS that a caller would not trust.
    """
    started = time.perf_counter()
    over_tls = server.transport == "tls"
    try:
        channel = await connect(
            server.connect_to or (server.address, server.port),
            "udp" if server.transport == "udp" else "tcp",
            client_context(server.ca_file, server.verify) if over_tls else None,
            server.server_name or server.address,
        )
    except NoAnswer as error:
        raise _unreachable(server, error) from None
    if credentials:
        channel.username, channel.password = credentials.username, credentials.password
    caller = Client(server, channel, started)
    try:
        yield caller
    finally:
        await caller.close()


def _unreachable(server: TurnServer, error: NoAnswer) -> ProbeError:
    over = "udp" if server.transport == "udp" else "tcp"
    certificate = (
        ""
        if server.transport != "tls"
        else (
            "its certificate (callready.probes.tls says more; coturn drops its TLS listener "
            "silently when certificate or key cannot be read), "
        )
    )
    return ProbeError(
        f"callers get no relay through {server.uri}",
        f"{certificate}the pool's turnserver@ unit and listeners, {server.port}/{over} in nftables "
        "and in the provider's firewall",
        str(error),
    )

"""LiveKit's signalling: is it up, does it take our tokens, which ICE servers does it hand out."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import json
import os
import secrets
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from livekit.protocol.rtc import (
    LeaveRequest,
    SessionDescription,
    SignalRequest,
    SignalResponse,
    SignalTarget,
)
from pydantic import SecretStr
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus, WebSocketException

from callready.probes import TIMEOUT, ProbeError, command, ice, reason, run, secret_from
from callready.probes.app import connected, get, web_url
from callready.probes.turn import Family, IceServer
from callready.settings.edge import VIA_PEER

WAIT = TIMEOUT / 2
"""Seconds for each part of a join, so that a gate can try again."""

# What the server says of a token (livekit-server pkg/service/rtcservice.go), and what to mend.
REFUSED_TOKEN = (
    "whether the app's LIVEKIT_API_KEY and LIVEKIT_API_SECRET (.env) are in keys of livekit.yaml, "
    "whether LiveKit was restarted since, and the clocks of both sides"
)


@dataclass(frozen=True)
class Health:
    """HTTP status of ``/``, the time the answer took (s), and whether it came from the edge of
    another SFU."""

    status: int
    rtt: float
    from_peer: bool = False


@dataclass(frozen=True)
class Joined:
    """What a client is told when it joins; `ice_servers` hide their credentials in a repr."""

    server_version: str
    node_id: str
    ice_servers: tuple[IceServer, ...]
    time_to_join: float


@dataclass(frozen=True)
class Reached:
    """What a join leads to: of each ICE server what it gave, of each of LiveKit's candidates the
    seconds until it answered, or why that was nothing; and the node that the room is on, with its
    version."""

    node_id: str
    server_version: str
    servers: ice.Gathered
    candidates: dict[ice.Candidate, float | ProbeError]


def health(
    url: str,
    again_after: float = 0,
    ca_file: str | None = None,
    at: tuple[str, int] | None = None,
    verify: bool = True,
) -> Health:
    """GET ``/``: 200 while the server is well.

    Args:
        url: ``ws://``, ``wss://``, ``http://`` or ``https://`` URL of LiveKit.
        again_after: seconds after which it must still be well: a server that cannot read its
            node statistics says 200 at first and 406 after four seconds; use 5. 0: ask once.
        ca_file, at, verify: as `app.get` takes them.

    Raises:
        ProbeError: no answer, or another status.
    """
    response, rtt = get(web_url(url, "http"), ca_file, at=at, verify=verify)
    if response.status_code == 406:
        raise ProbeError(
            f"no new call starts: {url} says 406, its node statistics are stale",
            "whether its Redis answers, if it has one; whether livekit-server can read "
            "/proc/loadavg (ProcSubset=pid in its unit prevents it); the machine's load",
        )
    if response.status_code != 200:
        raise ProbeError(
            f"no call starts: {url} answers {response.status_code} instead of 200",
            "whether that is LiveKit (port 7880) or another program, and a proxy before it",
        )
    if again_after:
        time.sleep(again_after)
        return health(url, 0, ca_file, at, verify)
    return Health(response.status_code, rtt, VIA_PEER in response.headers.get("via", ""))


def new_room() -> str:
    """A name for a room of ours. Events of such rooms reach the app's webhook too, which knows them
    by how they begin."""
    return f"callready-{secrets.token_hex(8)}"


def token(
    key: str,
    secret: SecretStr,
    room: str | None = None,
    identity: str | None = None,
    ttl: float = 600,
    create: bool = False,
) -> SecretStr:
    """An access token to join one room.

    Args:
        key: API key. secret: API secret.
        room: default a new random one, so that probes meet nobody.
        identity: default a new random one.
        ttl: seconds until it expires; negative for one that has.
        create: whether it may create the room too.
    """
    grants = {"room": room or new_room(), "roomJoin": True, "roomCreate": create}
    return granting(key, secret, grants, ttl, identity or f"probe-{secrets.token_hex(4)}")


def granting(
    key: str, secret: SecretStr, grants: Mapping[str, object], ttl: float, identity: str = "probe"
) -> SecretStr:
    """An access token with these grants (docs.livekit.io, "video grant"); arguments as `token`."""
    now = int(time.time())
    claims = {"iss": key, "sub": identity, "nbf": now, "exp": now + int(ttl), "video": grants}
    # By hand (RFC 7519): livekit.api would cost each process of the synthetic caller 10 MB.
    parts = [json.dumps(each).encode() for each in ({"alg": "HS256", "typ": "JWT"}, claims)]
    signed = b".".join(map(_encoded, parts))
    signature = hmac.digest(secret.get_secret_value().encode(), signed, "sha256")
    return SecretStr(f"{signed.decode()}.{_encoded(signature).decode()}")


def _encoded(octets: bytes) -> bytes:
    return urlsafe_b64encode(octets).rstrip(b"=")


def validate(
    url: str,
    token: SecretStr,
    ca_file: str | None = None,
    at: tuple[str, int] | None = None,
    verify: bool = True,
) -> int:
    """The HTTP status ``/rtc/validate`` gives a token: 200, or 401 where it is refused.

    `ca_file`, `at` and `verify` as `app.get` takes them.

    Raises:
        ProbeError: no answer.
    """
    headers = {
        "Authorization": f"Bearer {token.get_secret_value()}"
    }  # in the URL it would end up in logs
    address = web_url(url, "http", "/rtc/validate")
    response, _ = get(address, ca_file, headers, at=at, verify=verify)
    return response.status_code


@asynccontextmanager
async def joined(
    url: str,
    token: SecretStr,
    ca_file: str | None = None,
    at: tuple[str, int] | None = None,
    verify: bool = True,
) -> AsyncIterator[tuple[Joined, ClientConnection]]:
    """Join over the WebSocket as a client does; leaves with the block.

    Gives what the client is told, and its connection. Arguments as `validate`.

    Raises:
        ProbeError: no connection, a refused token, or no join response.
    """
    address = web_url(url, "ws", "/rtc?protocol=15&auto_subscribe=0")
    start = time.perf_counter()
    try:
        headers = {"Authorization": f"Bearer {token.get_secret_value()}"}
        # What is left of a connection that failed is not waited for: the next try is.
        options = {"additional_headers": headers, "close_timeout": 0.5}
        async with connected(address, ca_file, at, verify, **options) as socket:
            async with asyncio.timeout(WAIT):
                while not (message := await _message(socket)).HasField("join"):
                    pass
            told = message.join
            took = time.perf_counter() - start
            servers = tuple(
                IceServer(tuple(each.urls), each.username, each.credential)
                for each in told.ice_servers
            )
            try:
                yield (
                    Joined(told.server_info.version, told.server_info.node_id, servers, took),
                    socket,
                )
            finally:
                with contextlib.suppress(OSError, WebSocketException):
                    await socket.send(SignalRequest(leave=LeaveRequest()).SerializeToString())
    except InvalidStatus as error:
        status = error.response.status_code
        raise ProbeError(
            f"no call starts: signalling at {url} answers {status}",
            REFUSED_TOKEN if status == 401 else "LiveKit's log, and a proxy before it",
        ) from None
    except (OSError, WebSocketException) as error:
        raise ProbeError(
            f"no call starts: no signalling at {url}",
            "livekit-server.service, its port in nftables and in the provider's firewall, and a "
            "proxy that must pass WebSockets on",
            reason(error),
        ) from None


async def _message(socket: ClientConnection) -> SignalResponse:
    """What LiveKit says next."""
    response = SignalResponse()
    response.ParseFromString(await socket.recv(decode=False))
    return response


def signalling(url: str, token: SecretStr, ca_file: str | None = None) -> Joined:
    """What a client is told when it joins; arguments and errors as `joined`."""

    async def attempt() -> Joined:
        async with joined(url, token, ca_file) as (told, _):
            return told

    return asyncio.run(attempt())


def reach(
    url: str,
    key: str,
    secret: SecretStr,
    ca_file: str | None = None,
    at: tuple[str, int] | None = None,
    verify: bool = True,
    family: Family | None = None,
    node_id: str = "",
    via: ice.Via = ice.direct,
) -> Reached:
    """Join a room of its own and do what a browser does then: ask each ICE server, and check each
    of LiveKit's candidates.

    Args:
        url, ca_file, at, verify: as `validate` takes them.
        key, secret: of the API.
        family: asked over this address family only.
        node_id: of a cluster's node, to have the room there.
        via: the way to ICE servers and candidates.

    Raises:
        ProbeError: it cannot join.
    """

    def check(offer: ice.Offer, candidate: ice.Candidate) -> float | ProbeError:
        try:
            return ice.check(offer, candidate, via)
        except ProbeError as error:
            return error

    def ask(told: Joined, offer: ice.Offer) -> Reached:
        wanted = [c for c in offer.candidates if family in (None, c.family)]
        with ThreadPoolExecutor(max(1, len(wanted))) as threads:
            checks = threads.map(partial(check, offer), wanted)
            servers = ice.gather(told.ice_servers, ca_file, verify, family, via)
            return Reached(
                told.node_id, told.server_version, servers, dict(zip(wanted, checks, strict=True))
            )

    async def attempt() -> Reached:
        async with offered(url, key, secret, ca_file, at, verify, node_id) as (told, offer):
            return await asyncio.to_thread(ask, told, offer)

    return asyncio.run(attempt())


@asynccontextmanager
async def offered(
    url: str,
    key: str,
    secret: SecretStr,
    ca_file: str | None = None,
    at: tuple[str, int] | None = None,
    verify: bool = True,
    node_id: str = "",
) -> AsyncIterator[tuple[Joined, ice.Offer]]:
    """Join a room of its own and take LiveKit's offer, whose candidates then answer checks until
    the block ends; arguments and errors as `reach`."""
    room = new_room()
    access = token(key, secret, room, ttl=60, create=True)
    await asyncio.to_thread(create_room, url, access, room, node_id, ca_file, at, verify)
    async with joined(url, access, ca_file, at, verify) as (told, socket):
        yield told, await _offer(url, socket)


def create_room(
    url: str,
    token: SecretStr,
    room: str,
    node_id: str = "",
    ca_file: str | None = None,
    at: tuple[str, int] | None = None,
    verify: bool = True,
) -> None:
    """Make a room that is gone as soon as it is empty, on a node of a cluster if one is named: not
    every LiveKit makes rooms by itself (`room.auto_create`).

    Raises:
        ProbeError: it answers, but not from the node that is named.
    """
    body = {"name": room, "emptyTimeout": 10, "departureTimeout": 1, "nodeId": node_id}
    headers = {"Authorization": f"Bearer {token.get_secret_value()}"}
    address = web_url(url, "http", "/twirp/livekit.RoomService/CreateRoom")
    response, _ = get(address, ca_file, headers, body, at=at, verify=verify)
    if node_id and response.status_code != 200:
        raise ProbeError(
            f"no room can be made on node {node_id} of the cluster: {url} answers "
            f"{response.status_code}",
            "livekit.redis, and LiveKit's log",
        )


async def _offer(url: str, socket: ClientConnection) -> ice.Offer:
    """LiveKit's offer with all of its candidates; it is answered, without which no check is.

    Raises:
        ProbeError: it does not come.
    """
    sdp, trickled = "", []
    try:
        async with asyncio.timeout(WAIT):
            is_whole = False
            while not is_whole:
                each = await _message(socket)
                if each.HasField("offer"):
                    sdp = each.offer.sdp
                elif each.HasField("trickle") and each.trickle.target == SignalTarget.SUBSCRIBER:
                    trickled.append(each.trickle.candidateInit)
                    is_whole = each.trickle.final
    except TimeoutError:
        raise ProbeError(
            f"no call starts: {url} lets callers join and does not offer them media",
            "LiveKit's log, and the machine's load",
            f"{'an' if sdp else 'no'} offer with {len(trickled)} candidates and no end",
        ) from None
    offer = ice.read_offer(sdp, trickled)
    answer = SessionDescription(type="answer", sdp=ice.answer(offer))
    await socket.send(SignalRequest(answer=answer).SerializeToString())
    return offer


def keys_from(options: argparse.Namespace) -> tuple[str, SecretStr]:
    """API key and secret for a command: from the environment, the secret also from a file."""
    key = secret_from("LIVEKIT_API_KEY", None).get_secret_value()
    return key, secret_from("LIVEKIT_API_SECRET", options.secret_file)


def add_url(parser: argparse.ArgumentParser) -> None:
    """The URL of LiveKit as a command's argument, or from the environment."""
    default = os.environ.get("LIVEKIT_URL")
    parser.add_argument(
        "url",
        nargs="?" if default else None,
        default=default,
        help="ws:// or wss:// URL (default: LIVEKIT_URL)",
    )


def _probe(options: argparse.Namespace) -> object:
    if options.what == "health":
        return health(options.url, options.again_after, options.ca_file)
    if options.what == "join":
        found = reach(options.url, *keys_from(options), options.ca_file)
        for result in (*found.servers.values(), *found.candidates.values()):
            if isinstance(result, ProbeError):
                raise result
        return {"ice_servers": list(found.servers), "candidates": list(map(str, found.candidates))}
    mine = token(*keys_from(options))
    if options.what == "signalling":
        return signalling(options.url, mine, options.ca_file)
    status = validate(options.url, mine, options.ca_file)
    if status != 200:
        raise ProbeError(
            f"no call starts: {options.url} refuses the token with {status}", REFUSED_TOKEN
        )
    return {"status": status}


def main() -> None:
    parser = command(
        "livekit",
        f"{__doc__} LIVEKIT_API_KEY and LIVEKIT_API_SECRET are read from the environment.",
        "--secret-file",
        "--ca-file",
    )
    parser.add_argument("what", choices=["health", "validate", "signalling", "join"])
    add_url(parser)
    parser.add_argument(
        "--again-after",
        type=float,
        default=0,
        metavar="S",
        help="health: ask again after so many seconds",
    )
    run(parser, _probe)


if __name__ == "__main__":
    main()

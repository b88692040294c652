"""LiveKit's signalling: is it up, does it take our tokens, which ICE servers does it hand out."""

from __future__ import annotations

import argparse
import os
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta

from livekit.api import AccessToken, VideoGrants
from livekit.protocol.rtc import LeaveRequest, SignalRequest, SignalResponse
from pydantic import SecretStr
from websockets.exceptions import InvalidStatus, WebSocketException

from callready.probes import TIMEOUT, ProbeError, command, reason, run, secret_from
from callready.probes.app import connected, get, web_url
from callready.probes.turn import IceServer

# What the server says of a token (livekit-server pkg/service/rtcservice.go), and what to mend.
REFUSED_TOKEN = (
    "whether the app's LIVEKIT_API_KEY and LIVEKIT_API_SECRET (.env) are in keys of livekit.yaml, "
    "whether LiveKit was restarted since, and the clocks of both sides"
)


@dataclass(frozen=True)
class Health:
    """HTTP status of ``/`` and the time the answer took (s)."""

    status: int
    rtt: float


@dataclass(frozen=True)
class Joined:
    """What a client is told when it joins; `ice_servers` hide their credentials in a repr."""

    server_version: str
    ice_servers: tuple[IceServer, ...]
    time_to_join: float


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
            "whether livekit-server can read /proc/loadavg (ProcSubset=pid in its unit prevents "
            "it), and the machine's load",
        )
    if response.status_code != 200:
        raise ProbeError(
            f"no call starts: {url} answers {response.status_code} instead of 200",
            "whether that is LiveKit (port 7880) or another program, and a proxy before it",
        )
    if again_after:
        time.sleep(again_after)
        return health(url, 0, ca_file, at, verify)
    return Health(response.status_code, rtt)


def token(
    key: str,
    secret: SecretStr,
    room: str | None = None,
    identity: str | None = None,
    ttl: float = 600,
) -> SecretStr:
    """An access token to join one room.

    Args:
        key: API key. secret: API secret.
        room: default a new random one, so that probes meet nobody.
        identity: default a new random one.
        ttl: seconds until it expires; negative for one that has.
    """
    grants = VideoGrants(room_join=True, room=room or f"probe-{secrets.token_hex(8)}")
    access = AccessToken(key, secret.get_secret_value()).with_grants(grants)
    access.with_identity(identity or f"probe-{secrets.token_hex(4)}").with_ttl(
        timedelta(seconds=ttl)
    )
    return SecretStr(access.to_jwt())


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


def signalling(url: str, token: SecretStr, ca_file: str | None = None) -> Joined:
    """Join over the WebSocket as a client does, read what it is told, and leave.

    Raises:
        ProbeError: no connection, a refused token, or no join response.
    """
    address = web_url(url, "ws", "/rtc?protocol=15&auto_subscribe=0")
    start = time.perf_counter()
    try:
        headers = {"Authorization": f"Bearer {token.get_secret_value()}"}
        with connected(address, ca_file, additional_headers=headers) as socket:
            response = SignalResponse()
            while response.WhichOneof("message") != "join":
                left = start + TIMEOUT - time.perf_counter()
                response.ParseFromString(socket.recv(timeout=left, decode=False))
            took = time.perf_counter() - start
            socket.send(SignalRequest(leave=LeaveRequest()).SerializeToString())
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
    servers = tuple(
        IceServer(tuple(each.urls), each.username, each.credential)
        for each in response.join.ice_servers
    )
    return Joined(response.join.server_info.version, servers, took)


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
    parser.add_argument("what", choices=["health", "validate", "signalling"])
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

"""The app's own endpoints: HTTP health with its JSON fields, and a WebSocket exchange."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import httpx
from pydantic import SecretStr
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, WebSocketException

from callready.probes import TIMEOUT, ProbeError, command, reason, run
from callready.probes.tls import shared_context
from callready.probes.turn import IceServer

Scheme = Literal["http", "ws"]
LOOK_AT = "the app's unit and its log, and a proxy before it"


@dataclass(frozen=True)
class AppHealth:
    """HTTP status, the fields asked for as they were found, the time the answer took (s)."""

    status: int
    fields: dict[str, Any]
    rtt: float


@dataclass(frozen=True)
class Exchange:
    """What came back over a WebSocket, the time from connecting and from sending (s)."""

    received: str
    time_to_connect: float
    rtt: float


def web_url(url: str, scheme: Scheme, path: str | None = None) -> str:
    """`url` as ``http(s)`` or ``ws(s)``, with another path if one is given."""
    parts = urlsplit(url)
    secure = parts.scheme in ("https", "wss")
    if not parts.hostname or not (secure or parts.scheme in ("http", "ws")):
        raise ProbeError(f"{url!r} is no ws://, wss://, http:// or https:// URL", "the setting")
    base = urlunsplit((scheme + "s" * secure, parts.netloc, "", "", ""))
    return base + (path or parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def get(
    url: str,
    ca_file: str | None = None,
    headers: Mapping[str, str] | None = None,
    body: Mapping[str, Any] | None = None,
    at: tuple[str, int] | None = None,
    verify: bool = True,
    timeout: float = TIMEOUT,
) -> tuple[httpx.Response, float]:
    """GET without a proxy and without following redirects; the response and its time (s).

    Args:
        url: http:// or https:// URL.
        ca_file: PEM file of the authorities to trust; default the system's.
        headers: of the request.
        body: POSTed as JSON instead.
        at: address and port to connect to, wherever the URL's name leads.
        verify: False takes any certificate.
        timeout: seconds until it must have answered.

    Raises:
        ProbeError: no answer in time, or a certificate that callers refuse.
    """
    target = httpx.URL(url)
    headers = {"Host": target.netloc.decode(), **(headers or {})}
    place = target.copy_with(host=at[0], port=at[1]) if at else target
    extensions = {"sni_hostname": target.host}
    context = shared_context("http", ca_file, verify)
    try:
        with httpx.Client(verify=context, trust_env=False, timeout=timeout) as client:
            start = time.perf_counter()
            if body:
                response = client.post(place, headers=headers, json=body, extensions=extensions)
            else:
                response = client.get(place, headers=headers, extensions=extensions)
            return response, time.perf_counter() - start
    except (httpx.HTTPError, OSError) as error:
        raise ProbeError(
            f"callers get no answer from {url}",
            "whether the service runs and listens on that port, nftables and the provider's "
            "firewall, and for https the certificate",
            reason(error),
        ) from None


def health(
    url: str,
    status: int = 200,
    fields: Mapping[str, Any] | None = None,
    ca_file: str | None = None,
    at: tuple[str, int] | None = None,
    verify: bool = True,
) -> AppHealth:
    """GET `url` and compare its status and JSON fields.

    Args:
        url: http:// or https:// URL.
        status: the status it must have.
        fields: values by dotted path (``"database.ok": True``, list items by number).
        ca_file, at, verify: as `get` takes them.

    Raises:
        ProbeError: no answer, or everything in it that differs.
    """
    response, rtt = get(url, ca_file, at=at, verify=verify)
    wrong, values = [], {}
    if response.status_code != status:
        wrong.append(f"status is {response.status_code}, not {status}")
    try:
        body = response.json() if fields else None
        values = {path: _field(body, path) for path in fields or ()}
    except ValueError:
        wrong.append("the body is not JSON")
    for path, value in values.items():
        wanted = (fields or {})[path]
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            wrong.append(f"{path} is {json.dumps(value)}, not {json.dumps(wanted)}")
    if wrong:
        raise ProbeError(f"the app is not well: {url}", LOOK_AT, "; ".join(wrong))
    return AppHealth(response.status_code, values, rtt)


def _field(body: Any, path: str) -> Any:
    for part in path.split("."):
        try:
            body = body[int(part) if isinstance(body, list) else part]
        except (LookupError, TypeError, ValueError):
            return None
    return body


def token(
    url: str, bearer: SecretStr | None, room: str, identity: str, ca_file: str | None = None
) -> tuple[str, SecretStr]:
    """LiveKit's URL and a token to join a room, from the app's ``/token`` (examples/backend).

    Args:
        url: the app's URL, without the path.
        bearer: what the app asks of its callers; None asks without.
        room: to join.
        identity: to join as.
        ca_file: PEM file of the authorities to trust; default the system's.

    Raises:
        Refused: 401 or 403.
        ProbeError: no answer, or another one.
    """
    given = _given(url, "token", ("url", "token"), bearer, ca_file, room=room, identity=identity)
    return given["url"], SecretStr(given["token"])


def turn_credentials(url: str, bearer: SecretStr | None, ca_file: str | None = None) -> IceServer:
    """STUN and TURN servers from the app's ``/turn-credentials``; arguments and errors as `token`.

    Raises ProbeError too for credentials that live less than a minute.
    """
    given = _given(url, "turn-credentials", ("username", "credential"), bearer, ca_file)
    ttl, uris = given.get("ttl"), given.get("uris")
    if not isinstance(ttl, int) or ttl < 60:
        raise ProbeError(f"calls lose their relay: {url} says ttl {ttl}", LOOK_AT)
    if not isinstance(uris, list) or not uris:
        raise ProbeError(f"callers get no relay: {url}/turn-credentials names no uris", LOOK_AT)
    return IceServer(tuple(map(str, uris)), given["username"], given["credential"])


class Refused(ProbeError):
    """The app wants its callers to authenticate."""


def _given(
    url: str,
    path: str,
    texts: tuple[str, ...],
    bearer: SecretStr | None,
    ca_file: str | None,
    **body: str,
) -> dict[str, Any]:
    """What the app answers, with these texts in it."""
    headers = {"Authorization": f"Bearer {bearer.get_secret_value()}"} if bearer else {}
    response, _ = get(f"{url}/{path}", ca_file, headers, body)
    if response.status_code in (401, 403):
        raise Refused(
            f"callers get {response.status_code} from the app: {url}/{path}",
            "APP_TOKEN in its .env, and whether it was restarted since",
        )
    try:
        given = response.json()
    except ValueError:
        given = None
    if response.status_code != 200 or not isinstance(given, dict):
        raise ProbeError(
            f"the app gives callers nothing: {url}/{path} answers {response.status_code}", LOOK_AT
        )
    for key in texts:
        if not isinstance(given.get(key), str):
            raise ProbeError(f"the app gives callers no {key}: {url}", LOOK_AT)
    return given


@asynccontextmanager
async def connected(
    url: str,
    ca_file: str | None,
    at: tuple[str, int] | None = None,
    verify: bool = True,
    **options: Any,
) -> AsyncIterator[ClientConnection]:
    """A WebSocket to a ws:// or wss:// URL; `at` and `verify` as `get`, `options` as websockets
    takes them. Its client of threads is not for this: it reads from one TLS connection and writes
    to it at the same time, which OpenSSL does not allow, and one request in forty hung.

    Raises:
        InvalidStatus: the HTTP status was another one.
        OSError, WebSocketException: no connection.
    """
    context = shared_context("ws", ca_file, verify) if url.startswith("wss:") else None
    options = {"open_timeout": TIMEOUT, "close_timeout": TIMEOUT, **options}
    if at:
        options |= {"host": at[0], "port": at[1]}
    async with connect(url, ssl=context, proxy=None, **options) as channel:
        yield channel


def websocket(url: str, send: str, expect: str, ca_file: str | None = None) -> Exchange:
    """Open a WebSocket, send a text, and wait for a message that contains another.

    Args:
        url: ws:// or wss:// URL.
        send: text message to send.
        expect: text that a message within 5 s must contain.
        ca_file: PEM file of the authorities to trust; default the system's.

    Raises:
        ProbeError: no connection, or no such message.
    """
    url, seen = web_url(url, "ws"), 0

    async def exchange() -> Exchange:
        nonlocal seen
        start = time.perf_counter()
        async with connected(url, ca_file) as channel, asyncio.timeout(TIMEOUT):
            sent = time.perf_counter()
            await channel.send(send)
            while True:
                message = await channel.recv()
                text = message if isinstance(message, str) else message.decode(errors="replace")
                if expect in text:
                    return Exchange(text, sent - start, time.perf_counter() - sent)
                seen += 1

    try:
        return asyncio.run(exchange())
    except InvalidStatus as error:
        why = f"answers {error.response.status_code} instead of a WebSocket"
    except (OSError, WebSocketException) as error:
        why = f"gave {seen} other messages, then: {reason(error)}"
    raise ProbeError(f"the app does not talk to its users: {url} {why}", LOOK_AT)


def main() -> None:
    parser = command("app", __doc__, "--ca-file")
    parser.add_argument("url", help="http(s):// for health, ws(s):// for an exchange")
    parser.add_argument("--status", type=int, default=200, help="health: default %(default)s")
    parser.add_argument(
        "--field",
        action="append",
        type=_path_and_value,
        default=[],
        metavar="PATH=JSON",
        help="health: a field and its value, database.ok=true; may be repeated",
    )
    parser.add_argument("--send", default="", help="WebSocket: text to send")
    parser.add_argument("--expect", default="", help="WebSocket: text an answer must contain")
    run(parser, _probe)


def _path_and_value(text: str) -> tuple[str, Any]:
    path, _, value = text.partition("=")
    try:
        return path, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            "it wants PATH=JSON, for example database.ok=true or name='\"x\"'"
        ) from None


def _probe(options: argparse.Namespace) -> AppHealth | Exchange:
    if options.url.startswith("ws"):
        return websocket(options.url, options.send, options.expect, options.ca_file)
    return health(options.url, options.status, dict(options.field), options.ca_file)


if __name__ == "__main__":
    main()

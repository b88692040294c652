"""The app's own endpoints: HTTP health with its JSON fields, and a WebSocket exchange."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import httpx
import websockets
from pydantic import SecretStr

from callready.probes import TIMEOUT, ProbeError, reason, run
from callready.probes.tls import client_context
from callready.probes.turn_client import IceServer

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
    body: Mapping[str, str] | None = None,
    server_name: str | None = None,
    at: tuple[str, int] | None = None,
    verify: bool = True,
) -> tuple[httpx.Response, float]:
    """GET without a proxy and without following redirects; the response and its time (s).

    Args:
        url: http:// or https:// URL.
        ca_file: PEM file of the authorities to trust; default the system's.
        headers: of the request.
        body: POSTed as JSON instead.
        server_name: asked for in TLS and verified, where the URL has an address.
        at: address and port to connect to, wherever the URL's name leads.
        verify: False takes any certificate.

    Raises:
        ProbeError: no answer in 5 s, or a certificate that callers refuse.
    """
    context = client_context(ca_file, verify)
    target = httpx.URL(url)
    if at:
        headers = {"Host": target.netloc.decode(), **(headers or {})}
        server_name = server_name or target.host
        target = target.copy_with(host=at[0], port=at[1])
    try:
        with httpx.Client(verify=context, trust_env=False, timeout=TIMEOUT) as client:
            start = time.perf_counter()
            response = client.request(
                "POST" if body else "GET",
                target,
                headers=headers,
                json=body,
                extensions={"sni_hostname": server_name} if server_name else {},
            )
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
    wrong, found = [], {}
    if response.status_code != status:
        wrong.append(f"status is {response.status_code}, not {status}")
    if fields:
        try:
            body = response.json()
        except ValueError:
            body, wrong = None, [*wrong, "the body is not JSON"]
        for path, value in fields.items() if body is not None else ():
            found[path] = _field(body, path)
            if found[path] != value or isinstance(found[path], bool) != isinstance(value, bool):
                wrong.append(f"{path} is {json.dumps(found[path])}, not {json.dumps(value)}")
    if wrong:
        raise ProbeError(f"the app is not well: {url}", LOOK_AT, "; ".join(wrong))
    return AppHealth(response.status_code, found, rtt)


def _field(body: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(body, dict):
            body = body.get(part)
        elif isinstance(body, list) and part.isdigit() and int(part) < len(body):
            body = body[int(part)]
        else:
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
    found = _issued(f"{url}/token", bearer, ca_file, {"room": room, "identity": identity})
    return _text(found, "url", url), SecretStr(_text(found, "token", url))


def turn_credentials(url: str, bearer: SecretStr | None, ca_file: str | None = None) -> IceServer:
    """STUN and TURN servers from the app's ``/turn-credentials``; arguments and errors as `token`.

    Raises ProbeError too for credentials that live less than a minute.
    """
    found = _issued(f"{url}/turn-credentials", bearer, ca_file)
    if not isinstance(found.get("ttl"), int) or found["ttl"] < 60:
        raise ProbeError(f"calls lose their relay: {url} says ttl {found.get('ttl')}", LOOK_AT)
    uris = found.get("uris")
    if not isinstance(uris, list) or not uris:
        raise ProbeError(f"callers get no relay: {url}/turn-credentials names no uris", LOOK_AT)
    credentials = _text(found, "username", url), _text(found, "credential", url)
    return IceServer(tuple(map(str, uris)), *credentials)


class Refused(ProbeError):
    """The app wants its callers to authenticate."""


def _issued(
    url: str, bearer: SecretStr | None, ca_file: str | None, body: Mapping[str, str] | None = None
) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {bearer.get_secret_value()}"} if bearer else {}
    response, _ = get(url, ca_file, headers, body)
    if response.status_code in (401, 403):
        raise Refused(
            f"callers get {response.status_code} from the app: {url}",
            "APP_TOKEN in its .env, and whether it was restarted since",
        )
    try:
        found = response.json()
    except ValueError:
        found = None
    if response.status_code != 200 or not isinstance(found, dict):
        raise ProbeError(
            f"the app gives callers nothing: {url} answers {response.status_code}", LOOK_AT
        )
    return found


def _text(found: Mapping[str, Any], key: str, url: str) -> str:
    if not isinstance(found.get(key), str):
        raise ProbeError(f"the app gives callers no {key}: {url}", LOOK_AT)
    return str(found[key])


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
    return asyncio.run(_exchange(web_url(url, "ws"), send, expect, ca_file))


async def _exchange(url: str, send: str, expect: str, ca_file: str | None) -> Exchange:
    context = client_context(ca_file) if url.startswith("wss:") else None
    start, seen = time.perf_counter(), 0
    try:
        async with (
            asyncio.timeout(TIMEOUT),
            websockets.connect(url, ssl=context, proxy=None) as socket,
        ):
            connected = time.perf_counter()
            await socket.send(send)
            while True:
                message = await socket.recv()
                text = message if isinstance(message, str) else message.decode(errors="replace")
                if expect in text:
                    now = time.perf_counter()
                    return Exchange(text, connected - start, now - connected)
                seen += 1
    except websockets.InvalidStatus as error:
        why = f"answers {error.response.status_code} instead of a WebSocket"
    except (OSError, websockets.WebSocketException) as error:
        why = f"gave {seen} other messages, then: {reason(error)}"
    raise ProbeError(f"the app does not talk to its users: {url} {why}", LOOK_AT)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m callready.probes.app", description=__doc__)
    parser.add_argument("url", help="http(s):// for health, ws(s):// for an exchange")
    parser.add_argument("--status", type=int, default=200, help="health: default %(default)s")
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="PATH=JSON",
        help="health: a field and its value, database.ok=true; may be repeated",
    )
    parser.add_argument("--send", default="", help="WebSocket: text to send")
    parser.add_argument("--expect", default="", help="WebSocket: text an answer must contain")
    parser.add_argument("--ca-file", help="PEM file of the authorities to trust")

    def probe(options: argparse.Namespace) -> object:
        if options.url.startswith("ws"):
            return websocket(options.url, options.send, options.expect, options.ca_file)
        try:
            fields = {
                path: json.loads(value)
                for path, _, value in (each.partition("=") for each in options.field)
            }
        except ValueError:
            parser.error("--field wants PATH=JSON, for example database.ok=true or name='\"x\"'")
        return health(options.url, options.status, fields, options.ca_file)

    return run(parser, probe, arguments)


if __name__ == "__main__":
    sys.exit(main())

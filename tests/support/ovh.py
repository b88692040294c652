"""A double of OVH's API, as much of it as a dns-01 challenge takes: zones, TXT records, refresh.
It is not OVH: the real API was never reached from here.

It is strict. Every call but /auth/time is signed over URL and body as they were received, within a
minute of its clock, by a consumer key that has the right; what is published is what was there at
the last refresh. Errors have OVH's codes and bodies.
"""

import hashlib
import http.server
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

NAME = "eu.api.ovh.com"
KEYS = {
    "application_key": "LabApplication01",
    "application_secret": "lab0application0secret0000000001",
}
KEYS |= {"consumer_key": "lab0consumer0key0000000000000001"}


class Refusal(Exception):
    """An answer that is an error: status, OVH's code, words."""


@dataclass
class Ovh:
    """An account with one zone, its keys by their names in `tls.acme.dns`, and what to do when a
    record is published or withdrawn (`set-txt` or `clear-txt`, its name, its text). Tests change
    what it allows."""

    zone: str
    keys: dict[str, str]
    publish: Callable[[str, str, str], None]
    rights: list[tuple[str, str]] = field(
        default_factory=lambda: [(method, "/domain/zone/*") for method in ("GET", "POST", "DELETE")]
    )
    failing: set[tuple[str, str]] = field(default_factory=set)
    skew: int = 0  # seconds its clock is ahead
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    served: set[tuple[str, str]] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    def answer(self, method: str, url: str, body: str, headers: Any) -> object:
        """What a call gets; raises Refusal."""
        path, query = urlsplit(url).path.removeprefix("/1.0"), dict(parse_qsl(urlsplit(url).query))
        if (method, path) == ("GET", "/auth/time"):
            return int(time.time()) + self.skew
        self._check(method, url, path, body, headers)
        self.calls.append(f"{method} {path}")
        if (method, path) in self.failing:
            raise Refusal(500, "INTERNAL_SERVER_ERROR", "Internal server error")
        match method, path.split("/")[3:]:
            case _, [zone, *_] if zone != self.zone:
                raise Refusal(404, "NOT_FOUND", "This service does not exist")
            case "GET", [_, "record"]:
                return [
                    number
                    for number, record in self.records.items()
                    if all(record[key] == value for key, value in query.items())
                ]
            case "POST", [_, "record"]:
                record = json.loads(body)
                if record.keys() != {"fieldType", "subDomain", "target", "ttl"} or not (
                    record["fieldType"] == "TXT" and (record["ttl"] == 0 or record["ttl"] >= 60)
                ):
                    raise Refusal(400, "BAD_REQUEST", "Invalid record")
                number = 5_000_000_000 + len(self.calls)
                self.records[number] = record
                return {
                    "id": number,
                    "zone": self.zone,
                    **record,
                    "target": f'"{record["target"]}"',
                }
            case "DELETE", [_, "record", number] if int(number) in self.records:
                del self.records[int(number)]
                return None
            case "POST", [_, "refresh"]:
                self._refresh()
                return None
        raise Refusal(404, "NOT_FOUND", "The requested object does not exist")

    def _check(self, method: str, url: str, path: str, body: str, headers: Any) -> None:
        if headers["X-Ovh-Application"] != self.keys["application_key"]:
            raise Refusal(403, "INVALID_KEY", "This application key is invalid")
        if headers["X-Ovh-Consumer"] != self.keys["consumer_key"]:
            raise Refusal(403, "INVALID_CREDENTIAL", "This credential is not valid")
        at = headers["X-Ovh-Timestamp"] or "0"
        if abs(int(at) - time.time() - self.skew) > 60:
            raise Refusal(400, "QUERY_TIME_OUT", "Query out of time")
        parts = self.keys["application_secret"], self.keys["consumer_key"], method, url, body, at
        signature = "$1$" + hashlib.sha1("+".join(parts).encode()).hexdigest()
        if headers["X-Ovh-Signature"] != signature:
            raise Refusal(400, "INVALID_SIGNATURE", "Invalid signature")
        if not any(method == may and fnmatchcase(path, where) for may, where in self.rights):
            raise Refusal(403, "NOT_GRANTED_CALL", "This call has not been granted")

    def _refresh(self) -> None:
        now = {
            (f"{record['subDomain']}.{self.zone}.", record["target"])
            for record in self.records.values()
        }
        for name, value in self.served - now:
            self.publish("clear-txt", name, value)
        for name, value in now - self.served:
            self.publish("set-txt", name, value)
        self.served = now


@contextmanager
def running(ovh: Ovh, at: tuple[str, int], certificate: Path, key: Path) -> Iterator[int]:
    """Have it answer as `NAME`; the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
            url = f"https://{self.headers['Host']}{self.path}"
            status, result = 200, None
            try:
                if self.command == "POST" and "Content-Length" not in self.headers:
                    raise Refusal(411, "LENGTH_REQUIRED", "Length Required")
                result = ovh.answer(self.command, url, body, self.headers)
            except Refusal as refusal:
                status, code, words = refusal.args
                result = {"errorCode": code, "httpCode": f"{status} Error", "message": words}
            text = json.dumps(result, separators=(",", ":")).encode()
            self.send_response(status)
            self.send_header("X-Ovh-Queryid", "EU.ext-1.lab")
            self.send_header("Content-Type", "application/json; charset=utf-8")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_DELETE = handle_any

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet: `calls` has them."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.ThreadingHTTPServer(at, Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()

"""Who is told: a real SMTP server and a webhook, as receivers of alerts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session


@dataclass
class Sink:
    """What has come, each with the time (time.monotonic) when it did: mails as (recipients, text),
    webhooks as (path, JSON)."""

    mails: list[tuple[float, tuple[str, ...], str]] = field(default_factory=list)
    posts: list[tuple[float, str, Any]] = field(default_factory=list)

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        """aiosmtpd's hook."""
        parsed = message_from_bytes(envelope.original_content or b"", policy=policy.default)
        body = parsed.get_body(("plain",))
        text = f"{parsed['Subject']}\n{body.get_content() if body else ''}"
        self.mails.append((time.monotonic(), tuple(envelope.rcpt_tos), text))
        return "250 OK"

    def alerts(self, path: str, status: str = "firing") -> Iterator[tuple[float, dict[str, Any]]]:
        """Those that came to a path of the webhook, with their time."""
        for at, to, body in list(self.posts):
            if to == path:
                yield from ((at, each) for each in body["alerts"] if each["status"] == status)

    def wait_for(self, found: Callable[[], object], seconds: float) -> Any:
        """What `found` returns as soon as that is something; AssertionError where it never is."""
        end = time.monotonic() + seconds
        while not (result := found()):
            assert time.monotonic() < end, f"did not come in {seconds} s: {self}"
            time.sleep(0.2)
        return result


@contextmanager
def sink(address: str, smtp_port: int, http_port: int) -> Iterator[Sink]:
    """Both servers at an address of this machine."""
    found = Sink()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.posts.append((time.monotonic(), self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    mail = Controller(found, hostname=address, port=smtp_port)
    web = ThreadingHTTPServer((address, http_port), Handler)
    mail.start()
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        mail.stop()
        web.shutdown()
        web.server_close()

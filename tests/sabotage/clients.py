"""Clients that are not callready's, on the same paths as the verification: headless Chromium with
livekit-client, turnutils_uclient, and LiveKit's SDK. Chromium's part is run where callers are:
`python -m tests.sabotage.clients`, with questions as JSON on standard input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path as File
from tempfile import TemporaryDirectory
from typing import Any

from callready.diagnosis.model import Path, Tried
from callready.probes import webrtc
from callready.probes.turn import Credentials, TurnServer
from lab import Lab
from tests.support.fleet import REPOSITORY, probe
from tests.verify.history import Run
from tests.verify.targets import Route, Site

PAGE = File(__file__).with_name("browser.html")
LIBRARY = REPOSITORY / "lab/browser/node_modules/livekit-client/dist/livekit-client.umd.js"
SECONDS = 60  # for all paths at once; a client gives a dead one up after 15
ENOUGH = 15  # of 20 large packets: some may be lost while the other end comes up


def disagreements(inventory: str, run: Run) -> list[str]:
    """Where other clients find a path otherwise than a verification did, in words."""
    site = Site.load(inventory)
    routes = {route.path: route for route in site.routes()}
    tried = {
        each.path: each
        for each in run.paths
        if each.path.sfu and each.ok is not None and each.fails != "some"
    }
    with ThreadPoolExecutor(4) as threads:
        browser = threads.submit(in_chromium, {path: routes[path] for path in tried})
        relayed = [path for path in tried if path.turn]
        sdk = dict(zip(relayed, threads.map(lambda p: in_sdk(routes[p]), relayed), strict=True))
        # It takes any certificate.
        asked = [path for path in relayed if not _fails_in_tls(tried[path])]
        uclient = threads.map(lambda p: in_uclient(routes[p]), asked)
        allocates = dict(zip(asked, uclient, strict=True))
    opinions = (
        ("Chromium", browser.result(), passes),
        ("the SDK", sdk, passes),
        ("turnutils_uclient", allocates, allocated),
    )
    return [
        f"{client} {'gets' if found else 'does not get'} through {path.way} over IPv{path.family} "
        f"of {path.turn or path.sfu}"
        for client, found_by, of in opinions
        for path, found in found_by.items()
        if found != of(tried[path])
    ]


def _fails_in_tls(tried: Tried) -> bool:
    steps = {step.name for step in tried.steps}
    return "/TLS" in tried.path.way and "TCP" in steps and "TLS" not in steps


def passes(tried: Tried) -> bool:
    """Whether the verification found that media passes."""
    return bool(tried.ok)


def allocated(tried: Tried) -> bool:
    """Whether it got a relay, whatever became of it."""
    return passes(tried) or any(step.name == "allocate" for step in tried.steps)


def server(route: Route) -> tuple[TurnServer, Credentials]:
    """The TURN server of a path by the address that the path has, and credentials."""
    assert route.turn
    return route.turn.by_family[route.family], route.turn.credentials()


def in_sdk(route: Route) -> bool:
    """Whether a call of LiveKit's SDK passes through a TURN server."""
    at, _ = server(route)
    assert route.sfu and route.turn
    key, secret = route.sfu.key
    found = probe(
        *("webrtc", route.sfu.url, "--turn", at.uri, "--ca-file", route.sfu.ca or ""),
        secret=secret.get_secret_value(),
        LIVEKIT_API_KEY=key,
        TURN_SECRET=route.turn.pool.secrets[0].get_secret_value(),
    )
    return bool(found["ok"])


def in_uclient(route: Route) -> bool:
    """Whether coturn's client gets a relay."""
    at, who = server(route)
    assert route.sfu and route.sfu.server.settings.address
    over = {"udp": [], "tcp": ["-t"], "tls": ["-t", "-S", "-E", at.ca_file or ""]}[at.transport]
    process = subprocess.Popen(
        [
            *(*Lab().client_prefix(), "timeout", "8", "turnutils_uclient", "-v", "-c", *over),
            *("-u", who.username, "-w", who.password, "-p", f"{at.port}"),
            *("-e", route.sfu.server.settings.address, at.address),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        found = any("Received relay addr" in line for line in process.stdout or ())
        process.terminate()  # it would go on and wait for answers of its peer
    return found


def in_chromium(routes: dict[Path, Route]) -> dict[Path, bool]:
    """Whether 1,100 bytes at a time pass between two pages, path by path."""
    asked = [question(f"{number}", route) for number, route in enumerate(routes.values())]
    ca = next(route.sfu.ca for route in routes.values() if route.sfu)
    done = subprocess.run(
        [*Lab().client_prefix(), sys.executable, "-m", "tests.sabotage.clients", ca or ""],
        cwd=REPOSITORY,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=SECONDS + 30,
        check=False,
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    return {
        path: found.get(f"{number}", {}).get("received", 0) >= ENOUGH
        for number, path in enumerate(routes)
    }


def question(name: str, route: Route) -> dict[str, Any]:
    """What the page is told of a path."""
    assert route.sfu
    tokens = [each.get_secret_value() for each in webrtc.tokens(*route.sfu.key)]
    asked: dict[str, Any] = {"name": name, "url": route.sfu.url, "tokens": tokens}
    if not route.turn:
        return {**asked, "transport": route.proto, "family": route.family}
    at, who = server(route)
    given = {"urls": at.uri, "username": who.username, "credential": who.password}
    return {**asked, "server": given, "transport": "udp", "family": route.relay}


class Page(ThreadingHTTPServer):
    """Serves the page, and waits for what it finds."""

    def __init__(self, asked: str) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked, self.found, self.done = asked, "{}", threading.Event()


class Answers(BaseHTTPRequestHandler):
    """What the page asks for."""

    server: Page

    def do_GET(self) -> None:
        files = {"/": PAGE, "/livekit-client.umd.js": LIBRARY}
        file = files.get(self.path)
        content = file.read_bytes() if file else self.server.asked.encode()
        kinds = {".html": "text/html", ".js": "text/javascript"}
        self.send_response(200)
        self.send_header("Content-Type", kinds[file.suffix] if file else "application/json")
        self.send_header("Content-Length", f"{len(content)}")
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.server.found = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def chromium(url: str, ca: str) -> Iterator[None]:
    """Have a headless Chromium, which trusts an authority, show a page."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as home:
        nss = File(home, ".pki/nssdb")
        nss.mkdir(parents=True)
        certutil = ["certutil", "-d", f"sql:{nss}"]
        subprocess.run([*certutil, "-N", "--empty-password"], check=True)
        if ca:
            subprocess.run([*certutil, "-A", "-t", "C,,", "-n", "lab", "-i", ca], check=True)
        process = subprocess.Popen(
            [
                *("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", f"--user-data-dir={home}/profile", url),
            ],
            env={**os.environ, "HOME": home},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(process.pid, 9)
            process.wait()


def main() -> None:
    page = Page(sys.stdin.read())
    threading.Thread(target=page.serve_forever, daemon=True).start()
    with chromium(f"http://127.0.0.1:{page.server_port}/", sys.argv[1]):
        page.done.wait(SECONDS)
    print(page.found)


if __name__ == "__main__":
    main()

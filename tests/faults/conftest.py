"""Hosts in two good states each, and every fault of the session at work on them at once."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lab import Lab, archive, plan
from tests.support.place import Place, Places

if TYPE_CHECKING:
    pass

HOSTS = {"h09": "turn", "h10": "sfu", "h11": "sfu", "h12": "turn"}  # each kind on Debian 12 and 13
PORT = 8089


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="every step with every cut")


@pytest.fixture(scope="session")
def hosts() -> Iterator[None]:
    """The hosts; those that were not there before go again."""
    if os.geteuid():
        pytest.skip("the lab needs root")
    lab = Lab()
    made = [name for name in HOSTS if lab.state(name) == "absent"]
    lab.up(HOSTS)
    yield
    for name in made:
        lab.destroy(name)


@pytest.fixture(scope="session")
def www(hosts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """LiveKit's archive as two releases with different binaries; the URL of the download page."""
    folder = tmp_path_factory.mktemp("www")
    server = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer((plan.MACHINE.ipv4, PORT), server) as httpd:
        first = archive.publish()
        (folder / "v1.13.5").symlink_to(first.parent)
        repack(first, folder, "1.13.6")
        repack(first, folder, "1.13.7", bytes.fromhex("7f454c46020101") + bytes(64))
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://{plan.MACHINE.ipv4}:{PORT}"
        httpd.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def repack(source: Path, www: Path, version: str, binary: bytes | None = None) -> None:
    """Publish a release whose program is another one's with a byte more, or is `binary`."""
    folder = www / f"v{version}"
    unpacked = folder / "unpacked"
    unpacked.mkdir(parents=True)
    with tarfile.open(source) as tar:
        tar.extractall(unpacked, filter="data")
    program = unpacked / "livekit-server"
    program.write_bytes(program.read_bytes() + b"\0" if binary is None else binary)
    target = folder / source.name.replace(archive.VERSION, version)
    subprocess.run(["tar", "-C", unpacked, "-I", "gzip -1", "-cf", target, "."], check=True)
    shutil.rmtree(unpacked)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    (folder / "checksums.txt").write_text(f"{digest}  {target.name}\n")


@pytest.fixture(scope="session")
def places(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, www: str
) -> Iterator[Places]:
    """The hosts, learnt; what was found is written to FAULTS_RESULTS."""
    long = request.config.getoption("--long")
    places = Places(
        [
            Place(name, kind, tmp_path_factory.mktemp(name), www, long)
            for name, kind in HOSTS.items()
        ],
        long,
    )
    try:
        with ThreadPoolExecutor(len(HOSTS)) as pool:
            list(pool.map(Place.learn, places.all))
        yield places
    finally:
        places.over = True
        for kind_pool in places.pools.values():
            kind_pool.shutdown(cancel_futures=True)
        if path := os.environ.get("FAULTS_RESULTS"):
            Path(path).write_text(json.dumps(places.found, indent=1) + "\n")


@pytest.fixture(scope="session")
def running(request: pytest.FixtureRequest, places: Places) -> dict[str, list[Future[Any]]]:
    """The jobs of all selected tests that have one, begun at once, by test."""
    jobs = {
        item.nodeid: item.callspec.params["job"]
        for item in request.session.items
        if hasattr(item, "callspec") and "job" in item.callspec.params
    }
    return {
        test: [places.submit(job) for _ in (places.of(job.kind) if job.everywhere else "1")]
        for test, job in jobs.items()
    }

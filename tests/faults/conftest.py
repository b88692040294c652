"""Hosts in two good states each, and every fault of the session at work on them at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lab import Lab
from tests.support.archives import published
from tests.support.place import Place, Places

if TYPE_CHECKING:
    pass

HOSTS = {"h09": "turn", "h10": "sfu", "h11": "sfu", "h12": "turn"}  # each kind on Debian 12 and 13


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
    broken = bytes.fromhex("7f454c46020101") + bytes(64)
    folder = tmp_path_factory.mktemp("www")
    with published(folder, {"1.13.6": None, "1.13.7": broken}) as where:
        yield where


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

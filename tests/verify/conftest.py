"""How a verification runs: its options, one check for each thing in the inventory, all of them
side by side.

A check is a test function; its docstring is its title. Most checks wait for a network, so each
runs in a thread of its lane as soon as the run begins, and pytest reports them in order. Its
arguments are `check`, `site` and the thing that `each` names.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from callready.probes.webrtc import seconds
from callready.settings.problem import SettingsError
from tests.verify.check import CHECK, Check, params_of, unseen
from tests.verify.diagnosing import diagnosis
from tests.verify.report import Report
from tests.verify.targets import Site

# Threads a lane. Calls need a processor; side by side they would measure each other.
LANES = {"checks": 12, "waiting": 16, "paths": 1, "calls": 1, "attempts": 1, "soak": 16}

# From the host outwards; calls need all the rest.
ORDER = [
    *("hosts", "ports", "redis", "edge", "turn", "livekit", "cluster", "paths", "calls", "app"),
    *("monitor", "recording", "android"),
]

NOTHING = pytest.mark.nothing
SITE = pytest.StashKey[Site]()
REPORT = pytest.StashKey[Report]()
RUNNING = pytest.StashKey[Future[None]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("callready")
    group.addoption("--inventory", help="the inventory to verify: inventories/prod")
    group.addoption("--attempts", type=int, help="calls in a row (default: verify.attempts)")
    group.addoption(
        "--soak", type=seconds, default=0, metavar="TIME", help="also calls that last: 90s, 10m"
    )
    group.addoption("--full-sweep", action="store_true", help="try all 65535 TCP ports")
    group.addoption(
        "--report", type=Path, default=Path("report"), help="folder of verify.html, .json and .xml"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "each(source): one check for each thing it finds")
    config.addinivalue_line("markers", "nothing: there is no such thing in the inventory")
    config.addinivalue_line("markers", "lane(name): the threads a check runs in")
    inventory = config.getoption("--inventory")
    if not inventory:
        raise pytest.UsageError("name an inventory: --inventory inventories/prod")
    try:
        site = Site.load(inventory)
    except SettingsError as error:
        raise pytest.UsageError(str(error)) from None
    site.attempts = config.getoption("--attempts")
    site.soak = config.getoption("--soak")
    site.full_sweep = config.getoption("--full-sweep")
    config.stash[SITE] = site
    folder: Path = config.getoption("--report")
    folder.mkdir(parents=True, exist_ok=True)
    config.option.xmlpath = config.option.xmlpath or str(folder / "verify.xml")
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "no"  # the report says what is wrong, once
    config.stash[REPORT] = Report(site, folder / "verify.html")
    config.pluginmanager.register(config.stash[REPORT])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if marker := metafunc.definition.get_closest_marker("each"):
        found = marker.args[0](metafunc.config.stash[SITE])
        argument = next(iter(inspect.signature(metafunc.function).parameters))
        metafunc.parametrize(argument, found or [pytest.param(None, marks=NOTHING)], ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An inventory without TURN has no TURN checks: they are not there, rather than skipped."""
    items[:] = [item for item in items if not item.get_closest_marker(NOTHING.name)]
    items.sort(key=lambda item: ORDER.index(item.path.stem.removeprefix("test_")))
    for item in items:
        item.stash[CHECK] = Check()


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    if session.config.option.collectonly:
        return (yield)
    site = session.config.stash[SITE]
    lanes = {name: ThreadPoolExecutor(threads, name) for name, threads in LANES.items()}
    for item in session.items:
        marker = item.get_closest_marker("lane")
        lane = lanes[marker.args[0] if marker else "checks"]
        item.stash[RUNNING] = lane.submit(_run, item, site)
    try:
        done = yield
        items = [item for item in session.items if isinstance(item, pytest.Function)]
        session.config.stash[REPORT].diagnosis = diagnosis(items, site)
        return done
    finally:
        for lane in lanes.values():
            lane.shutdown(cancel_futures=True)
        for server in site.servers.values():
            server.disconnect()


def _run(item: pytest.Item, site: Site) -> None:
    assert isinstance(item, pytest.Function)
    check, started = item.stash[CHECK], time.monotonic()
    known = {"check": check, "site": site, **params_of(item)}
    try:
        with check.probing(unseen):
            item.obj(**{name: known[name] for name in inspect.signature(item.function).parameters})
        check.conclude()
    finally:
        check.seconds = time.monotonic() - started


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    try:
        pyfuncitem.stash[RUNNING].result()
    finally:
        figure = ", ".join(pyfuncitem.stash[CHECK].figures)
        pyfuncitem.user_properties.append(("figure", figure))
    return True


@pytest.fixture
def check(request: pytest.FixtureRequest) -> Check:
    """Where a check says what it found."""
    return request.node.stash[CHECK]  # type: ignore[no-any-return]


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Site:
    """The inventory."""
    return request.config.stash[SITE]

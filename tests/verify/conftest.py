"""How a verification runs: its options, one check for each thing in the inventory, all of them
side by side.

A check is a test function; its docstring is its title. Most checks wait for a network, so each
runs in a thread of its lane as soon as the run begins, and pytest reports them in order. Its
arguments are `check`, `site` and the thing that `each` names.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from callready.settings.fleet import SettingsError
from verify.check import Check
from verify.report import Report
from verify.targets import Site

# Threads a lane. Calls need a processor; side by side they would measure each other.
LANES = {"checks": 6, "calls": 1, "attempts": 1}

SITE = pytest.StashKey[Site]()
CHECK = pytest.StashKey[Check]()
RUNNING = pytest.StashKey[Future[None]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("callready")
    group.addoption("--inventory", help="the inventory to verify: inventories/prod")
    group.addoption("--attempts", type=int, default=5, help="calls in a row (default %(default)s)")
    group.addoption("--full-sweep", action="store_true", help="try all 65535 TCP ports")
    group.addoption(
        "--report", type=Path, default=Path("report"), help="folder of verify.html and verify.xml"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "each(source): one check for each thing it finds")
    config.addinivalue_line("markers", "lane(name): the threads a check runs in")
    inventory = config.getoption("--inventory")
    if not inventory:
        raise pytest.UsageError("name an inventory: --inventory inventories/prod")
    try:
        site = Site.load(inventory)
    except SettingsError as error:
        raise pytest.UsageError(str(error)) from None
    site.attempts = config.getoption("--attempts")
    site.full_sweep = config.getoption("--full-sweep")
    config.stash[SITE] = site
    folder: Path = config.getoption("--report")
    folder.mkdir(parents=True, exist_ok=True)
    config.option.xmlpath = config.option.xmlpath or str(folder / "verify.xml")
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "no"  # the table says what is wrong, once
    config.pluginmanager.register(Report(site, folder / "verify.html"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if marker := metafunc.definition.get_closest_marker("each"):
        argument = metafunc.fixturenames[0]
        metafunc.parametrize(argument, marker.args[0](metafunc.config.stash[SITE]), ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An inventory without TURN has no TURN checks: they are not there, rather than skipped."""
    items[:] = [item for item in items if not _is_for_nothing(item)]
    for item in items:
        item.stash[CHECK] = Check()


def _is_for_nothing(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and pytest.HIDDEN_PARAM in callspec.params.values()


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
        return (yield)
    finally:
        for lane in lanes.values():
            lane.shutdown(cancel_futures=True)
        for server in site.servers.values():
            server.disconnect()


def _run(item: pytest.Item, site: Site) -> None:
    assert isinstance(item, pytest.Function)
    known = {"check": item.stash[CHECK], "site": site}
    params = item.callspec.params if hasattr(item, "callspec") else {}
    item.obj(**{name: {**known, **params}[name] for name in item._fixtureinfo.argnames})
    item.stash[CHECK].conclude()


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

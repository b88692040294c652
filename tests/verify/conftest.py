"""How a verification runs: its options, which checks there are for an inventory, and that they
run side by side: most of them wait for a network, and a host must be verified in seconds.

A check is a function whose arguments are named here. It runs in a thread of its lane; pytest
reports the checks in order. Its figure goes to `measure`; its docstring is its title.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from callready.settings.fleet import SettingsError
from verify.report import Report, describe
from verify.targets import Site, Turn

LANES = {"checks": 6, "calls": 1, "attempts": 1}
SITE = pytest.StashKey[Site]()
LANES_KEY = pytest.StashKey[dict[str, ThreadPoolExecutor]]()
RUNNING = pytest.StashKey[Future[None]]()

Measure = Callable[[str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("callready")
    group.addoption("--inventory", help="the inventory to verify: inventories/prod")
    group.addoption("--attempts", type=int, default=5, help="calls to try in a row (%(default)s)")
    group.addoption("--full-sweep", action="store_true", help="try all 65535 TCP ports")
    group.addoption(
        "--report", type=Path, default=Path("report"), help="folder of verify.html and verify.xml"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lane(name): checks of a lane share its threads")
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
    folder = config.getoption("--report")
    if config.option.xmlpath is None:
        config.option.xmlpath = str(folder / "verify.xml")
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "no"  # the table says it, and it says it once
    config.pluginmanager.register(Report(site, folder / "verify.html"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    site = metafunc.config.stash[SITE]
    for name, values in _arguments(site).items():
        if name in metafunc.fixturenames:
            found = list(values())
            metafunc.parametrize(name, found, ids=str)


def _arguments(site: Site) -> dict[str, Callable[[], Any]]:
    """What a check can ask for by the name of its argument."""
    servers = site.servers.values()
    apps = [s for s in servers if "app" in s.settings.groups and s.settings.app]
    return {
        "server": lambda: servers,
        "filtered": lambda: (s for s in servers if s.settings.firewall.enabled and _role(s)),
        "media_host": lambda: (s for s in servers if _role(s)),
        "sfu_host": lambda: (s for s in servers if s.settings.is_sfu),
        "turn_host": lambda: (s for s in servers if s.settings.turn_pools),
        "tls_host": lambda: {turn.name: turn.server for turn in site.turns("tls")}.values(),
        "app_host": lambda: apps,
        "workers_host": lambda: (s for s in apps if s.settings.app.workers),  # type: ignore[union-attr]
        "health": lambda: _app_checks(apps, "health"),
        "websocket": lambda: _app_checks(apps, "websockets"),
        "turn": site.turns,
        "tls_turn": partial(site.turns, "tls"),
        "way": lambda: sorted(_ways(site), key=lambda way: way.name),
        "rival": lambda: (turn for turn in site.turns() if len(_pools(site)) > 1),
        "peer_pool": lambda: (turn for turn in site.turns() if turn.pool.peers == "internet"),
        "sfu": site.sfus,
        "relayed": lambda: _relayed(site),
        "both": lambda: (
            _Pair(sfu, turn)
            for sfu in site.sfus()
            for turn in site.turns()
            if turn.pool.peers == "internet" and turn.pool_name != sfu.livekit.turn_pool
        ),
    }

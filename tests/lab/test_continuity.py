"""Calls that are on while a deploy runs: what their callers notice of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support.continuity import Calls, calls_of
from tests.support.fleet import DRAIN, PAIR, REPOSITORY, Fleet, Host, draining

SFU, TURN = PAIR
UDP, TLS = f"turn:{TURN.fqdn}:3478?transport=udp", f"turns:{TURN.fqdn}:5349?transport=tcp"


def during(fleet: Fleet, change: Callable[[Fleet], object]) -> tuple[Calls, list[str]]:
    """Deploy a change while a direct call and two relayed ones are on; what they noticed, and the
    hosts that were changed."""
    secret, pool = fleet.secrets["livekit/api_secret"], fleet.secrets["turn/calls"]
    url = fleet.data["livekit"]["url"]
    with calls_of(url, "APIfleet", secret, {UDP: pool, TLS: pool}) as calls:
        change(fleet)
        fleet.data["deploy"] = {}  # time enough for a busy machine
        changed = fleet.deploy().changed
    for name, both in calls.items():
        for each in both:
            print(f"{name}: {each}")
    return calls, changed


def nothing(_fleet: Fleet) -> None:
    pass


def firewall(fleet: Fleet) -> None:
    fleet.data["firewall"] = {"extra_ports": ["8443/tcp"]}


def certificate(_fleet: Fleet) -> None:
    subprocess.run([sys.executable, "-m", "lab", "cert", TURN.name], check=True, cwd=REPOSITORY)


def turn_setting(fleet: Fleet) -> None:
    fleet.data["turn"]["total_quota"] = 1300


def livekit_setting(fleet: Fleet) -> None:
    fleet.data["livekit"]["logging"] = {"level": "debug"}


@pytest.mark.alone
@pytest.mark.parametrize(
    ("change", "hosts"),
    [(nothing, []), (firewall, ["h07", "h08"]), (certificate, ["h08"])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_calls_go_on_undisturbed(
    pair: Fleet, change: Callable[[Fleet], object], hosts: list[str]
) -> None:
    calls, changed = during(pair, change)
    assert changed == hosts
    assert list(calls) == ["direct", UDP, TLS]
    for name, both in calls.items():
        for each in both:
            assert each.way == ("host" if name == "direct" else f"relay {name}")
            assert each.undisturbed, calls
            assert each.sent > 0 and each.received > 0, calls


@pytest.mark.parametrize(
    ("change", "disturbed"),
    [(turn_setting, [UDP, TLS]), (livekit_setting, ["direct", UDP, TLS])],
    ids=["coturn", "LiveKit"],
)
def test_restart_is_noticed_and_calls_come_back(
    pair: Fleet, change: Callable[[Fleet], object], disturbed: list[str]
) -> None:
    calls, _ = during(pair, change)
    assert [
        name for name, both in calls.items() if not all(c.undisturbed for c in both)
    ] == disturbed
    assert all(each.reconnects == 1 for name in disturbed for each in calls[name]), calls
    assert not [each for both in calls.values() for each in both if each.gone or each.way == "none"]


@pytest.mark.parametrize(("change", "host"), [(turn_setting, TURN), (livekit_setting, SFU)])
def test_drained_service_restarts_when_its_calls_have_ended(
    pair: Fleet, change: Callable[[Fleet], object], host: Host
) -> None:
    pair.data["deploy"] = {"drain": DRAIN}
    change(pair)
    pair.unsettled = True
    secret, pool = pair.secrets["livekit/api_secret"], pair.secrets["turn/calls"]
    with calls_of(pair.data["livekit"]["url"], "APIfleet", secret, {UDP: pool}) as calls:
        before = host.pids()
        process = pair.start()
        draining(process)
        assert host.pids() == before
    said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert all(each.undisturbed for both in calls.values() for each in both), calls
    assert host.pids() != before

"""A pool of TURN hosts: one leaves it and another one joins, in ordinary deploys, and no call that
is on notices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import plan
from tests.support.continuity import calls_of
from tests.support.fleet import (
    DRAIN,
    Fleet,
    Host,
    delivered,
    draining,
    entry,
    pair_inventory,
    probe,
)

SFU, OLD, NEW = Host("h16"), Host("h18"), Host("h17")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """An SFU and the only host of its pool; the other one is bare."""
    with delivered(*(host.name for host in (SFU, OLD, NEW))):
        _, data, secrets = pair_inventory()
        data["livekit"]["url"] = f"ws://{SFU.fqdn}:7880"
        groups = {"livekit": [entry(SFU)], "turn": [entry(OLD, pools=["calls"])]}
        fleet = Fleet(tmp_path_factory.mktemp("pool"), groups, data, secrets)
        fleet.deploy()
        yield fleet
        fleet.restore()


def told(fleet: Fleet) -> list[str]:
    """The URIs that LiveKit hands out, each of which answers."""
    found = probe(
        *("webrtc", f"ws://{SFU.fqdn}:7880", "--ice-servers", "--ca-file", f"{plan.STATE}/ca.pem"),
        secret=fleet.secrets["livekit/api_secret"],
        LIVEKIT_API_KEY="APIfleet",
    )
    assert found["ok"], found
    return [uri for uri in found if ":" in uri]


def every_way(host: Host) -> list[str]:
    """The URIs of the only host that is handed out."""
    port = f"turn:{host.fqdn}:3478?transport="
    tls = f"turns:{host.fqdn}:5349?transport=tcp"
    return [f"{port}udp", f"{port}tcp", tls, f"stun:{host.fqdn}:3478"]


def test_a_host_takes_anothers_place_and_no_call_notices(pool: Fleet) -> None:
    assert told(pool) == every_way(OLD)
    pool.groups["turn"][0][1]["hand_out"] = False
    pool.groups["turn"].append(entry(NEW, pools=["calls"]))
    pool.data["deploy"] = {"drain": DRAIN}
    secret, shared = pool.secrets["livekit/api_secret"], pool.secrets["turn/calls"]
    was, (relay, *_) = OLD.pids(), every_way(OLD)
    with calls_of(pool.data["livekit"]["url"], "APIfleet", secret, {relay: shared}) as calls:
        process = pool.start()
        draining(process)  # the new host serves by then, and the SFU waits for its calls
        assert list(NEW.pids()) == ["turnserver@calls.service"]
    said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    for both in calls.values():
        print(*both, sep="\n")
        assert all(each.undisturbed for each in both), calls
    assert list(calls) == ["direct", relay] and OLD.pids() == was
    assert told(pool) == every_way(NEW)

    # Nobody is told of it any more, so it may go, and no other host changes by that.
    gone = pool.run("--limit", OLD.fqdn, file="remove.py")
    assert gone.status == 0, gone.text
    assert OLD.pids() == {}
    del pool.groups["turn"][0]
    assert pool.deploy().changed == []


def test_a_host_that_callers_are_told_of_is_not_cleaned(pool: Fleet) -> None:
    pool.restore()
    pool.groups["turn"] = [entry(NEW, pools=["calls"]), entry(OLD, pools=["calls"])]
    was = NEW.pids()
    run = pool.run("--limit", NEW.fqdn, file="remove.py")
    assert run.status == 1 and NEW.pids() == was
    assert (
        f"{SFU.fqdn} would go on sending callers here: set hand_out = False for this host, deploy"
        in "\n".join(run.message)
    )

"""`make load` on one host that is SFU and TURN server: real media both ways, relayed by each
transport; what was seen is true, and nothing is left."""

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lab import Lab
from tests.support.fleet import (
    REPOSITORY,
    Fleet,
    Host,
    Inventory,
    build_generator,
    delivered,
    entry,
    inventory,
)

BOX = Host("h20")


def box_inventory() -> Inventory:
    """An SFU that is also a TURN host, behind an edge."""
    _, data, secrets = inventory()
    del data["app"]
    data["livekit"]["url"] = f"wss://{BOX.fqdn}"
    # The two callers take 24 allocations, one of the others 6.
    data["turn"] = {
        "min_port": 60001,
        "total_quota": 60,
        "pools": {"calls": data["turn"]["pools"]["calls"]},
    }
    data["tls"] = {key: text.replace("{host}", "{name}") for key, text in data["tls"].items()}
    data["edge"] = {}
    groups = {
        "livekit": [entry(BOX, name=f"turn.{BOX.fqdn}", pools=["calls"])],
        "turn": [BOX.fqdn],
    }
    return groups, data, secrets[:2]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    build_generator()
    with delivered(BOX.name):
        fleet = Fleet(tmp_path_factory.mktemp("load"), *box_inventory())
        fleet.deploy()
        yield fleet


def load(fleet: Fleet, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command where the callers are."""
    fleet.write()
    inventory = str(fleet.inventory)
    command = [*Lab().client_prefix(), sys.executable, "-m", "callready.load", inventory]
    done = subprocess.run(
        [*command, *arguments],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=240,
        check=False,
    )
    assert fleet.marker not in done.stdout + done.stderr, "a secret was printed"
    return done


def test_calls_load_a_host_and_leave_nothing(box: Fleet) -> None:
    what = ["--rooms=2", "--room=3", "--steps=1", "--hold=10", "--relayed=0.5", "--confirm=fleet"]
    done = load(box, "video", *what)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rooms, 6 participants (3 by TURN: 1 tcp, 1 tls, 1 udp)" in done.stdout
    assert "; 0 failed\n" in done.stdout and " in 24 of 24 streams; " in done.stdout
    # Sound alone is 12 x 50.
    packets = re.search(r"media +([\d,]+) packets/s", done.stdout)
    assert packets and int(packets[1].replace(",", "")) > 1000, done.stdout
    host = re.search(rf"^  {BOX.fqdn} +\d+% .* (\d+) +0$", done.stdout, re.MULTILINE)
    assert host and int(host[1]) >= 6, done.stdout
    assert "everything is as before: a call connects" in done.stdout
    assert BOX.root("ss -Hnua '( sport >= :60001 )' | wc -l") == "0"


def test_a_refused_allocation_is_the_limit(box: Fleet) -> None:
    what = ["--rooms=1", "--room=12", "--speakers=1", "--steps=1", "--hold=5", "--relayed=0"]
    done = load(box, "audio", *what, "--rate=50", "--confirm=fleet")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"limit, at 12 participants: \d+ allocations were refused with 486", done.stdout
    )
    assert BOX.root("ss -Hnua '( sport >= :60001 )' | wc -l") == "0"


def test_a_name_that_leads_elsewhere_is_not_loaded(box: Fleet) -> None:
    host, settings = box.groups["livekit"][0]
    box.groups["livekit"][0] = (host, {**settings, "address6": None})
    done = load(box, "--confirm=fleet")
    box.restore()
    assert done.returncode == 1
    assert f"{BOX.ipv6}, which is no address of the inventory" in done.stderr

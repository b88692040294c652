"""Deploys that do not reach their end, and hosts that go away: the next run completes it."""

from __future__ import annotations

import os
import signal

import pytest

from lab import Lab
from tests.support.fleet import (
    HOSTS,
    SFU,
    TURN12,
    TURN13,
    TWO_POOLS,
    Fleet,
    Host,
    eventually,
    held,
    idle,
    probe,
    starting,
)

CALLS, FIREWALL = "turnserver@calls.service", "callready-firewall.service"


def kill_script(host: Host) -> None:
    """SIGKILL the deploy's script on a host and its children."""
    host.root(
        "kill -9 $(find /proc/[0-9]*/fd -lname /run/callready.lock 2>&- | cut -d/ -f3 | sort -u)"
    )


# A folder that is named after a process of now is kept by the next deploy, too.
LEFTOVERS = """
for left in /var/lib/callready/incoming.*; do
    process=${left#*/incoming.}
    [ ! -e "$left" ] || [ -d "/proc/${process%%.*}" ] || echo "$left"
done
ls -d /etc/callready/releases/.new-* 2>&-
find /etc /usr/local /srv -name '*.callready-new'
"""


def assert_completed(fleet: Fleet) -> None:
    """The next run completes what was begun, the one after it changes nothing."""
    for host in HOSTS:
        eventually(lambda host=host: idle(host))  # type: ignore[misc]
    fleet.deploy()
    assert fleet.deploy().changed == []
    for host in HOSTS:
        assert host.root(LEFTOVERS) == ""


@pytest.mark.parametrize(
    ("unit", "dies"),
    [(FIREWALL, "both"), (CALLS, "controller")],
    ids=["both ends before the firewall loads", "the controller while coturn restarts"],
)
def test_killed_deploy_is_completed_by_the_next(fleet: Fleet, unit: str, dies: str) -> None:
    before = TURN12.pids()[CALLS]
    fleet.data["deploy"] = {"confirm_timeout": 25}  # time for another run to look meanwhile
    fleet.data["turn"]["total_quota"] = 1300
    fleet.data["firewall"] = {"extra_ports": ["8443/tcp"]}
    with held(TURN12, unit), fleet.killed(when=lambda: starting(TURN12, unit)):
        if dies == "both":
            kill_script(TURN12)
    (waits,) = (line for line in fleet.run().message if "h03" in line)
    assert "another deploy waits for its confirmation here" in waits
    eventually(lambda: idle(TURN12))
    assert "total-quota=1200" in TURN12.root("cat /etc/coturn/calls.conf")
    assert "8443" not in TURN12.root("nft list table inet callready")
    assert_completed(fleet)
    assert TURN12.pids()[CALLS] != before
    with TURN12.listening("tcp", 8443):
        assert probe("ports", TURN12.fqdn, "--ports", "8443")["open"] == [8443]


def test_power_cut_while_packages_are_installed(fleet: Fleet) -> None:
    Lab().reset("h06")

    def unpacked() -> bool:
        status = TURN13.root("dpkg-query -W -f '${db:Status-Status}' coturn", check=False)
        return status in ("unpacked", "half-installed", "half-configured")

    with fleet.killed(when=unpacked):
        Lab().power_cut("h06")
    Lab().boot("h06")
    assert TURN13.root("systemctl is-active coturn.service", check=False) != "active"
    assert_completed(fleet)
    assert probe("turn", "allocate", TURN13.fqdn, secret=fleet.secrets["turn/calls"])["ok"]


def test_package_that_a_power_cut_left_torn_is_installed_anew(fleet: Fleet) -> None:
    """In the states of dpkg(1) that last for a moment only, between its writes."""
    for state in ("half-installed", "unpacked"):
        torn = f"/^Package: coturn$/,/^$/s/^Status: .*/Status: install reinstreq {state}/"
        TURN13.root(f"sed -i '{torn}' /var/lib/dpkg/status; rm /usr/bin/turnserver")
        assert "+ package coturn 4.6.1-2" in fleet.deploy().plan("h06")
        assert TURN13.root("dpkg-query -W -f '${db:Status-Abbrev}' coturn").strip() == "ii"
        TURN13.root("test -x /usr/bin/turnserver")
    assert fleet.deploy().changed == []


def test_control_c_says_so_and_is_no_success(fleet: Fleet) -> None:
    fleet.data["turn"]["total_quota"] = 1300
    with held(TURN12, CALLS):
        process = fleet.start()
        eventually(lambda: starting(TURN12, CALLS))
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "callready: interrupted; hosts that were being switched return by themselves" in said
    fleet.unsettled = True
    assert_completed(fleet)


def test_second_deploy_of_a_host_is_told_of_the_first(fleet: Fleet) -> None:
    fleet.data["deploy"] = {"confirm_timeout": 120}  # a whole second run is in between
    fleet.data["turn"]["total_quota"] = 1300
    with held(TURN12, CALLS):
        first = fleet.start()
        eventually(lambda: starting(TURN12, CALLS))
        fleet.data["turn"]["total_quota"] = 1400
        second = fleet.run("--limit", TURN12.fqdn)
    assert first.wait(timeout=60) == 0
    assert second.status == 1
    assert "another deploy waits for its confirmation here" in second.text
    assert "total-quota=1300" in TURN12.root("cat /etc/coturn/calls.conf")
    fleet.unsettled = True


def test_replaced_binary_is_a_reason_to_restart(fleet: Fleet) -> None:
    for host, binary in (
        (SFU, "/opt/livekit/1.13.5/livekit-server"),
        (TURN12, "/usr/bin/turnserver"),
    ):
        host.root(f"cp -p {binary} {binary}.new; mv {binary}.new {binary}")
    before = {host: host.pids() for host in HOSTS}
    run = fleet.deploy()
    assert run.plan("h04") == ["! unit livekit-server.service: restart, its binary was replaced"]
    assert run.plan("h03") == [f"! unit {CALLS}: restart, its binary was replaced"]
    assert {host for host in HOSTS if host.pids() != before[host]} == {SFU, TURN12}
    assert fleet.deploy().changed == []


def test_stopped_service_is_started(fleet: Fleet) -> None:
    TURN13.root(f"systemctl stop {CALLS}")
    run = fleet.deploy()
    assert (run.changed, run.plan("h06")) == (["h06"], [f"+ unit {CALLS}: start"])


def test_hosts_that_go_away_are_named_and_the_others_are_deployed(fleet: Fleet) -> None:
    """h05 is cut off from the start, h06 in the middle of its script."""
    fleet.data["turn"]["total_quota"] = 1300
    fleet.unsettled = True
    Lab().cut("h05")
    try:
        with held(TURN13, CALLS):
            process = fleet.start("--json")
            eventually(lambda: starting(TURN13, CALLS))
            Lab().cut("h06")
            _, said = process.communicate(timeout=60)
    finally:
        for name in ("h05", "h06"):
            Lab().mend(name)
    assert process.returncode == 1
    assert "[h05.lab.test] Could not connect" in said
    assert "[h06.lab.test] the connection broke; within 15 s of its switch" in said
    assert "Traceback" not in said
    quotas = {
        host: host.root("cat /etc/coturn/*.conf").count("total-quota=1300")
        for host in (TURN12, TWO_POOLS)
    }
    assert (quotas[TURN12], quotas[TWO_POOLS]) == (1, 0)
    assert_completed(fleet)
    assert TWO_POOLS.root("cat /etc/coturn/*.conf").count("total-quota=1300") == 2


def test_calls_connect_after_a_reboot_without_a_deploy(fleet: Fleet) -> None:
    for host in (SFU, TURN12, TWO_POOLS):
        Lab().reboot(host.name)
    for host in (SFU, TURN12, TWO_POOLS):
        assert "policy drop" in host.root("nft list table inet callready")
        before = "systemctl show -p ActiveEnterTimestampMonotonic --value "
        loaded, network = (int(host.root(before + u)) for u in (FIREWALL, "systemd-networkd"))
        assert loaded < network, "the network was up before its firewall"
    secret = {"secret": fleet.secrets["livekit/api_secret"], "LIVEKIT_API_KEY": "APIfleet"}
    call = probe("webrtc", f"ws://{SFU.fqdn}:7880", "--relay-only", **secret)
    assert call["ok"], call
    assert probe("turn", "allocate", TWO_POOLS.fqdn, secret=fleet.secrets["turn/avatar"])["ok"]
    assert fleet.deploy().changed == []

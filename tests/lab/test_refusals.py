"""What a deploy refuses, in which words, and that nothing was changed by then."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from lab import Lab
from tests.support.fleet import (
    OBSTACLES,
    PYINFRA,
    REPOSITORY,
    SFU,
    TURN12,
    TURN13,
    TWO_POOLS,
    Fleet,
    Run,
    obstacle,
    verify,
)

ENVIRONMENT = {**os.environ, "PYINFRA_YES": "1"}


def pyinfra(*arguments: str | Path) -> Run:
    done = subprocess.run(
        [PYINFRA, *arguments],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return Run(done.returncode, done.stdout, done.stderr)


# Settings: before any connection


@pytest.fixture
def nowhere(tmp_path: Path) -> Fleet:
    """An inventory of hosts that nobody can connect to: whoever tries gives other words."""
    groups = {
        "livekit": [("h17.lab.test", {"address": "198.51.100.117"})],
        "turn": [("h18.lab.test", {"address": "198.51.100.118", "pools": ["calls"]})],
    }
    data = {
        "livekit": {"url": "ws://h17.lab.test:7880", "keys": {"APIx": "secret:livekit/api_secret"}},
        "turn": {
            "tls": False,
            "pools": {"calls": {"realm": "lab.test", "secrets": ["secret:turn/calls"]}},
        },
    }
    return Fleet(tmp_path, groups, data, ["livekit/api_secret", "turn/calls"])


NOTHING = "nothing was connected to"


def test_shipped_example_is_refused_unedited() -> None:
    run = pyinfra("inventories/prod", "deploy.py")
    assert run.status == 1
    first, example, *_ = run.message
    assert first == NOTHING
    assert example == (
        "inventories/prod: still has the example's /CHANGE-ME/path/to/the/flutter/project, "
        "app1.example.com, avatar.example.com, callready@example.com, example.com, "
        "https://app.example.com, https://monitor.example.com, mail.example.com:587, "
        "mon1.example.com, oncall@example.com, operator@example.com, sfu1.example.com, "
        "team@example.com, turn1.example.com, turn2.example.com, wss://livekit.example.com: "
        "edit inventories/prod and inventories/group_data/prod.py to name your own hosts"
    )


def test_every_mistake_of_every_host_is_told_at_once(nowhere: Fleet) -> None:
    nowhere.groups["turn"][0][1]["address"] = "2001:db8::1"
    nowhere.groups["livekit"][0][1]["adress6"] = "2001:db8::2"
    nowhere.data["livekit"]["rtc"] = {"tcp_port": 70000}
    nowhere.data["livekit"]["keys"] = {"APIx": "written-into-the-inventory-0123456789"}
    nowhere.data["turn"]["allowed_peers"] = ["10.0.0.0/8"]
    nowhere.secrets["turn/calls"] = "short"
    assert sorted(nowhere.refused()) == [
        "h17.lab.test, h18.lab.test: livekit.keys.APIx: is written in the inventory; write a "
        'reference such as "secret:turn/calls" and keep the value in the store (make secrets '
        "ENV=…)",
        "h17.lab.test, h18.lab.test: livekit.rtc.tcp_port: 70000 is not a port (1-65535)",
        "h17.lab.test, h18.lab.test: turn.allowed_peers.0: 10.0.0.0/8: coturn reads no CIDR, 4.6.1 "
        "would run without the rule: write 10.0.0.0-10.255.255.255",
        "h17.lab.test, h18.lab.test: turn.pools.calls.secrets.0: is shorter than 32 characters; "
        "generate one with make secrets ENV=…",
        "h17.lab.test: adress6: is not a setting; did you mean address6?",
        "h18.lab.test: address: '2001:db8::1' is not an IPv4 address",
        NOTHING,
    ]


def test_rules_that_need_several_sections(nowhere: Fleet) -> None:
    both = nowhere.groups["livekit"][0]
    both[1]["pools"] = ["calls"]
    nowhere.groups["turn"].append(both)
    nowhere.data["livekit"]["config"] = {"rtc": {"max_bitrat": 1}}
    nowhere.data["turn"]["pools"]["calls"]["extra"] = {"no-udp-relay-bandwidth-limit": True}
    nowhere.data["turn"]["pools"]["spare"] = {"realm": "x.test", "secrets": ["secret:turn/calls"]}
    assert sorted(nowhere.refused()) == [
        "h17.lab.test, h18.lab.test: turn.pools.calls.extra.no-udp-relay-bandwidth-limit: not a "
        "coturn key in any version: bandwidth is unlimited by default; to limit it use max-bps "
        "(bytes/s per session) or bps-capacity (bytes/s for the server)",
        "h17.lab.test: livekit.config.rtc.max_bitrat: not a key of livekit.yaml in any version; "
        "livekit-server 1.13.5 would not start",
        "h17.lab.test: turn.pools.calls.min_port: LiveKit (media 50000-60000) and coturn calls "
        "(relay range 49152-65535) overlap on the same host; keep 50000-60000 for LiveKit, give "
        "60001-65535 to coturn calls",
        NOTHING,
        "turn.pools.calls.secrets.0: is the same secret as turn.pools.spare.secrets.0: use "
        "different ones",
        "turn.pools.spare: no host of group turn has it in its pools",
    ]


def test_host_without_ipv4_is_refused(nowhere: Fleet) -> None:
    nowhere.groups["turn"][0][1].clear()
    nowhere.groups["turn"][0][1].update(address6="2001:db8:ca11::118", pools=["calls"])
    assert nowhere.refused() == [
        NOTHING,
        "h18.lab.test: address: IPv6-only hosts are not supported, many callers have no IPv6: give "
        "the host an IPv4 address too",
    ]


def test_missing_secret_is_named_with_what_to_run(nowhere: Fleet) -> None:
    del nowhere.secrets["turn/calls"]
    (line,) = nowhere.refused()[1:]
    assert line.endswith("fleet.secrets.yaml has no entry turn/calls: run make secrets ENV=fleet")


def test_secrets_that_others_may_read_are_refused(nowhere: Fleet) -> None:
    nowhere.write()
    store = nowhere.folder / "fleet.secrets.yaml"
    store.chmod(0o644)
    run = pyinfra(nowhere.inventory, "deploy.py")
    assert run.status == 1
    assert run.message == [NOTHING, f"{store}: others may read it; run chmod 600 {store}"]
    assert yaml.safe_load(store.read_text())["turn/calls"] not in run.text


def test_certificate_that_cannot_be_served_is_refused(fleet: Fleet) -> None:
    fleet.data["tls"]["certificate"] = "/var/lib/callready-lab/certs/h03.lab.test.pem"
    assert sorted(fleet.refused()) == [
        f"{name}.lab.test: tls: key /var/lib/callready-lab/certs/{name}.lab.test.key does not "
        "belong to certificate /var/lib/callready-lab/certs/h03.lab.test.pem"
        for name in ("h05", "h06")
    ] + [NOTHING]


def test_limit_does_not_hide_the_mistakes_of_other_hosts(fleet: Fleet) -> None:
    fleet.groups["turn"][1][1]["ssh_port"] = 0
    assert fleet.refused("--limit", TURN12.fqdn) == [
        NOTHING,
        "h06.lab.test: ssh_port: 0 is not a port (1-65535)",
    ]


def test_mistyped_selection_is_no_success(fleet: Fleet) -> None:
    fleet.write()
    run = pyinfra(f"{fleet.inventory}s", "deploy.py")
    assert (run.status, run.message) == (
        1,
        [NOTHING, f"{fleet.inventory}s: no hosts: is it the right file?"],
    )
    run = pyinfra(fleet.inventory, "deploy.py", "--limit", "h99*")
    assert run.status == 1
    assert "callready: no host was selected: check the inventory's path and --limit" in run.text


# Hosts: after their facts are read


def test_host_that_is_no_supported_debian_is_refused(fleet: Fleet) -> None:
    TURN13.root("sed -i.kept 's/^VERSION_ID=.*/VERSION_ID=11/' /usr/lib/os-release")
    try:
        assert fleet.refused() == [
            "nothing was changed",
            "h06.lab.test: runs debian 11 on amd64; supported are Debian 12 and 13 on amd64 and "
            "arm64",
        ]
    finally:
        TURN13.root("mv /usr/lib/os-release.kept /usr/lib/os-release")


def test_other_coturn_than_the_inventory_says_is_refused(fleet: Fleet) -> None:
    fleet.groups["turn"][1][1]["turn"] = {**fleet.data["turn"], "version": "4.18.0"}
    assert fleet.refused() == [
        "nothing was changed",
        "h06.lab.test: has coturn 4.6.1-2, the inventory says 4.18.0: set turn.version to what the "
        "host has (the keys are then checked for that version)",
    ]


def test_address_that_the_host_has_otherwise_is_refused(fleet: Fleet) -> None:
    own, internal = fleet.groups["livekit"][0][1], "10.77.9.4"
    own["private_address"] = internal
    own["internal_address"] = internal
    fleet.groups["turn"][0][1]["address"] = "198.51.100.203"
    has = "on none of its interfaces, which have"
    assert sorted(fleet.refused()) == [
        f"h03.lab.test: address: 198.51.100.203 is {has} {TURN12.ipv4}, {TURN12.ipv6}: if the "
        "provider's network leads it to one of these (1:1 NAT), set private_address to that",
        f"h04.lab.test: internal_address: {internal} is {has} {SFU.ipv4}, {SFU.ipv6}",
        f"h04.lab.test: private_address: {SFU.ipv4} (address) is on an interface of the host, so "
        "there is no 1:1 NAT: leave private_address out; an address on an internal network is "
        "internal_address",
        "nothing was changed",
    ]


def test_port_of_another_program_is_refused(fleet: Fleet) -> None:
    fleet.data["livekit"]["port"] = 7890
    with SFU.listening("tcp", 7890):
        assert fleet.refused() == [
            "nothing was changed",
            "h04.lab.test: port 7890/tcp is taken by perl (foreign-tcp-7890.service), LiveKit "
            "needs it for signalling: stop that program (a container?) or change livekit.port",
        ]
        fleet.data["host"] = {"other_listeners": ["7890/tcp"]}  # of another host, perhaps
        fleet.data["livekit"]["port"] = 7880
        assert fleet.deploy().changed == []


ENV, CALLS = "/srv/app/.env", "/etc/coturn/calls.conf"


@pytest.mark.parametrize("kind", OBSTACLES)
def test_environment_file_that_cannot_be_replaced_is_refused(
    fleet: Fleet, kind: str, tmp_path: Path
) -> None:
    fleet.data["livekit"]["keys"] = {"APIother": "secret:livekit/api_secret"}
    fleet.data["turn"]["total_quota"] = 1300  # another change in the same deploy
    with obstacle(SFU, kind, ENV) as words, obstacle(TURN13, "folder", CALLS):
        nothing, env, calls = fleet.refused(*["--dry"] * (kind == "folder"))
        assert nothing == "nothing was changed"
        assert env.startswith(f"h04.lab.test: {ENV} {words}: ")
        assert env.endswith(", or name another file (app.env_file)")
        assert calls.startswith(f"h06.lab.test: {CALLS} is a folder: callready puts a file there")
        if kind == "folder":
            found = verify(tmp_path, "test_places", inventory=fleet.inventory)
            assert sorted(name for name, why in found.items() if why) == [
                "test_places[h04.lab.test]",
                "test_places[h06.lab.test]",
            ]
    assert not SFU.root("find /srv/app /etc/callready -name '*callready-new' -o -name theirs")


def test_clock_that_is_off_is_refused(fleet: Fleet) -> None:
    messages = fleet.refused("--limit", TURN12.fqdn, before=("faketime", "-f", "+45s"))
    assert messages == [
        "nothing was changed",
        "h03.lab.test: its clock is 45 s behind this machine's (limit 30 s, host.max_clock_skew): "
        "TURN credentials carry an expiry time; check timedatectl on both",
    ]


def test_notrack_is_refused_where_another_table_does_nat(fleet: Fleet) -> None:
    fleet.data["firewall"] = {"notrack": True}
    TWO_POOLS.root(
        "nft add table ip docker; nft 'add chain ip docker out { type nat hook postrouting "
        "priority 100; }'; nft add rule ip docker out ip saddr 172.17.0.0/16 masquerade"
    )
    try:
        assert fleet.refused() == [
            "nothing was changed",
            "h05.lab.test: firewall.notrack would break the NAT of ip docker: replies to untracked "
            "source ports are lost; leave it off",
        ]
    finally:
        TWO_POOLS.root("nft delete table ip docker")


def test_active_ufw_is_refused_and_an_inactive_one_is_not(fleet: Fleet) -> None:
    TURN13.root("apt-get -qq -o Dpkg::Use-Pty=0 install -y ufw > /dev/null")
    try:
        assert fleet.deploy().changed == []
        TURN13.root("ufw allow 22/tcp; ufw --force enable")
        assert fleet.refused() == [
            "nothing was changed",
            "h06.lab.test: ufw is active and would drop what callready opens: disable it (ufw "
            "disable) or set firewall.enabled to False",
        ]
    finally:
        TURN13.root("ufw disable; apt-get -qq purge -y ufw > /dev/null")


def test_bad_setting_is_told_even_of_a_host_that_is_cut_off(fleet: Fleet) -> None:
    fleet.data["turn"]["user_quota"] = -1
    Lab().cut("h05")
    try:
        run = fleet.refused()
    finally:
        Lab().mend("h05")
    assert run[0] == NOTHING
    assert len(run) == 2 and "turn.user_quota: " in run[1]

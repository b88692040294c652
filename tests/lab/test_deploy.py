"""The deploy of a fleet: what an operator sees of it, and what callers get."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lab import Lab, plan
from tests.support.fleet import (
    FLEET,
    HOSTS,
    REPOSITORY,
    SFU,
    SUPPORT,
    TURN12,
    TURN13,
    TWO_POOLS,
    Fleet,
    Host,
    eventually,
    probe,
)

CA = str(plan.STATE / "ca.pem")


def allocate(host: Host, secret: str, port: int = 3478, *options: str) -> str:
    """Whether a caller with credentials from this secret gets a relay: `ok`, or the refusal."""
    where = ("--port", str(port), "--ca-file", CA, *options)
    result = probe("turn", "allocate", host.fqdn, *where, secret=secret)
    return "ok" if result["ok"] else result["evidence"]


def anonymous(host: Host, port: int = 3478) -> str:
    result = probe("turn", "allocate", host.fqdn, "--port", str(port), "--anonymous")
    return "ok" if result["ok"] else result["evidence"]


# Before the first deploy


def test_dry_run_shows_the_plan_of_bare_hosts_and_touches_nothing(bare_fleet: Fleet) -> None:
    before = {host: host.snapshot() for host in HOSTS}
    run = bare_fleet.run("--dry", "--diff")
    assert run.status == 0, run.text
    turn, sfu = run.plan("h03"), run.plan("h04")
    assert [line for line in turn if line.startswith("+ package coturn 4.6.1-")]
    assert {
        "+ file /etc/coturn/calls.conf",
        "+ firewall table inet callready",
        "+ unit turnserver@calls.service: start",
    } <= set(turn), turn
    assert [line for line in turn if line.startswith("+ row /var/lib/turn/calls.db calls.lab.test")]
    assert [line for line in turn if line.startswith("+ certificate h03.lab.test serial")]
    assert {
        "+ user livekit",
        "+ binary /opt/livekit/1.13.5/livekit-server",
        "+ unit livekit-server.service: start",
    } <= set(sfu), sfu
    assert "relay-ip=198.51.100.103" in run.text
    assert "••••••" in run.text
    for host in HOSTS:
        assert host.snapshot() == before[host]


def test_another_coturn_than_the_host_would_install_is_refused(bare_fleet: Fleet) -> None:
    bare_fleet.data["turn"]["version"] = "4.18.0"
    said = "{0}.lab.test: would install coturn 4.6.1-{1}, the inventory says 4.18.0: " + (
        "set turn.version to what the host has (the keys are then checked for that version)"
    )
    assert sorted(bare_fleet.refused()) == [
        said.format("h03", 1),
        said.format("h05", 1),
        said.format("h06", 2),
        "nothing was changed",
    ]
    # A host that never fetched package lists knows its candidate only later.
    TURN12.root("rm -rf /var/lib/apt/lists/*")
    files = "find /etc ! -type d -printf '%p %T@\n'; dpkg-query -W"
    before = TURN12.root(files)
    run = bare_fleet.run("--limit", TURN12.fqdn)
    assert run.status == 1
    assert "coturn 4.18.0 is wanted, this host would install 4.6.1-1:" in run.text
    assert TURN12.root(files) == before


# The first deploy


def test_first_deploy_brings_every_bare_host_up(deployed_fleet: Fleet) -> None:
    run = deployed_fleet.first
    assert run and run.status == 0, run and run.text
    assert [name for name in FLEET if f"[{name}.lab.test] Success" in run.text] == list(FLEET)
    assert {host.name: sorted(host.pids()) for host in HOSTS} == {
        "h03": ["turnserver@calls.service"],
        "h04": ["livekit-server.service"],
        "h05": ["turnserver@avatar.service", "turnserver@gadget.service"],
        "h06": ["turnserver@calls.service"],
    }


@pytest.mark.parametrize("host", [TURN12, TURN13, TWO_POOLS], ids=lambda host: host.name)
def test_no_coturn_but_ours_ever_ran(deployed_fleet: Fleet, host: Host) -> None:
    said = host.root("journalctl _COMM=turnserver -o json --output-fields=_SYSTEMD_UNIT")
    units = {json.loads(line)["_SYSTEMD_UNIT"] for line in said.splitlines()}
    assert units and all(unit.startswith("turnserver@") for unit in units)
    assert host.root("readlink /etc/systemd/system/coturn.service") == "/dev/null"
    assert host.root("systemctl is-active coturn.service", check=False) == "inactive"


@pytest.mark.parametrize("host", [TURN12, TURN13], ids=["Debian 12", "Debian 13"])
@pytest.mark.parametrize("transport", ["udp", "tcp", "tls"])
def test_callers_get_a_relay_and_strangers_do_not(fleet: Fleet, host: Host, transport: str) -> None:
    over = (5349 if transport == "tls" else 3478, "--transport", transport)
    assert allocate(host, fleet.secrets["turn/calls"], *over) == "ok"
    assert "(401 Unauthorized)" in allocate(host, "x" * 32, *over)
    assert "(401 Unauthorized)" in anonymous(host)


def test_livekit_answers_and_keeps_answering(fleet: Fleet) -> None:
    health = probe("livekit", "health", f"ws://{SFU.fqdn}:7880", "--again-after", "5")
    assert health["status"] == 200


def test_second_and_third_run_change_nothing(fleet: Fleet) -> None:
    before = {host: host.snapshot() for host in HOSTS}
    for _ in range(2):
        results = fleet.deploy().results
        assert (results["hosts"], results["success"]) == (4, 0)
    assert {host: host.snapshot() for host in HOSTS} == before


# Changes


def test_one_value_restarts_only_the_unit_that_has_it(fleet: Fleet) -> None:
    before = {host: host.pids() for host in HOSTS}
    untouched = {host: host.snapshot() for host in (TURN12, TURN13)}
    fleet.data["livekit"]["logging"] = {"level": "debug"}
    fleet.data["turn"]["pools"]["avatar"]["user_quota"] = 13
    assert fleet.deploy().changed == ["h04", "h05"]
    restarted = {
        unit for host in HOSTS for unit, pid in host.pids().items() if before[host].get(unit) != pid
    }
    assert restarted == {"livekit-server.service", "turnserver@avatar.service"}
    assert {host: host.snapshot() for host in untouched} == untouched
    assert '"level":"debug"' in SFU.root("journalctl -u livekit-server -o cat -n 20").lower()


def test_changed_turn_secret_reaches_everybody_without_a_restart_of_coturn(fleet: Fleet) -> None:
    old = fleet.secrets["turn/calls"]
    coturns = {host: host.pids() for host in (TURN12, TURN13)}
    livekit = SFU.pids()
    restarts = SFU.root("wc -l < /run/app-log")
    new = fleet.secrets["turn/calls"] = fleet.marker + "-a-new-secret-for-the-pool"
    assert fleet.deploy().changed == ["h03", "h04", "h06"]

    for host in coturns:
        assert host.pids() == coturns[host]
        assert allocate(host, new) == "ok"
        assert "(401 Unauthorized)" in allocate(host, old)
    assert SFU.pids() != livekit
    offered = fleet.ice_servers()
    assert offered["ok"] and len([uri for uri in offered if uri.startswith("turn")]) == 4, offered
    environment = SFU.root("cat /srv/app/.env").splitlines()
    assert f"TURN_SECRET={new}" in environment
    assert int(SFU.root("wc -l < /run/app-log")) == int(restarts) + 1


def test_environment_file_keeps_what_is_not_ours(fleet: Fleet) -> None:
    lines = SFU.root("cat /srv/app/.env").splitlines()
    assert lines[0] == "DEBUG=1"
    assert lines[1:3] == ["LIVEKIT_API_KEY=APIfleet", "PORT=80"]
    assert sorted(line.partition("=")[0] for line in lines[3:]) == [
        "LIVEKIT_API_SECRET",
        "LIVEKIT_URL",
        "STUN_URIS",
        "TURN_SECRET",
        "TURN_TTL",
        "TURN_URIS",
    ]
    assert SFU.root("stat -c '%a %U' /srv/app/.env") == "600 debian"


def test_renewed_certificate_is_served_without_a_restart(fleet: Fleet) -> None:
    before = {host: host.pids() for host in HOSTS}
    subprocess.run(
        [sys.executable, "-m", "lab", "cert", TWO_POOLS.name], check=True, cwd=REPOSITORY
    )
    pem = plan.STATE / "certs" / f"{TWO_POOLS.fqdn}.pem"
    renewed = openssl("x509", "-noout", "-serial", "-in", str(pem)).partition("=")[2]
    old = {served(TWO_POOLS, port) for port in (5349, 5350)}
    assert renewed not in old

    assert fleet.deploy().changed == ["h05"]
    assert {served(TWO_POOLS, port) for port in (5349, 5350)} == {renewed}
    assert {host: host.pids() for host in HOSTS} == before
    for name in ("privkey.pem", "fullchain.pem"):
        path = f"/etc/callready/tls/h05.lab.test/current/{name}"
        assert TWO_POOLS.root(f"stat -Lc '%F' {path}") == "regular file"
    key = TWO_POOLS.root("stat -Lc '%a %U %G' /etc/callready/tls/h05.lab.test/current/privkey.pem")
    assert key == "640 root turnserver"


def openssl(*arguments: str) -> str:
    return subprocess.run(
        ["openssl", *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def served(host: Host, port: int) -> str:
    """Serial of the certificate that callers get."""
    return str(probe("tls", host.fqdn, str(port), "--ca-file", CA)["serial"])


def test_dry_run_shows_a_change_with_secrets_hidden_and_touches_nothing(fleet: Fleet) -> None:
    before = {host: host.snapshot() for host in HOSTS}
    fleet.data["livekit"]["logging"] = {"level": "warn"}
    fleet.data["turn"]["total_quota"] = 1300
    fleet.secrets["turn/avatar"] = fleet.marker + "/another=secret.with:signs"
    fleet.secrets["livekit/api_secret"] = fleet.marker + "/a-third=secret.with:signs"
    run = fleet.run("--dry", "--diff")
    assert run.status == 0
    livekit, config = "livekit-server.service", "/etc/livekit/livekit.yaml"
    assert run.plan("h04") == [
        f"~ file {config}",
        f"~ file /etc/systemd/system/{livekit}.d/callready.conf",
        "~ environment /srv/app/.env: LIVEKIT_URL, LIVEKIT_API_KEY, LIVEKIT_API_SECRET, STUN_URIS, "
        "TURN_URIS, TURN_SECRET, TURN_TTL",
        f"! unit {livekit}: restart, its process is older than its configuration",
        "! command echo restarted >> /run/app-log: run, /srv/app/.env changed",
    ]
    rows = [line for line in run.plan("h05") if " row " in line]
    assert [line[:30] for line in rows] == [
        "+ row /var/lib/turn/avatar.db ",
        "- row /var/lib/turn/avatar.db ",
    ]
    for line in ("-total-quota=1200", "+total-quota=1300", "-  level: info", "+  level: warn"):
        assert line in run.text
    assert {host: host.snapshot() for host in HOSTS} == before


def test_limit_deploys_one_host_and_leaves_the_others(fleet: Fleet) -> None:
    others = {host: host.snapshot() for host in HOSTS if host != TURN13}
    fleet.data["turn"]["total_quota"] = 1300
    run = fleet.deploy("--limit", TURN13.fqdn)
    assert (run.changed, run.results["hosts"]) == (["h06"], 1)
    assert "total-quota=1300" in TURN13.root("cat /etc/coturn/calls.conf")
    assert {host: host.snapshot() for host in others} == others


def test_edited_file_is_announced_and_put_back(fleet: Fleet) -> None:
    config = TURN12.root("cat /etc/coturn/calls.conf")
    TURN12.root("echo total-quota=7 >> /etc/coturn/calls.conf")
    TURN12.root("sed -i s/1200/1/ /etc/coturn/calls.conf")  # makes a plain file of our link
    run = fleet.deploy()
    path = "/etc/coturn/calls.conf"
    assert run.plan("h03")[0] == f"~ file {path} (edited on the host since the last deploy)"
    assert run.changed == ["h03"]
    assert TURN12.root(f"cat {path}") == config
    assert fleet.deploy().changed == []


def test_edit_through_the_link_is_announced_and_put_back(fleet: Fleet) -> None:
    config = TURN13.root("cat /etc/coturn/calls.conf")
    TURN13.root("echo total-quota=7 >> /etc/coturn/calls.conf; chmod 644 /etc/coturn/calls.conf")
    run = fleet.deploy()
    assert "(edited on the host since the last deploy)" in run.plan("h06")[0]
    assert TURN13.root("cat /etc/coturn/calls.conf") == config
    assert TURN13.root("stat -Lc '%a %U %G' /etc/coturn/calls.conf") == "640 root turnserver"


# Several TURN services on one host


def test_credentials_of_one_pool_are_worthless_at_the_other(fleet: Fleet) -> None:
    avatar, gadget = fleet.secrets["turn/avatar"], fleet.secrets["turn/gadget"]
    assert allocate(TWO_POOLS, avatar) == "ok"
    assert "(401 Unauthorized)" in allocate(TWO_POOLS, avatar, 3479)
    assert "(401 Unauthorized)" in allocate(TWO_POOLS, fleet.secrets["turn/calls"])
    assert "(401 Unauthorized)" in anonymous(TWO_POOLS, 3479)

    def fixed(port: int, password: str) -> dict[str, object]:
        where = ("allocate", TWO_POOLS.fqdn, "--port", str(port))
        return probe("turn", *where, secret=password, TURN_USERNAME="gadget")

    granted = fixed(3479, gadget)
    assert granted["ok"] and 60001 <= int(str(granted["relayed_port"])) <= 65535
    assert "(401 Unauthorized)" in str(fixed(3478, gadget))
    assert "(401 Unauthorized)" in str(fixed(3479, avatar))


# The firewall


def test_nothing_answers_but_what_is_planned(fleet: Fleet) -> None:
    planned = {SFU: "22,7880,7881", TWO_POOLS: "22,3478,3479,5349,5350"}
    for host, ports in planned.items():
        with host.listening("tcp", 8000), host.listening("udp", 8000):
            assert host.root("ss -Hltn 'sport = :8000'")
            for address in (host.ipv4, host.ipv6):
                wanted = f"{ports},8000,111,5355,6789,9641"
                found = probe("ports", address, "--ports", wanted, "--planned", ports)
                assert found["ok"], found
                assert ",".join(map(str, found["open"])) == ports
                assert reach("direct", address, 8000) == "silence"


def test_relay_does_not_reach_the_services_of_its_own_host(fleet: Fleet) -> None:
    secret = fleet.secrets["turn/avatar"]
    with TWO_POOLS.listening("udp", 8000), TWO_POOLS.listening("udp", 60500):
        # The pool's policy lets callers have this permission: its own relays are peers too.
        assert reach("relay", TWO_POOLS.ipv4, 60500, secret) == "echo"
        assert reach("relay", TWO_POOLS.ipv4, 8000, secret) == "silence"
    with TURN13.listening("udp", 8000):
        TURN13.root("nft insert rule inet callready input udp dport 8000 accept")
        fleet.unsettled = True
        assert reach("relay", TURN13.ipv4, 8000, secret) == "echo"


def reach(how: str, address: str, number: int, secret: str = "", caller: bool = True) -> str:
    """Send from where the callers are, or from this machine, or through a relay of h05: what
    tests/support/datagram.py prints."""
    where = Lab().client_prefix() if caller else []
    script = SUPPORT / "datagram.py"
    return subprocess.run(
        [*where, sys.executable, script, how, address, str(number), TWO_POOLS.ipv4],
        input=secret,
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        timeout=30,
        env={"PYTHONPATH": str(REPOSITORY)},
    ).stdout.strip()


@pytest.fixture
def internal() -> Iterator[dict[Host, str]]:
    """An internal network of two hosts: the address of each."""
    network = {SFU: "10.77.0.4", TURN12: "10.77.0.3"}
    for host, address in network.items():
        host.root(f"ip address add {address}/24 dev host0")
    yield network
    for host, address in network.items():
        host.root(f"ip address delete {address}/24 dev host0")


def counted(host: Host, key: str) -> int:
    """The packets that a use of the port plan has let in, by its counter in the filter."""
    said = host.root(f"nft list counter inet callready {key}")
    return int(said.partition("packets ")[2].split()[0])


def test_what_is_open_to_some_and_a_rate_for_each_client(
    fleet: Fleet, internal: dict[Host, str]
) -> None:
    """A group over both address families and an internal network, a protocol without ports, and a
    relayed call that the rate does not touch, all without connection tracking of media."""
    fleet.groups["livekit"][0][1]["internal_address"] = internal[SFU]
    fleet.groups["scrapers"] = [SFU.fqdn]
    fleet.data["firewall"] = {
        "notrack": True,
        "turn_requests_per_client": 5,
        "open": {
            "redis": {"ports": ["6379/tcp"], "sources": ["scrapers"]},
            "keepalived": {
                "protocols": ["vrrp"],
                "sources": [plan.CALLER.ipv4, f"{plan.IPV6_PREFIX}/{plan.IPV6_LENGTH}"],
            },
        },
    }
    pids = {host: host.pids() for host in HOSTS}
    assert fleet.deploy().changed == list(FLEET)
    assert {host: host.pids() for host in HOSTS} == pids

    redis, vrrp = "firewall.open.redis/tcp/6379", "firewall.open.keepalived/vrrp"
    with TURN12.listening("tcp", 6379):
        for number, address in enumerate((TURN12.ipv4, TURN12.ipv6, internal[TURN12]), 1):
            SFU.root(f"timeout 5 bash -c ': < /dev/tcp/{address}/6379'")
            assert counted(TURN12, redis) == number
        for address in (TURN12.ipv4, TURN12.ipv6):
            assert probe("ports", address, "--ports", "6379")["open"] == []
        assert counted(TURN12, redis) == 3
    for address, by_caller in ((TURN12.ipv4, True), (TURN12.ipv6, True), (TURN12.ipv4, False)):
        reach("protocol", address, 112, caller=by_caller)
    reach("protocol", TURN12.ipv4, 50)
    assert counted(TURN12, vrrp) == 2

    stun = "turn.pools.avatar.listening_port/udp/3478"
    eventually(lambda: reach("requests", TWO_POOLS.ipv4, 1) == "1")
    before = counted(TWO_POOLS, f"{stun}/limited")
    relayed = probe("turn", "relay", TWO_POOLS.fqdn, secret=fleet.secrets["turn/avatar"])
    assert relayed["ok"] and relayed["received"] == relayed["sent"] == 50
    assert counted(TWO_POOLS, f"{stun}/limited") == before
    for address in (TWO_POOLS.ipv4, TWO_POOLS.ipv6):
        before = counted(TWO_POOLS, f"{stun}/limited")
        answered = int(reach("requests", address, 500))
        assert 0 < answered <= 100, answered
        assert counted(TWO_POOLS, f"{stun}/limited") - before == 500 - answered
    # What it counts is no change of it.
    assert fleet.deploy().changed == []


def test_callers_are_told_of_addresses_that_they_reach(fleet: Fleet) -> None:
    """The host has more: bridges as Docker makes them, an internal network."""
    bridges = range(3)
    for number in bridges:
        SFU.root(
            f"ip link add br{number} type bridge; ip link set br{number} up; "
            f"ip address add 172.17.{number}.1/24 dev br{number}; "
            f"ip address add fd00:17:{number}::1/64 dev br{number} nodad"
        )
    SFU.root("systemctl restart livekit-server.service")  # it looks for interfaces when it starts
    eventually(lambda: bool(probe("livekit", "health", f"ws://{SFU.fqdn}:7880")["ok"]))
    try:
        joined = probe(
            "livekit",
            "join",
            f"ws://{SFU.fqdn}:7880",
            "--ca-file",
            CA,
            secret=fleet.secrets["livekit/api_secret"],
            LIVEKIT_API_KEY="APIfleet",
        )
    finally:
        for number in bridges:
            SFU.root(f"ip link delete br{number}")
    assert joined["ok"], joined
    told = [re.sub(r":\d+/", " ", candidate) for candidate in joined["candidates"]]
    own = (SFU.ipv4, f"[{SFU.ipv6}]")
    assert sorted(told) == sorted(f"{each} {proto}" for each in own for proto in ("tcp", "udp"))


def test_tables_of_other_programs_stay(fleet: Fleet) -> None:
    TURN12.root(
        "nft add table inet foreign; nft add chain inet foreign mine; "
        "nft add rule inet foreign mine counter accept"
    )
    before = TURN12.root("nft list table inet foreign")
    fleet.data["firewall"] = {"extra_ports": ["8443/tcp"]}
    pids = TURN12.pids()
    assert fleet.deploy().changed == list(FLEET)
    assert TURN12.root("nft list table inet foreign") == before
    assert TURN12.pids() == pids
    with TURN12.listening("tcp", 8443):
        assert probe("ports", TURN12.fqdn, "--ports", "8443")["open"] == [8443]
    TURN12.root("nft delete table inet foreign")


def test_ruleset_changed_on_the_host_is_put_back(fleet: Fleet) -> None:
    TURN12.root("nft flush ruleset")
    assert fleet.deploy().changed == ["h03"]
    with TURN12.listening("tcp", 8000):
        assert probe("ports", TURN12.fqdn, "--ports", "22,8000")["open"] == [22]


# Less


def test_pool_taken_out_of_the_inventory_leaves_the_host(fleet: Fleet) -> None:
    del fleet.data["turn"]["pools"]["gadget"]
    fleet.groups["turn"][2][1]["pools"] = ["avatar"]
    avatar = TWO_POOLS.pids()["turnserver@avatar.service"]
    run = fleet.deploy()
    assert run.changed == ["h05"]
    assert "- unit turnserver@gadget.service" in run.plan("h05")
    assert TWO_POOLS.pids() == {"turnserver@avatar.service": avatar}
    assert TWO_POOLS.root("find /etc -path '*gadget*' ! -path '*/releases/*'") == ""
    assert probe("ports", TWO_POOLS.fqdn, "--ports", "3478,3479,5350")["open"] == [3478]
    assert fleet.deploy().changed == []


def test_role_taken_out_of_the_inventory_leaves_the_host(fleet: Fleet) -> None:
    assert SFU.root("cat /etc/callready/before/etc/livekit/livekit.yaml") == "port: 1"
    assert SFU.root("stat -c %a /etc/callready/before/etc/livekit/livekit.yaml") == "600"
    # The SFU moves to h06, h04 goes on minting tokens.
    fleet.groups["livekit"] = [fleet.groups["turn"].pop(1)]
    fleet.groups["livekit"][0][1].pop("pools")
    fleet.data["livekit"]["url"] = f"ws://{TURN13.fqdn}:7880"
    run = fleet.deploy()
    assert "- unit livekit-server.service" in run.plan("h04")
    assert "- unit turnserver@calls.service" in run.plan("h06")
    assert (SFU.pids(), list(TURN13.pids())) == ({}, ["livekit-server.service"])
    # What stood there before callready is back, and nothing but the way back starts at boot.
    assert SFU.root("cat /etc/livekit/livekit.yaml") == "port: 1"
    units = SFU.root("find /etc/systemd -name '*livekit*' -o -name '*callready*'").splitlines()
    assert {path.rpartition("/")[2] for path in units} == {
        "callready-boot.service",
        "callready-revert.service",
    }
    assert SFU.root("nft list tables") == ""
    assert fleet.deploy().changed == []

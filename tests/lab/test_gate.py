"""The health gate and new SSH connections, against a TURN host and an SFU of the lab: what a broken
host makes them say, and what a network that lets no UDP through does."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from pyinfra.api.config import Config
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.host import Host as Connection
from pyinfra.api.inventory import Inventory
from pyinfra.api.state import State

from callready.probes import catalogue, stun
from callready.probes.kinds import Join
from callready.probes.probe import Probe
from callready.release.node import Node
from callready.rollout import gate, ssh
from callready.rollout.prober import Prober
from callready.rollout.tunnel import tunnel
from callready.secrets.loading import validate
from callready.settings.inventory import inventory_data
from lab import Lab, ca, hosts, plan
from tests.support.fleet import Fleet, Host, delivered, eventually, inventory

TURN, SFU = Host("h13"), Host("h14")
UDP = "meta l4proto udp"


class Site:
    """The two hosts deployed, with the deploy's own view of them and a connection to each."""

    def __init__(self, fleet: Fleet, **more: str) -> None:
        self.fleet = fleet
        data = inventory_data(str(fleet.inventory))
        self.settings = validate(str(fleet.inventory), data)
        strict = {"ssh_strict_host_key_checking": "yes", **more}
        known = Inventory(([(name, {**item, **strict}) for name, item in data.items()], {}))
        State(known, Config())
        self.connections: dict[str, Connection] = {host.name: host for host in known}

    def node(self, host: Host) -> Node:
        return Node(host.fqdn, self.settings)

    def probes(self, host: Host) -> list[Probe]:
        return gate.probes(self.node(host))

    def gate(self, host: Host, within: float = 0) -> list[str]:
        """The gate's sentences; none of them has a secret."""
        said = ask(self.probes(host), within)
        assert self.fleet.marker not in "".join(said)
        return said

    def families(self, host: Host) -> dict[int, str]:
        return ssh.families(self.connections[host.fqdn], self.node(host))


PROBER = Prober()


def ask(probes: Sequence[Probe], within: float) -> list[str]:
    """A sentence for each probe that does not pass."""
    found = zip(probes, PROBER.ask(probes, within), strict=True)
    return [f"{probe.title}: {finding}" for probe, finding in found if finding]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    _, data, secrets = inventory()
    data["livekit"]["url"], data["edge"] = f"wss://{SFU.fqdn}", {}
    del data["app"], data["turn"]["pools"]["avatar"]
    data["turn"]["pools"]["calls"] |= {"max_port": 60000, "tls_on_443": True}
    secrets.remove("turn/avatar")
    groups = {
        "livekit": [(SFU.fqdn, {"address": SFU.ipv4, "address6": SFU.ipv6})],
        "turn": [
            (TURN.fqdn, {"address": TURN.ipv4, "address6": TURN.ipv6, "pools": ["calls", "gadget"]})
        ],
    }
    fleet = Fleet(tmp_path_factory.mktemp("operator"), groups, data, secrets)
    with delivered(TURN.name, SFU.name):
        fleet.deploy()
        yield Site(fleet)


@contextmanager
def changed(host: Host, do: str, undo: str) -> Iterator[None]:
    host.root(do)
    try:
        yield
    finally:
        host.root(undo)


@contextmanager
def filtered(host: Host, rule: str) -> Iterator[None]:
    """A rule of a table before callready's own."""
    chain = "{ type filter hook input priority -50; }"
    with changed(
        host,
        f"nft add table inet gate; nft 'add chain inet gate in {chain}'; "
        f"nft add rule inet gate in {rule}",
        "nft delete table inet gate",
    ):
        yield


def about(said: list[str]) -> list[str]:
    return [sentence.partition(" on h1")[0] for sentence in said]


def test_the_gate_passes_on_a_good_deploy(site: Site) -> None:
    for host, least in ((TURN, 24), (SFU, 6)):
        assert len(site.probes(host)) >= least
        assert site.gate(host, within=10) == []


@pytest.mark.parametrize(
    ("host", "unit", "what", "why"),
    [
        (TURN, "turnserver@gadget", r"pool gadget|port 5350", "Connection refused"),
        (SFU, "livekit-server", "LiveKit", "no answer in time"),
        (SFU, "haproxy", "LiveKit|HTTPS|certificate", "Connection refused"),
    ],
)
def test_a_stopped_service(site: Site, host: Host, unit: str, what: str, why: str) -> None:
    with changed(host, f"systemctl stop {unit}", f"systemctl start {unit}"):
        said = site.gate(host)
    assert len(said) == len([probe for probe in site.probes(host) if re.search(what, probe.title)])
    assert all(re.search(what, sentence) and why in sentence for sentence in said)
    assert site.gate(host, within=10) == []


def test_a_service_that_comes_up_late_passes(site: Site) -> None:
    with changed(
        TURN,
        "systemctl stop turnserver@gadget; systemd-run -q --on-active=3 --timer-property="
        "AccuracySec=100ms systemctl start turnserver@gadget",
        "true",
    ):
        assert site.gate(TURN, within=20) == []


def test_a_port_that_the_firewall_closes(site: Site) -> None:
    with filtered(TURN, "tcp dport 5350 drop"):
        said = site.gate(TURN)
    way = "TURN allocation over tls of pool gadget"
    certificate = f"certificate of {TURN.fqdn} on port 5350"
    assert about(said) == [way, certificate] * 2
    assert all("in nftables" in text or "the firewall" in text for text in said)


@pytest.mark.parametrize(
    ("ports", "proto"), [("udp dport 50000-60000", "UDP"), ("tcp dport 7881", "TCP")]
)
def test_media_that_a_firewall_drops(site: Site, ports: str, proto: str) -> None:
    with filtered(SFU, f"{ports} drop"):
        said = site.gate(SFU)
    assert about(said) == ["join through LiveKit"] * 2
    for sentence, family in zip(said, (4, 6), strict=True):
        assert f"calls get no media over {proto} (IPv{family})" in sentence
        assert "deploy.gate_from" in sentence


def test_a_join_from_another_host(site: Site) -> None:
    """What only the join tells of is asked through the tunnel too."""
    joins = [probe for probe in site.probes(SFU) if isinstance(probe, Join)]
    TURN.root("command -v python3 || apt-get install -y -q python3-minimal >&2")
    assert gate.blocked(PROBER, joins) == []
    with Lab().blackhole(SFU.name, UDP):
        assert about(gate.blocked(PROBER, joins)) == ["join through LiveKit"] * 2
        assert ["no media over UDP" in sentence for sentence in ask(joins, 0)] == [True, True]
        with tunnel(site.connections[TURN.fqdn], joins) as through:
            # 443 of the host that probes is redirected for others only.
            for finding in PROBER.ask(through, 10):
                assert finding and finding.warning and finding.suffers.count("callers get") == 1
                assert f"turns:{TURN.fqdn}:443" in finding.suffers
    with (
        filtered(SFU, "ip saddr 198.51.100.113 udp dport 50000-60000 drop"),
        tunnel(site.connections[TURN.fqdn], joins[:1]) as through,
    ):
        assert "no media over UDP (IPv4)" in ask(through, 0)[0]


def test_ice_servers_of_another_host(site: Site) -> None:
    """They count if they answered before."""
    joins = [probe for probe in site.probes(SFU) if isinstance(probe, Join)]
    servers = catalogue.ice_servers(site.settings, SFU.fqdn)
    assert len(servers) == 4
    counting = [replace(join, answering=tuple(servers)) for join in joins]
    assert ask(counting, 10) == [] and PROBER.ask(list(servers.values()), 10) == [None] * 4
    with changed(TURN, "systemctl stop turnserver@calls", "systemctl start turnserver@calls"):
        warnings, errors = (PROBER.ask(each, 0) for each in (joins, counting))
        assert all(PROBER.ask(list(servers.values()), 0))
    assert [finding and finding.warning for finding in warnings] == [True, True]
    assert [finding and finding.warning for finding in errors] == [False, False]
    for finding in warnings + errors:
        assert finding and all(f":{TURN.fqdn}:" in part for part in finding.suffers.split("; "))
    eventually(lambda: not ask(counting, 0))


def test_a_release_that_breaks_calls_is_not_confirmed(site: Site) -> None:
    """Its signalling answers and its media does not: a provider's firewall, say."""
    fleet, was = site.fleet, SFU.root("readlink /etc/callready/current")
    fleet.data["livekit"]["rtc"] = {"tcp_port": 7882}
    with filtered(SFU, "tcp dport 7882 drop"):
        run = fleet.run()
    assert run.status == 1
    assert (
        f"[{SFU.fqdn}] join through LiveKit on {SFU.fqdn} (IPv4): calls get no media over TCP"
        in run.text
    )
    assert SFU.root("readlink /etc/callready/current") == was
    assert "tcp_port: 7881" in SFU.root("cat /etc/livekit/livekit.yaml")
    fleet.restore()
    assert site.gate(SFU, within=10) == []


def test_a_turn_host_that_is_down_blocks_no_sfu(site: Site) -> None:
    fleet = site.fleet
    fleet.data["livekit"]["logging"] = {"level": "debug"}
    with changed(TURN, "systemctl stop turnserver@calls", "systemctl start turnserver@calls"):
        run = fleet.run("--limit", SFU.fqdn)
    assert run.status == 0, run.text
    warned = [line for line in run.text.splitlines() if "join through LiveKit" in line]
    assert len(warned) == 2 and all(f"turn:{TURN.fqdn}:3478" in line for line in warned)
    assert "level: debug" in SFU.root("cat /etc/livekit/livekit.yaml")
    fleet.restore()
    fleet.deploy()


def test_a_rollback_of_both_does_not_undo_itself(site: Site) -> None:
    """LiveKit returns first, to telling callers of a coturn that is not there again yet."""
    fleet = site.fleet
    fleet.data["turn"]["pools"]["calls"]["listening_port"] = 3500
    assert fleet.deploy().changed == [TURN.name, SFU.name]
    back = fleet.run(file="rollback.py")
    assert back.status == 0, back.text
    assert f"turn:{TURN.fqdn}:3478?transport=udp: no answer" in back.text
    fleet.restore()
    assert fleet.deploy().changed == []
    assert site.gate(SFU, within=10) == []


def test_another_secret_than_the_one_that_mints(site: Site) -> None:
    database = "/var/lib/turn/calls.db"
    column = "update turn_secret set value = "
    secret = site.fleet.secrets["turn/calls"]
    was = TURN.root(f"sqlite3 {database} 'select value from turn_secret'")
    assert was == secret
    with changed(
        TURN,
        f"sqlite3 {database} \"{column}'{'x' * 40}'\"",
        f"sqlite3 {database} \"{column}'{secret}'\"",
    ):
        said = site.gate(TURN)
    assert len(said) == 8
    assert all("pool calls" in text and "does not accept the credentials" in text for text in said)


def test_a_certificate_for_another_name(site: Site) -> None:
    live = f"/etc/callready/tls/{TURN.fqdn}/current"
    other = ca.issue("other.lab.test", folder=Path(site.fleet.folder))
    pem, key = other.read_text(), other.with_suffix(".key").read_text()
    with changed(
        TURN,
        f"cp -a {live}/ /run/gate-tls && cat > {live}/fullchain.pem <<'E'\n{pem}E\n"
        f"cat > {live}/privkey.pem <<'E'\n{key}E\nsystemctl restart turnserver@calls",
        f"cp -a /run/gate-tls/. {live}/ && rm -r /run/gate-tls && "
        "systemctl restart turnserver@calls",
    ):
        said = site.gate(TURN, within=3)
        waiting = ask(gate.probes(site.node(TURN), certificates=False), 10)
    named = f"its name is not {TURN.fqdn}, it names other.lab.test"
    assert sum(named in text for text in said) == 4
    assert set(about(said)) == {
        "TURN allocation over tls of pool calls",
        "TURN allocation over tls on 443 of pool calls",
        *(f"certificate of {TURN.fqdn} on port {port}" for port in (443, 5349)),
    }
    assert waiting == []
    assert site.gate(TURN, within=10) == []


def test_a_network_without_udp_is_found_and_another_host_probes(site: Site) -> None:
    """The gate host first lacks what it takes to pass UDP on."""
    probes, prober = site.probes(TURN), site.connections[SFU.fqdn]
    assert gate.blocked(PROBER, probes) == []
    SFU.root("command -v python3 || apt-get install -y -q python3-minimal >&2")
    with Lab().blackhole(TURN.name, UDP):
        said = gate.blocked(PROBER, probes)
        assert len(said) == 4
        assert all("lets no UDP through" in text and "gate_from" in text for text in said)
        assert f"{TURN.ipv4}:3478" in said[0]
        assert about(site.gate(TURN)) == [
            f"{what} of pool {pool}"
            for _ in (4, 6)
            for pool in ("calls", "gadget")
            for what in ("STUN", "TURN allocation over udp")
        ]
        with tunnel(prober, probes) as through:
            assert gate.blocked(PROBER, through) == []
            assert ask(through, 10) == []
            with changed(
                TURN, "systemctl stop turnserver@gadget", "systemctl start turnserver@gadget"
            ):
                said = ask(through, 0)
    assert len(said) == len([probe for probe in probes if probe.port in (3479, 5350)])
    assert all("127.0.0.1" not in text for text in said)
    assert any(f"turn:{TURN.ipv4}:3479?transport=tcp" in text for text in said)
    eventually(lambda: not SFU.root("pgrep -u debian python3", check=False))


def test_a_gate_host_that_cannot_pass_probes_on_says_what_it_needs(site: Site) -> None:
    probes, prober = site.probes(TURN), site.connections[SFU.fqdn]
    with (
        changed(
            SFU, "chmod 0 $(readlink -f $(command -v python3))", "chmod 755 /usr/bin/python3.*"
        ),
        pytest.raises(ConnectError, match=r"needs python3"),
        tunnel(prober, probes),
    ):
        pass
    config = "/etc/ssh/sshd_config.d/gate.conf"
    with (
        changed(
            SFU,
            f"echo AllowTcpForwarding no > {config}; systemctl restart ssh",
            f"rm {config}; systemctl restart ssh",
        ),
        pytest.raises(ConnectError, match="AllowTcpForwarding"),
        tunnel(prober, probes),
    ):
        pass


def test_udp_to_a_bare_port(site: Site) -> None:
    """Behind the deployed firewall a media port is open, and any other silent."""
    assert stun.comes_back(SFU.ipv4, 55555)
    assert stun.comes_back(SFU.ipv6, 55555)
    assert not stun.comes_back(SFU.ipv4, 4)
    with Lab().blackhole(SFU.name, UDP):
        assert not stun.comes_back(SFU.ipv4, 55555)


def test_new_connections_by_family(site: Site) -> None:
    both = {4: TURN.ipv4, 6: TURN.ipv6}
    assert site.families(TURN) == both
    own = site.connections[TURN.fqdn]
    own.connect(raise_exceptions=True)
    start = time.monotonic()
    with filtered(TURN, "meta nfproto ipv6 tcp dport 22 ct state new drop"):
        assert site.families(TURN) == {4: TURN.ipv4}
        with pytest.raises(ConnectError, match=rf"{TURN.fqdn} \({TURN.ipv6}\) fails: no answer"):
            ssh.connect(own, TURN.ipv6)
        assert own.run_shell_command("true")[0], "the deploy's own connection was disturbed"
    assert time.monotonic() - start < 20
    assert site.families(TURN) == both
    own.disconnect()


def test_a_jump_host_leaves_no_choice(site: Site, tmp_path: Path) -> None:
    config = tmp_path / "ssh_config"
    jump = "Host h14.lab.test\n User debian\n IdentityFile {key}\n UserKnownHostsFile {known}\n"
    files = {"key": hosts.USER_KEY, "known": plan.STATE / "known_hosts"}
    config.write_text(jump.format(**files) + f"Host {TURN.fqdn}\n ProxyJump {SFU.fqdn}\n")
    behind = Site(site.fleet, ssh_config_file=str(config))
    with filtered(TURN, f"ip saddr {plan.MACHINE.ipv4} tcp dport 22 drop"):
        ssh.connect(behind.connections[TURN.fqdn], None)
        assert behind.families(TURN) == {ssh.THE_DEPLOYS_WAY: TURN.fqdn}
    eventually(lambda: "sshd" not in SFU.root("ss -Htnp state established sport = 22"))


def test_another_host_at_the_address_is_refused(site: Site) -> None:
    with pytest.raises(ConnectError, match="its host key is not the one in known_hosts"):
        ssh.connect(site.connections[TURN.fqdn], SFU.ipv4)

"""Verification fails on each sabotage of a good deploy, and says what is wrong where.

The hosts are the lab's four; a deploy mends what it is meant to see.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import Lab, ca, hosts, plan
from tests.support.fleet import Host, deploy_lab, verify

SFU, CALLS, AVATAR, APP = Host("sfu1"), Host("turn1"), Host("turn2"), Host("app1")
EDIT = "sed -i --follow-symlinks"
TLS = "/etc/callready/tls/turn1.lab.test"
# Its unit is active before it listens.
RESTART_LIVEKIT = """systemctl restart livekit-server
timeout 60 sh -c 'until ss -Hltn sport = :7880 | grep -q .; do sleep 0.1; done'"""


@dataclass(frozen=True)
class Sabotage:
    """What is done to a host, the check that must fail (`pytest -k`), and what it must say."""

    name: str
    host: Host
    script: str
    check: str
    says: tuple[str, ...]
    undo: str = ""  # where a deploy rightly does not look
    certificate: str = ""  # whose is put beside the current one of turn1 first


SABOTAGES = [
    Sabotage(
        "port closed",
        CALLS,
        "nft insert rule inet callready input iif != lo tcp dport 5349 drop",
        "test_sweep[turn1.lab.test]",
        ("coturn calls", "5349/tcp on 198.51.100.21", "a firewall drops it", "nft list table"),
    ),
    Sabotage(
        "secret differing",
        AVATAR,
        "sqlite3 /var/lib/turn/avatar.db \"update turn_secret set value = 'a' || value\"",
        "test_allocation[turn2.lab.test-avatar-udp]",
        ("turn:198.51.100.22:3478?transport=udp", "401", "userdb"),
    ),
    Sabotage(
        "certificate of another name",
        CALLS,
        f"cd {TLS}; chgrp turnserver other/*; ln -sfn other current; "
        "systemctl reload turnserver@calls",
        "test_certificate[turn1.lab.test-calls-tls]",
        ("its name is not turn1.lab.test", "it names turn2.lab.test"),
        certificate="turn2.lab.test",
    ),
    Sabotage(
        "certificate renewed on disk but not served",
        CALLS,
        f"cd {TLS}; chgrp turnserver other/*; ln -sfn other current",
        "test_certificate[turn1.lab.test-calls-tls]",
        (
            "callers get certificate",
            "on 198.51.100.21, the host's file is",
            "systemctl reload turnserver@calls on turn1.lab.test",
        ),
        certificate="turn1.lab.test",
    ),
    Sabotage(
        "expired certificate",
        CALLS,
        f"cd {TLS}; chgrp turnserver other/*; ln -sfn other current; "
        "systemctl reload turnserver@calls",
        "test_certificate[turn1.lab.test-calls-tls]",
        ("its validity: it has expired", "the renewal"),
        certificate="turn1.lab.test expired",
    ),
    Sabotage(
        "relay range shifted",
        CALLS,
        f"{EDIT} 's/^min-port=.*/min-port=40000/; s/^max-port=.*/max-port=41000/' "
        "/etc/coturn/calls.conf; systemctl restart turnserver@calls",
        "test_allocation[turn1.lab.test-calls-tcp]",
        ("a relay that nobody reaches", "instead of 198.51.100.21 port 49152-65535", "min-port"),
    ),
    Sabotage(
        "edge up and LiveKit down",
        SFU,
        "systemctl stop livekit-server",
        "test_health[sfu1.lab.test]",
        ("no answer from https://sfu1.lab.test", "no answer in time"),
    ),
    Sabotage(
        ".env edited",
        APP,
        f"{EDIT} 's/^LIVEKIT_API_SECRET=./&x/' /srv/app/.env",
        "test_environment[app1.lab.test]",
        ("callers get 401", "LIVEKIT_API_SECRET in /srv/app/.env"),
    ),
    Sabotage(
        ".env one rotation behind",
        APP,
        f"{EDIT} 's/^TURN_SECRET=./&x/' /srv/app/.env; chown app: /srv/app/.env; "
        "systemctl restart backend",
        "test_call_from_the_app[app1.lab.test]",
        ("calls do not connect", "turn:turn1.lab.test:3478", "401"),
    ),
    Sabotage(
        "TURN on 443 gone",
        CALLS,
        "nft flush chain inet callready turn_on_443",
        "test_allocation[turn1.lab.test-calls-tls-443]",
        ("no relay through turns:198.51.100.21:443", "443/tcp in nftables"),
    ),
    Sabotage(
        "LiveKit past the edge",
        SFU,
        f"{EDIT} /bind_addresses/d /etc/livekit/livekit.yaml; {RESTART_LIVEKIT}",
        "test_behind[sfu1.lab.test]",
        ("plain HTTP of sfu1.lab.test listens on", "livekit-server.service"),
    ),
    Sabotage(
        "old TLS",
        SFU,
        f"{EDIT} 's/TLSv1.2 no-tls/TLSv1.0 no-tls/; s/bind-ciphers /&ALL:@SECLEVEL=0:/' "
        "/etc/haproxy/haproxy.cfg; systemctl restart haproxy",
        "test_tls_versions[sfu1.lab.test]",
        ("speaks TLSv1, TLSv1.1, TLSv1.2, TLSv1.3",),
    ),
    Sabotage(
        "deny-list emptied",
        AVATAR,
        f"{EDIT} /denied-peer-ip/d /etc/coturn/avatar.conf; systemctl restart turnserver@avatar",
        "test_forbidden_peers[turn2.lab.test-avatar-udp]",
        ("169.254.169.254", "10.0.0.1", "fd00::1", "denied-peer-ip", "/etc/coturn/avatar.conf"),
    ),
    Sabotage(
        "STUN unreachable",
        AVATAR,
        "nft 'table inet stray { chain input { type filter hook input priority -10; "
        "meta nfproto ipv4 udp dport 3478 drop; }; }'",
        "test_stun[turn2.lab.test-avatar-udp]",
        ("no srflx candidate", "stun:198.51.100.22:3478", "3478/udp in nftables"),
        undo="nft delete table inet stray",
    ),
    Sabotage(
        "wrong node_ip",
        SFU,
        f"{EDIT} 's/node_ip: .*/node_ip: 198.51.100.99/' /etc/livekit/livekit.yaml; "
        f"{RESTART_LIVEKIT}",
        "test_relayed[sfu1.lab.test-turn1.lab.test-calls-udp]",
        ("calls do not connect", "rtc.node_ip"),
    ),
    Sabotage(
        "unplanned listener",
        AVATAR,
        "systemd-run -q --unit=stray systemd-socket-activate -l 8081 /bin/cat",
        "test_listeners[turn2.lab.test]",
        ("8081/tcp (systemd-socket- of stray.service)", "host.other_listeners"),
        undo="systemctl stop stray",
    ),
]


def put_certificate(name: str, scratch: Path) -> None:
    """A certificate of the same authority beside turn1's current one; its own is renewed, or an
    expired one made in `scratch`."""
    name, _, expired = name.partition(" ")
    chain = ca.CERTIFICATES / f"{name}.pem"
    if expired:
        chain = ca.issue(name, (CALLS.ipv4, CALLS.ipv6), -1, scratch)
    elif name == CALLS.fqdn:
        ca.issue(name, (CALLS.ipv4, CALLS.ipv6))
    leader = hosts.leader(plan.find_host(CALLS.name))
    folder = Path(f"/proc/{leader}/root{TLS}/other")
    folder.mkdir(exist_ok=True)
    for source, target in ((chain, "fullchain.pem"), (chain.with_suffix(".key"), "privkey.pem")):
        (folder / target).write_bytes(source.read_bytes())
        (folder / target).chmod(0o640)


def test_a_good_deploy_passes(good: None, tmp_path: Path) -> None:
    found = verify(tmp_path, *(sabotage.check for sabotage in SABOTAGES))
    assert {sabotage.check for sabotage in SABOTAGES} <= found.keys()
    assert not any(found.values()), found


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.name)
def test_verification_names(sabotage: Sabotage, good: None, tmp_path: Path) -> None:
    if sabotage.certificate:
        put_certificate(sabotage.certificate, tmp_path)
    sabotage.host.root(sabotage.script)
    try:
        said = verify(tmp_path, sabotage.check)[sabotage.check]
    finally:
        if sabotage.undo:
            sabotage.host.root(sabotage.undo)
        else:
            deploy_lab()
    for words in sabotage.says:
        assert words in said


def test_verification_names_a_full_table_of_connections(good: None, tmp_path: Path) -> None:
    check = "test_connections[turn2.lab.test]"
    with Lab().fill_conntrack(AVATAR.name, 0.9):
        assert "table of connections is nearly full" in verify(tmp_path, check)[check]
    assert not verify(tmp_path, check)[check]


def test_nothing_is_left_of_it(good: None, tmp_path: Path) -> None:
    found = verify(tmp_path, *(sabotage.check for sabotage in SABOTAGES), "test_hosts")
    assert not any(found.values()), found

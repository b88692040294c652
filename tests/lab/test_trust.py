"""The keys of hosts: what is not recorded is refused, and how an operator records it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from paramiko import HostKeys

from lab import Lab, plan
from tests.support.fleet import PAIR, REPOSITORY, STRICT, Fleet, Host, Run, jump

SFU, TURN = PAIR


def key(host: Host) -> str:
    """A host's key as the lab knows it: type and base64."""
    known = (plan.STATE / "known_hosts").read_text().splitlines()
    return next(line.partition(" ")[2] for line in known if line.startswith(f"{host.fqdn},"))


def fingerprint(text: str) -> str:
    """As ssh-keygen prints it."""
    done = subprocess.run(["ssh-keygen", "-lf", "-"], input=text, capture_output=True, text=True)
    return done.stdout.split()[1]


def trust(fleet: Fleet, *arguments: str, types: str | None = None) -> Run:
    """The literal command; with `types`, on a terminal where somebody types that."""
    fleet.write()
    master, terminal = pty.openpty()
    os.write(master, f"{types or ''}\x04".encode())  # and the end of input
    done = subprocess.run(
        [sys.executable, "-m", "callready.trust", fleet.inventory, *arguments],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL if types is None else terminal,
        capture_output=True,
        text=True,
        timeout=60,
    )
    os.close(master)
    os.close(terminal)
    assert "Traceback" not in done.stderr, done.stderr
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def known(pair: Fleet, tmp_path: Path) -> Path:
    """The known_hosts file of the pair's inventory; it is not there yet."""
    path = tmp_path / "pair.known_hosts"
    pair.data["ssh_known_hosts_file"] = str(path)
    return path


def test_unknown_keys_are_refused_until_somebody_has_said_yes(pair: Fleet, known: Path) -> None:
    refused = pair.run()
    assert refused.status == 1
    for host in PAIR:
        assert (
            f"[{host.fqdn}] SSH error (the SSH key of {host.fqdn} is not recorded: "
            f"ED25519 {fingerprint(key(host))}. Compare and record it with make trust ENV=fleet)"
        ) in refused.text

    asked = trust(pair, types="no\n")
    assert asked.status == 1
    for host in PAIR:
        assert f"+ {host.fqdn}  {host.ipv6}  ED25519 {fingerprint(key(host))}  NEW" in asked.stdout
    unasked = trust(pair)
    assert unasked.status == 1
    assert "no terminal to ask on" in unasked.stderr
    assert not known.exists()

    assert trust(pair, types="yes\n").status == 0
    assert known.read_text() == "".join(f"{host.fqdn} {key(host)}\n" for host in PAIR)
    assert known.stat().st_mode & 0o777 == 0o644
    assert pair.deploy().changed == []
    again = trust(pair)
    assert (again.status, again.stdout.splitlines()[-1]) == (
        0,
        "every key is recorded: nothing to do",
    )


def test_changed_key_is_refused_until_the_host_is_named(pair: Fleet, known: Path) -> None:
    """The TURN host is taken for one that has the SFU's key; its name is hashed."""
    hashed = "|1|F1E1KeoE/eEWhi10WpGv4OdiO6Y=|3988QV0VE8wmZL7suNrYQLITLCg="
    other = HostKeys.hash_host(TURN.fqdn, hashed)
    before = f"# ours\n{SFU.fqdn},sfu {key(SFU)}\n{other},turn {key(SFU)}\n"
    known.write_text(before)
    refused = pair.run()
    assert refused.status == 1
    old, new = (f"ED25519 {fingerprint(key(host))}" for host in PAIR)
    said = f"THE SSH KEY OF {TURN.fqdn} HAS CHANGED: recorded is {old}, it shows {new}."
    assert said in refused.text and "before you run make trust ENV=fleet" in refused.text
    assert f"[{SFU.fqdn}] nothing to change" in refused.text

    for types in ("yes\n", f"{SFU.fqdn}\n"):
        asked = trust(pair, types=types)
        assert asked.status == 1
        assert f"! {TURN.fqdn}  {TURN.ipv6}  {new}  CHANGED" in asked.stdout
        assert f"! {TURN.fqdn}  recorded is {old}" in asked.stdout
        assert known.read_text() == before

    assert trust(pair, types=f"{TURN.fqdn}\n").status == 0
    assert known.read_text() == (
        f"# ours\n{SFU.fqdn},sfu {key(SFU)}\nturn {key(SFU)}\n{TURN.fqdn} {key(TURN)}\n"
    )
    assert pair.deploy().changed == []


def test_keys_are_recorded_by_their_fingerprints_and_the_unreachable_are_named(
    pair: Fleet, known: Path
) -> None:
    Lab().cut(TURN.name)
    try:
        run = trust(pair, "--fingerprint", fingerprint(key(SFU)))
    finally:
        Lab().mend(TURN.name)
    assert run.status == 1
    assert f"! {TURN.fqdn}  cannot be reached: " in run.stdout
    assert known.read_text() == f"{SFU.fqdn} {key(SFU)}\n"

    wrong = trust(pair, "--fingerprint", "SHA256:wrong")
    assert wrong.status == 1
    assert "no host shows SHA256:wrong" in wrong.stderr
    assert known.read_text() == f"{SFU.fqdn} {key(SFU)}\n"
    assert trust(pair, "--fingerprint", fingerprint(key(TURN))).status == 0
    assert pair.deploy().changed == []


def test_key_behind_a_jump_host_and_on_another_port(pair: Fleet, known: Path) -> None:
    """Another sshd of the TURN host, with a key of another type, for the SFU's host alone."""
    TURN.root(
        "rm -f /run/other /run/other.pub; ssh-keygen -q -t ecdsa -N '' -f /run/other;"
        "/usr/sbin/sshd -p 2222 -h /run/other -o PidFile=/run/other.pid;"
        f"nft insert rule inet callready input ip6 saddr {SFU.ipv6} tcp dport 2222 accept;"
        f"nft insert rule inet callready input ip saddr {SFU.ipv4} tcp dport 2222 accept"
    )
    pair.unsettled = True
    pair.data["ssh_config_file"] = jump(known.with_name("ssh_config"), f" Port 2222\n{STRICT}")
    try:
        assert f"the SSH key of [{TURN.fqdn}]:2222 is not recorded" in pair.run("--dry").text
        run = trust(pair, types="yes\n")
        assert run.status == 0, run.text
        other = TURN.root("cut -d' ' -f1,2 /run/other.pub")
        shown = f"{TURN.fqdn}  through its jump host  ECDSA {fingerprint(other)}  NEW"
        assert shown in run.stdout
        assert f"[{TURN.fqdn}]:2222 {other}" in known.read_text().splitlines()
        assert pair.run("--dry").status == 0
        jump(known.with_name("ssh_config"), " Port 2222\nHost *\n UserKnownHostsFile /dev/null\n")
        refused = pair.run("--dry")
        assert refused.status == 1
        assert f"the SSH key of the jump host {SFU.fqdn} is not recorded" in refused.text
    finally:
        TURN.root("kill $(cat /run/other.pid)")

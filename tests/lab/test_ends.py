"""How a deploy ends when something is in its way: a true exit status, and a sentence."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from lab import Lab, plan
from tests.support.fleet import (
    PAIR,
    PYINFRA,
    REPOSITORY,
    STRICT,
    Fleet,
    encrypted_key,
    eventually,
    held,
    idle,
    jump,
    starting,
)

SFU, TURN = PAIR


def test_host_that_falls_silent_is_given_up_and_the_other_left_alone(pair: Fleet) -> None:
    pair.data["turn"]["total_quota"] = 1300
    pair.data["livekit"]["logging"] = {"level": "debug"}
    pair.unsettled = True
    with held(TURN, "turnserver@calls.service"):
        process = pair.start()
        eventually(lambda: starting(TURN, "turnserver@calls.service"))
        with Lab().blackhole(TURN.name):
            _, said = process.communicate(timeout=40)  # 20 s and what pyinfra takes to end
    assert process.returncode == 1
    assert f"[{TURN.fqdn}] the connection broke; within 15 s of its switch the host returns" in said
    assert f"[{SFU.fqdn}] not switched, because {TURN.fqdn} failed" in said
    assert "Traceback" not in said
    eventually(lambda: idle(TURN))
    assert "level: debug" not in SFU.root("cat /etc/livekit/livekit.yaml")
    pair.deploy()
    assert "level: debug" in SFU.root("cat /etc/livekit/livekit.yaml")
    assert "total-quota=1300" in TURN.root("cat /etc/coturn/calls.conf")


def test_jump_host_that_falls_silent_is_given_up(pair: Fleet, tmp_path: Path) -> None:
    pair.data["turn"]["total_quota"] = 1500
    pair.data["ssh_config_file"] = jump(tmp_path / "ssh_config", STRICT)
    pair.unsettled = True
    with held(TURN, "turnserver@calls.service"):
        process = pair.start("--limit", TURN.fqdn, "--no-wait")
        eventually(lambda: starting(TURN, "turnserver@calls.service"))
        with Lab().blackhole(SFU.name):
            _, said = process.communicate(timeout=60)
    assert process.returncode == 1, "pyinfra itself says 0 with --no-wait"
    assert "Traceback" not in said
    assert f"[{TURN.fqdn}] the connection broke; within 15 s of its switch the host returns" in said
    eventually(lambda: idle(TURN))
    assert "total-quota=1500" not in TURN.root("cat /etc/coturn/calls.conf")


def test_question_that_nobody_can_answer_is_an_error(pair: Fleet) -> None:
    pair.data["turn"]["total_quota"] = 1400
    pair.write()
    before = TURN.snapshot()
    run = subprocess.run(
        [PYINFRA, pair.inventory, "deploy.py"],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != "PYINFRA_YES"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1
    assert "callready: no terminal to ask on: give -y or PYINFRA_YES=1" in run.stderr
    assert "Traceback" not in run.stderr and "exception" not in run.stderr
    assert TURN.snapshot() == before


def test_network_without_udp_is_told_and_gone_round(pair: Fleet) -> None:
    pair.data["turn"]["total_quota"] = 1600
    pair.unsettled = True
    SFU.root("command -v python3 || apt-get install -y -q python3-minimal >&2")
    before = TURN.snapshot()
    with Lab().blackhole(TURN.name, "meta l4proto udp"):
        run = pair.run()
        assert run.status == 1
        assert f"STUN of pool calls on {TURN.fqdn} (IPv4): no answer over UDP" in run.text
        assert "deploy.gate_from names a host to probe from" in run.text
        assert TURN.snapshot() == before
        pair.groups["turn"][0][1]["deploy"] = {"gate_from": SFU.fqdn}
        assert pair.deploy().changed == ["h08"]
    assert "total-quota=1600" in TURN.root("cat /etc/coturn/calls.conf")


def test_sudo_that_asks_for_a_password(pair: Fleet) -> None:
    pair.data["turn"]["total_quota"] = 1700
    pair.groups["turn"][0][1]["sudo_password"] = "secret:sudo"
    pair.secrets["sudo"] = f"{pair.marker}-sudo-'$x"
    pair.unsettled = True
    rule = "/etc/sudoers.d/90-cloud"
    TURN.root(
        f"mv {rule} /root/rule; echo 'debian ALL=(ALL) ALL' > {rule}; chmod 440 {rule}; "
        "echo 'debian:other' | chpasswd"
    )
    try:
        wrong = pair.run()
        assert wrong.status == 1
        assert f"{TURN.fqdn}: cannot look at the host as root: sudo: " in wrong.text
        TURN.root(f"cat <<'END' | chpasswd\ndebian:{pair.secrets['sudo']}\nEND")
        assert pair.deploy().changed == ["h08"]
        assert pair.deploy().changed == []
    finally:
        TURN.root(f"mv /root/rule {rule}; passwd -q -d debian; passwd -q -l debian")
    assert "total-quota=1700" in TURN.root("cat /etc/coturn/calls.conf")


def test_an_encrypted_ssh_key(pair: Fleet, tmp_path: Path) -> None:
    """With its passphrase in the store, from an agent, and with neither."""
    pair.secrets |= {"ssh/key": f"{pair.marker}-ssh", "ssh/other": f"{pair.marker}-other"}
    key = pair.data["ssh_key"] = encrypted_key(tmp_path / "key", pair.secrets["ssh/key"])
    pair.data["ssh_key_password"] = "secret:ssh/key"
    pair.data["turn"]["total_quota"] = 1900  # the gate opens connections of its own
    assert pair.deploy().changed == ["h08"]
    pair.data["ssh_key_password"] = "secret:ssh/other"
    assert f"ssh_key: ssh_key_password does not open {key}" in pair.run().text
    del pair.data["ssh_key_password"]
    assert f"ssh_key: {key} is encrypted and no SSH agent has it: start one and run" in (
        pair.run().text
    )
    del pair.data["ssh_key"]  # where ssh itself would look
    pair.data["ssh_config_file"] = str(tmp_path / "config")
    (tmp_path / "config").write_text(f"Host *\n IdentityFile {key}\n")
    assert "the key for it is encrypted and no SSH agent has it" in pair.run().text
    agent = subprocess.Popen(
        ["ssh-agent", "-D", "-a", tmp_path / "agent"], stdout=subprocess.DEVNULL
    )
    try:
        eventually((tmp_path / "agent").exists)
        pair.environment = {"SSH_AUTH_SOCK": str(tmp_path / "agent")}
        subprocess.run(
            ["ssh-add", "-q", plan.STATE / "id_ed25519"],
            env={**os.environ, **pair.environment},
            check=True,
        )
        pair.deploy("--dry")
        pair.data["ssh_key"] = key
        pair.deploy("--dry")
    finally:
        pair.environment = {}
        agent.terminate()
        agent.wait()


def test_root_without_sudo(pair: Fleet) -> None:
    pair.data["turn"]["total_quota"] = 1800
    pair.unsettled = True
    TURN.root("mv /usr/bin/sudo /root/; cp -r ~debian/.ssh /root/; chown -R root: /root/.ssh")
    try:
        assert f"{TURN.fqdn}: cannot look at the host as root: it has no sudo: install" in (
            pair.run().text
        )
        pair.groups["turn"][0][1]["ssh_user"] = "root"
        assert pair.deploy().changed == ["h08"]
        pair.groups["turn"][0][1]["sudo_password"] = "secret:turn/calls"  # in vain, and no harm
        assert pair.deploy().changed == []
    finally:
        TURN.root("mv /root/sudo /usr/bin/; rm -r /root/.ssh")
    assert "total-quota=1800" in TURN.root("cat /etc/coturn/calls.conf")

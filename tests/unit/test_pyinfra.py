"""What pyinfra does by itself and callready/pyinfra_cli.py mends: a test that fails here says that a
newer pyinfra no longer needs a patch, or that the patch no longer fits it."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import paramiko
import pytest
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.state import State
from pyinfra.connectors import ssh, ssh_util

PYINFRA = Path(sys.executable).with_name("pyinfra")
FAIL = "from pyinfra.operations import server\n\nserver.shell(name='fails', commands=['exit 1'])\n"


def pyinfra(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Plain pyinfra, in a folder without a config.py of ours."""
    return subprocess.run(
        [PYINFRA, *arguments],
        cwd=folder,
        env={**os.environ, "PYINFRA_PROGRESS": "off"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_selected_host_is_a_success(tmp_path: Path) -> None:
    (tmp_path / "deploy.py").write_text(FAIL)
    assert pyinfra(tmp_path, "-y", "mistyped/inventory", "deploy.py").returncode == 0


def test_a_group_of_the_wrong_shape_is_left_out_and_the_last_data_wins(tmp_path: Path) -> None:
    (tmp_path / "deploy.py").write_text("")
    (tmp_path / "hosts").write_text(
        "one = ['@local', None]\ntwo = [('@local', {'x': 1}), ('@local', {'x': 2})]\n"
    )
    run = pyinfra(tmp_path, "hosts", "debug-inventory", "--json")
    (host,) = json.loads(run.stdout)
    assert "one" not in host["groups"] and host["data"]["x"] == 2
    (tmp_path / "hosts").write_text("hosts = [")
    assert "traceback" in pyinfra(tmp_path, "hosts", "deploy.py").stderr


def test_no_wait_forgets_who_failed(tmp_path: Path) -> None:
    (tmp_path / "deploy.py").write_text(FAIL)
    assert pyinfra(tmp_path, "-y", "@local", "deploy.py").returncode == 1
    assert pyinfra(tmp_path, "-y", "@local", "deploy.py", "--no-wait").returncode == 0


def test_nobody_to_ask_is_a_traceback_and_a_deploy_file_is_read_after_connecting(
    tmp_path: Path,
) -> None:
    (tmp_path / "deploy.py").write_text(f"print('read')\n{FAIL}")
    run = pyinfra(tmp_path, "@local", "deploy.py")
    assert run.returncode == 1 and "EOFError" in run.stderr
    assert "Connected" in run.stderr and "read" in run.stdout
    (tmp_path / "deploy.py").write_text("raise SystemExit('never connected')")
    assert "Connected" in pyinfra(tmp_path, "-y", "@local", "deploy.py").stderr


def test_nothing_to_execute_is_asked_about(tmp_path: Path) -> None:
    (tmp_path / "deploy.py").write_text("")
    assert "EOFError" in pyinfra(tmp_path, "@local", "deploy.py").stderr


def test_ctrl_c_is_a_success(tmp_path: Path) -> None:
    running = tmp_path / "running"
    wait = f"touch {running}; while [ -e {running} ]; do sleep 0.1; done"
    (tmp_path / "deploy.py").write_text(FAIL.replace("exit 1", wait))
    process = subprocess.Popen(
        [PYINFRA, "-y", "@local", "deploy.py"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not running.exists():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    running.unlink()
    assert process.wait(60) == 0


def test_unknown_keys_are_accepted_and_nagle_stays() -> None:
    defaults = ssh.connector_data_meta
    assert defaults["ssh_strict_host_key_checking"].default == "accept-new"
    assert defaults["ssh_paramiko_connect_kwargs"].default is None
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as line,
    ):
        transport = paramiko.Transport(line)
        assert not line.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        transport.close()


def test_an_encrypted_key_is_not_looked_for_in_the_agent(tmp_path: Path) -> None:
    key = str(tmp_path / "key")
    make = ["ssh-keygen", "-q", "-t", "ed25519", "-a", "1", "-f", key, "-N", "passphrase"]
    subprocess.run(make, check=True)
    state = SimpleNamespace(private_keys={}, cwd=None)
    with pytest.raises(PyinfraError, match="is encrypted, set ssh_key_password to use this key"):
        ssh_util.get_private_key(cast(State, state), key, "")
    state.private_keys.clear()
    assert ssh_util.get_private_key(cast(State, state), key, "passphrase")


def test_what_is_patched_is_there() -> None:
    """In a process of its own, because pyinfra_cli has gevent patch the one that imports it."""
    look = (
        "from pyinfra_cli import cli, inventory; from pyinfra.connectors import ssh; "
        "from pyinfra.connectors.sshuserclient import client; "
        "cli.connect_all, cli.disconnect_all, cli.run_ops, cli._do_confirm, "
        "cli.state, ssh.SSHClient, ssh.get_private_key, client.SSHClient, client.AskPolicy, "
        "client.StrictPolicy, inventory._get_groups_from_filename, inventory._is_inventory_group, "
        "inventory.exec_file"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

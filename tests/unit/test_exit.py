"""The literal command where no host can be reached: what it says and its exit status."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.inventories import SECRETS

ROOT = Path(__file__).parents[2]
STORE = {
    f"CALLREADY_SECRET_{name.upper().replace('/', '_')}": value for name, value in SECRETS.items()
}
PYINFRA = Path(sys.executable).with_name("pyinfra")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as an operator has it after cloning."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("config.py", "deploy.py", "history.py", "callready", "tasks", "templates"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(
        ROOT / "inventories",
        folder / "inventories",
        ignore=shutil.ignore_patterns("*.secrets.yaml", "__pycache__"),
    )
    return folder


def pyinfra(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Merged, as an operator sees it.
    return subprocess.run(
        [PYINFRA, *arguments],
        cwd=folder,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYINFRA_PROGRESS": "off", **environment},
    )


def test_an_example_is_refused_until_it_is_edited(clone: Path) -> None:
    if "example.com" not in (clone / "inventories/prod").read_text():
        pytest.skip("inventories/prod is no example any more: it was edited")
    run = pyinfra(clone, "inventories/prod", "deploy.py", "--dry")
    assert run.returncode == 1
    assert "nothing was connected to" in run.stdout
    assert "inventories/prod: still has the example's " in run.stdout
    assert "edit inventories/prod and inventories/group_data/prod.py" in run.stdout
    assert "run make secrets ENV=prod" in run.stdout
    assert "Traceback" not in run.stdout


def test_every_error_comes_before_any_connection_and_no_secret_with_it(clone: Path) -> None:
    # The addresses are the lab's; nothing answers on them if somebody tries all the same.
    data = clone / "inventories/group_data/broken.py"
    shutil.copy(clone / "inventories/lab", clone / "inventories/broken")
    shutil.copy(clone / "inventories/group_data/lab.py", data)
    with data.open("a") as file:
        file.write(
            "turn['min_port'] = 70000\nfierwall = {}\nhost = {'udp_buffer': 'secret:turn/calls'}\n"
        )
    run = pyinfra(
        clone, "-y", "-vvv", "--key", "inventories/lab", "inventories/broken", "deploy.py", **STORE
    )
    assert run.returncode == 1
    hosts = "sfu1.lab.test, turn1.lab.test, turn2.lab.test, app1.lab.test, @local"
    for line in (
        f"inventories/broken: {hosts}: turn.min_port: 70000 is not a port (1-65535)",
        f"inventories/broken: {hosts}: fierwall: is not a setting; did you mean firewall?",
    ):
        assert line in run.stdout.splitlines()
    assert "Connected" not in run.stdout and "Traceback" not in run.stdout
    assert not [value for value in SECRETS.values() if value in run.stdout]


def test_a_mistyped_inventory_is_an_error(clone: Path) -> None:
    run = pyinfra(clone, "-y", "inventories/prdo", "deploy.py")
    assert run.returncode == 1
    assert "inventories/prdo: no hosts: is it the right file?" in run.stdout
    assert "Traceback" not in run.stdout


def test_a_limit_that_matches_nothing_is_an_error(clone: Path) -> None:
    run = pyinfra(clone, "-y", limited(clone), "deploy.py", "--limit", "nobody", **STORE)
    assert run.returncode == 1
    assert "callready: no host was selected: check the inventory's path and --limit" in run.stdout
    assert "Traceback" not in run.stdout


def test_history_asks_nothing_and_wants_no_root_where_an_android_project_is(
    clone: Path, tmp_path: Path
) -> None:
    sudo = tmp_path / "sudo"
    sudo.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    sudo.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    run = pyinfra(clone, limited(clone), "history.py", "--limit", "@local", PATH=path, **STORE)
    assert run.returncode == 0, run.stdout
    assert "[@local]         Ready: history.py" in run.stdout
    assert "Press enter" not in run.stdout and not (tmp_path / "asked").exists()


def limited(clone: Path) -> str:
    """The lab's inventory with the least that it needs."""
    shutil.copy(clone / "inventories/lab", clone / "inventories/limited")
    (clone / "inventories/group_data/limited.py").write_text(
        "turn = {'tls': False, 'pools': {'calls': {'realm': 'calls.test', "
        "'secrets': ['secret:turn/calls']}, 'avatar': {'realm': 'avatar.test', "
        "'secrets': ['secret:turn/avatar']}}}\n"
        "livekit = {'url': 'ws://sfu1.lab.test', "
        "'keys': {'APIunit': 'secret:livekit/api_secret'}}\n"
        "app = {'env_file': '/srv/app/.env'}\nandroid = {'checkout': '/srv/android', 'domains': ["
        "{'host': 'sfu1.lab.test', 'scheme': 'ws', 'scope': 'debug'}]}\n"
    )
    return "inventories/limited"


def test_inventory_in_a_repository_beside_the_clone_has_its_files_beside_it(clone: Path) -> None:
    """As docs/upgrading-callready.md says; on port 1 nothing listens."""
    folder = clone.parent / "ops/inventories"
    (folder / "group_data").mkdir(parents=True)
    here, there = ({"ssh_hostname": address, "ssh_port": 1} for address in ("127.0.0.1", "::1"))
    (folder / "prod").write_text(
        f"livekit = [('sfu1.callready.test', {here | {'address': '192.0.2.11'}})]\n"
        f"turn = [('turn1.callready.test', {there | {'address': '192.0.2.21', 'pools': ['calls']}})]\n"
    )
    (folder / "group_data/prod.py").write_text(
        "ssh_known_hosts_file = '../ops/inventories/prod.known_hosts'\n"
        "livekit = {'url': 'ws://sfu1.callready.test:7880', "
        "'keys': {'APIprod': 'secret:livekit/api_secret'}}\n"
        "turn = {'tls': False, 'pools': {'calls': {'realm': 'callready.test', "
        "'secrets': ['secret:turn/calls']}}}\n"
    )
    inventory = "../ops/inventories/prod"
    made = subprocess.run(
        [sys.executable, "-m", "callready.secrets", inventory], cwd=clone, capture_output=True
    )
    assert made.returncode == 0 and (folder / "prod.secrets.yaml").is_file()
    run = pyinfra(clone, "-y", inventory, "deploy.py")
    assert run.returncode == 1
    assert "nothing was connected to" not in run.stdout
    assert "Failed to load host keys from ../ops/inventories/prod.known_hosts" in run.stdout
    assert "Unable to connect to port 1 on 127.0.0.1" in run.stdout

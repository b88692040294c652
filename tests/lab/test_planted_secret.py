"""A planted secret is where it must be, and nowhere else: not in the output (which every run in
these tests is searched for), a log, a process list, or a file that others may read."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import Onlooker
from fleet import HOSTS, REPOSITORY, SFU, TWO_POOLS, Fleet, Host

PLACES = "/etc /home /media /mnt /opt /root /run /srv /tmp /usr/local /var"


def found_in(host: Host, text: str) -> dict[str, str]:
    """Files of a host that contain a text: path -> mode, owner and group."""
    names = f"grep -rlsF --exclude-dir=journal -e {text} {PLACES} | sort -u"
    listed = host.root(f"{names} | while read -r f; do stat -c '%n %a %U:%G' \"$f\"; done")
    return {line.split()[0]: line.partition(" ")[2] for line in listed.splitlines()}


def test_secret_is_only_in_the_files_of_those_who_need_it(fleet: Fleet) -> None:
    found = {host.name: found_in(host, fleet.marker) for host in HOSTS}
    for host, files in found.items():
        current = SFU.root("readlink /etc/callready/current") if host == "h04" else ""
        wanted = {
            "h03": {"/var/lib/turn/calls.db": "640 turnserver:turnserver"},
            "h06": {"/var/lib/turn/calls.db": "640 turnserver:turnserver"},
            "h05": {"/var/lib/turn/avatar.db": "640 turnserver:turnserver"},
            "h04": {
                f"/etc/callready/{current}/files/etc/livekit/livekit.yaml": "600 root:root",
                f"/etc/callready/{current}/files/etc/livekit/turn_secret": "600 root:root",
                "/run/credentials/livekit-server.service/livekit.yaml": "440 root:root",
                "/run/credentials/livekit-server.service/turn_secret": "440 root:root",
                "/srv/app/.env": "600 debian:debian",
            },
        }[host]
        assert wanted.items() <= files.items()
        assert not [path for path, mode in files.items() if mode.split()[0][-1] != "0"]
        older = files.keys() - wanted.keys()
        assert all(path.startswith("/etc/callready/releases/") for path in older), older
    # Fixed users are kept as coturn wants them: a hash that opens as much as the password.
    key = hashlib.md5(f"gadget:gadget.lab.test:{fleet.secrets['turn/gadget']}".encode()).hexdigest()
    assert found_in(TWO_POOLS, key) == {"/var/lib/turn/gadget.db": "640 turnserver:turnserver"}


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_secret_is_in_no_log_of_a_host(fleet: Fleet, host: Host) -> None:
    host.root("logger the-search-works")
    journal = "journalctl --no-pager -o cat -a | grep -c -e "
    assert host.root(journal + "the-search-works") != "0"
    assert host.root(journal + fleet.marker, check=False) == "0"


def test_onlooker_saw_the_deploy_and_no_secret(deployed_fleet: Fleet) -> None:
    seen = deployed_fleet.seen
    for word in (b"deploy.py", b"apply.sh", b"apt-get", b"sqlite3", b"turnserver"):
        assert [text for text in seen if word in text], f"{word!r} was not seen"
    assert not [text for text in seen if deployed_fleet.marker.encode() in text]


def test_onlooker_would_have_seen_one() -> None:
    """colmena's poison: one planted where it must be found, or a search proves nothing."""
    with Onlooker() as onlooker:
        subprocess.run(["sh", "-c", "sleep 1; :", "Poison1"], check=True)
        subprocess.run(["sleep", "1"], user="nobody", check=True, env={"SECRET": "Poison2"})
    for poison in (b"Poison1", b"Poison2"):
        assert [text for text in onlooker.seen if poison in text]


def test_first_deploy_left_nothing_on_the_controller(fleet: Fleet) -> None:
    """It ran with -vvv --debug --diff, which is when pyinfra writes most."""
    marker = fleet.marker.encode()
    store = fleet.folder / "fleet.secrets.yaml"
    left = [
        path
        for folder in (fleet.folder, REPOSITORY, Path(tempfile.gettempdir()), Path("/var/tmp"))
        for path in newer_files(folder, fleet.inventory)
        if marker in path.read_bytes()
    ]
    assert set(left) == {store}
    assert store.stat().st_mode & 0o777 == 0o600


def newer_files(folder: Path, than: Path) -> list[Path]:
    """Files written after the fleet's first inventory was, small enough to be a leftover."""
    since = (than.parent / "group_data").stat().st_ctime - 60
    skip = {".git", "__pycache__", "node_modules", ".venv", ".mypy_cache", ".ruff_cache"}
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skip]
        for name in names:
            path = Path(parent, name)
            if path.is_file() and path.stat().st_mtime > since and path.stat().st_size < 10**8:
                found.append(path)
    return found

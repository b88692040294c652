"""A planted secret is where it must be, and nowhere else: not in the output (which every run in
these tests is searched for), a log, a process list, or a file that others may read."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lab import Lab, hosts, plan
from tests.support.fleet import (
    HOSTS,
    PAIR,
    PYINFRA,
    REPOSITORY,
    SFU,
    TRACE,
    TURN13,
    TWO_POOLS,
    Fleet,
    Host,
    encrypted_key,
)

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


@contextmanager
def traced(host: Host, file: Path) -> Iterator[None]:
    """Write down every program that anybody starts over SSH, with arguments and environment."""
    group = hosts.group(plan.find_host(host.name))
    (sshd,) = group.pids("payload/system.slice/ssh.service")
    tracer = subprocess.Popen([*TRACE, file, "-p", str(sshd)], stderr=subprocess.PIPE, text=True)
    try:
        assert tracer.stderr and "attached" in tracer.stderr.readline()
        yield
    finally:
        tracer.terminate()
        tracer.wait()


def test_secret_is_in_no_argument_and_no_environment_variable(fleet: Fleet, tmp_path: Path) -> None:
    """Of no program that a deploy starts which replaces every secret and adds a pool."""
    for name in ("livekit/api_secret", "turn/calls", "turn/avatar"):
        fleet.secrets[name] = f"{fleet.marker}-another-{name}-0123456789"
    fleet.secrets["turn/spare"] = f"{fleet.marker}-one-for-the-spare-pool-0123456789"
    spare = {**fleet.data["turn"]["pools"]["gadget"], "realm": "spare.lab.test"}
    del spare["users"]
    fleet.data["turn"]["pools"]["spare"] = {**spare, "secrets": ["secret:turn/spare"]}
    fleet.groups["turn"][1][1]["pools"] = ["spare"]
    with ExitStack() as traces:
        for host in HOSTS:
            traces.enter_context(traced(host, tmp_path / host.name))
        fleet.deploy(before=(*TRACE, str(tmp_path / "controller")))
        # One planted where it must be found, or a search that finds nothing proves nothing.
        subprocess.run(
            [sys.executable, "-m", "lab", "root", TURN13.name, "--", "POISON=1 ls /poison"],
            cwd=REPOSITORY,
            check=False,
        )
    seen = {file.name: file.read_text() for file in tmp_path.iterdir()}
    for host in HOSTS:
        for word in ("/apply.sh", "base64"):
            assert word in seen[host.name]
    for word in ("deploy.py", "POISON=1", '"/poison"', '"sqlite3"'):
        assert word in seen["controller"] + seen[TURN13.name]
    assert not [where for where, text in seen.items() if fleet.marker in text]


def test_secret_is_in_no_process_list(fleet: Fleet) -> None:
    """Of everything that runs on the machine, hosts included: every command line, and the
    environment of all that is not root's."""
    lists: dict[str, bytes] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lists[process.name] = (process / "cmdline").read_bytes()
            if process.stat().st_uid:
                lists[process.name] += (process / "environ").read_bytes()
        except OSError:
            continue  # it has ended
    for word in (b"/usr/bin/turnserver", b"livekit-server", b"CALLREADY_FINGERPRINT="):
        assert [text for text in lists.values() if word in text]
    assert not [pid for pid, text in lists.items() if fleet.marker.encode() in text]


def test_first_deploy_left_nothing_on_the_controller(fleet: Fleet) -> None:
    """It ran with -vvv --debug --diff, which is when pyinfra writes most."""
    marker = fleet.marker.encode()
    store = fleet.folder / "fleet.secrets.yaml"
    left = [
        path
        for folder in (fleet.folder, REPOSITORY, Path(tempfile.gettempdir()), Path("/var/tmp"))
        for path in newer_files(folder, fleet.inventory, marker)
    ]
    assert set(left) == {store}
    assert store.stat().st_mode & 0o777 == 0o600


def newer_files(folder: Path, than: Path, having: bytes) -> Iterator[Path]:
    """Files with these bytes, written after the fleet's first inventory was and small enough to be
    a leftover."""
    since = (than.parent / "group_data").stat().st_ctime - 60
    skip = {".git", "__pycache__", "node_modules", ".venv", ".mypy_cache", ".ruff_cache"}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skip]
        for name in names:
            path = Path(parent, name)
            with suppress(OSError):  # whoever else works on this machine removes files
                status = path.stat()
                is_leftover = status.st_mtime > since and status.st_size < 10**8
                if path.is_file() and is_leftover and having in path.read_bytes():
                    yield path


@pytest.mark.parametrize(
    "arguments",
    [
        ["debug-inventory"],
        ["debug-inventory", "--json", "-vvv", "--debug-all"],
        ["deploy.py", "--debug-operations"],
        ["deploy.py", "--debug-operations", "--json"],
        ["deploy.py", "--dry", "--json", "--diff", "-vvv", "--debug-all"],
        ["deploy.py", "--json", "--diff", "-vvv", "--debug-all"],
    ],
    ids=" ".join,
)
def test_secret_is_in_no_output_of_pyinfra(
    pair: Fleet, arguments: list[str], tmp_path: Path
) -> None:
    """While every secret is about to be replaced, and the way in needs two more."""
    pair.secrets = {name: f"{value}-replaced" for name, value in pair.secrets.items()}
    lock(pair, tmp_path)
    pair.unsettled = True
    run = literal(pair, REPOSITORY, PYINFRA, pair.inventory, *arguments)
    assert run.returncode == 0, run.stdout
    wanted = "secret:turn/calls" if arguments[0] == "debug-inventory" else "Switch and confirm"
    assert wanted in run.stdout
    assert pair.marker not in run.stdout


def test_secret_is_in_no_traceback(pair: Fleet, tmp_path: Path) -> None:
    """Of a template that has secrets, with a mistake in it."""
    for name in ("callready", "tasks", "templates", "config.py", "deploy.py"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, tmp_path / name)
    template = tmp_path / "templates/livekit.yaml.j2"
    before = {host: host.snapshot() for host in PAIR}
    for mistake in ("{{ lk.keys.missing }}", "{{ lk['keys'] | round }}", "{% if %}"):
        template.write_text((REPOSITORY / "templates/livekit.yaml.j2").read_text() + mistake)
        run = literal(pair, tmp_path, PYINFRA, pair.inventory, "deploy.py", "-vvv", "--debug-all")
        assert run.returncode == 1
        left = [path for path in tmp_path.iterdir() if path.is_file()]
        assert not [
            text
            for text in [run.stdout, *(path.read_text() for path in left)]
            if pair.marker in text
        ]
        assert "livekit.yaml.j2" in run.stdout
    assert {host: host.snapshot() for host in PAIR} == before


def test_secret_is_in_no_report_of_the_verification(pair: Fleet, tmp_path: Path) -> None:
    """Whose checks fail, because its secrets are not the ones the hosts have."""
    pair.secrets = {name: f"{value}-replaced" for name, value in pair.secrets.items()}
    lock(pair, tmp_path)
    run = literal(
        pair,
        REPOSITORY,
        *Lab().client_prefix(),
        sys.executable,
        "-m",
        "callready.verify",
        pair.inventory,
        "-v",
        "--attempts",
        "1",
        "--report",
        tmp_path / "report",
        "--tb=long",
        "--showlocals",
    )
    assert run.returncode == 1
    cases = ElementTree.parse(tmp_path / "report/verify.xml").iter("testcase")
    failed = {
        case.attrib["name"].partition("[")[0] for case in cases if case.find("failure") is not None
    }
    assert {"test_tokens", "test_allocation"} <= failed, failed
    assert "test_packages" not in failed, "it did not get in"
    for text in (run.stdout, *(path.read_text() for path in (tmp_path / "report").iterdir())):
        assert "401" in text
        assert pair.marker not in text


def lock(pair: Fleet, folder: Path) -> None:
    """Have the way in need secrets too."""
    pair.secrets |= {name: f"{pair.marker}-{name}" for name in ("ssh/key", "ssh/password")}
    pair.data["ssh_key"] = encrypted_key(folder / "key", pair.secrets["ssh/key"])
    pair.data["ssh_key_password"] = "secret:ssh/key"
    pair.data["ssh_password"] = "secret:ssh/password"


def literal(pair: Fleet, folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command as an operator does; all that it prints."""
    pair.write()
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "PYINFRA_YES": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )

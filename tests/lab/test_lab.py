"""The lab itself, as an operator uses it: a second lab in a network namespace of its own.

It shares nothing but the cached images with a lab that may run on this machine at the same time.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fleet import REPOSITORY, eventually

INSTANCE = "crtest"
NAMESPACE = Path(f"/run/netns/{INSTANCE}-machine")
PYTHON = ["nsenter", f"--net={NAMESPACE}", sys.executable]
ENVIRONMENT = {**os.environ, "CALLREADY_LAB": INSTANCE, "PYTHONUNBUFFERED": "1"}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root")


def python(*arguments: str) -> "subprocess.Popen[str]":
    """Start Python in the test lab's surroundings."""
    return subprocess.Popen(
        [*PYTHON, *arguments],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def lab(*arguments: str, status: int = 0) -> str:
    """Run one lab command to its end and return what it printed."""
    process = python("-m", "lab", *arguments)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == status, output
    return output


def kill_when(appears: str, process: "subprocess.Popen[str]") -> None:
    """SIGKILL a command as soon as such a process of the test lab exists."""
    eventually(lambda: any(appears in line for line in processes()))
    process.kill()
    process.wait()


def processes() -> list[str]:
    """Command lines of processes in a cgroup of the test lab."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"/{INSTANCE}-lab/" in (folder / "cgroup").read_text():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [command for command in found if command]  # a dead one, not yet reaped, has none


def traces() -> list[str]:
    """Everything on the machine that belongs to the test lab."""
    cgroups = [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{INSTANCE}-lab")]
    files = [Path(f"/var/lib/{INSTANCE}-lab"), Path(f"/run/{INSTANCE}-lab.lock")]
    links = subprocess.run(
        ["ip", "-netns", NAMESPACE.name, "-brief", "link"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [
        *processes(),
        *cgroups,
        *(str(file) for file in files if file.exists()),
        *(
            line
            for line in Path("/proc/self/mounts").read_text().splitlines()
            if INSTANCE in line and NAMESPACE.name not in line
        ),
        *(link for link in links if not link.startswith("lo ")),
        *(str(path) for path in NAMESPACE.parent.glob(f"{INSTANCE}-client")),
        *(line for line in Path("/etc/hosts").read_text().splitlines() if INSTANCE in line),
    ]


@pytest.fixture(scope="module", autouse=True)
def surroundings() -> Iterator[None]:
    if NAMESPACE.exists():
        lab("down")  # an earlier test run was killed
    else:
        subprocess.run(["ip", "netns", "add", NAMESPACE.name], check=True)
    subprocess.run(["ip", "-netns", NAMESPACE.name, "link", "set", "lo", "up"], check=True)
    try:
        yield
    finally:
        lab("down")
        subprocess.run(["ip", "netns", "del", NAMESPACE.name], check=True)


@pytest.fixture(scope="module")
def up(surroundings: None) -> None:
    lab("up", "h19", "h20")


def test_hosts_are_as_a_provider_delivers_them(up: None) -> None:
    for name, other, release in (("h19", "h20", "12."), ("h20", "h19", "13.")):
        assert lab("ssh", name, "--", "cat /etc/debian_version").startswith(release)
        assert lab("ssh", name, "--", "id -un; hostname").split() == ["debian", name]
        assert lab("root", name, "--", "id", "-un") == "root\n"  # no word of complaint from sudo
        assert lab("ssh", name, "--", "ls /usr/sbin/nft /usr/bin/python3 2>&-", status=2) == ""
        assert lab("ssh", name, "--", "systemctl is-system-running") == "running\n"
        keyless = f"ssh -o BatchMode=yes -o StrictHostKeyChecking=no debian@{name}.lab.test 2>&1"
        assert "denied (publickey)" in lab("ssh", other, "--", keyless, status=255)


def test_callers_reach_hosts_by_name_and_nothing_beyond(up: None) -> None:
    connect = "import socket, sys; socket.create_connection((sys.argv[1], 22), 5).recv(4)"
    for name in ("h19.lab.test", "2001:db8:ca11::120"):
        lab("client", "--", sys.executable, "-c", connect, name)
    for route in ("ip route get 203.0.113.1", "ip -6 route get 2001:db8:1::1"):
        assert "unreachable" in lab("client", "--", *route.split(), status=2)
        assert "unreachable" in lab("ssh", "h19", "--", f"{route} 2>&1", status=2)
    ask_proxy = (
        "import urllib.request as r; "
        "r.build_opener(r.ProxyHandler({'http': 'http://198.51.100.1:3143'}))"
        ".open('http://elsewhere.example/')"
    )
    assert "403" in lab("client", "--", sys.executable, "-c", ask_proxy, status=1)


LEFT = "ip link show passing >/dev/null 2>&1"


def test_reboot_keeps_files_and_loses_the_network_namespace(up: None) -> None:
    lab("root", "h20", "--", "echo kept > /root/file; ip link add passing type bridge")
    lab("ssh", "h20", "--", LEFT)
    lab("reboot", "h20")
    lab("ssh", "h20", "--", LEFT, status=1)
    assert lab("root", "h20", "--", "cat /root/file") == "kept\n"


def test_reboot_from_inside_brings_the_host_back(up: None) -> None:
    lab("root", "h19", "--", "ip link add passing type bridge; systemctl reboot --no-block || true")
    eventually(lambda: python("-m", "lab", "ssh", "h19", "--", f"! {LEFT}").wait() == 0)


def test_power_cut_and_boot(up: None) -> None:
    lab("root", "h19", "--", "echo kept > /root/file")
    lab("power-cut", "h19")
    assert not any("h19" in line for line in processes())
    assert "off" in lab("status")
    lab("boot", "h19")
    assert lab("root", "h19", "--", "cat /root/file") == "kept\n"


def test_reset_gives_a_bare_host_with_the_same_ssh_key(up: None) -> None:
    lab("root", "h19", "--", "echo gone > /root/file")
    key = lab("root", "h19", "--", "cat /etc/ssh/ssh_host_ed25519_key.pub")
    lab("reset", "h19")
    lab("root", "h19", "--", "test ! -e /root/file")
    assert lab("root", "h19", "--", "cat /etc/ssh/ssh_host_ed25519_key.pub") == key


def test_cut_line_passes_nothing_until_mended(up: None) -> None:
    connect = "import socket; socket.create_connection(('198.51.100.119', 22), 2)"
    lab("cut", "h19")
    assert "timed out" in lab("client", "--", sys.executable, "-c", connect, status=1)
    assert "cut" in lab("status")
    lab("mend", "h19")
    again = ["-m", "lab", "client", "--", sys.executable, "-c", connect]
    eventually(lambda: python(*again).wait() == 0)  # the client may have given the address up


def test_certificates_verify_until_they_expire(up: None, tmp_path: Path) -> None:
    folder = f"/var/lib/{INSTANCE}-lab"
    verify = ["openssl", "verify", "-CAfile", f"{folder}/ca.pem"]
    for whom in (["-verify_hostname", "h19.lab.test"], ["-verify_ip", "2001:db8:ca11::119"]):
        subprocess.run([*verify, *whom, f"{folder}/certs/h19.lab.test.pem"], check=True)
    assert Path(f"{folder}/certs/h19.lab.test.key").stat().st_mode & 0o777 == 0o600
    expired = lab("cert", "old.example.com", "--days", "-3", "--to", str(tmp_path)).strip()
    done = subprocess.run([*verify, expired], capture_output=True, text=True, check=False)
    assert "certificate has expired" in done.stderr


def test_archive_has_the_release_layout_and_runs(up: None, tmp_path: Path) -> None:
    arch = subprocess.check_output(["dpkg", "--print-architecture"], text=True).strip()
    name = f"livekit_1.13.5_linux_{arch}.tar.gz"
    fetch = "import sys, urllib.request as r; r.urlretrieve(sys.argv[1], sys.argv[2])"
    for file in (name, "checksums.txt"):
        url = f"http://198.51.100.1:8080/v1.13.5/{file}"
        lab("client", "--", sys.executable, "-c", fetch, url, str(tmp_path / file))
    subprocess.run(["sha256sum", "--check", "--strict", "checksums.txt"], cwd=tmp_path, check=True)
    subprocess.run(["tar", "xf", name], cwd=tmp_path, check=True)
    version = subprocess.check_output([tmp_path / "livekit-server", "--version"], text=True)
    assert "1.13.5" in version


def test_second_command_waits_and_says_for_whom(up: None) -> None:
    hold = "import lab.run, time\nwith lab.run.locked(): print('held'); time.sleep(600)"
    holder = python("-c", hold)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    second = python("-m", "lab", "boot", "h19")
    assert second.stdout is not None
    said = second.stdout.readline()
    holder.kill()
    holder.communicate()
    second.communicate(timeout=60)
    assert f"waiting for another lab command to end: -c (pid {holder.pid})" in said
    assert second.returncode == 0


def test_mistakes_are_one_sentence(up: None) -> None:
    assert lab("up", "sfu9", status=1).startswith("lab: sfu9: no such host; the lab's are sfu1")
    assert lab("boot", "h18", status=1) == "lab: h18 was not made yet: `python -m lab up h18`\n"


BORROW = "from bench.world import borrowed\nwith borrowed(['h19']): print('borrowed')"


def test_bench_takes_no_host_that_is_there(up: None) -> None:
    before = lab("status")
    output, _ = python("-c", BORROW).communicate(timeout=60)
    assert "BenchError: h19: in use" in output
    assert lab("status") == before


def test_leftovers_of_a_killed_run_are_found_and_removed(up: None) -> None:
    lab("down")
    assert traces() == []
    kill_when("systemd-nspawn", python("-m", "lab", "up", "h19", "h20"))
    build = "from lab.run import Group; Group('image-x').stream('sleep', '4321')"
    kill_when("sleep 4321", python("-c", build))
    assert any("sleep 4321" in line for line in processes())  # or there is nothing to find

    assert "h20.lab.test" in lab("up", "h19", "h20")
    assert not any("sleep 4321" in line for line in processes())
    assert lab("ssh", "h19", "--", "hostname") == "h19\n"

    hosts = Path("/etc/hosts").read_bytes()
    # As the kernel keeps the network of a host that was killed while its connections linger.
    link = ["ip", "-netns", NAMESPACE.name, "link", "add", "vb-h22", "type", "veth"]
    subprocess.run(link, check=True)
    lab("down")
    assert traces() == []
    begin, end = (f"# {INSTANCE} lab {word}\n".encode() for word in ("begin", "end"))
    before, _, rest = hosts.partition(begin)
    assert Path("/etc/hosts").read_bytes() == before + rest.partition(end)[2]


def test_bench_removes_what_a_killed_run_of_it_left(up: None) -> None:
    lab("down")
    killed = python("-c", f"{BORROW}; import time; time.sleep(600)")
    assert killed.stdout is not None and "borrowed\n" in iter(killed.stdout.readline, "")
    meanwhile, _ = python("-c", BORROW).communicate(timeout=60)
    assert f"another run measures on the lab's hosts (pid {killed.pid})" in meanwhile
    killed.kill()
    killed.communicate()
    assert any("systemd-nspawn" in line for line in processes())  # or there is nothing to find

    again = python("-c", BORROW)
    output, _ = again.communicate(timeout=180)
    assert again.returncode == 0, output
    assert "h19.lab.test booted" in output  # as delivered, not the one that was left
    assert traces() == []

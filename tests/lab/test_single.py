"""inventories/single and inventories/dev as they ship, but for names, addresses and where the lab
keeps its files: refused unedited, and edited deployed to a bare host and verified in full."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from callready.probes import ProbeError, tls
from callready.probes.app import get
from lab import Lab, ca, hosts, plan
from tests.support.crowd import crowd, held
from tests.support.fleet import PYINFRA, REPOSITORY, Host, delivered, eventually

# The names that an operator replaces, longest first.
NAMES = {
    "livekit.example.com": "{box}",
    "turn.example.com": "turn.{box}",
    "app.example.com": "app.{box}",
    "one.example.com": "{box}",
    "dev.example.com": "{box}",
    "example.com": "{box}",
    "192.0.2.10": "{ipv4}",
    "2001:db8::10": "{ipv6}",
    "192.168.1.0-192.168.1.255": "198.51.100.0-198.51.100.255",
    '"192.168.1.10"': '"{ipv4}", "address6": "{ipv6}"',
    "/CHANGE-ME/path/to/the/flutter/project": "{checkout}",
}
PLACES = f"""
ssh_key = "{plan.STATE}/id_ed25519"
ssh_known_hosts_file = "{plan.STATE}/known_hosts"
ssh_config_file = "/dev/null"
livekit["base_url"] = "http://{plan.MACHINE.ipv4}:{plan.WWW_PORT}"
# Addresses that no public peer has.
turn["pools"]["avatar"]["allowed_peers"] = [
    "198.51.100.0-198.51.100.255", "2001:db8:ca11::-2001:db8:ca11:0:ffff:ffff:ffff:ffff",
]
"""
LAB_AUTHORITY = f"""
tls = {{
    "certificate": "{ca.CERTIFICATES}/{{name}}.pem",
    "key": "{ca.CERTIFICATES}/{{name}}.key",
    "ca": "{ca.CA_CERTIFICATE}",
}}
"""
EDGE = """
edge = {"app_timeout": 3}
"""
# Privileged ports, as operators of networks that let nothing else out want them.
LOW_PORTS = """
turn["pools"]["avatar"]["listening_port"] = 443
livekit["rtc"] = {"tcp_port": 80}
"""
LAN_BACKEND = """
mkdir -p /etc/systemd/system/backend.socket.d
printf '[Socket]\\nListenStream=\\nListenStream=0.0.0.0:8000\\n' \
    > /etc/systemd/system/backend.socket.d/lan.conf
systemctl daemon-reload
"""

# Checks that must be among those that pass, by the pytest id's beginning.
SINGLE_CHECKS = {
    "test_redirects",
    "test_https",
    "test_tls_versions",
    "test_behind",
    "test_signalling",
    "test_direct",
    "test_peer_to_peer",
    "test_side_by_side",
    "test_call_from_the_app",
    "test_workers",
    "test_websocket",
    "test_api_is_guarded",
    "test_sweep",
}
DEV_CHECKS = SINGLE_CHECKS - {"test_redirects", "test_https", "test_tls_versions", "test_behind"}
BOXES = {"single": (Host("h02"), SINGLE_CHECKS), "dev": (Host("h01"), DEV_CHECKS)}


@pytest.fixture(scope="module")
def bare_boxes() -> Iterator[None]:
    with delivered(*(box.name for box, _ in BOXES.values())):
        yield


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PYINFRA_YES": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def edited(env: str, box: Host, folder: Path) -> Path:
    """The shipped inventory after an operator has edited it, in a folder of its own."""
    source = REPOSITORY / "inventories"
    values = {"box": box.fqdn, "ipv4": box.ipv4, "ipv6": box.ipv6, "checkout": folder / "app"}
    (folder / "group_data").mkdir()
    for name in (env, f"group_data/{env}.py"):
        text = (source / name).read_text()
        for example, own in NAMES.items():
            text = text.replace(example, own.format(**values))
        (folder / name).write_text(text)
    with (folder / f"group_data/{env}.py").open("a") as file:
        file.write(PLACES + (LAB_AUTHORITY + EDGE if env == "single" else LOW_PORTS))
    subprocess.run(["cp", "-r", REPOSITORY / "lab/checkout", folder / "app"], check=True)
    return folder / env


@pytest.mark.parametrize("env", BOXES)
def test_unedited_it_is_refused(env: str, tmp_path: Path) -> None:
    (tmp_path / "group_data").mkdir()
    for name in (env, f"group_data/{env}.py"):
        (tmp_path / name).write_text((REPOSITORY / "inventories" / name).read_text())
    done = run(PYINFRA, tmp_path / env, "deploy.py", "--dry")
    assert done.returncode == 1
    line, *_ = done.stderr.partition("nothing was connected to\n")[2].splitlines()
    assert line.startswith(f"{tmp_path / env}: still has the example's /CHANGE-ME/")
    assert line.endswith(
        f"edit {tmp_path / env} and {tmp_path}/group_data/{env}.py to name your own hosts"
    )


@pytest.mark.parametrize("env", BOXES)
def test_one_host_carries_everything(env: str, bare_boxes: None, tmp_path: Path) -> None:
    lab = Lab()
    box, wanted = BOXES[env]
    inventory = edited(env, box, tmp_path)
    lab.install_backend(box.name)
    if env == "dev":
        box.root(LAN_BACKEND)
    assert run(sys.executable, "-m", "callready.secrets", inventory).returncode == 0
    # A project may become one of another kind.
    for kind, expected in (("flutter", "confirmed release "), ("com.facebook.react", "No changes")):
        (tmp_path / "app/android/app/build.gradle").write_text(f'apply plugin: "{kind}"')
        done = run(PYINFRA, inventory, "deploy.py")
        assert done.returncode == 0, done.stdout + done.stderr
        assert expected in done.stdout + done.stderr
        advice = f"{tmp_path}/app is a React Native project: its debug builds load their code from"
        assert (advice in done.stderr) == (kind == "com.facebook.react")

    report = tmp_path / "report"
    verified = run(
        *lab.client_prefix(),
        sys.executable,
        "-m",
        "callready.verify",
        inventory,
        "--report",
        report,
    )
    assert verified.returncode == 0, verified.stdout
    passed = {
        case.attrib["name"].partition("[")[0]
        for case in ElementTree.parse(report / "verify.xml").iter("testcase")
    }
    assert wanted <= passed, wanted - passed
    assert ("test_redirects" in passed) == (env == "single")
    if env == "single":  # where TURN and HTTPS share 443, one address may not hold more either
        with crowd(box, box.fqdn, idle=1100, slow=0):
            eventually(lambda: held(box) <= 1000, 5)
            assert held(box) > 500
        gives_up_the_application(box)
        serves_each_address_as_soon_as_it_is_there(box)


def gives_up_the_application(box: Host) -> None:
    """After the time of its own, not after a minute."""
    url, file = f"https://app.{box.fqdn}/health", str(ca.CA_CERTIFICATE)
    box.root("systemctl kill -s STOP backend.service")
    try:
        answer, _ = get(url, file)
    finally:
        box.root("systemctl kill -s CONT backend.service")
    assert answer.status_code == 504
    eventually(lambda: get(url, file)[0].status_code == 200, 10)


def serves_each_address_as_soon_as_it_is_there(box: Host) -> None:
    """IPv6 does not come at boot, and Debian waits for it: the edge and coturn do not."""
    network = "/etc/systemd/network/10-host0.network"
    turns = [f"turnserver@{pool}.service" for pool in ("calls", "avatar")]
    online = "systemctl is-active network-online.target"

    def serves(address: str) -> bool:
        try:
            return bool(tls.served(address, 443, box.fqdn, str(ca.CA_CERTIFICATE)))
        except ProbeError:
            return False

    box.root(
        f"cp -p {network} /root; printf '[Match]\\nName=host0\\n[Network]\\nIPv6AcceptRA=no\\n"
        f"DHCP=ipv6\\nAddress={box.ipv4}/24\\n[DHCPv6]\\nWithoutRA=solicit\\n' > {network}"
    )
    # Nothing enters it meanwhile: systemd stops every process there (SIGSTOP) before it ends them,
    # and nsenter stops with its child and stays so.
    hosts.reboot(plan.find_host(box.name))
    eventually(lambda: serves(box.ipv4))
    assert box.root(online, check=False) != "active"
    assert not serves(box.ipv6)
    box.root(
        f"mv /root/{Path(network).name} {network}; networkctl reload; networkctl reconfigure host0"
    )
    eventually(lambda: serves(box.ipv6), 20)
    assert box.root("systemctl show -P NRestarts haproxy.service") == "0"
    # coturn starts while its IPv6 address is away, and has it when it comes back.
    eventually(lambda: box.root(online, check=False) == "active")
    box.root(f"ip address delete {box.ipv6}/64 dev host0; systemctl restart {' '.join(turns)}")
    box.root(f"ip address add {box.ipv6}/64 dev host0 nodad")
    assert all(box.root(f"systemctl is-active {unit}") == "active" for unit in turns)

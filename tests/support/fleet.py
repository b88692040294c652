"""A fleet of lab hosts as an operator has it: an inventory in a folder of its own, the literal
pyinfra command, a look into the hosts, and what callers see of them."""

from __future__ import annotations

import copy
import json
import os
import secrets
import shlex
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
import yaml

from lab import Lab, archive, hosts, plan, wheels

REPOSITORY = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
PYINFRA = Path(sys.executable).with_name("pyinfra")
LAB_INVENTORY = "inventories/lab"

# Everything of a host that a deploy may change, and that nothing else changes.
SNAPSHOT = """
export LC_ALL=C
cd /
find etc opt srv usr/local var/lib/callready var/lib/turn run/callready-firewall \
    ! -name '*.db-shm' -printf '%p %y %m %u %g %l %T@\\n' 2>/dev/null | sort
dpkg-query -W
cat etc/passwd
systemctl show -p Id,ActiveState,UnitFileState,MainPID coturn.service livekit-server.service \
    callready-firewall.service 'turnserver@*.service'
nft -st list ruleset 2>/dev/null
sysctl -n net.ipv4.ip_local_reserved_ports
"""

# Everything that a release is on a host, as lines that differ between releases only. State is left
# out: certificates, those of the fleet too, secret rows, history, packages.
RELEASE = """
export LC_ALL=C
for path in $PATHS; do
    printf '%s %s %s ' "$path" "$(readlink "$path")" "$(stat -L -c '%F %a %U %G' "$path" 2>&-)"
    sha256sum < "$path" 2>&- || echo absent
done
for link in current confirmed; do
    echo "$link $(sha256sum < /etc/callready/$link/manifest 2>&-)"
done
for unit in $UNITS; do
    state=$(systemctl show -p ActiveState --value "$unit")
    pid=$(systemctl show -p MainPID --value "$unit")
    # Debian's own starts with the host as long as its package is there.
    if [ $unit = haproxy.service ]; then
        grep -qsz ^CALLREADY_FINGERPRINT= /proc/$pid/environ || state=inactive pid=0
    fi
    echo "$unit $state"
    [ "$pid" -gt 0 ] || continue
    tr '\\0' '\\n' < /proc/$pid/environ | grep ^CALLREADY_FINGERPRINT=
    cat /run/callready/$unit 2>&-
    sha256sum < /proc/$pid/exe
    find /run/credentials/$unit -type f ! -name 'fleet.*' -exec sha256sum {} + 2>&- | sort
done
nft -st list table inet callready 2>&-
sysctl -n net.ipv4.ip_local_reserved_ports
"""

# What a bare Debian can listen with; says when it does.
LISTENER = """
use Socket qw(:all);
my ($proto, $port) = @ARGV;
my $tcp = $proto eq "tcp";
socket(my $s, AF_INET6, $tcp ? SOCK_STREAM : SOCK_DGRAM, 0) or die;
setsockopt($s, SOL_SOCKET, SO_REUSEADDR, 1) or die;
setsockopt($s, IPPROTO_IPV6, IPV6_V6ONLY, 0) or die;
bind($s, pack_sockaddr_in6($port, Socket::IN6ADDR_ANY)) or die $!;
listen($s, 9) or die if $tcp;
system("systemd-notify", "--ready");
while (1) {
    if ($tcp) { accept(my $c, $s); close $c }
    else { my $from = recv($s, my $data, 1500, 0); send($s, $data, 0, $from) }
}
"""


@dataclass(frozen=True)
class Host:
    """A look into a host, past its network and its firewall."""

    name: str

    @property
    def fqdn(self) -> str:
        return plan.find_host(self.name).fqdn

    @property
    def ipv4(self) -> str:
        return plan.find_host(self.name).ipv4

    @property
    def ipv6(self) -> str:
        return plan.find_host(self.name).ipv6

    def inside(self, script: str) -> list[str]:
        """The command that runs a script as root inside."""
        leader = hosts.leader(plan.find_host(self.name))
        return ["nsenter", "--all", f"--target={leader}", "sh", "-c", script]

    def root(self, script: str, check: bool = True) -> str:
        """Run a script as root inside; its standard output."""
        done = subprocess.run(
            self.inside(script),
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert not check or done.returncode == 0, f"{self.name}: {script}: {done.stderr}"
        return done.stdout.strip()

    def snapshot(self) -> list[str]:
        """Every file, package, process and rule that a deploy could touch."""
        return self.root(SNAPSHOT, check=False).splitlines()

    def release(self, paths: Iterable[str], units: Iterable[str]) -> list[str]:
        """The release as it is on the host, of all that these files and units may be."""
        variables = f"PATHS={shlex.quote(' '.join(sorted(paths)))}\n"
        variables += f"UNITS={shlex.quote(' '.join(sorted(units)))}\n"
        return self.root(variables + RELEASE, check=False).splitlines()

    def pids(self) -> dict[str, int]:
        """The main process of each of our units."""
        shown = self.root(
            "systemctl show -p Id,MainPID 'turnserver@*.service' livekit-server.service"
        )
        pairs = (block.split() for block in shown.split("\n\n") if block)
        found = {dict(p.split("=", 1) for p in pair)["Id"]: pair for pair in pairs}
        pids = {
            unit: int(dict(p.split("=", 1) for p in pair)["MainPID"])
            for unit, pair in found.items()
        }
        return {unit: pid for unit, pid in pids.items() if pid}

    def media(self) -> int:
        """UDP ports of calls that LiveKit has open."""
        return int(self.root("ss -Hlnup | grep -c livekit-server || true"))

    @contextmanager
    def listening(self, proto: str, port: int) -> Iterator[None]:
        """Another program of the host on a port of all its addresses: over UDP it echoes."""
        unit = f"foreign-{proto}-{port}.service"
        self.root(
            f"systemd-run -q --unit={unit} --property=Type=notify --property=NotifyAccess=all "
            f"perl -e '{LISTENER}' {proto} {port}"
        )
        try:
            yield
        finally:
            self.root(f"systemctl stop {unit}")


@dataclass(frozen=True)
class Run:
    """How a command ended and everything it printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout + self.stderr

    @property
    def results(self) -> dict[str, Any]:
        """pyinfra's JSON: totals of its operations, how many hosts had any, and which failed."""
        results = json.loads(self.stdout)["results"]
        hosts = {
            host
            for operation in results["operations"]
            for how in ("success", "error", "no_change")
            for host in operation[how]
        }
        return {**results["totals"], "hosts": len(hosts), "failed_hosts": results["failed_hosts"]}

    @property
    def changed(self) -> list[str]:
        """The short names of the hosts that something was changed on, by pyinfra's JSON."""
        operations = json.loads(self.stdout)["results"]["operations"]
        return sorted({host.partition(".")[0] for op in operations for host in op["success"]})

    @property
    def message(self) -> list[str]:
        """What an operator is told when pyinfra gives up, without its progress lines."""
        error = self.stderr.partition("--> pyinfra error: ")[2]
        return error.strip().splitlines()

    def plan(self, host: str) -> list[str]:
        """The changes announced for a host, as printed."""
        prefix = f"[{host}.lab.test]   "
        lines = (line.strip() for line in self.text.splitlines())
        return [
            " ".join(line.removeprefix(prefix).split())
            for line in lines
            if line.startswith(prefix) and line.removeprefix(prefix)[0] in "+~-!"
        ]


class Fleet:
    """An inventory that tests may change: `groups`, `data` and `secrets` are written to files
    before every run. Every secret contains `marker`, which no run may print."""

    def __init__(
        self, folder: Path, groups: dict[str, Any], data: dict[str, Any], names: list[str]
    ) -> None:
        self.folder = folder
        self.inventory = folder / "fleet"
        self.groups, self.data = groups, data
        self.marker = "Planted" + secrets.token_hex(8)
        self.secrets = {name: f"{self.marker}-{name}-{secrets.token_hex(8)}" for name in names}
        self._original = copy.deepcopy((groups, data, self.secrets))
        self.deploy_file, self.environment = "deploy.py", dict[str, str]()
        self.first: Run | None = None
        # Whether hosts may be other than the original inventory says.
        self.unsettled = True
        self._started: list[subprocess.Popen[str]] = []

    def restore(self) -> None:
        """The inventory as it was; returns the fleet to it with the next deploy. A deploy that a
        failed test has left running is ended."""
        while self._started:
            process = self._started.pop()
            self.unsettled |= process.poll() is None
            stop(process)
        self.groups, self.data, self.secrets = copy.deepcopy(self._original)

    def write(self) -> None:
        """Put the inventory on disk as an operator would have it."""
        (self.folder / "group_data").mkdir(exist_ok=True)
        _write(self.inventory, self.groups)
        _write(self.folder / "group_data/fleet.py", self.data)
        store = self.folder / "fleet.secrets.yaml"
        store.touch(0o600)
        store.write_text(yaml.safe_dump(self.secrets))

    def start(
        self, *arguments: str, before: tuple[str, ...] = (), file: str = ""
    ) -> subprocess.Popen[str]:
        """Start the literal command in a process group of its own; `file` instead of deploy.py."""
        self.write()
        process = subprocess.Popen(
            [*before, PYINFRA, self.inventory, file or self.deploy_file, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PYINFRA_YES": "1", "PYTHONUNBUFFERED": "1", **self.environment},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(self, *arguments: str, before: tuple[str, ...] = (), file: str = "") -> Run:
        """Run the literal command to its end; arguments as `start`."""
        process = self.start(*arguments, before=before, file=file)
        try:
            stdout, stderr = process.communicate(timeout=400)
        finally:
            stop(process)
        run = Run(process.returncode, stdout, stderr)
        assert self.marker not in run.text, "a secret was printed"
        assert "Traceback" not in run.text, run.text
        return run

    def deploy(self, *arguments: str, before: tuple[str, ...] = ()) -> Run:
        """A deploy that must succeed; its JSON is in the result."""
        changed_inventory = (self.groups, self.data, self.secrets) != self._original
        self.unsettled = changed_inventory or bool(arguments)
        run = self.run("--json", *arguments, before=before)
        assert run.status == 0, run.text
        return run

    def ice_servers(self) -> dict[str, Any]:
        """What LiveKit hands out to callers, each one asked: `ok` if all answer."""
        return probe(
            "webrtc",
            f"ws://{SFU.fqdn}:7880",
            "--ice-servers",
            "--ca-file",
            str(plan.STATE / "ca.pem"),
            secret=self.secrets["livekit/api_secret"],
            LIVEKIT_API_KEY="APIfleet",
        )

    def refused(self, *arguments: str, before: tuple[str, ...] = ()) -> list[str]:
        """A deploy that must be refused: exit 1, one message, nothing changed on any host."""
        looked_at = [Host(name) for name in FLEET if Lab().state(name) in ("running", "cut")]
        was = {host: host.snapshot() for host in looked_at}
        run = self.run(*arguments, before=before)
        assert run.status == 1, run.text
        for host in looked_at:
            assert host.snapshot() == was[host], f"{host.name} was changed"
        return [line.removeprefix(f"{self.inventory}: ") for line in run.message]

    @contextmanager
    def killed(self, when: Callable[[], bool]) -> Iterator[None]:
        """Start a deploy and SIGKILL it, all of its process group, as soon as `when` is true.

        The body runs while nobody is there any more; hosts may still be working.
        """
        self.unsettled = True
        process = self.start()
        try:
            eventually(lambda: when() or process.poll() is not None)
            assert process.poll() is None, f"it ended before: {process.communicate()}"
        finally:
            stop(process)
        yield


# Debian 12 and 13 each serve TURN; h05 has two pools.
FLEET = ("h03", "h04", "h05", "h06")
SFU, TURN12, TURN13, TWO_POOLS = Host("h04"), Host("h03"), Host("h06"), Host("h05")
HOSTS = (SFU, TURN12, TURN13, TWO_POOLS)


# Groups, group data and names of the secrets.
Inventory = tuple[dict[str, Any], dict[str, Any], list[str]]


def entry(host: Host, **more: Any) -> tuple[str, dict[str, Any]]:
    """A host as a group has it."""
    return host.fqdn, {"address": host.ipv4, "address6": host.ipv6, **more}


def inventory() -> Inventory:
    """The tests' fleet."""
    groups = {
        "livekit": [entry(SFU)],
        "turn": [
            entry(TURN12, pools=["calls"]),
            entry(TURN13, pools=["calls"]),
            entry(TWO_POOLS, pools=["avatar", "gadget"]),
        ],
        "app": [SFU.fqdn],
    }
    data = {
        "ssh_user": "debian",
        "ssh_key": f"{plan.STATE}/id_ed25519",
        "ssh_known_hosts_file": f"{plan.STATE}/known_hosts",
        "ssh_config_file": "/dev/null",
        # Of a deploy that dies, the next one waits for the end.
        "deploy": {"confirm_timeout": 15},
        "livekit": {
            "base_url": "http://198.51.100.1:8080",
            "url": f"ws://{SFU.fqdn}:7880",
            "keys": {"APIfleet": "secret:livekit/api_secret"},
        },
        "turn": {
            "total_quota": 1200,
            "pools": {
                "calls": {"realm": "calls.lab.test", "secrets": ["secret:turn/calls"]},
                "avatar": {
                    "realm": "avatar.lab.test",
                    "secrets": ["secret:turn/avatar"],
                    "peers": "internet",
                    "allowed_peers": ["198.51.100.0-198.51.100.255"],
                    "max_port": 60000,
                },
                "gadget": {
                    "realm": "gadget.lab.test",
                    "users": {"gadget": "secret:turn/gadget"},
                    "listening_port": 3479,
                    "tls_listening_port": 5350,
                    "min_port": 60001,
                },
            },
        },
        "tls": {
            "certificate": f"{plan.STATE}/certs/{{host}}.pem",
            "key": f"{plan.STATE}/certs/{{host}}.key",
            "ca": f"{plan.STATE}/ca.pem",
        },
        "app": {
            "env_file": "/srv/app/.env",
            "owner": "debian",
            "commands": ["echo restarted >> /run/app-log"],
        },
    }
    return groups, data, ["livekit/api_secret", "turn/calls", "turn/avatar", "turn/gadget"]


# One SFU and one TURN host.
PAIR = (Host("h07"), Host("h08"))


def pair_inventory() -> Inventory:
    """The same as `inventory`, of the pair."""
    (sfu, turn) = PAIR
    _, data, secrets = inventory()
    del data["app"]
    data["livekit"]["url"] = f"ws://{sfu.fqdn}:7880"
    data["turn"] = {"pools": {"calls": data["turn"]["pools"]["calls"]}}
    groups = {"livekit": [entry(sfu)], "turn": [entry(turn, pools=["calls"])]}
    return groups, data, secrets[:2]


def watched_inventory(box: Host, monitor: Host, smtp: int, http: int) -> Inventory:
    """An SFU that is also a TURN host, and the monitor that watches it; alerts go to these ports of
    the machine (`tests.support.sink`)."""
    _, data, secrets = inventory()
    machine = plan.MACHINE.ipv4
    groups = {
        "livekit": [entry(box, name=f"turn.{box.fqdn}", pools=["calls"])],
        "turn": [box.fqdn],
        "monitor": [entry(monitor)],
    }
    del data["app"]
    data["turn"] = {"min_port": 60001, "pools": {"calls": data["turn"]["pools"]["calls"]}}
    data["livekit"] |= {
        "url": f"wss://{box.fqdn}",
        "keys": data["livekit"]["keys"] | {"APIcaller": "secret:monitor/livekit"},
        "prometheus": {"password": "secret:livekit/prometheus"},
    }
    data["tls"] = {key: text.replace("{host}", "{name}") for key, text in data["tls"].items()}
    data |= {
        "edge": {"requests_per_client": 100_000},  # tests ask faster than people
        "host": {"other_listeners": ["5355/tcp", "5355/udp"]},
        "fleet_ca": "secret:fleet/ca",
        "monitor": {
            "url": f"https://{monitor.fqdn}",
            "password": "secret:monitor/password",
            "mail": {
                "smarthost": f"{machine}:{smtp}",
                "sender": "alerts@lab.test",
                "require_tls": False,
            },
            "page": {"mail": ["oncall@lab.test"], "webhooks": [f"http://{machine}:{http}/page"]},
            "ticket": {"webhooks": [f"http://{machine}:{http}/ticket"]},
            "livekit_key": "APIcaller",
            "turn_secret": "secret:monitor/turn",
            "wheels": str(wheels.publish()),
            "watchdog": f"http://{machine}:{http}/watchdog",
        },
    }
    more = [f"monitor/{name}" for name in ("password", "livekit", "turn")]
    return groups, data, [*secrets[:2], "livekit/prometheus", "fleet/ca", *more]


def shown(fleet: Fleet, path: str, **parameters: str) -> str:
    """What people get at a path of the monitor."""
    trusted = ssl.create_default_context(cafile=f"{plan.STATE}/ca.pem")
    login = ("operator", fleet.secrets["monitor/password"])
    url = f"{fleet.data['monitor']['url']}{path}"
    answer = httpx.get(url, params=parameters, auth=login, verify=trusted, timeout=20)
    answer.raise_for_status()
    return answer.text


def found(fleet: Fleet, query: str) -> list[Any]:
    """What the monitor's Prometheus finds."""
    answer = shown(fleet, "/api/v1/query", query=query)
    return list(json.loads(answer)["data"]["result"])


def encrypted_key(path: Path, passphrase: str) -> str:
    """A copy of the lab's SSH key that opens with a passphrase, with its public key beside it."""
    for end in ("", ".pub"):
        shutil.copy(plan.STATE / f"id_ed25519{end}", f"{path}{end}")
    change = ["ssh-keygen", "-q", "-p", "-a", "1", "-f", str(path), "-P", "", "-N", passphrase]
    subprocess.run(change, check=True, stdout=subprocess.DEVNULL)
    return str(path)


def build_generator() -> None:
    """Have the program that makes many calls."""
    path = f"PATH={archive.go().rpartition('/')[0]}:{os.environ['PATH']}"
    subprocess.run(["make", "-s", "load/generator", path], cwd=REPOSITORY, check=True)


def deploy_lab() -> None:
    """The literal command for the lab's four hosts, which must succeed."""
    done = subprocess.run(
        [PYINFRA, LAB_INVENTORY, "deploy.py"],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        env={**os.environ, "PYINFRA_YES": "1"},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def stop(process: subprocess.Popen[str]) -> None:
    """SIGKILL what was started with a process group of its own, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
    process.communicate()


def idle(host: Host) -> bool:
    """Whether no deploy works on the host any more, nor waits for its confirmation."""
    asked = "flock -n /run/callready.lock true && [ ! -e /var/lib/callready/pending ] && echo idle"
    return host.root(asked, check=False) == "idle"


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what is bound to happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.05)


DRAIN = 92  # seconds; a deploy tells how many calls it waits for when 90, 60 and 30 are left


def draining(process: subprocess.Popen[str]) -> None:
    """Read what a deploy prints until it has waited two seconds for the calls that are on."""
    assert any("media ports in use, " in line for line in process.stderr or ()), "it did not wait"


def probe(module: str, *arguments: str, secret: str = "", **environment: str) -> dict[str, Any]:
    """What a caller sees: `python -m callready.probes.MODULE …` where the callers are, as data
    with `ok`; a secret goes over standard input."""
    done = subprocess.run(
        [
            *Lab().client_prefix(),
            sys.executable,
            "-m",
            f"callready.probes.{module}",
            *arguments,
            "--json",
            *(["--secret-file", "-"] if secret else []),
        ],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        text=True,
        input=secret,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return {"ok": not done.returncode, **json.loads(done.stdout or done.stderr)}


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text("".join(f"{key} = {pformat(value)}\n\n" for key, value in values.items()))


@contextmanager
def delivered(*names: str) -> Iterator[None]:
    """Hosts as delivered; those that were not there before go again."""
    if os.geteuid():
        pytest.skip("the lab needs root")
    lab = Lab()
    made = [name for name in names if lab.state(name) == "absent"]
    lab.up(names)
    for name in set(names) - set(made):
        lab.reset(name)
    yield
    for name in made:
        lab.destroy(name)


@contextmanager
def held(host: Host, unit: str) -> Iterator[None]:
    """Make the next start of a unit wait, so that a deploy stands still right there."""
    folder = f"/run/systemd/system/{unit}.d"
    wait = "while [ -e /run/hold ]; do sleep 0.1; done"
    host.root(
        f"mkdir -p {folder}; touch /run/hold; systemctl daemon-reload; printf '[Service]\\n"
        f'ExecStartPre=+/bin/sh -c "{wait}"\\n\' > {folder}/hold.conf; systemctl daemon-reload'
    )
    try:
        yield
    finally:
        host.root(f"rm -f /run/hold; rm -r {folder}; systemctl daemon-reload")


def starting(host: Host, unit: str) -> bool:
    """Whether a unit waits in its start."""
    return host.root(f"systemctl is-active {unit}", check=False) == "activating"


# How a file becomes one that cannot be replaced, how it is one again, and what is said of it.
OBSTACLES = {
    "folder": ("mv {0} {0}.kept && mkdir {0} && touch {0}/theirs", "rm -r {0} && mv {0}.kept {0}"),
    "bind mount": ("mount --bind {0} {0}", "umount {0}"),
    "immutable": ("chattr +i {1}", "chattr -i {1}"),
}
SAID_OF = {
    "folder": "is a folder",
    "bind mount": "is a mount point",
    "immutable": "is immutable (chattr +i) or on a read-only file system",
}


@contextmanager
def obstacle(host: Host, kind: str, path: str) -> Iterator[str]:
    """Have something that cannot be replaced at `path`; what callready says of it."""
    outside = plan.STATE / "hosts" / host.name / f"root{path}"  # a minimal Debian has no chattr

    def make(command: str) -> None:
        if kind == "immutable":
            subprocess.run(command.format(path, outside).split(), check=True)
        else:
            host.root(command.format(path))

    there, gone = OBSTACLES[kind]
    make(there)
    try:
        yield SAID_OF[kind]
    finally:
        make(gone)


STRICT = f"Host *\n UserKnownHostsFile {plan.STATE}/known_hosts\n StrictHostKeyChecking yes\n"


def jump(config: Path, more: str) -> str:
    """An ssh_config by which the pair's TURN host is behind its SFU."""
    sfu, turn = PAIR
    config.write_text(
        f"Host *\n User debian\n IdentityFile {plan.STATE}/id_ed25519\n"
        f"Host {turn.fqdn}\n ProxyJump {sfu.fqdn}\n{more}"
    )
    return str(config)


def verify(report: Path, *checks: str, inventory: Path | str = LAB_INVENTORY) -> dict[str, str]:
    """Run these checks where the callers are; what each says that fails, "" of one that passes."""
    done = subprocess.run(
        [
            *Lab().client_prefix(),
            sys.executable,
            "-m",
            "callready.verify",
            inventory,
            "-v",
            "-k",
            " or ".join(checks),
            "--attempts",
            "1",
            "--report",
            report,
        ],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    cases = ElementTree.parse(report / "verify.xml").iter("testcase")
    found = {
        case.attrib["name"]: "".join(failure.text or "" for failure in case.iter("failure"))
        for case in cases
    }
    assert found, done.stdout + done.stderr
    assert bool(done.returncode) == any(found.values()), done.stdout
    for text in filter(None, found.values()):
        assert text.split("\n")[0] in done.stdout and "Traceback" not in done.stdout
    return found


TRACE = ("strace", "-f", "-v", "-s", "1000000", "-e", "trace=execve", "-o")

"""The hosts that are measured on: booted for the run, reached directly or over a slow line."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from callready.release.node import Node
from callready.secrets.loading import load_fleet
from lab import Host, Lab, ca, find_host, hosts
from lab.plan import BENCH_HOSTS, STATE
from lab.run import abandoned, locked, remove_tree
from tasks import declare

ROOT = Path(__file__).parent.parent
HOSTS = BENCH_HOSTS[6:]
FIRST_PORT = 22000  # of the slow lines, on 127.0.0.1
SSH_DATA = {
    "ssh_user": "debian",
    "ssh_key": str(hosts.USER_KEY),
    "ssh_strict_host_key_checking": "yes",
    "ssh_config_file": "/dev/null",
}
POOL = {"realm": "calls.lab.test", "secrets": ["secret:turn/calls"], "peers": "internet"}


class BenchError(Exception):
    """Something did not run, so its time is worth nothing."""


@dataclass(frozen=True)
class Line:
    """The way to some hosts: the first `count` of the world's, `rtt` ms away."""

    world: "World"
    count: int
    rtt: int

    @property
    def hosts(self) -> list[Host]:
        """Who is at the other end."""
        return self.world.hosts[: self.count]

    @property
    def inventory(self) -> Path:
        """For pyinfra."""
        return self.world.folder / f"hosts-{self.count}-{self.rtt}"

    @property
    def ssh(self) -> list[str]:
        """The ssh command but for host and command."""
        return ["ssh", "-F", str(self.world.folder / f"ssh-{self.rtt}")]

    def run(self, scripts: Mapping[str, str]) -> dict[str, str]:
        """Run each host's script as root, all at once over one ssh each; what each printed.

        Raises BenchError with the words of the first that failed.
        """
        jobs = {
            host.fqdn: subprocess.Popen(
                [*self.ssh, host.fqdn, "sudo -n sh -s"],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for host in self.hosts
        }
        for name, job in jobs.items():
            assert job.stdin
            with suppress(BrokenPipeError):  # ssh has failed and says why below
                job.stdin.write(scripts[name])
                job.stdin.close()
            job.stdin = None  # or communicate() would close it again
        printed = {}
        for name, job in jobs.items():
            out, err = job.communicate()
            if job.returncode:
                raise BenchError(f"ssh {name}: exit {job.returncode}: {(err or out)[-1000:]}")
            printed[name] = out
        return printed


@dataclass
class World:
    """Hosts, and in `folder` everything that leads to them.

    There are two sets of the same resources on every host, so that whoever is measured finds them
    as it left them: callready's own, and under other names and ports those that plain pyinfra,
    Ansible and the script take turns with. The `quotas` are the value that a run changes.
    """

    folder: Path
    hosts: list[Host]
    rtts: Sequence[int]
    quotas: dict[str, int] = field(default_factory=lambda: {"callready": 100, "bench": 100})
    declared: dict[str, Node] = field(default_factory=dict)

    def prepare(self, counts: Sequence[int]) -> None:
        """Write inventories and files."""
        self.folder.mkdir()
        os.environ["CALLREADY_SECRET_TURN_CALLS"] = secrets.token_urlsafe(32)
        known = [
            f"{name} {key}\n"
            for host in self.hosts
            for key in [(hosts.HOST_KEYS / f"{host.name}.pub").read_text().rsplit(" ", 1)[0]]
            for name in (host.ipv4, f"[127.0.0.1]:{port(host)}")
        ]
        (self.folder / "known_hosts").write_text("".join(known))
        (self.folder / "empty.py").write_text("")
        (self.folder / "group_data").mkdir()
        self.write_settings()
        for rtt in self.rtts:
            (self.folder / f"ssh-{rtt}").write_text(self._ssh_config(rtt))
            for count in counts:
                line = Line(self, count, rtt)
                names = [(host.fqdn, self._host_data(host, rtt)) for host in line.hosts]
                line.inventory.write_text(f"turn = {names!r}\n")
                ansible = "".join(f"{host.fqdn}\n" for host in line.hosts)
                line.inventory.with_suffix(".ini").write_text(ansible)
        fleet = load_fleet(str(Line(self, max(counts), self.rtts[0]).inventory))
        self.declared = {name: declare(fleet, name) for name in fleet.hosts}
        for here in self.declared.values():
            (self.folder / "files" / here.name).mkdir(parents=True)
        self.write_files()

    def change(self, side: str) -> None:
        """Give the files of one side another value."""
        self.quotas[side] += 1
        self.write_settings() if side == "callready" else self.write_files()

    def write_settings(self) -> None:
        """The inventories' group data."""
        data = {
            **SSH_DATA,
            "ssh_known_hosts_file": str(self.folder / "known_hosts"),
            "turn": {"pools": {"calls": {**POOL, "user_quota": self.quotas["callready"]}}},
            "tls": {
                "ca": f"{ca.CA_CERTIFICATE}",
                "certificate": f"{ca.CERTIFICATES}/{{host}}.pem",
                "key": f"{ca.CERTIFICATES}/{{host}}.key",
            },
        }
        text = "".join(f"{key} = {value!r}\n" for key, value in data.items())
        (self.folder / "group_data" / "turn.py").write_text(text)

    def write_files(self) -> None:
        """The other side's files, as callready renders them but for names and ports."""
        for here in self.declared.values():
            for name, content in bench_files(here, self.quotas["bench"]).items():
                (self.folder / "files" / here.name / name).write_bytes(content)

    def variables(self) -> dict[str, str]:
        """What the other side knows besides its files; the same for every host."""
        release = next(iter(self.declared.values())).release
        return {
            "bench_files": str(self.folder / "files"),
            "bench_packages": " ".join(packages(release.packages)),
            "bench_reserved_ports": release.sysctls["net.ipv4.ip_local_reserved_ports"],
        }

    def _host_data(self, host: Host, rtt: int) -> dict[str, object]:
        where = {"ssh_hostname": host.ipv4, "address6": host.ipv6}
        # The forwarder has no IPv6, and callready would try it.
        slow = {"ssh_hostname": "127.0.0.1", "ssh_port": port(host)}
        return {"address": host.ipv4, "pools": ["calls"], **(slow if rtt else where)}

    def _ssh_config(self, rtt: int) -> str:
        blocks = [
            f"Host {host.fqdn}\n  HostName {'127.0.0.1' if rtt else host.ipv4}\n"
            f"  Port {port(host) if rtt else 22}\n"
            for host in self.hosts
        ]
        return "".join(blocks) + (
            f"Host *\n  User debian\n  BatchMode yes\n  IdentitiesOnly yes\n  ConnectTimeout 10\n"
            f"  StrictHostKeyChecking yes\n  IdentityFile {hosts.USER_KEY}\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
        )

    @contextmanager
    def slow_lines(self) -> Iterator[None]:
        """Run the forwarders of every round-trip time but 0."""
        rtt = max(self.rtts)
        ways = [f"{port(host)}={host.ipv4}:22" for host in self.hosts]
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.delay", str(rtt), *ways],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin and process.stdout
        try:
            if not process.stdout.readline():
                raise BenchError(f"the forwarder does not listen on 127.0.0.1:{FIRST_PORT}-")
            yield
        finally:
            process.stdin.close()
            process.wait()


def port(host: Host) -> int:
    """The local port that leads to the host over the slow line."""
    return FIRST_PORT + host.number


def packages(wanted: dict[str, str]) -> list[str]:
    """A release's packages; of alternatives the first."""
    return [names.partition(" | ")[0] for names in wanted]


def bench_files(here: Node, quota: int) -> dict[str, bytes]:
    """The files of callready's release under other names; coturn listens on loopback only, on
    other ports, so that both can run on one host."""
    own = {
        "/etc/sysctl.d/60-callready.conf": "60-bench.conf",
        "/etc/callready/nftables.conf": "nftables.conf",
        "/usr/local/lib/callready/load-firewall": "load-firewall",
        "/etc/systemd/system/callready-firewall.service": "bench-firewall.service",
        "/etc/coturn/calls.conf": "calls.conf",
        "/etc/systemd/system/turnserver@.service": "benchturn@.service",
    }
    swaps = {
        "/usr/local/lib/callready/": "/usr/local/lib/bench-",
        "/etc/coturn/": "/etc/bench/",
        f"/tls/{here.settings.name}/current/": "/tls/",
        "callready": "bench",
        "listening-port=3478": "listening-port=4478",
        "listening-port=5349": "listening-port=6349",
        "user-quota=100": f"user-quota={quota}",
        f"listening-ip={here.settings.address}": "listening-ip=127.0.0.1",
        f"listening-ip={here.settings.address6}": "",
    }
    made = {}
    for path, name in own.items():
        text = here.release.files[path].content.decode()
        for old, new in swaps.items():
            text = text.replace(old, new)
        made[name] = text.encode()
    pair = here.release.certificates[here.settings.name]
    return {**made, "fullchain.pem": pair.chain, "privkey.pem": pair.key}


@contextmanager
def borrowed(names: Sequence[str]) -> Iterator[tuple[Path, list[Host]]]:
    """A folder for this run and lab hosts as delivered, which go again with it.

    What the run makes is noted in the folder first, so that the next run can remove what this one
    leaves if it is killed. Raises BenchError if another run measures or such a host exists.
    """
    own = STATE / f"bench-{os.getpid()}"
    with locked():
        for folder in STATE.glob("bench-*"):
            if not abandoned(folder.name):
                pid = folder.name.rpartition("-")[2]
                raise BenchError(
                    f"another run measures on the lab's hosts (pid {pid}): wait until it ends, or "
                    "remove them with `python -m lab down`"
                )
            give_back(folder)
        if there := " ".join(name for name in names if Lab().state(name) != "absent"):
            raise BenchError(
                f"{there}: in use, and only hosts as delivered can be measured on: wait, or remove "
                f"what is there with `python -m lab destroy {there}`"
            )
        own.mkdir(mode=0o700, parents=True)
        if not ca.CA_CERTIFICATE.exists():
            (own / "lab").touch()
        (own / "hosts").write_text(" ".join(names))
    try:
        Lab().up(names)
        yield own, [find_host(name) for name in names]
    finally:
        give_back(own)


def give_back(folder: Path) -> None:
    """Remove a run's folder and what it made; the lab stays if it has other hosts by now."""
    noted = folder / "hosts"
    for name in noted.read_text().split() if noted.exists() else ():
        Lab().destroy(name)
    if (folder / "lab").exists() and not Lab().status():
        Lab().down()
    else:
        remove_tree(folder)

"""A lab host with an inventory of its own and two good states, A and B: what it takes to break a
deploy from one to the other anywhere, and to judge what is left."""

from __future__ import annotations

import copy
import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue
from typing import Any, Protocol

from callready.probes import ProbeError, livekit
from callready.probes.probe import Probe
from callready.release import node
from callready.rollout import gate
from callready.rollout.prober import Prober
from callready.secrets.loading import validate
from lab import Lab, ca, hosts, plan, wheels
from tasks import declare
from tests.support.fleet import Fleet, Host, Run, eventually, stop

TIMER = 5  # seconds until a host that is not confirmed reverts
LONG_TIMER = 30  # where something else must come first, however slow this machine is
HELD = "tests/support/held_deploy.py"

Patch = dict[str, tuple[str, str]]  # template: what is replaced, by what

# Nobody works on the host any more, and nothing waits.
SETTLED = """
[ ! -e /var/lib/callready/pending ] &&
[ -z "$(find /proc/[0-9]*/fd -lname /run/callready.lock 2>&-)" ] &&
case $(systemctl is-active callready-revert.service) in inactive | failed) echo yes ;; esac
"""
# Downloads, installs and stages again what an earlier deploy left on the host.
FORGET = """
current=$(readlink -f /etc/callready/current) binary=$(readlink -f /usr/local/bin/livekit-server)
for folder in /etc/callready/releases/* /opt/livekit/* /opt/callready/*; do
    case $current=${binary%/*} in *"$folder"*) ;; *) rm -rf "$folder" ;; esac
done
"""


SHARED: dict[str, Any] = {}
PROBER = Prober()


class EndedBefore(AssertionError):
    """A deploy ended before it came where it was to stand still."""


class Place(Fleet):
    """A host that serves TURN or an SFU with its app. A and B differ in configuration, firewall,
    binary, secret rows, certificate, and in having a second pool or not; C, of TURN hosts, is A and
    watches itself, without `long` on Debian 13 only."""

    def __init__(self, name: str, kind: str, folder: Path, www: str, long: bool = False) -> None:
        self.host, self.kind, self.long = Host(name), kind, long
        for certificate in "AB":
            ca.issue(self.host.fqdn, (self.host.ipv4, self.host.ipv6), 90, folder / certificate)
        has_monitor = kind == "turn" and (long or plan.find_host(name).suite == "trixie")
        states = "ABC" if has_monitor else "AB"
        self.states = {state: self._data(state, folder, www) for state in states}
        host_data: dict[str, Any] = {"address": self.host.ipv4, "address6": self.host.ipv6}
        groups = {"turn": [(self.host.fqdn, {**host_data, "pools": ["calls"]})]}
        if kind == "sfu":
            groups = {"livekit": [(self.host.fqdn, host_data)], "app": [self.host.fqdn]}  # type: ignore[list-item]
        names = ["turn/calls", "turn/next", "turn/gadget", "livekit/api_secret"]
        names += ["fleet/ca", "monitor/password", "redis/livekit"]
        super().__init__(folder, groups, self.states["A"], names)
        # All hosts have the same, because a test may put two into one inventory.
        SHARED.setdefault("secrets", self.secrets)
        SHARED.setdefault("marker", self.marker)
        self.secrets, self.marker = SHARED["secrets"], SHARED["marker"]
        self._original = copy.deepcopy((groups, self.states["A"], self.secrets))
        self.good: dict[str, list[str]] = {}
        self.now = ""  # the state it was last seen in
        self.status = 0  # of the last deploy
        self.paths: set[str] = set()
        self.units: set[str] = set()

    def _data(self, state: str, folder: Path, www: str) -> dict[str, Any]:
        pools: dict[str, Any] = {
            "calls": {
                "realm": "lab.test",
                "peers": "internet",
                "max_port": 60000,
                "secrets": ["secret:turn/calls"],
            },
        }
        if state == "B":
            pools["calls"]["secrets"] = ["secret:turn/next", "secret:turn/calls"]
            pools["gadget"] = {
                "realm": "gadget.test",
                "users": {"gadget": "secret:turn/gadget"},
                "peers": "internet",
                "min_port": 60001,
                "listening_port": 3479,
                "tls_listening_port": 5350,
            }
        pair = "B" if state == "B" else "A"
        own: dict[str, Any] = {
            "turn": {"total_quota": 1200 + 100 * (state == "B"), "pools": pools},
            "tls": {
                "certificate": f"{folder}/{pair}/{{host}}.pem",
                "key": f"{folder}/{pair}/{{host}}.key",
                "ca": f"{ca.CA_CERTIFICATE}",
            },
        }
        if self.kind == "sfu":
            own = {
                "livekit": {
                    "turn_pool": None,
                    "base_url": www,
                    "url": f"ws://{self.host.fqdn}:7880",
                    "version": {"A": "1.13.5", "B": "1.13.6"}[state],
                    "keys": {f"API{state}": "secret:livekit/api_secret"},
                    "rtc": {
                        "tcp_port": {"A": 7881, "B": 7882}[state],
                        "stun_servers": [f"{plan.CALLER.ipv4}:3478"],
                    },
                },
                "app": {
                    "env_file": "/srv/app/.env",
                    "owner": "debian",
                    "commands": ["echo restarted >> /run/app-log"],
                },
            }
        if state == "C":
            nobody = f"http://{plan.MACHINE.ipv4}:9/nobody"
            own["monitor"] = {
                "url": f"https://{self.host.fqdn}",
                "password": "secret:monitor/password",
                "page": {"webhooks": [nobody]},
                "watchdog": nobody,
                "wheels": str(wheels.publish()),
            }
            own |= {"edge": {}, "fleet_ca": "secret:fleet/ca"}
        return {
            "ssh_user": "debian",
            "ssh_key": f"{plan.STATE}/id_ed25519",
            "ssh_known_hosts_file": f"{plan.STATE}/known_hosts",
            "ssh_config_file": "/dev/null",
            "firewall": {"extra_ports": ["8443/tcp"] if state == "B" else []},
            "deploy": {"confirm_timeout": TIMER},
            **own,
        }

    def use(self, state: str, timer: int = TIMER) -> None:
        """Have the inventory say A or B; `timer` is the host's, in seconds."""
        self.restore()
        self.data = copy.deepcopy(self.states[state])
        self.data["deploy"]["confirm_timeout"] = timer
        if self.kind == "turn" and state == "B":
            self.groups["turn"][0][1]["pools"] = ["calls", "gadget"]
        if state == "C":
            self.groups["monitor"] = [self.host.fqdn]
        self.deploy_file, self.environment = "deploy.py", {}

    def reach_state(self, state: str, verb: str = "") -> Run:
        """A deploy of a good state (or the removal of it) that must succeed, given time."""
        self.use("A" if state == "none" else state, timer=60)
        verb = verb or ("remove" if state == "none" else "deploy")
        run = self.run("--json", file=f"{verb}.py")
        assert run.status == 0, run.text
        self.now, self.status = state, 0
        return run

    def learn(self) -> None:
        """What the host is like bare, with A and with B."""
        for state in self.states:
            release = self.declared(state).release
            self.paths |= {*release.files, *release.links, *release.environments}
            self.units |= {*release.services, "callready-firewall.service"}
        self.paths.discard("/etc/haproxy/haproxy.cfg")  # Debian's is there as long as the package
        self.deliver()
        self.good["none"] = self.snapshot()
        for state in "AB":
            self.reach_state(state)
            self.good[state] = self.snapshot()
        assert len(set(map(tuple, self.good.values()))) == 3

    def deliver(self) -> None:
        """The host as its operator got it, with something of a hand-made installation."""
        Lab().reset(self.host.name)
        self.host.root("mkdir -p /srv/app; echo 'DEBUG=1\nLIVEKIT_API_KEY=old' > /srv/app/.env")

    def snapshot(self) -> list[str]:
        """The release as it is on the host."""
        return self.host.release(self.paths, self.units)

    @contextmanager
    def deploying(
        self, *arguments: str, verb: str = "deploy", hold: str = "", patch: Patch | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """A deploy that stands still at a point, by the time the body begins; it goes on with
        `release` and has ended, or is ended, after the body."""
        self.host.root("rm -f /run/held")
        for mark in ("held", "was-held"):
            (self.folder / mark).unlink(missing_ok=True)
        self.deploy_file = HELD
        self.environment = {
            "FAULTS_FOLDER": str(self.folder),
            "FAULTS_DEPLOY": f"{verb}.py",
            "FAULTS_HOLD": hold,
            "FAULTS_PATCH": json.dumps(patch or {}),
        }
        process = self.start(*arguments)
        try:
            if hold:
                eventually(lambda: self.is_held() or process.poll() is not None)
                if not self.is_held():
                    raise EndedBefore(f"step {hold}: {process.communicate()}")
            yield process
        finally:
            stop(process)
            self.status = process.returncode

    def is_held(self) -> bool:
        """Whether a deploy stands still, here or on the host."""
        return (self.folder / "held").exists() or bool(
            self.host.root("ls /run/held 2>&-", check=False)
        )

    def release(self, alive: bool = True) -> None:
        """Let a deploy that stands still go on, here and on the host."""
        (self.folder / "held").unlink(missing_ok=True)
        if alive:
            self.host.root("rm -f /run/held")

    def steps(self, target: str, verb: str) -> list[list[str]]:
        """The steps of a deploy from what the host has to a state, by the release code itself."""
        self.use(target)
        with self.deploying("--dry", verb=verb) as process:
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, output
        found: list[list[str]] = json.loads(
            (self.folder / f"steps-{self.host.fqdn}.json").read_text()
        )
        return found

    def forget(self) -> None:
        """Throw away what earlier deploys left, so that the next one downloads and stages anew."""
        self.host.root(FORGET)

    def settled(self) -> bool:
        """Whether the host has come to rest."""
        return self.host.root(SETTLED, check=False) == "yes"

    def sound(self) -> str:
        """Assert that the host is wholly in one state, lets new connections in and serves what
        callers need; that state."""
        eventually(self.settled)
        for address in (self.host.ipv4, self.host.ipv6):
            done = subprocess.run(
                ["ssh", "-F", hosts.SSH_CONFIG, address, "true"],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                check=False,
            )
            assert done.returncode == 0, f"no new SSH connection to {address}: {done.stderr}"
        found = self.snapshot()
        state = next((state for state, good in self.good.items() if good == found), "")
        assert state, "torn: " + "\n".join(
            f"not {state}: {sorted(set(found) ^ set(good))}" for state, good in self.good.items()
        )
        probes = self.probes(state)
        found_wrong = zip(probes, PROBER.ask(probes), strict=True)
        wrong = [f"{p.title}: {why}" for p, why in found_wrong if why and not why.warning]
        assert not wrong, wrong
        return state

    def probes(self, state: str) -> list[Probe]:
        """What callers need of the host in a state, by the gate's own reckoning."""
        return gate.probes(self.declared(state)) if state != "none" else []

    def declared(self, state: str) -> node.Node:
        """What the inventory says in a state."""
        self.use(state)
        self.write()
        (name, values), groups = next(iter(self.groups.values()))[0], list(self.groups)
        data = {name: {**self.data, **values, "groups": groups}}
        return declare(validate(str(self.inventory), data), name)

    def ready(self, start: str = "", timer: int = TIMER) -> None:
        """Have the host in a good state (`start`, or B if it is, or A), whatever was before."""
        if not self.now:
            self.deliver()
            self.now = "none"
        if self.now != (start := start or ("B" if self.now == "B" else "A")):
            self.reach_state(start)
        self.source, self.target = self.now, "A" if self.now == "B" else "B"
        if self.now == "none":
            self.target = "A"
        self.use(self.target, timer)

    def fails(self, *says: str, status: int = 1, patch: Patch | None = None) -> str:
        """A deploy to the target that must not succeed and must say so; the last line said."""
        with self.deploying(patch=patch) as process:
            out, err = process.communicate(timeout=180)
        text = out + err
        assert process.returncode == status, text
        for words in says:
            assert words in text, text
        assert self.marker not in text and "Traceback" not in text, text
        return " … ".join(says)

    def twin(self) -> Place:
        """Another operator's checkout of the same inventory."""
        other = copy.copy(self)
        other.folder = Path(tempfile.mkdtemp(dir=self.folder))
        other.inventory = other.folder / "fleet"
        return other

    def converges(self, target: str) -> None:
        """Assert that the next run brings the host to a state and another changes nothing."""
        self.reach_state(target)
        assert self.sound() == target
        again = self.reach_state(target)
        assert again.changed == [], again.text


class Node(Place):
    """A host of kind `sfu` as one of two SFUs with edges that are one service; the other one has
    their Redis and stays in state A. The host is drained before its LiveKit restarts."""

    def __init__(self, place: Place, other: Place) -> None:
        vars(self).update(vars(place))
        self.folder = Path(tempfile.mkdtemp(dir=place.folder))
        self.inventory = self.folder / "fleet"
        self.url = f"wss://{self.host.fqdn}"
        self.states = {
            state: self._joined(data, place.folder / state) for state, data in place.states.items()
        }
        hosts = {
            each.host.fqdn: {"address": each.host.ipv4, "address6": each.host.ipv6}
            for each in (place, other)
        }
        groups = {"livekit": list(hosts.items()), "redis": [other.host.fqdn]}
        self._original = copy.deepcopy((groups, self.states["A"], self.secrets))
        self.other = other
        self.limit: tuple[str, ...] = ("--limit", self.host.fqdn)
        self.good, self.paths, self.units, self.now = {}, set(), set(), ""

    def _joined(self, alone: dict[str, Any], certificates: Path) -> dict[str, Any]:
        data = copy.deepcopy(alone)
        del data["app"]
        data["livekit"] |= {"url": self.url, "keys": {"APIcluster": "secret:livekit/api_secret"}}
        data["deploy"] |= {"drain": 60}
        return data | {
            "tls": {
                "certificate": f"{certificates}/{{name}}.pem",
                "key": f"{certificates}/{{name}}.key",
                "ca": f"{ca.CA_CERTIFICATE}",
            },
            "edge": {},
            "fleet_ca": "secret:fleet/ca",
            "redis": {"livekit_password": "secret:redis/livekit"},
            "host": {"other_listeners": ["5355/tcp", "5355/udp"]},
        }

    def start(
        self, *arguments: str, before: tuple[str, ...] = (), file: str = ""
    ) -> subprocess.Popen[str]:
        return super().start(*self.limit, *arguments, before=before, file=file)

    def deliver(self) -> None:
        """Both hosts, with the other one in state A."""
        for each in (self, self.other):
            Lab().reset(each.host.name)
        limit, self.limit = self.limit, ()
        try:
            self.reach_state("A")
        finally:
            self.limit = limit

    def learn(self) -> None:
        for state in self.states:
            release = self.declared(state).release
            self.paths |= {*release.files, *release.links}
            self.units |= {*release.services, "callready-firewall.service"}
        self.deliver()
        self.good["A"] = self.snapshot()
        self.reach_state("B")
        self.good["B"] = self.snapshot()
        assert self.good["A"] != self.good["B"]

    def declared(self, state: str) -> node.Node:
        self.use(state)
        self.write()
        data = {
            name: {
                **self.data,
                **values,
                "groups": ["livekit"] + ["redis"] * (name != self.host.fqdn),
            }
            for name, values in self.groups["livekit"]
        }
        return declare(validate(str(self.inventory), data), self.host.fqdn)

    def sound(self) -> str:
        """Also that its edge gives callers to its own LiveKit, and nothing drains it any more."""
        eventually(self._serves)
        found = super().sound()
        assert self.host.root("systemctl is-active callready-drain", check=False) != "active"
        return found

    def _serves(self) -> bool:
        with suppress(ProbeError):
            at = (self.host.ipv4, 443)
            return not livekit.health(self.url, ca_file=f"{ca.CA_CERTIFICATE}", at=at).from_peer
        return False


class Job(Protocol):
    """What is done on so many hosts of a kind."""

    kind: str
    hosts: int

    def run(self, places: Places, *taken: Any) -> Any: ...


class Places:
    """The hosts of each kind and who waits for one; what was found, for the table in docs/."""

    def __init__(self, places: list[Place], long: bool) -> None:
        self.all, self.long = places, long
        self.free: dict[str, Queue[Place]] = {kind: Queue() for kind in ("turn", "sfu")}
        self.pools = {kind: ThreadPoolExecutor(len(self.of(kind))) for kind in self.free}
        self.turns = {kind: threading.Lock() for kind in self.free}
        self.over = False  # the session ends
        self.found: list[dict[str, str]] = []
        for place in places:
            self.free[place.kind].put(place)

    def of(self, kind: str) -> list[Place]:
        """The hosts of a kind."""
        return [place for place in self.all if place.kind == kind]

    def submit(self, job: Job) -> Future[Any]:
        """Have a job done on hosts of its kind as soon as there are enough of them."""

        def work() -> Any:
            with self.turns[job.kind]:  # or who waits for two hosts would never get them
                taken = [self.free[job.kind].get() for _ in range(job.hosts)]
            try:
                return job.run(self, *taken)
            finally:
                for place in taken:
                    self.free[job.kind].put(place)

        return self.pools[job.kind].submit(work)

    def note(self, **found: str) -> None:
        """Something for the table."""
        self.found.append(found)

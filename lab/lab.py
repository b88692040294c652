"""The lab as a whole: what the command line and the tests use."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from lab import archive, backend, ca, hosts, images, network, plan, services
from lab.run import LabError, abandoned, groups, locked, remove_groups, remove_tree, say

PROGRAMS = {  # program: Debian package
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "apt-cacher-ng": "apt-cacher-ng",
    "ip": "iproute2",
    "nft": "nftables",
    "bridge": "iproute2",
    "conntrack": "conntrack",
    "ssh": "openssh-client",
    "nsenter": "util-linux",
}

CHECKOUT = Path(__file__).with_name("checkout")


class Lab:
    """Debian hosts on a bridge of this machine; needs root. Every method may be repeated.

    Methods that change something wait for any other lab command on the machine to end.
    All raise :class:`lab.LabError` with a sentence for the operator.
    """

    def up(self, names: Iterable[str] = plan.DEFAULT_HOSTS, suite: str | None = None) -> None:
        """Boot these hosts, with network, packages, LiveKit archive and certificates.

        Args:
            names: host names of the plan; those that run already are left alone.
            suite: ``bookworm`` or ``trixie`` for hosts not made yet, instead of the plan's.
        """
        wanted = [self._host(name) for name in names]
        with locked():
            _check_machine()
            _clear_leftovers()
            for folder in (plan.STATE, plan.CACHE):
                folder.mkdir(parents=True, exist_ok=True)
                folder.chmod(0o755)
            network.up()
            ca.create()
            for host in wanted:
                hosts.make_host_key(host)
                ca.issue_for_host(host)
            hosts.write_ssh_identity()
            network.publish_names()
            # The Android project that inventories/lab deploys to.
            shutil.copytree(CHECKOUT, plan.STATE / "android", dirs_exist_ok=True)
            suites = {
                host: hosts.suite(host) if hosts.exists(host) else suite or host.suite
                for host in wanted
            }
            jobs: list[Callable[[], object]] = [archive.publish]
            for image in sorted(set(suites.values())):
                its_hosts = [host for host in wanted if suites[host] == image]
                jobs.append(lambda image=image, its_hosts=its_hosts: _up_suite(image, its_hosts))  # type: ignore[misc]
            _together(jobs)
            services.start()
            for host in wanted:
                if host.name == plan.APP_HOST:
                    backend.install(host)

    def down(self) -> None:
        """Remove every trace but the cache, also what a killed run left behind."""
        with locked():
            for group in groups():
                say(f"ending {group.name}")
            remove_groups()
            for host in plan.HOSTS.values():
                hosts.destroy(host)
            hosts.remove_nspawn_folders()
            network.withdraw_names()
            network.down()
            remove_tree(plan.STATE)
            builds = [each for each in plan.CACHE.glob("build-*") if abandoned(each.name)]
            for unfinished in (*plan.CACHE.glob("*/*.partial"), *builds):
                remove_tree(unfinished)
            plan.LOCK.unlink(missing_ok=True)
            say("the lab is gone")

    def purge(self) -> None:
        """`down`, and remove the cached images, packages and archives too."""
        with locked():
            self.down()
            remove_tree(plan.CACHE)

    def install_backend(self, name: str) -> None:
        """Put the example backend on a host, as an app developer does."""
        backend.install(self._made(name))

    def boot(self, name: str) -> None:
        """Start a host that is off and wait until it is ready."""
        with locked():
            hosts.start_and_wait(self._made(name))

    def reboot(self, name: str) -> None:
        """Let a host shut down in order and boot again, in a new network namespace."""
        host = self._made(name)
        with locked():
            hosts.reboot(host)
            hosts.start_and_wait(host)

    def power_cut(self, name: str) -> None:
        """SIGKILL all of a host at once; `boot` brings it back."""
        host = self._made(name)
        with locked():
            hosts.power_cut(host)
            say(f"{host.fqdn} is off")

    def reset(self, name: str) -> None:
        """Bring a host back to how it was delivered, with the same SSH host key."""
        host = self._made(name)
        with locked():
            hosts.create(host, hosts.suite(host))
            hosts.start_and_wait(host)

    def destroy(self, name: str) -> None:
        """Throw a host away."""
        host = self._host(name)
        with locked():
            hosts.destroy(host)
            hosts.forget_host_key(host)
            hosts.write_ssh_identity()
            say(f"{host.fqdn} is gone")

    def cut(self, name: str) -> None:
        """Cut a host's line: not a frame passes, until `mend` or its next boot."""
        network.set_port(self._running(name), forwarding=False)

    def mend(self, name: str) -> None:
        """Undo `cut`."""
        network.set_port(self._running(name), forwarding=True)

    def blackhole(
        self, name: str, packets: str = "meta l4proto { tcp, udp }"
    ) -> AbstractContextManager[None]:
        """Lose packets (an nftables match) between this machine and a host without a word."""
        return network.blackhole(self._host(name), packets)

    def fill_conntrack(self, name: str, share: float = 1.0) -> AbstractContextManager[None]:
        """Fill a host's table of tracked connections to this share with ones that stay."""
        return network.fill_conntrack(hosts.leader(self._running(name)), share)

    def status(self) -> list[tuple[str, str, str, str, str]]:
        """Name, suite, state, IPv4 and IPv6 address of every host that was made."""
        return [
            (host.fqdn, hosts.suite(host), self.state(host.name), host.ipv4, host.ipv6)
            for host in plan.HOSTS.values()
            if hosts.exists(host)
        ]

    def state(self, name: str) -> str:
        """``absent``, ``off``, ``cut`` or ``running``."""
        host = self._host(name)
        if not hosts.exists(host):
            return "absent"
        if not hosts.group(host).running():
            return "off"
        return "cut" if network.port_state(host) == "disabled" else "running"

    def ssh(
        self, name: str, command: str, *, input: str | None = None, timeout: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command in a host as user `debian`; the exit status is in the result."""
        return hosts.ssh(self._made(name), command, input=input, timeout=timeout)

    def client_prefix(self) -> list[str]:
        """What to put before a command so that it runs in the callers' network namespace."""
        namespace = Path("/run/netns", plan.CLIENT)
        if not namespace.exists():
            raise LabError("the lab is down: `python -m lab up` starts it")
        return ["nsenter", f"--net={namespace}"]

    def address(self, name: str) -> str:
        """A host's IPv4 address."""
        return self._host(name).ipv4

    def address6(self, name: str) -> str:
        """A host's IPv6 address."""
        return self._host(name).ipv6

    def _host(self, name: str) -> plan.Host:
        try:
            return plan.find_host(name)
        except KeyError:
            known = [n for n in plan.HOSTS if n not in plan.BENCH_HOSTS]
            known.append(f"{plan.BENCH_HOSTS[0]}..{plan.BENCH_HOSTS[-1]}")
            raise LabError(f"{name}: no such host; the lab's are {' '.join(known)}") from None

    def _made(self, name: str) -> plan.Host:
        host = self._host(name)
        if not hosts.exists(host):
            raise LabError(f"{host.name} was not made yet: `python -m lab up {host.name}`")
        return host

    def _running(self, name: str) -> plan.Host:
        host = self._made(name)
        if not hosts.group(host).running():
            raise LabError(f"{host.name} is off: `python -m lab boot {host.name}` starts it")
        return host


def _up_suite(suite: str, its_hosts: list[plan.Host]) -> None:
    """Make a suite's image, then boot its hosts, without waiting for other suites."""
    images.build(suite)

    def boot(host: plan.Host) -> None:
        if not hosts.exists(host):
            hosts.create(host, suite)
        hosts.start_and_wait(host)

    _together([lambda host=host: boot(host) for host in its_hosts])  # type: ignore[misc]


def _together(jobs: Sequence[Callable[[], object]]) -> None:
    """Run jobs at the same time; raise the first error when all have ended."""
    with ThreadPoolExecutor(max_workers=max(1, len(jobs))) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


def _clear_leftovers() -> None:
    """End what a killed run left: builders without a master, lost packets, half-made hosts."""
    network.remove_blackholes()
    for group in groups():
        if not group.name.startswith(("host-", "service-")) and abandoned(group.name):
            say(f"ending {group.name}, left over by a run that was killed")
            group.kill()
    for host in plan.HOSTS.values():
        if hosts.folder(host).exists() and not hosts.exists(host):
            say(f"removing {host.name}, left half-made by a run that was killed")
            hosts.destroy(host)


def _check_machine() -> None:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = sorted({p for name, p in PROGRAMS.items() if not shutil.which(name, path=path)})
    if missing:
        raise LabError(f"missing programs: apt-get install {' '.join(missing)}")

"""One host: its overlay on a root image, its boot in systemd-nspawn, its SSH identity."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from lab import images, network, plan, services
from lab.run import Group, LabError, remove_tree, run, say, wait_until

HOSTS = plan.STATE / "hosts"
HOST_KEYS = plan.STATE / "host-keys"
USER_KEY = plan.STATE / "id_ed25519"
KNOWN_HOSTS = plan.STATE / "known_hosts"
NSPAWN = Path("/run/systemd/nspawn")
SSH_CONFIG = plan.STATE / "ssh_config"

# podman, which runs recordings, needs two more kinds of system calls than nspawn allows, and its
# images cannot be overlays on the host's own overlay.
#
# A `reboot` inside ends nspawn with status 133; starting it again gives the host a new network
# namespace, so nothing of its firewall outlives the reboot. Anything else leaves the host off.
POWERED = """
while :; do
  status=0
  SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn --quiet --settings=no --register=no \
    --keep-unit --machine="$1" --directory="$2" --network-bridge="$3" --link-journal=no \
    --resolv-conf=off --timezone=off --console=read-only \
    --system-call-filter="@keyring bpf" --bind="$4:/var/lib/containers" --boot || status=$?
  [ $status = 133 ] || exit $status
done
"""


def folder(host: plan.Host) -> Path:
    """Everything of the host that a reset throws away."""
    return HOSTS / host.name


def exists(host: plan.Host) -> bool:
    """True once the host was made completely."""
    return (folder(host) / "image").exists()


def group(host: plan.Host) -> Group:
    """The host's processes."""
    return Group(f"host-{host.name}")


def leader(host: plan.Host) -> int | None:
    """The pid of the host's own process 1, as this machine counts; None while it is off."""
    # What it forks is in there for a moment too, with a lower pid once pids have wrapped around.
    for pid in group(host).pids("payload/init.scope"):
        with contextlib.suppress(OSError):
            if re.search(r"^NSpid:.*\t1$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
                return pid
    return None


def create(host: plan.Host, suite: str) -> None:
    """Give the host a fresh overlay on the suite's image: a host as delivered."""
    destroy(host)
    base = folder(host)
    for part in ("upper", "work", "root"):
        (base / part).mkdir(parents=True)
        (base / part).chmod(0o755)
    image = images.path(suite)
    _mount(base, image)
    _personalise(host, base / "root")
    (base / "image").write_text(str(image))  # last: exists() is true from here


def suite(host: plan.Host) -> str:
    """The Debian suite the host was made with."""
    return Path((folder(host) / "image").read_text()).name.split("-")[0]


def destroy(host: plan.Host) -> None:
    """Cut the power and throw the overlay away."""
    group(host).kill()
    network.remove_port(host)
    if folder(host).exists():
        _remove_nspawn_remains(host)
        remove_tree(folder(host))


def power_on(host: plan.Host) -> None:
    """Start the host's systemd; returns at once (see `wait_ready`)."""
    base = folder(host)
    if not os.path.ismount(base / "root"):
        _mount(base, Path((base / "image").read_text()))  # the machine itself was rebooted
    _remove_nspawn_remains(host)
    network.remove_port(host)
    containers = base / "containers"
    containers.mkdir(exist_ok=True)
    arguments = (host.name, base / "root", plan.BRIDGE, containers)
    group(host).start("sh", "-c", POWERED, "lab-host", *arguments)


def power_cut(host: plan.Host) -> None:
    """SIGKILL every process of the host at once.

    What the host wrote stays, synced or not: the page cache is this machine's and lives on.
    """
    group(host).kill()


def reboot(host: plan.Host) -> None:
    """Let the host shut down in order and boot again; returns when the old boot is gone."""
    old = leader(host)
    if old is None:
        raise LabError(f"{host.name} is off: `python -m lab boot {host.name}` starts it")
    os.kill(old, signal.SIGRTMIN + 5)  # systemd(1), SIGNALS: starts reboot.target
    gone = f"{host.name} does not shut down; see {_log(host)}"
    wait_until(lambda: not Path(f"/proc/{old}").exists(), 100, gone)


def wait_ready(host: plan.Host, seconds: float = 60) -> str:
    """Wait until systemd has finished booting and sshd lets the user in.

    Returns:
        ``running``, or ``degraded (UNIT ...)`` naming the failed units.

    Raises:
        LabError: not within ``seconds``.
    """
    tick = time.monotonic() + 4
    end = time.monotonic() + seconds
    state = ""
    while state not in ("running", "degraded"):
        if time.monotonic() > end:
            raise LabError(f"{host.name} does not boot (systemd: {state}); see {_log(host)}")
        if time.monotonic() > tick:
            tick += 4
            say(f"{host.name} is still booting ({state or 'no systemd yet'})")
        time.sleep(0.1)
        state = _inside(host, "systemctl", "is-system-running")
    if state == "degraded":
        units = _inside(host, "systemctl", "--failed", "--plain", "--no-legend").splitlines()
        state = f"degraded ({' '.join(line.split()[0] for line in units)})"
    refused = f"{host.name} is {state}, but SSH does not let {USER_KEY} in; see {_log(host)}"
    wait_until(lambda: ssh(host, "true").returncode == 0, 20, refused)
    return state


def ssh(
    host: plan.Host, command: str, *, input: str | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a shell command in the host as user `debian`, over SSH with the lab's key."""
    return subprocess.run(
        ["ssh", "-F", SSH_CONFIG, host.name, command],
        input=input if input is not None else "",
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )


def write_ssh_identity() -> None:
    """The user's key, known_hosts and ssh_config for all hosts that exist or once existed."""
    if not USER_KEY.exists():
        _keygen(USER_KEY, f"{plan.INSTANCE} lab")
    known = []
    for host in plan.HOSTS.values():
        key = HOST_KEYS / f"{host.name}.pub"
        if key.exists():
            names = f"{host.fqdn},{host.name},{host.ipv4},{host.ipv6}"
            known.append(f"{names} {' '.join(key.read_text().split()[:2])}\n")
    _replace(KNOWN_HOSTS, "".join(known))
    blocks = [f"Host {h.name} {h.fqdn}\n  HostName {h.ipv4}\n" for h in plan.HOSTS.values()]
    common = (
        "Host *\n  User debian\n  BatchMode yes\n  IdentitiesOnly yes\n"
        "  ConnectTimeout 5\n  ServerAliveInterval 5\n  ServerAliveCountMax 3\n"
        f"  StrictHostKeyChecking yes\n  IdentityFile {USER_KEY}\n"
        f"  UserKnownHostsFile {KNOWN_HOSTS}\n  GlobalKnownHostsFile /dev/null\n"
    )
    _replace(SSH_CONFIG, "".join(blocks) + common)


def make_host_key(host: plan.Host) -> None:
    """The host's SSH key, unless it has one: it survives a reset, so known_hosts stays right."""
    if not (HOST_KEYS / f"{host.name}.pub").exists():
        HOST_KEYS.mkdir(parents=True, exist_ok=True)
        (HOST_KEYS / host.name).unlink(missing_ok=True)
        _keygen(HOST_KEYS / host.name, host.fqdn)


def forget_host_key(host: plan.Host) -> None:
    """Remove the host's SSH key."""
    for key in (HOST_KEYS / host.name, HOST_KEYS / f"{host.name}.pub"):
        key.unlink(missing_ok=True)


def start_and_wait(host: plan.Host) -> None:
    """Power on unless it is on, and wait until it is ready, saying so."""
    began = time.monotonic()
    was_on = group(host).running()
    if not was_on:
        power_on(host)
    state = wait_ready(host)
    words = "was up" if was_on else f"booted in {time.monotonic() - began:.1f} s"
    cut = ", CUT from the network" if network.port_state(host) == "disabled" else ""
    say(f"{host.fqdn} {words}: {state}{cut} ({suite(host)}, {host.ipv4}, {host.ipv6})")


def remove_nspawn_folders() -> None:
    """Remove nspawn's folders in /run if no host is left in them, of ours or anybody's."""
    for part in ("propagate", "unix-export", "locks", ""):
        with contextlib.suppress(OSError):  # absent, or not empty
            (NSPAWN / part).rmdir()


def _log(host: plan.Host) -> Path:
    return plan.LOGS / f"{group(host).name}.log"


def _inside(host: plan.Host, *command: str) -> str:
    pid = leader(host)
    if pid is None:
        if not group(host).running():
            raise LabError(f"{host.name} went off while booting; see {_log(host)}")
        return ""
    return run("nsenter", "--all", f"--target={pid}", *command, check=False).strip()


def _mount(base: Path, image: Path) -> None:
    layers = f"lowerdir={image},upperdir={base / 'upper'},workdir={base / 'work'}"
    run("mount", "-t", "overlay", f"{plan.INSTANCE}-lab", "-o", layers, base / "root")


def _personalise(host: plan.Host, root: Path) -> None:
    def put(name: str, text: str, mode: int = 0o644, owner: int = 0) -> None:
        file = root / name
        if not file.parent.exists():
            file.parent.mkdir(mode=0o700)
            os.chown(file.parent, owner, owner)
        file.write_text(text)
        file.chmod(mode)
        os.chown(file, owner, owner)

    put("etc/hostname", f"{host.name}\n")
    # Without a line for its own name sudo complains at every call.
    local = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
    put("etc/hosts", local + plan.hosts_lines())
    # Sorts before 80-container-host0.network, which would ask for DHCP.
    put(
        "etc/systemd/network/10-host0.network",
        "[Match]\nName=host0\n\n[Network]\nIPv6AcceptRA=no\n"
        + "".join(
            f"\n[Address]\nAddress={address}\nDuplicateAddressDetection=none\n"
            for address in (f"{host.ipv4}/{plan.IPV4_LENGTH}", f"{host.ipv6}/{plan.IPV6_LENGTH}")
        ),
    )
    put("etc/apt/apt.conf.d/90-lab", services.apt_settings())
    key = HOST_KEYS / host.name
    put("etc/ssh/ssh_host_ed25519_key", key.read_text(), 0o600)
    put("etc/ssh/ssh_host_ed25519_key.pub", key.with_suffix(".pub").read_text())
    authorized = USER_KEY.with_suffix(".pub").read_text()
    put("home/debian/.ssh/authorized_keys", authorized, 0o600, owner=1000)
    (root / "srv/app").mkdir()  # as the app's developer has it


def _remove_nspawn_remains(host: plan.Host) -> None:
    """Delete what nspawn leaves in /run when it is killed."""
    for part in ("propagate", "unix-export"):  # the latter since systemd 256
        if (NSPAWN / part / host.name).exists():
            remove_tree(NSPAWN / part / host.name)
    root = folder(host) / "root"
    if root.exists():
        lock = f"inode-{root.stat().st_dev}:{root.stat().st_ino}"
        (NSPAWN / "locks" / lock).unlink(missing_ok=True)


def _keygen(path: Path, comment: str) -> None:
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path)


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}")
    new.write_text(text)
    shutil.copymode(path, new) if path.exists() else new.chmod(0o644)
    new.rename(path)

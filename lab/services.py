"""What the hosts can fetch over the bridge: Debian packages and the LiveKit archive."""

import shutil
import socket
import sys

from lab import images, plan
from lab.archive import WWW
from lab.run import Group, run, wait_until

APT_CACHE = plan.CACHE / "apt"
APT_CONFIG = plan.STATE / "apt-cacher-ng"
APT_USER = "apt-cacher-ng"


def start() -> None:
    """Start the caching package proxy and the archive's HTTP server, unless they run."""
    apt, www = Group("service-apt"), Group("service-www")
    if not apt.running():
        _configure_apt_cacher()
        drop = ("setpriv", f"--reuid={APT_USER}", f"--regid={APT_USER}", "--clear-groups")
        apt.start(*drop, "/usr/sbin/apt-cacher-ng", "-c", APT_CONFIG)
    if not www.running():
        WWW.mkdir(parents=True, exist_ok=True)
        www.start(
            sys.executable,
            "-m",
            "http.server",
            str(plan.WWW_PORT),
            "--bind",
            plan.MACHINE.ipv4,
            "--directory",
            WWW,
        )
    wait_for(plan.APT_PORT, apt)
    wait_for(plan.WWW_PORT, www)


def apt_settings() -> str:
    """A host's apt configuration: the proxy, and how far this machine trusts its mirror."""
    trust = run(
        "apt-config",
        "dump",
        "--format",
        '%F "%v";%n',
        "Acquire::Check-Valid-Until",
        "Acquire::Check-Date",
        "Acquire::Languages",
    )
    kept = "".join(line + "\n" for line in trust.splitlines() if not line.endswith(' "";'))
    return f'Acquire::http::Proxy "http://{plan.MACHINE.ipv4}:{plan.APT_PORT}";\n{kept}'


def _configure_apt_cacher() -> None:
    lines = {
        "CacheDir": APT_CACHE,
        "LogDir": plan.LOGS / "apt-cacher-ng",
        "SupportDir": "/usr/lib/apt-cacher-ng",
        "SocketPath": APT_CONFIG / "socket",
        "BindAddress": plan.MACHINE.ipv4,
        "Port": plan.APT_PORT,
        "ForeGround": 1,
        "ReportPage": "",
        # Only the repositories the images came from: a way to packages, not to the outside.
        "ForceManaged": 1,
    }
    repositories = {
        url
        for suite in plan.SUITES
        if images.path(suite).exists()
        for url in images.repositories(images.path(suite))
    }
    for number, url in enumerate(sorted(repositories)):
        lines[f"Remap-lab{number}"] = f"{url} ; {url}"
    proxy = run("apt-config", "dump", "--format", "%v", "Acquire::http::Proxy").strip()
    if proxy:
        lines["Proxy"] = proxy
    APT_CONFIG.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{key}: {value}\n" for key, value in lines.items())
    (APT_CONFIG / "acng.conf").write_text(text)
    for folder in (APT_CACHE, APT_CONFIG, plan.LOGS / "apt-cacher-ng"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.chown(folder, APT_USER, APT_USER)


def wait_for(port: int, group: Group) -> None:
    """Until a service of the lab answers; raises LabError."""

    def answers() -> bool:
        try:
            socket.create_connection((plan.MACHINE.ipv4, port), timeout=1).close()
        except OSError:
            return False
        return group.running()

    log = plan.LOGS / f"{group.name}.log"
    wait_until(answers, 10, f"{group.name} does not answer on port {port}; see {log}")

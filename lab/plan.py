"""The lab's fixed plan: host names, addresses, and where everything lies on this machine."""

import os
from dataclasses import dataclass
from pathlib import Path

# A second lab beside the first (the lab's own tests make one) needs another value here and a
# network namespace of its own, because both use the same addresses.
INSTANCE = os.environ.get("CALLREADY_LAB", "callready")

CACHE = Path("/var/cache/callready")  # root images, packages, LiveKit archive: kept by `down`
STATE = Path(f"/var/lib/{INSTANCE}-lab")  # everything else: removed by `down`
LOGS = STATE / "log"
LOCK = Path(f"/run/{INSTANCE}-lab.lock")
CGROUP = f"{INSTANCE}-lab"

BRIDGE = f"{INSTANCE}0"
CLIENT = f"{INSTANCE}-client"  # the callers' network namespace
DOMAIN = "lab.test"
# Documentation ranges: RFC 5737 section 3 (TEST-NET-2), RFC 3849.
IPV4_PREFIX, IPV4_LENGTH = "198.51.100.", 24
IPV6_PREFIX, IPV6_LENGTH = "2001:db8:ca11::", 64
APT_PORT = 3143  # not 3142: the machine may run an apt-cacher-ng of its own
WWW_PORT = 8080

SUITES = ("bookworm", "trixie")  # Debian 12 and 13


@dataclass(frozen=True)
class Host:
    """A machine on the bridge: its name, the last part of its addresses, its Debian suite."""

    name: str
    number: int
    suite: str = "trixie"

    @property
    def fqdn(self) -> str:
        return f"{self.name}.{DOMAIN}"

    @property
    def turn_name(self) -> str:
        """A second name of the same addresses, for hosts where TURN and HTTPS share port 443."""
        return f"turn.{self.fqdn}"

    @property
    def app_name(self) -> str:
        """A third one, for hosts that serve LiveKit and an application."""
        return f"app.{self.fqdn}"

    @property
    def ipv4(self) -> str:
        return f"{IPV4_PREFIX}{self.number}"

    @property
    def ipv6(self) -> str:
        return f"{IPV6_PREFIX}{self.number}"


MACHINE = Host("controller", 1)
CALLER = Host("client", 2)
APP_HOST = "app1"  # where the example backend runs
DEFAULT_HOSTS = ("sfu1", "turn1", "turn2", APP_HOST)
SERVICE = f"livekit.{DOMAIN}"  # a name that leads to each of these
SERVED_BY = ("sfu1", "sfu2", "sfu3")
BENCH_HOSTS = tuple(f"h{number:02}" for number in range(1, 27))
HOSTS = {
    host.name: host
    for host in (
        Host("sfu1", 11, "trixie"),
        Host("sfu2", 12, "bookworm"),
        Host("sfu3", 13, "trixie"),
        Host("turn1", 21, "bookworm"),
        Host("turn2", 22, "trixie"),
        Host(APP_HOST, 31, "trixie"),
        Host("mon1", 41, "bookworm"),
        Host("redis1", 51, "bookworm"),
        Host("egress1", 61, "trixie"),
        *(Host(name, 101 + i, SUITES[i % 2]) for i, name in enumerate(BENCH_HOSTS)),
    )
}


def find_host(name: str) -> Host:
    """The host of this name, short or fully qualified; ``KeyError`` if the plan has none."""
    return HOSTS[name.removesuffix(f".{DOMAIN}")]


def hosts_lines() -> str:
    """All names of the plan, as lines of an /etc/hosts file."""
    everyone = (MACHINE, CALLER, *HOSTS.values())
    own = "".join(
        f"{address} {host.fqdn} {host.name} {host.turn_name} {host.app_name}\n"
        for host in everyone
        for address in (host.ipv4, host.ipv6)
    )
    # After all others: a host's address has its own name first.
    addresses = (each for name in SERVED_BY for each in (HOSTS[name].ipv4, HOSTS[name].ipv6))
    return own + "".join(f"{address} {SERVICE}\n" for address in addresses)

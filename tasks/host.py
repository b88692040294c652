"""The host base: what every role needs."""

from callready.release import sysctls
from callready.release.node import Node
from callready.settings.ports import Use

# What the roles' steps on the host call; a minimal Debian has none of them.
PACKAGES = ("ca-certificates", "curl", "nftables", "openssl")


def base(node: Node) -> None:
    """Packages, time synchronisation and kernel settings of hosts that others reach."""
    if not node.settings.is_server:
        return
    for package in PACKAGES:
        node.release.package(package)
    node.release.package("systemd-timesyncd | chrony | ntpsec | openntpd | ntpd-rs")
    buffer = node.settings.host.udp_buffer
    for key in sysctls.MAXIMA:
        _sysctl(node, key, str(buffer))
    # coturn and LiveKit give up, and with them their calls, where they cannot bind an IPv6 address
    # that comes late or never; HAProxy's "transparent" needs no such permission.
    host = node.settings
    if host.address6 and (host.turn_pools or host.address6 in host.livekit_addresses):
        _sysctl(node, "net.ipv6.ip_nonlocal_bind", "1")
    # Debian's ephemeral range 32768-60999 overlaps the media ranges: without this an outgoing
    # connection can take a port that a call was promised.
    _sysctl(node, sysctls.RESERVED_PORTS, reserved(node.ports))
    node.release.file(sysctls.FILE, "60-callready.conf.j2", sysctls=node.release.sysctls)


def _sysctl(node: Node, key: str, value: str) -> None:
    """A kernel setting that does not take away what somebody else has set."""
    node.release.sysctl(key, sysctls.join(key, value, node.sysctls.get(key, "")))


def reserved(plan: list[Use]) -> str:
    """The plan's ports as the kernel lists reserved ports."""
    return sysctls.port_list((use.first, use.last) for use in plan if use.first)

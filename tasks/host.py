"""The host base: what every role needs."""

from callready.release.node import Node
from callready.settings.ports import Use

# What the roles' steps on the host call; a minimal Debian has none of them.
PACKAGES = ("ca-certificates", "curl", "nftables", "openssl")


def base(node: Node) -> None:
    """Packages, time synchronisation and kernel settings of hosts that carry media."""
    if not node.settings.serves:
        return
    for package in PACKAGES:
        node.release.package(package)
    node.release.package("systemd-timesyncd | chrony | ntpsec | openntpd")
    buffer = node.settings.host.udp_buffer
    node.release.sysctl("net.core.rmem_max", buffer)
    node.release.sysctl("net.core.wmem_max", buffer)
    # coturn and LiveKit give up, and with them their calls, where they cannot bind an IPv6 address
    # that comes late or never; HAProxy's "transparent" needs no such permission.
    host = node.settings
    if host.address6 and (host.turn_pools or host.address6 in host.livekit_addresses):
        node.release.sysctl("net.ipv6.ip_nonlocal_bind", 1)
    # Debian's ephemeral range 32768-60999 overlaps the media ranges: without this an outgoing
    # connection can take a port that a call was promised.
    node.release.sysctl("net.ipv4.ip_local_reserved_ports", reserved(node.ports))
    node.release.file(
        "/etc/sysctl.d/60-callready.conf", "60-callready.conf.j2", sysctls=node.release.sysctls
    )


def reserved(plan: list[Use]) -> str:
    """The plan's ports as the kernel lists reserved ports: sorted, neighbours merged."""
    merged: list[list[int]] = []
    for first, last in sorted((use.first, use.last) for use in plan if use.first):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in merged)

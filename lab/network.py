"""The lab's network on this machine: bridge, callers' namespace, names in /etc/hosts."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from lab import plan
from lab.run import LabError, abandoned, run

CALLER_LINK = f"{plan.INSTANCE}-c"  # the bridge's end of the callers' cable
NAMESPACES = Path("/run/netns")
INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
INOTIFY_SAVED = plan.STATE / "max_user_instances"
CONNECTIONS = Path("/proc/sys/net/netfilter/nf_conntrack_max")
ETC_HOSTS = Path("/etc/hosts")
BLOCK = re.compile(
    rb"# %(name)s lab begin\n.*?# %(name)s lab end\n" % {b"name": plan.INSTANCE.encode()}, re.DOTALL
)


def up() -> None:
    """Make bridge and callers' namespace; every step may be repeated."""
    _refuse_taken_range()
    if not _link_exists(plan.BRIDGE):
        # A fixed address, or the bridge takes the lowest of its ports' and changes with them.
        run("ip", "link", "add", plan.BRIDGE, "address", "02:ca:11:00:00:01", "type", "bridge")
    # Nothing is routed between the lab and the outside, whatever the machine does elsewhere.
    for name in ("ipv4/conf/{}/forwarding", "ipv6/conf/{}/forwarding", "ipv6/conf/{}/accept_ra"):
        Path("/proc/sys/net", name.format(plan.BRIDGE)).write_text("0")
    run("ip", "link", "set", plan.BRIDGE, "type", "bridge", "mcast_snooping", "0")
    _addresses(plan.MACHINE, plan.BRIDGE)

    if not (NAMESPACES / plan.CLIENT).exists():
        run("ip", "netns", "add", plan.CLIENT)
    if not _link_exists(CALLER_LINK):
        run(
            "ip",
            "link",
            "add",
            CALLER_LINK,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            plan.CLIENT,
        )
    run("ip", "link", "set", CALLER_LINK, "master", plan.BRIDGE, "up")
    run("ip", "-netns", plan.CLIENT, "link", "set", "lo", "up")
    _addresses(plan.CALLER, "eth0", "-netns", plan.CLIENT)
    _raise_inotify_limit()


def down() -> None:
    """Remove what `up` made; what is already gone is fine."""
    remove_blackholes()
    for link in (CALLER_LINK, plan.BRIDGE):
        if _link_exists(link):
            run("ip", "link", "del", link)
    if (NAMESPACES / plan.CLIENT).exists():
        run("ip", "netns", "del", plan.CLIENT)
    if NAMESPACES.is_mount() and not any(NAMESPACES.iterdir()):
        run("umount", NAMESPACES, check=False)  # `ip netns add` mounted it, and does so again
    if INOTIFY_SAVED.exists():
        INOTIFY.write_text(INOTIFY_SAVED.read_text())


def set_port(host: plan.Host, forwarding: bool) -> None:
    """Let the host's port on the bridge pass frames, or none at all.

    The host keeps its carrier and addresses, as it does when a line is cut further away.
    """
    run("bridge", "link", "set", "dev", f"vb-{host.name}", "state", "3" if forwarding else "0")


@contextlib.contextmanager
def blackhole(host: plan.Host, packets: str) -> Iterator[None]:
    """Lose packets (an nftables match) between this machine and a host without a word; unlike a
    cut line, the host has neighbours."""
    table = f"{plan.INSTANCE}-{host.name}-{os.getpid()}"
    rules = "".join(
        f"add chain bridge {table} {hook} {{ type filter hook {hook} priority 0; }}\n"
        f"add rule bridge {table} {hook} {ip} {side} {address} {packets} drop\n"
        for hook, side in (("input", "saddr"), ("output", "daddr"))
        for ip, address in (("ip", host.ipv4), ("ip6", host.ipv6))
    )
    run("nft", "-f", "-", input=f"add table bridge {table}\n{rules}")
    try:
        yield
    finally:
        run("nft", "delete", "table", "bridge", table)


@contextlib.contextmanager
def fill_conntrack(leader: int | None, share: float) -> Iterator[None]:
    """Fill the connection tracking of a host (the pid of its process 1) to this share of its size.

    The size is the machine's, but each network namespace counts its own. Connections that are open
    stay as they are; those that have ended make room now, not one by one later.
    """
    conntrack = ("nsenter", f"--net=/proc/{leader}/ns/net", "conntrack")
    run(*conntrack, "-D", "-p", "udp", check=False)
    for state in ("TIME_WAIT", "CLOSE", "FIN_WAIT", "LAST_ACK", "CLOSE_WAIT"):
        run(*conntrack, "-D", "-p", "tcp", "--state", state, check=False)
    entries = "".join(
        f"-I -t 3600 -u SEEN_REPLY,ASSURED -p udp -s 203.0.113.{n >> 16} -d 192.0.2.1 "
        f"--sport {n & 0xFFFF} --dport 9\n"
        for n in range(int(share * int(CONNECTIONS.read_text())))
    )
    run(*conntrack, "--load-file", "-", input=entries, check=False)  # ends where it is full
    try:
        yield
    finally:
        run(*conntrack, "-F")


def remove_blackholes() -> None:
    """Remove those of a command that was killed."""
    for line in run("nft", "list", "tables", "bridge").splitlines():
        name = line.split()[-1]
        if name.startswith(f"{plan.INSTANCE}-") and abandoned(name):
            run("nft", "delete", "table", "bridge", name)


def port_state(host: plan.Host) -> str:
    """``forwarding`` or ``disabled``; empty while the host is off."""
    shown = run("bridge", "-json", "link", "show", "dev", f"vb-{host.name}", check=False)
    ports = json.loads(shown or "[]")
    return str(ports[0]["state"]) if ports else ""


def remove_port(host: plan.Host) -> None:
    """Take away what is left of a killed host's network: the kernel keeps that for as long as its
    last connections have something to say to each other, up to minutes."""
    port = f"vb-{host.name}"
    if _link_exists(port):
        run("ip", "link", "delete", port, check=False)


def publish_names() -> None:
    """Put the lab's names into /etc/hosts, in a block of our own."""
    name = plan.INSTANCE
    block = f"# {name} lab begin\n{plan.hosts_lines()}# {name} lab end\n".encode()
    _rewrite(block + BLOCK.sub(b"", ETC_HOSTS.read_bytes()))


def withdraw_names() -> None:
    """Take our block out of /etc/hosts and leave every other byte as it was."""
    _rewrite(BLOCK.sub(b"", ETC_HOSTS.read_bytes()))


def _rewrite(content: bytes) -> None:
    if content == ETC_HOSTS.read_bytes():
        return
    new = ETC_HOSTS.with_name(f".hosts.{plan.INSTANCE}-lab")
    new.write_bytes(content)
    shutil.copymode(ETC_HOSTS, new)
    try:
        os.replace(new, ETC_HOSTS)
    except OSError as error:
        new.unlink()
        if error.errno != errno.EBUSY:  # busy: bind-mounted, as it is inside a container
            raise
        ETC_HOSTS.write_bytes(content)


def _link_exists(name: str) -> bool:
    # not /sys/class/net: that shows the namespace sysfs was mounted in, not ours
    return Path("/proc/sys/net/ipv4/conf", name).exists()


def _addresses(host: plan.Host, interface: str, *where: str) -> None:
    ip = ("ip", *where)
    run(*ip, "address", "replace", f"{host.ipv4}/{plan.IPV4_LENGTH}", "dev", interface)
    run(*ip, "address", "replace", f"{host.ipv6}/{plan.IPV6_LENGTH}", "dev", interface, "nodad")
    run(*ip, "link", "set", interface, "up")


def _refuse_taken_range() -> None:
    for family, prefix in (
        ("-4", f"{plan.IPV4_PREFIX}0/{plan.IPV4_LENGTH}"),
        ("-6", f"{plan.IPV6_PREFIX}/{plan.IPV6_LENGTH}"),
    ):
        for route in run("ip", family, "route", "show", "root", prefix).splitlines():
            if f"dev {plan.BRIDGE}" not in route:
                raise LabError(
                    f"this machine already has a route into the lab's range {prefix}: "
                    f"{route.strip()}; remove it, or run the lab elsewhere"
                )


def _raise_inotify_limit() -> None:
    # Every host's systemd takes several instances: about 30 hosts exhaust Debian's 128.
    if int(INOTIFY.read_text()) < 1024:
        INOTIFY_SAVED.write_text(INOTIFY.read_text())
        INOTIFY.write_text("1024")

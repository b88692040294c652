"""What a host has too little of: room on its disks, connections, relay ports, allocations."""

from __future__ import annotations

from collections.abc import Iterator

from callready.diagnosis.model import Cause, Place
from callready.diagnosis.seen import GIB, OF_TURN, Seen
from callready.settings.pools import unit as turn_unit


def causes(seen: Seen) -> Iterator[Cause]:
    """Disks, the kernel's connections, relay ranges, quotas, and ports that others have."""
    yield from _disks(seen)
    kernel = seen.inspection.kernel
    used, most = (kernel.get(f"net.netfilter.nf_conntrack_{k}", "") for k in ("count", "max"))
    if used.isdigit() and most.isdigit() and int(used) > 0.8 * int(most):
        full = f"{used} of {most}"
        yield seen.cause(
            "connections-full",
            Place.CAPACITY,
            f"the kernel's table of connections is nearly full ({full}): new callers are dropped",
            "sysctl -w net.netfilter.nf_conntrack_max=262144; firewall.notrack",
            full,
            breaks=seen.flows(),
            checks=("test_connections",),
        )
    yield from _relays(seen)
    for unit, service in seen.node.release.services.items():
        own = {f"{i.proto}/{i.port}" for i in seen.facts.listeners if i.unit == unit}
        for port, who in seen.listeners(unit).items():
            if port in service.listens and port not in own:
                yield seen.cause(
                    "port-taken",
                    Place.UNIT,
                    f"{who} has {port}, which is {unit}'s",
                    f"stop it, and systemctl restart {unit}",
                    who,
                    breaks=tuple(f for f in seen.flows(unit) if f"{f.proto}/{f.first}" == port),
                    checks=("test_listening", "test_listeners"),
                )


def _disks(seen: Seen) -> Iterator[Cause]:
    told = set()
    for disk in seen.inspection.disks:
        same = (disk.size, disk.free, disk.read_only)
        if same in told or not disk.size:
            continue
        told.add(same)
        least = disk.size // 20 if disk.size <= GIB else min(GIB, disk.size // 20)
        few = disk.inodes > 0 and disk.inodes_free < disk.inodes // 50
        if disk.read_only:
            yield seen.cause(
                "disk-read-only",
                Place.CAPACITY,
                f"{disk.path} is mounted read-only",
                f"dmesg, for errors of the disk; mount -o remount,rw {disk.path}",
                checks=("test_places",),
                latent=True,
            )
        elif disk.free < least or few:
            left = f"{disk.inodes_free} of {disk.inodes} inodes"
            if disk.free < least:
                left = f"{disk.free // 2**20} of {disk.size // 2**20} MiB"
            yield seen.cause(
                "disk-full",
                Place.CAPACITY,
                f"{disk.path} is nearly full: {left} left; the next deploy, renewal or start fails",
                f"du -xh {disk.path} | sort -h | tail",
                f"{left} free on {disk.path} ({disk.kind})",
                latent=True,
            )


def _relays(seen: Seen) -> Iterator[Cause]:
    for use, flow in seen.uses:
        if not use.relay or use.proto != "udp":
            continue
        sockets, ports = seen.inspection.sockets.get(use.ports, 0), use.last - use.first + 1
        others = {
            item.port: f"{item.process} of {item.unit}"
            for item in seen.facts.listeners
            if item.proto == use.proto and item.port in use and item.unit not in (use.unit, "-")
        }
        if sockets > 0.8 * ports or len(others) > ports // 4:
            yield seen.cause(
                "relay-ports-full",
                Place.CAPACITY,
                f"{use.service} has no ports left in {use.ports}: {sockets} sockets",
                f"a wider range ({use.setting}); ss -uanp, for whose they are",
                *sorted(set(others.values()))[:4],
                breaks=(flow, *seen.flows(use.unit)),
                checks=seen.checks(use.unit),
            )
    for name, pool in seen.node.settings.turn_pools.items():
        sockets, most = (
            seen.inspection.sockets.get(f"{pool.min_port}-{pool.max_port}", 0),
            pool.allocations,
        )
        if most and sockets >= 0.95 * most and most < pool.relay_ports:
            yield seen.cause(
                "quota-used",
                Place.CAPACITY,
                f"pool {name} has {sockets} allocations and may have {most}: callers get 486",
                f"turn.pools.{name}.total_quota",
                breaks=seen.flows(turn_unit(name)),
                checks=OF_TURN,
            )

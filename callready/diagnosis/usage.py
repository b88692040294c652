"""What a host does, counted at two moments: processor, network, allocations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pyinfra.api.host import Host

from callready.release.node import Node
from callready.rollout.remote import output_of

READ = r"""
name=$(ip -o addr show to "$ADDRESS" | awk '{ print $2; exit }')
echo "at $(cut -d ' ' -f 1 /proc/uptime)"
echo "cores $(nproc)"
# Of a container alone; without cgroup v2 of the whole machine, in ticks of 10 ms.
awk '$1 == "usage_usec" { print "cpu", $2 }' /sys/fs/cgroup/cpu.stat 2> /dev/null ||
    awk '$1 == "cpu" { printf "cpu %.0f\n", ($2 + $3 + $4 + $7 + $8) * 10000 }' /proc/stat
awk '$1 == "Udp:" && n { print "overflows", $n }
    $1 == "Udp:" { for (i = 2; i <= NF; i++) if ($i == "RcvbufErrors") n = i }' /proc/net/snmp
awk '$1 == "Udp6RcvbufErrors" { print "overflows6", $2 }' /proc/net/snmp6 2> /dev/null
for what in count max; do
    echo "tracked_$what $(cat /proc/sys/net/netfilter/nf_conntrack_$what 2> /dev/null)"
done
awk -v name="$name:" '$1 == name { print "packets", $11; print "bytes", $10 }' /proc/net/dev
for range in $RANGES; do
    ss -Hnua "( sport >= :${range%-*} and sport <= :${range#*-} )"
done | awk 'END { print "allocations", NR }'
"""


@dataclass(frozen=True)
class Reading:
    """What a host has counted; `cpu` in seconds, `packets` and `bytes` are those it has sent."""

    at: float
    cores: int
    cpu: float
    overflows: int
    tracked: int
    tracked_max: int
    allocations: int
    packets: int
    bytes: int


def read(lines: Iterable[str]) -> Reading:
    """What READ has printed; what a host does not count is 0."""
    found = {name: float(value or 0) for name, _, value in (line.partition(" ") for line in lines)}
    whole = {name: int(value) for name, value in found.items()}
    return Reading(
        at=found["at"],
        cores=whole["cores"],
        cpu=found["cpu"] / 1e6,
        overflows=whole.get("overflows", 0) + whole.get("overflows6", 0),
        tracked=whole["tracked_count"],
        tracked_max=whole["tracked_max"],
        allocations=whole["allocations"],
        packets=whole.get("packets", 0),
        bytes=whole.get("bytes", 0),
    )


class Use(NamedTuple):
    """Of a host, between two readings: share of its processors, packets and kilobits a second that
    it sent, packets that its receive buffers had no room for, share of the kernel's table, and
    allocations at the end."""

    processor: float
    cores: float
    packets: float
    kilobits: float
    overflows: int
    tracked: float
    allocations: int


def use(before: Reading, after: Reading) -> Use:
    """What a host did between two readings."""
    seconds = max(after.at - before.at, 0.01)
    cores = (after.cpu - before.cpu) / seconds
    return Use(
        processor=cores / after.cores,
        cores=cores,
        packets=(after.packets - before.packets) / seconds,
        kilobits=(after.bytes - before.bytes) * 8 / 1000 / seconds,
        overflows=after.overflows - before.overflows,
        tracked=after.tracked / after.tracked_max if after.tracked_max else 0,
        allocations=after.allocations,
    )


def look(connection: Host, node: Node) -> Reading:
    """Read a host's counters; `allocations` are those of all its pools.

    Raises:
        SettingsError: it cannot be looked at.
    """
    pools = node.settings.turn_pools.values()
    ranges = " ".join(f"{pool.min_port}-{pool.max_port}" for pool in pools)
    script = f"ADDRESS={node.settings.local_address} RANGES='{ranges}'\n{READ}"
    return read(output_of(connection, node, script))

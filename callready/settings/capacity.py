"""What a host can carry: by its settings and its machine, limit by limit, for a kind of call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

from callready.settings import pools
from callready.settings.fleet import Fleet
from callready.settings.models import HostSettings
from callready.settings.ports import LIVEKIT

# Packets a second that a core forwards: what upstream's bench and a user's measured of LiveKit (38
# to 75 thousand, and half of it), and coturn's own bench of a relay thread (126 thousand), with
# room for what else a host does.
OF_LIVEKIT, OF_COTURN = 20_000, 50_000
FILES_OF_LIVEKIT, FILES_OF_ALLOCATION = 6, 2
# MiB, measured with the participants of `make load`: what LiveKit takes for one who neither sends
# nor receives, coturn for an allocation (26 KiB over UDP, 53 over TLS), HAProxy for a connection
# with TLS; and what Debian and these programs take without a call.
OF_PARTICIPANT, OF_ALLOCATION, OF_CONNECTION, AT_REST = 1.2, 1 / 16, 1 / 16, 256
# Of processors, links, tables and memory: above it calls suffer before the limit is reached.
SHARE = 0.8


class Rate(NamedTuple):
    """Of media, a second."""

    packets: float
    kilobits: float

    def times(self, number: float) -> Rate:
        """That of several streams."""
        return Rate(self.packets * number, self.kilobits * number)


@dataclass(frozen=True)
class Kind:
    """A kind of participant, on the wire: what one who speaks sends, and what others get of it; and
    the MiB that an SFU keeps for each of these."""

    sends: Rate
    of_each: Rate
    kept: tuple[float, float]


# Opus with 20 ms a packet; 720p with three layers (2.0, 0.5 and 0.15 Mbit/s), of which a receiver
# gets the one that fits the size of its picture (livekit-client's adaptive stream).
KINDS = {
    "audio": Kind(Rate(50, 50), Rate(50, 50), (0.75, 0.16)),
    "video": Kind(Rate(300, 2_700), Rate(240, 2_050), (5, 0.5)),
    "gallery": Kind(Rate(300, 2_700), Rate(100, 550), (5, 0.5)),
}


@dataclass(frozen=True)
class Calls:
    """The calls that are planned for.

    Args:
        kind: of KINDS.
        room: participants of a room.
        speakers: how many of them send; others only listen.
        relayed: the share of participants whose media needs TURN, 0 to 1.
    """

    kind: str
    room: int
    speakers: int
    relayed: float

    @property
    def sent(self) -> Rate:
        """By a participant, on average."""
        return KINDS[self.kind].sends.times(self.speakers / self.room)

    @property
    def received(self) -> Rate:
        """By a participant, on average: of every speaker but itself."""
        return KINDS[self.kind].of_each.times(self.speakers * (self.room - 1) / self.room)

    @property
    def kept(self) -> float:
        """By an SFU for a participant, on average, in MiB."""
        sent, received = KINDS[self.kind].kept
        return (sent + received * (self.room - 1)) * self.speakers / self.room

    @property
    def relayed_both_ways(self) -> Rate:
        """What TURN has to forward for a participant, on average over those who need none."""
        rates = zip(self.sent, self.received, strict=True)
        return Rate(*(self.relayed * sum(pair) for pair in rates))


@dataclass(frozen=True)
class Machine:
    """What a host has; 0 where that is not known.

    Args:
        cores: processors.
        conntrack: connections that the kernel tracks at most.
        bandwidth: of its link, megabits a second in each direction.
        files: open files, by unit.
        memory: in MiB.
    """

    cores: int
    conntrack: int = 0
    bandwidth: float = 0
    files: Mapping[str, int] = field(default_factory=dict)
    memory: float = 0


class Limit(NamedTuple):
    """Of participants on a host: by what, how that comes about, and what moves it."""

    participants: int
    what: str
    sum: str
    moved_by: str


def limits(fleet: Fleet, host: HostSettings, machine: Machine, calls: Calls) -> list[Limit]:
    """How many participants of the service a host can carry, the first limit first. Both TURN hosts
    that a caller is told of have to carry it: clients allocate on each, and take the first that
    answers."""
    found = [*_shared(fleet, host, machine, calls), *_of_sfu(host, machine)]
    for name in host.turn_pools:
        found += _of_pool(fleet, host, name, machine)
    return sorted(found)


def cores_each(fleet: Fleet, host: HostSettings, calls: Calls) -> float:
    """What an average participant takes of a host's processors, in cores."""
    sfu, turn = _parts(fleet, host)
    to_callers, relayed = calls.received.packets, calls.relayed_both_ways.packets
    return sfu * to_callers / OF_LIVEKIT + turn * relayed / OF_COTURN


def sent_each(fleet: Fleet, host: HostSettings, calls: Calls) -> Rate:
    """What a host sends for an average participant."""
    return _through(fleet, host, calls, calls.received)


def received_each(fleet: Fleet, host: HostSettings, calls: Calls) -> Rate:
    """What a host receives for an average participant."""
    return _through(fleet, host, calls, calls.sent)


def _through(fleet: Fleet, host: HostSettings, calls: Calls, of_sfu: Rate) -> Rate:
    sfu, turn = _parts(fleet, host)
    pairs = zip(of_sfu, calls.relayed_both_ways, strict=True)
    return Rate(*(sfu * media + turn * relayed for media, relayed in pairs))


def _parts(fleet: Fleet, host: HostSettings) -> tuple[bool, float]:
    """Whether media of the service's callers goes through its SFU, and the share of them who are
    told of its TURN server, whose media may go through that."""
    sfus = [name for name, each in fleet.group("livekit").items() if each.livekit]
    telling = [
        name for name in sfus if any(each is host for each, _ in pools.handed_out(fleet, name))
    ]
    return bool(host.sfu), len(telling) / max(1, len(sfus))


def _limit(capacity: float, use: float, what: str, words: str, moved_by: str) -> Iterator[Limit]:
    if capacity > 0 and use > 0:
        yield Limit(int(capacity / use), what, words, moved_by)


def _shared(fleet: Fleet, host: HostSettings, machine: Machine, calls: Calls) -> Iterator[Limit]:
    """What the roles of a host take from the same machine."""
    each = {name: allocations(fleet, host, name) for name in host.turn_pools}
    sfu = bool(host.sfu)
    cores = cores_each(fleet, host, calls)
    yield from _limit(
        SHARE * machine.cores,
        cores,
        "processor",
        f"{SHARE:.0%} of {machine.cores} cores; {cores * 1000:.1f} thousandths of one each",
        "a host with more cores",
    )
    busier = max(sent_each(fleet, host, calls).kilobits, received_each(fleet, host, calls).kilobits)
    yield from _limit(
        SHARE * machine.bandwidth * 1000,
        busier,
        "bandwidth",
        f"{SHARE:.0%} of {machine.bandwidth:g} Mbit/s; {busier / 1000:.2f} Mbit/s each in the "
        "busier direction",
        "another offer of the provider; host.bandwidth says what it is",
    )
    flows: float = 0
    if sfu:
        # A WebSocket, twice behind an edge: to it, and from it to LiveKit.
        flows += (1 + host.has_edge) + (not host.firewall.notrack)
    for number in filter(None, each.values()):
        flows += number * (not host.firewall.notrack) + calls.relayed
    yield from _limit(
        SHARE * machine.conntrack,
        flows,
        "tracked connections",
        f"{SHARE:.0%} of {machine.conntrack}; {flows:.1f} each",
        "net.netfilter.nf_conntrack_max, or firewall.notrack",
    )
    connections = 0
    if host.has_edge and host.edge:
        connections = sfu + sum(
            2 * _families(host) * (way.unit == pools.EDGE)
            for name in host.turn_pools
            for way in pools.ways(host, name)
            if way.advertised
        )
        yield from _limit(
            host.edge.max_connections,
            connections,
            "connections of the edge",
            f"{host.edge.max_connections}; {connections} each",
            "edge.max_connections",
        )
    memory = sfu * (OF_PARTICIPANT + calls.kept) + connections * OF_CONNECTION
    memory += sum(each.values()) * OF_ALLOCATION
    yield from _limit(
        max(0.1, SHARE * machine.memory - AT_REST) if machine.memory else 0,
        memory,
        "memory",
        f"{SHARE:.0%} of {machine.memory:.0f} MiB, less {AT_REST} without a call; {memory:.2f} MiB "
        "each",
        "a host with more memory",
    )


def _of_sfu(host: HostSettings, machine: Machine) -> Iterator[Limit]:
    if not (settings := host.sfu):
        return
    rtc = settings.rtc
    ports = rtc.port_range_end - rtc.port_range_start + 1
    addresses = _families(host) + (len(rtc.ips.includes) if rtc.ips else 0)
    yield from _limit(
        ports,
        2 * addresses,
        "ports of media",
        f"{ports}; 2 peer connections x {addresses} addresses each",
        "livekit.rtc.port_range_end",
    )
    files = machine.files.get(LIVEKIT, 0)
    yield from _limit(
        files,
        FILES_OF_LIVEKIT,
        "open files of LiveKit",
        f"{files}; {FILES_OF_LIVEKIT} each",
        f"LimitNOFILE of {LIVEKIT}",
    )


def _of_pool(fleet: Fleet, host: HostSettings, name: str, machine: Machine) -> Iterator[Limit]:
    pool, key, unit = host.turn_pools[name], f"turn.pools.{name}", pools.unit(name)
    each = allocations(fleet, host, name)
    asked = f"{each} allocations each, used or not"
    if each == 0:  # LiveKit hands out another pool
        return
    quota, setting = pool.allocations, "total_quota"
    yield from _limit(quota, each, f"quota of pool {name}", f"{quota}; {asked}", f"{key}.{setting}")
    ports = pool.relay_ports
    yield from _limit(
        ports, each, f"relay ports of pool {name}", f"{ports}; {asked}", f"{key}.min_port"
    )
    files = machine.files.get(unit, 0)
    yield from _limit(
        files,
        FILES_OF_ALLOCATION * each,
        f"open files of pool {name}",
        f"{files}; {FILES_OF_ALLOCATION} an allocation, {asked}",
        f"LimitNOFILE of {unit}",
    )


def allocations(fleet: Fleet, host: HostSettings, pool: str) -> int:
    """How many allocations a participant of the service has on a host, on average over the SFUs:
    none where they hand out another pool or other hosts."""
    sfus = {name: sfu.livekit for name, sfu in fleet.group("livekit").items() if sfu.livekit}
    told = [each for name in sfus for each, _ in pools.handed_out(fleet, name) if each is host]
    served = any(livekit.turn_pool == pool for livekit in sfus.values())
    # That of someone on Wi-Fi and mobile is twice as much; few are.
    return ceil(len(told) / len(sfus) * _families(host) * 2) if served else 0


def _families(host: HostSettings) -> int:
    return 2 if host.address6 else 1

"""Put a deployed service under load: python -m callready.load inventories/ENV [KIND] [--rooms 8] …

Calls of a kind, more in each step, until the first limit shows; hosts are measured meanwhile, and
two callers on LiveKit's own client notice what people would. The calls are made by load/, a program
on LiveKit's Go SDK, which `make load` builds.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import secrets
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Generator as Steps
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, get_args
from urllib.parse import urlsplit

from callready.capacity import add_calls, calls_of, machine
from callready.diagnosis.usage import Reading, Use, look, use
from callready.probes import ProbeError, livekit, webrtc
from callready.probes.catalogue import trust
from callready.probes.generator import (
    MOST_PARTICIPANTS,
    MOST_SECONDS,
    Generator,
    Heard,
    Participant,
    Service,
)
from callready.probes.turn import IceServer
from callready.release.node import Node
from callready.rollout.ssh import hosts_of
from callready.secrets.loading import validate
from callready.settings.capacity import SHARE, Calls, cores_each, limits, sent_each
from callready.settings.fleet import Fleet
from callready.settings.inventory import inventory_data
from callready.settings.pools import Transport, handed_out
from callready.settings.problem import SettingsError
from callready.settings.uris import place

# Where calls begin to suffer: seconds at the 95th percentile, shares.
MOST_JOIN, MOST_LOSS, MOST_TRACKED = 2.0, 0.01, 0.7
OF_THIS_MACHINE = 0.9
"""Share of this machine's processors above which figures are about it, not about the hosts."""
IDLE = 3.0  # seconds that hosts are looked at before the load and after it
BESIDE = 8.0  # seconds of the two callers' call before it
RECOVERY = 60.0  # seconds in which everything must be as before
# So that a machine without a server of the inventory asks none of others.
NOBODY = IceServer(("stun:127.0.0.1:9",), "", "")


@dataclass(frozen=True)
class Wanted:
    """The load of a run: what calls, rooms in the last step, steps, seconds a step is held, joins a
    second, and by which transports to TURN those of the relayed share go, in turn; none: all."""

    calls: Calls
    rooms: int
    steps: int
    hold: float
    rate: float
    by: Sequence[str]

    @property
    def participants(self) -> int:
        """In the last step."""
        return self.rooms * self.calls.room

    @property
    def seconds(self) -> float:
        """That a run takes about, if nothing is slow."""
        return self.participants / self.rate + self.steps * (self.hold + 5) + 30

    def rooms_of(self, step: int) -> int:
        """How many rooms there are in a step, of 1 to `steps`."""
        return math.ceil(self.rooms * step / self.steps)

    def streams(self, rooms: int) -> int:
        """What all participants of so many rooms receive: of each speaker but themselves."""
        each = self.calls.speakers * (self.calls.room - 1)
        return rooms * each * (1 if self.calls.kind == "audio" else 2)

    def problems(self) -> Iterator[str]:
        """Why this is no load for a run."""
        if self.participants > MOST_PARTICIPANTS:
            yield f"{self.participants} participants: a run has {MOST_PARTICIPANTS} at most"
        if self.seconds > MOST_SECONDS:
            yield f"it would take {self.seconds:.0f} s: a run takes {MOST_SECONDS} s at most"


def services(fleet: Fleet) -> list[Service]:
    """One for each URL, which several hosts may have."""
    found: dict[str, Service] = {}
    for host in fleet.group("livekit").values():
        if told := host.livekit:
            key, secret = next(iter(told.keys.items()))
            found.setdefault(told.url, Service(told.url, key, secret, trust(host)["ca"]))
    return list(found.values())


def addresses(fleet: Fleet) -> set[str]:
    """All that anything of a run may be sent to."""
    return {each for host in fleet.hosts.values() for each in host.addresses}


def outside(name: str, allowed: set[str]) -> set[str]:
    """The addresses of a name, or of an address, that are not of the inventory."""
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(name, None)}
    except OSError:
        return set()  # nothing can be sent there
    return found - allowed


def check(service: Service, allowed: set[str]) -> None:
    """See that callers are led to hosts of the inventory only, before any load.

    Raises:
        SettingsError: they are not.
        ProbeError: nobody can join.
    """
    name = place(service.url)[0]
    if strange := outside(name, allowed):
        raise SettingsError(
            f"{service.url} is {', '.join(sorted(strange))}, which is no address of the inventory: "
            "load goes to its hosts only"
        )

    async def candidates() -> set[str]:
        async with livekit.offered(service.url, service.key, service.secret, service.ca) as told:
            return {each.address for each in told[1].candidates}

    if strange := {each for each in asyncio.run(candidates()) if outside(each, allowed)}:
        raise SettingsError(
            f"LiveKit at {service.url} tells callers to send media to "
            f"{', '.join(sorted(strange))}, which is no address of the inventory: see livekit.rtc"
        )


def participants(wanted: Wanted, service: Service, number: int) -> list[Participant]:
    """Those of the room of this number, from 0; the relayed share is spread over all rooms."""
    calls, room = wanted.calls, f"callready-load-{secrets.token_hex(4)}"
    found = []
    for n in range(calls.room):
        before, after = (
            math.floor((number * calls.room + n + more) * calls.relayed + 1e-9) for more in (0, 1)
        )
        by = wanted.by[before % len(wanted.by)] if after > before else ""
        found.append(Participant(service, room, f"{room}-{n}", n < calls.speakers, by))
    return found


def p95(seconds: Iterable[float]) -> float:
    """What 95 of 100 do not exceed; 0 of none."""
    found = sorted(seconds)
    return found[math.ceil(0.95 * len(found)) - 1] if found else 0.0


@dataclass(frozen=True)
class Step:
    """What was seen while so many rooms were there.

    Args:
        number: from 1.
        rooms, participants: in all.
        streams: how many all participants are to receive.
        relayed: how many of them TURN servers relay, by transport.
        heard: what the program has seen.
        hosts: what each host did.
        here: share of this machine's processors in use.
        call: what the two callers noticed, or what was wrong.
    """

    number: int
    rooms: int
    participants: int
    streams: int
    relayed: Mapping[str, int]
    heard: Heard
    hosts: Mapping[str, Use]
    here: float
    call: webrtc.Call | str

    @property
    def p95(self) -> float:
        """Seconds in which 95 of 100 have joined."""
        return p95(self.heard.joins)

    @property
    def lost(self) -> float:
        """The share of packets that did not arrive."""
        return self.heard.lost(self.streams)


def reached(step: Step) -> Iterator[str]:
    """The limits that a step has shown."""
    if step.p95 > MOST_JOIN:
        yield f"joins take {step.p95:.1f} s (95 %), more than {MOST_JOIN:g} s"
    if failed := step.heard.failed:
        yield f"{len(failed)} joins failed: {failed[0]}"
    for code, count in step.heard.refused.items():
        yield f"{count} allocations were refused with {code}"
    if step.lost > MOST_LOSS:
        yield f"{step.lost:.1%} of packets are lost, more than {MOST_LOSS:.0%}"
    if step.heard.broken:
        yield f"{step.heard.broken} times a participant lost its connection"
    for name, used in step.hosts.items():
        if used.processor > SHARE:
            yield f"{name}: processor {used.processor:.0%}, more than {SHARE:.0%}"
        if used.overflows:
            yield (
                f"{name}: {used.overflows} packets found no room in a receive buffer "
                "(host.udp_buffer)"
            )
        if used.tracked > MOST_TRACKED:
            yield (
                f"{name}: the kernel's table of connections is {used.tracked:.0%} full, more than "
                f"{MOST_TRACKED:.0%}"
            )
    if isinstance(step.call, str):
        yield f"the two callers beside it: {step.call}"
    else:
        slow = max(each.connect_seconds for each in step.call.participants)
        lost = max(each.loss for each in step.call.participants)
        if slow > MOST_JOIN:
            yield f"the two callers beside it join in {slow:.1f} s, more than {MOST_JOIN:g} s"
        if lost > MOST_LOSS:
            yield f"the two callers beside it lose {lost:.1%} of packets, more than {MOST_LOSS:.0%}"
    if step.here > OF_THIS_MACHINE:
        yield (
            f"this machine's processors are {step.here:.0%} in use: it is the limit, not the "
            "hosts; run it on a larger one"
        )


def table(step: Step, steps: int) -> str:
    """A step for people."""
    heard = step.heard
    ways = ", ".join(f"{count} {by}" for by, count in sorted(step.relayed.items()))
    by_turn = f"{sum(step.relayed.values())} by TURN" + (f": {ways}" if ways else "")
    seconds = max(heard.seconds, 0.01)
    packets, bits = heard.received / seconds, heard.bytes * 8 / 1e6 / seconds
    median = statistics.median(heard.joins) if heard.joins else 0
    if isinstance(step.call, str):
        callers = step.call
    else:
        both = step.call.participants
        callers = (
            f"joined in {max(each.connect_seconds for each in both):.2f} s, heard each other after "
            f"{max(each.audio_seconds for each in both):.2f} s, lost "
            f"{max(each.loss for each in both):.2%}, longest silence "
            f"{step.call.longest_silence:.2f} s"
        )
    width = max(len("this machine"), *map(len, step.hosts))
    lines = [
        f"step {step.number} of {steps}: {step.rooms} rooms, {step.participants} participants "
        f"({by_turn})",
        f"  joins       median {median:.2f} s, 95 % {step.p95:.2f} s; {len(heard.failed)} failed",
        f"  media       {packets:,.0f} packets/s and {bits:.1f} Mbit/s arrive, in {heard.streams} "
        f"of {step.streams} streams; {step.lost:.2%} lost",
        f"  two callers {callers}",
        f"  {'':{width}}  processor  packets/s out  Mbit/s out  connections  allocations  "
        "overflows",
    ]
    lines += [
        f"  {name:<{width}}  {used.processor:>9.0%}  {used.packets:>13,.0f}  "
        f"{used.kilobits / 1000:>10.1f}  {used.tracked:>11.1%}  {used.allocations:>11}  "
        f"{used.overflows:>9}"
        for name, used in step.hosts.items()
    ]
    return "\n".join([*lines, f"  {'this machine':<{width}}  {step.here:>9.0%}"])


class Cost(NamedTuple):
    """What a participant costs a host: thousandths of a core, packets/s and kbit/s sent."""

    thousandths: float
    packets: float
    kilobits: float


def cost(without: Use, loaded: Use, participants: int) -> Cost:
    """What each of the participants adds to what the host does without them."""
    return Cost(
        1000 * (loaded.cores - without.cores) / participants,
        (loaded.packets - without.packets) / participants,
        (loaded.kilobits - without.kilobits) / participants,
    )


def compared(name: str, cores: int, found: Cost, planned: Cost) -> list[str]:
    """Measured beside planned, and what each means for the host's processors."""
    lines = [
        f"  {name:<34}{'measured':>10}{'planned':>10}",
        f"    {'thousandths of a core':<32}{found.thousandths:>10.1f}{planned.thousandths:>10.1f}",
        f"    {'packets/s out':<32}{found.packets:>10.0f}{planned.packets:>10.0f}",
        f"    {'kbit/s out':<32}{found.kilobits:>10.0f}{planned.kilobits:>10.0f}",
    ]
    most = [
        f"{1000 * SHARE * cores / each:.0f}" if each > 0 else "?"
        for each in (found.thousandths, planned.thousandths)
    ]
    what = f"participants at {SHARE:.0%} of {cores} cores"
    lines.append(f"    {what:<32}{most[0]:>10}{most[1]:>10}")
    return lines


class Run:
    """A run: its hosts, whom it may reach, and what was seen before the load."""

    def __init__(self, inventory: str, wanted: Wanted) -> None:
        data = inventory_data(inventory)
        self.fleet = validate(inventory, data)
        self.services = services(self.fleet)
        if not self.services:
            raise SettingsError(f"{inventory}: no host in group livekit: there is nothing to load")
        self.allowed = addresses(self.fleet)
        # Which SFU has a room is LiveKit's choice: relayed is what each of them can have relayed.
        told = [handed_out(self.fleet, name) for name in self.fleet.group("livekit")]
        offers = [{way.transport for _, way in each} for each in told]
        ways = [each for each in get_args(Transport) if all(each in offer for offer in offers)]
        self.wanted = replace(wanted, by=wanted.by or ways)
        if wanted.calls.relayed and not (ways and set(ways).issuperset(wanted.by)):
            raise SettingsError(
                f"{inventory}: LiveKit hands out TURN over {', '.join(ways) or 'nothing'}: "
                "say with --by and --relayed how calls are to be relayed"
            )
        relays = [host for each in told for host, _ in each]
        names = [name for name, host in self.fleet.hosts.items() if host.sfu or host in relays]
        self.hosts = hosts_of(data, names, self.fleet)
        for service in self.services:
            check(service, self.allowed)
        # Connects to all of them, so that one that is away is known now.
        self.machines = {
            name: machine(host, Node(name, self.fleet)) for name, host in self.hosts.items()
        }
        self.idle: dict[str, Use] = {}
        self.beside: dict[str, Use] = {}  # what they do for the two callers alone

    def look(self) -> dict[str, Reading]:
        """What the hosts have counted; raises SettingsError."""
        return {name: look(host, Node(name, self.fleet)) for name, host in self.hosts.items()}

    def quiet(self) -> dict[str, Use]:
        """What the hosts do without load."""
        before = self.look()
        time.sleep(IDLE)
        after = self.look()
        return {name: use(before[name], after[name]) for name in self.hosts}

    def call(self, seconds: float) -> webrtc.Call | str:
        """What two callers on LiveKit's own client notice, or what is wrong."""
        service, room = self.services[0], f"callready-load-{secrets.token_hex(4)}"
        try:
            service.create(room)
            told = livekit.signalling(service.url, service.token(room), service.ca).ice_servers
            ours = [each for each in told if self._ours(each)]
            pair = (service.token(room), service.token(room))
            return webrtc.call(service.url, pair, ours or [NOBODY], False, service.ca, seconds)
        except ProbeError as error:
            return error.finding.shown

    def _ours(self, server: IceServer) -> bool:
        names = [urlsplit(f"//{url.partition(':')[2]}").hostname or "" for url in server.urls]
        return not any(outside(name, self.allowed) for name in names)

    def steps(self) -> Steps[Step, None, None]:
        """Load in steps until one shows a limit; all participants have left at the end."""
        wanted, relayed = self.wanted, Counter[str]()
        self.idle = self.quiet()
        before, call = self.look(), self.call(BESIDE)
        if isinstance(call, str):
            raise SettingsError(f"calls do not connect without load either: {call}")
        self.beside = {name: use(before[name], now) for name, now in self.look().items()}
        with Generator.started(
            wanted.calls.kind, self.allowed, self.services[0].ca, 2 * wanted.seconds + 120
        ) as generator:
            rooms = 0
            for number in range(1, wanted.steps + 1):
                heard = Heard()
                while rooms < wanted.rooms_of(number) and not heard.failed:
                    who = participants(wanted, self.services[rooms % len(self.services)], rooms)
                    who[0].service.create(who[0].room)
                    generator.join(who, wanted.rate, heard)
                    relayed.update(each.by for each in who if each.by)
                    rooms += 1
                step = self._hold(generator, number, rooms, dict(relayed), heard)
                yield step
                if any(reached(step)):
                    break

    def _hold(
        self, generator: Generator, number: int, rooms: int, relayed: dict[str, int], heard: Heard
    ) -> Step:
        wanted = self.wanted
        with ThreadPoolExecutor(1) as threads:
            before, here = self.look(), processor()
            called = threads.submit(self.call, max(wanted.hold - 5, wanted.hold / 2))
            generator.measure(wanted.hold, wanted.streams(rooms), heard)
            after, now = self.look(), processor()
            call = called.result()
        return Step(
            number,
            rooms,
            rooms * wanted.calls.room,
            wanted.streams(rooms),
            relayed,
            heard,
            {name: use(before[name], after[name]) for name in self.hosts},
            (now[0] - here[0]) / max(1, now[1] - here[1]),
            call,
        )

    def costs(self, last: Step) -> Iterator[str]:
        """What a participant costs, beside what is planned with."""
        calls = self.wanted.calls
        yield f"a participant costs, at {last.participants}:"
        for name, loaded in last.hosts.items():
            host = self.fleet[name]
            sent = sent_each(self.fleet, host, calls)
            cores = cores_each(self.fleet, host, calls)
            planned = Cost(1000 * cores, sent.packets, sent.kilobits)
            found = cost(self.beside[name], loaded, last.participants)
            yield from compared(name, self.machines[name].cores, found, planned)
            if first := limits(self.fleet, host, self.machines[name], calls)[:1]:
                yield (
                    f"    planned: {first[0].participants} participants, then {first[0].what} "
                    "(make capacity)"
                )

    def recovered(self) -> Iterator[str]:
        """What is not as it was before the load; waits up to RECOVERY for it."""
        end = time.monotonic() + RECOVERY
        while True:
            wrong, now = [], self.quiet()
            for name, was in self.idle.items():
                if now[name].allocations > was.allocations:
                    wrong.append(f"{name}: {now[name].allocations} allocations are left")
                if now[name].processor > was.processor + 0.1:
                    wrong.append(f"{name}: processor {now[name].processor:.0%}")
            if not wrong or time.monotonic() > end:
                break
        yield from wrong
        if isinstance(call := self.call(1), str):
            yield f"a call: {call}"


def processor() -> tuple[int, int]:
    """Of this machine's processors: the time in use and in all, in ticks (proc(5))."""
    times = [int(each) for each in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return sum(times) - times[3] - times[4], sum(times)


def load(run: Run) -> bool:
    """Run it and print what was seen; whether everything was as before at the end."""
    done = list[Step]()
    try:
        with closing(run.steps()) as steps:
            for step in steps:
                done.append(step)
                print(table(step, run.wanted.steps), end="\n\n", flush=True)
    finally:
        left = list(run.recovered()) if run.idle else []
        for each in left:
            print(f"not as before: {each}", file=sys.stderr)
    last = done[-1]
    for each in reached(last):
        print(f"first limit, at {last.participants} participants: {each}")
    if not any(reached(last)):
        print(f"no limit up to {last.participants} participants: try more --rooms")
    well = [step for step in done if not any(reached(step))] or done
    print("\n" + "\n".join(run.costs(well[-1])))
    if not left:
        print("\neverything is as before: a call connects, no allocation and no load is left")
    return not left


def agreed(name: str, given: str | None) -> bool:
    """Whether the operator has typed the inventory's name, here or as an option."""
    if given is None and not sys.stdin.isatty():
        print(f"no terminal to ask on: give --confirm {name}", file=sys.stderr)
        return False
    answer = given if given is not None else input("Type the inventory's name to begin: ")
    if answer.strip() != name:
        print(f"callready: that is not {name}: nothing was done", file=sys.stderr)
        return False
    return True


def asked(arguments: Sequence[str]) -> tuple[argparse.Namespace, Wanted]:
    """What the operator asks for; exits with 2 where that cannot be."""
    parser = argparse.ArgumentParser(
        "python -m callready.load", description="Load a deployed service in steps, to its limit."
    )
    add_calls(parser)
    add = parser.add_argument
    add("--rooms", type=int, default=8, help="rooms in the last step (%(default)s)")
    add("--by", default="", help="how these reach TURN, in turn: udp,tcp,tls; default: all it has")
    add("--steps", type=int, default=4, help="until all rooms are there (%(default)s)")
    add("--hold", type=float, default=20, help="seconds a step is held (%(default)g)")
    add("--rate", type=float, default=5, help="joins a second at most (%(default)g)")
    add("--confirm", metavar="NAME", help="the inventory's name, instead of typing it")
    given = parser.parse_args(arguments)
    calls = calls_of(parser, given)
    by = [each for each in given.by.split(",") if each]
    if not set(by) <= {"udp", "tcp", "tls"}:
        parser.error("--by is udp, tcp and tls, with commas between")
    if (
        not 1 <= given.steps <= given.rooms
        or not 5 <= given.hold <= 600
        or not 0 < given.rate <= 50
    ):
        parser.error("--steps is 1 to --rooms, --hold 5 to 600, --rate up to 50")
    wanted = Wanted(calls, given.rooms, given.steps, given.hold, given.rate, by)
    if problems := list(wanted.problems()):
        parser.error("; ".join(problems))
    return given, wanted


def main(arguments: Sequence[str]) -> int:
    """The `make load` command."""
    given, wanted = asked(arguments)
    name = Path(given.inventory).name
    print(
        f"{given.inventory}: up to {wanted.participants} participants ({wanted.calls.kind}) in "
        f"{wanted.rooms} rooms and {wanted.steps} steps, for about {wanted.seconds:.0f} s. Other "
        "calls on these hosts may suffer."
    )
    try:
        return 0 if agreed(name, given.confirm) and load(Run(given.inventory, wanted)) else 1
    except (SettingsError, ProbeError) as error:
        print(f"callready: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, EOFError):
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

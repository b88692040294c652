"""What each host can carry: python -m callready.capacity inventories/ENV [KIND] [--room 4] …

Looks at every host of an SFU or TURN server and says, for a kind of call, how many participants
each limit allows, which one comes first, and what moves it.
"""

from __future__ import annotations

import argparse
import sys

from pyinfra.api.host import Host

from callready.release.node import Node
from callready.rollout.remote import output_of
from callready.rollout.ssh import hosts_of
from callready.secrets.loading import validate
from callready.settings import pools
from callready.settings.capacity import KINDS, Calls, Limit, Machine, limits
from callready.settings.inventory import inventory_data
from callready.settings.ports import LIVEKIT
from callready.settings.problem import SettingsError

# A virtual interface has a speed that says nothing, -1 or none.
LOOK = r"""
echo "cores $(nproc)"
echo "memory $(awk '$1 == "MemTotal:" { print $2 }' /proc/meminfo)"
echo "conntrack $(cat /proc/sys/net/netfilter/nf_conntrack_max 2> /dev/null)"
name=$(ip -o addr show to "$ADDRESS" | awk '{ print $2; exit }')
echo "bandwidth $(cat "/sys/class/net/$name/speed" 2> /dev/null)"
for unit in $UNITS; do
    [ "$(systemctl show -P LoadState "$unit")" != loaded ] ||
        echo "$unit $(systemctl show -P LimitNOFILE "$unit")"
done
"""


def machine(connection: Host, node: Node) -> Machine:
    """Look at a host; raises SettingsError."""
    host = node.settings
    units = [LIVEKIT] * bool(host.sfu) + [pools.unit(name) for name in host.turn_pools]
    script = f"ADDRESS={host.local_address} UNITS='{' '.join(units)}'\n{LOOK}"
    return read(output_of(connection, node, script), host.host.bandwidth)


def read(lines: list[str], bandwidth: float | None) -> Machine:
    """What LOOK has printed; the bandwidth of the settings before that of the interface."""
    pairs = (line.partition(" ") for line in lines)
    found = {name: int(value) for name, _, value in pairs if value.isdigit()}
    names = ("cores", "memory", "conntrack", "bandwidth")
    cores, memory, conntrack, speed = (found.pop(name, 0) for name in names)
    return Machine(cores, conntrack, bandwidth or speed, found, memory / 1024)


def table(name: str, found: list[Limit], machine: Machine) -> str:
    """The limits of a host for people, the first one first."""
    if not found:
        return f"{name}: no limit for the callers of the service; its pools are for others"
    width = max(len(limit.what) for limit in found)
    lines = [f"{name}: {found[0].participants} participants, then {found[0].what}"]
    lines += [
        f"  {limit.participants:>7}  {limit.what:<{width}}  {limit.sum}\n"
        f"  {'':7}  {'':{width}}  moved by {limit.moved_by}"
        for limit in found
    ]
    if not machine.bandwidth:
        lines.append("        ?  bandwidth: the interface has no speed; set host.bandwidth")
    return "\n".join(lines)


def capacity(inventory: str, calls: Calls) -> str:
    """The tables of every host; raises SettingsError."""
    data = inventory_data(inventory)
    fleet = validate(inventory, data)
    names = [name for name, host in fleet.hosts.items() if host.sfu or host.turn_pools]
    if not names:
        raise SettingsError(f"{inventory}: no host in group livekit or turn")
    sent, received = (
        f"{r.packets:.0f} packets/s ({r.kilobits / 1000:.2f} Mbit/s)"
        for r in (calls.sent, calls.received)
    )
    who = "all speaking" if calls.speakers == calls.room else f"{calls.speakers} speaking"
    found = [
        f"{calls.kind}: rooms of {calls.room}, {who}, {calls.relayed:.0%} by TURN; a participant "
        f"sends {sent} and receives {received} on average"
    ]
    for name, connection in hosts_of(data, names, fleet).items():
        seen = machine(connection, Node(name, fleet))
        found.append(table(name, limits(fleet, fleet[name], seen, calls), seen))
    return "\n\n".join(found)


def add_calls(parser: argparse.ArgumentParser) -> None:
    """The arguments that name an inventory and the calls on it."""
    add = parser.add_argument
    add("inventory", help="such as inventories/prod")
    add(
        "kind",
        nargs="?",
        default="video",
        choices=[*KINDS],
        help="what speakers send, and others see of each: sound; 720p; 720p, small pictures "
        "(%(default)s)",
    )
    add("--room", type=int, default=4, help="participants of a room (%(default)s)")
    add("--speakers", type=int, help="how many of them send; default: all")
    add("--relayed", type=float, default=0.2, help="share that needs TURN, 0 to 1 (%(default)s)")


def calls_of(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Calls:
    """What was given for them; exits with 2 where that cannot be."""
    speakers = given.room if given.speakers is None else given.speakers
    if given.room < 2 or not 1 <= speakers <= given.room or not 0 <= given.relayed <= 1:
        parser.error("a room has at least 2 participants and 1 speaker; --relayed is 0 to 1")
    return Calls(given.kind, given.room, speakers, given.relayed)


def main(arguments: list[str]) -> int:
    """The `make capacity` command."""
    parser = argparse.ArgumentParser(
        "python -m callready.capacity", description="What each host can carry."
    )
    add_calls(parser)
    given = parser.parse_args(arguments)
    calls = calls_of(parser, given)
    try:
        print(capacity(given.inventory, calls))
    except SettingsError as error:
        print(f"callready: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

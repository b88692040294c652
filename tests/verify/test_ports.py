"""What a stranger finds open: planned ports, ports with a listener, and the usual ones."""

from ipaddress import ip_address

from callready.diagnosis.model import Cause, Flow, Place
from callready.probes import local_address, ports
from callready.settings.host_checks import unreachable
from callready.settings.ports import Use, parse_port
from tests.verify.check import Check, each, having
from tests.verify.servers import Server
from tests.verify.targets import Site


@each(having(lambda server: server.planned.packages))
def test_sweep(server: Server, site: Site, check: Check) -> None:
    """Open TCP ports are the planned ones"""
    plan = [use for use in server.node.ports if use.proto == "tcp"]
    by_hand = set[int]()
    if not server.settings.firewall.enabled:
        others = map(parse_port, server.settings.host.other_listeners)
        by_hand = {port for proto, a, b in others if proto == "tcp" for port in range(a, b + 1)}
    planned = {port for use in plan for port in range(use.first, use.last + 1)}
    listening = {item.port for item in server.facts.listeners if item.proto == "tcp"}
    asked = range(1, 65536) if site.full_sweep else {*ports.usual(), *planned, *by_hand, *listening}
    for family, address in server.addresses.items():
        here = {use: _lets_in(server, use, address) for use in plan}
        served = {
            use.first: use
            for use, open_ in here.items()
            if open_ and not use.relay and use.role not in ("sshd", "extra", "acme")
        }
        maybe = (use for use, open_ in here.items() if open_ is not False)
        allowed = by_hand | {port for use in maybe for port in range(use.first, use.last + 1)}
        with check.probing():
            found = ports.sweep(address, asked)
            missing = frozenset(served) - found.open
            # A connection is given up before its first retransmission: ask again.
            again = ports.sweep(address, missing, timeout=3) if missing else found
            check.figure(f"IPv{family} {', '.join(map(str, sorted(found.open))) or 'none'}")
            _judge(
                server.name,
                address,
                served,
                found.open - allowed,
                missing - again.open,
                again,
                check,
            )
    check.figure(f"of {len(asked)} tried")


def _lets_in(server: Server, use: Use, address: str) -> bool | None:
    """Whether the packet filter lets this machine use it at an address; None if it cannot be told,
    because there is NAT on the way."""
    if not use.some:
        return use.audience == "anyone"
    own = local_address(address)
    if own is None or (unreachable(own) and not unreachable(address)):
        return None
    ip4, ip6 = server.node.fleet.networks(use.some)
    here = ip_address(own)
    return any(here in network for network in ip4) or any(here in network for network in ip6)


def _judge(
    name: str,
    address: str,
    served: dict[int, Use],
    open_: frozenset[int],
    missing: frozenset[int],
    again: ports.Sweep,
    check: Check,
) -> None:
    """Note every port that is open and should not be, and the other way round."""
    check.expect(
        not open_,
        f"strangers reach {', '.join(f'{port}/tcp' for port in sorted(open_))} on {address}, "
        "which nobody planned to be open to this machine",
        "ss -lntup for the program, nft list table inet callready for the rule that lets it in",
        Cause(
            "port-open",
            name,
            Place.FILTER,
            f"strangers reach {', '.join(f'{port}/tcp' for port in sorted(open_))} of {name}",
            "ss -lntup there for the program: stop it, or list its port in firewall.extra_ports",
            checks=("test_listeners",),
        ),
    )
    for port in sorted(missing):
        use = served[port]
        how = (
            "refused: nothing listens there"
            if port in again.refused
            else "not answered: a firewall drops it"
        )
        check.expect(
            False,
            f"callers cannot use {use.service}, {use.purpose}: {port}/tcp on {address} is {how}",
            "the unit of that service, nft list table inet callready, the provider's firewall",
        )
        check.closed.append(Flow(name, "tcp", port, port, 6 if ":" in address else 4))
        check.fails = "all"

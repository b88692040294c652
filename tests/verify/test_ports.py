"""What a stranger finds open: planned ports, ports with a listener, and the usual ones."""

from callready.probes import ports
from callready.settings.ports import Use, parse_port
from tests.verify.check import Check, each, having
from tests.verify.targets import Server, Site


@each(having(lambda server: server.planned.packages))
def test_sweep(server: Server, site: Site, check: Check) -> None:
    """Open TCP ports are the planned ones"""
    plan = [use for use in server.node.ports if use.audience == "anyone" and use.proto == "tcp"]
    expected = [use for use in plan if not use.relay and use.role not in ("sshd", "extra", "acme")]
    served = {use.first: use for use in expected}
    allowed = {port for use in plan for port in range(use.first, use.last + 1)}
    if not server.settings.firewall.enabled:
        others = map(parse_port, server.settings.host.other_listeners)
        allowed |= {port for proto, a, b in others if proto == "tcp" for port in range(a, b + 1)}
    listening = {item.port for item in server.facts.listeners if item.proto == "tcp"}
    asked = range(1, 65536) if site.full_sweep else {*ports.usual(), *allowed, *listening}
    for family, address in server.addresses.items():
        with check.probing():
            found = ports.sweep(address, asked)
            missing = frozenset(served) - found.open
            # A connection is given up before its first retransmission: ask again.
            again = ports.sweep(address, missing, timeout=3) if missing else found
            check.figure(f"IPv{family} {', '.join(map(str, sorted(found.open))) or 'none'}")
            _judge(address, served, found.open - allowed, missing - again.open, again, check)
    check.figure(f"of {len(asked)} tried")


def _judge(
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
        "which nobody planned",
        "ss -lntup for the program, nft list table inet callready for the rule that lets it in",
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

"""What the packet filters of a host do to calls: callready's own, and those of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from callready.diagnosis.counting import LARGE
from callready.diagnosis.filters import OURS, Filters, Obstacle
from callready.diagnosis.model import Cause, Flow, Place, in_words
from callready.diagnosis.packets import CALLER
from callready.diagnosis.seen import FIREWALL, Seen
from callready.release.plan import RULES
from callready.settings.pools import ways
from callready.settings.ports import Use


def causes(seen: Seen) -> Iterator[Cause]:
    """A table of callready's that is gone or changed, and rules of others that calls meet."""
    inspection, wants = seen.inspection, RULES in seen.node.release.files
    redirected = [flow for use, flow in seen.uses if not use.unit]
    if wants and not seen.has_table and inspection.ruleset:
        yield seen.cause(
            "filter-not-loaded",
            Place.FILTER,
            "callready's packet filter is not loaded: strangers are let in, and ports that it "
            "redirects lead nowhere",
            f"systemctl restart {FIREWALL}",
            "nft list tables: no inet callready",
            breaks=tuple(redirected),
            checks=("test_firewall", "test_sweep", "test_behind"),
        )
    filters = Filters.read(inspection.ruleset, inspection.texts, inspection.xtables)
    if wants and seen.has_table and inspection.rules and not seen.is_undeployed:
        met = _obstacles(
            seen, filters, [(u, f) for u, f in (*seen.uses, *seen.measured) if u.unit], OURS
        )
        met = [each for each in met if each.verdict not in ("dnat", "redirect")]
        breaks = [flow for each in met for flow in each.flows]
        if any(sign == "-" and "dnat" in rule for sign, rule in inspection.rules):
            breaks += redirected
        lines = (
            f"{'inserted' if sign == '+' else 'missing'}: {rule}" for sign, rule in inspection.rules
        )
        yield seen.cause(
            "filter-changed",
            Place.FILTER,
            "somebody changed callready's own packet filter",
            f"systemctl restart {FIREWALL}, which loads it anew",
            *list(lines)[:8],
            breaks=_and_redirected(seen, breaks),
            checks=("test_firewall",),
        )
    alike: dict[tuple[object, ...], list[Obstacle]] = {}
    for each in _obstacles(seen, filters, [*seen.uses, *seen.measured]):
        of_monitor = all(flow.meets(own) for flow in each.flows for _, own in seen.measured)
        whom = each.remotes if each.is_for_some and not (seen.measured and of_monitor) else ()
        kind = each.table, each.chain, each.verdict, each.directions, each.sizes, each.rate, whom
        alike.setdefault(kind, []).append(each)
    for rules in alike.values():
        yield _foreign(seen, rules)


def _obstacles(
    seen: Seen, filters: Filters, uses: list[tuple[Use, Flow]], only: tuple[str, str] | None = None
) -> list[Obstacle]:
    host = seen.node.settings
    locals_ = {4: host.local_address, 6: host.address6}
    callers = {address: CALLER for address in seen.callers}
    fleet: dict[str, int] = {}
    for name, other in seen.node.fleet.hosts.items():
        ports = [pool.min_port for pool in other.turn_pools.values()]
        ports += [other.sfu.rtc.port_range_start] if other.sfu else []
        if ports and name != seen.node.name:
            fleet |= {address: ports[0] for address in other.addresses}
    # It asks itself over loopback.
    watching = seen.node.fleet.group("monitor").items()
    others = [each for name, each in watching if name != seen.node.name]
    monitors = {address: CALLER for each in others for address in each.addresses}
    # Relays and SFUs meet each other with media alone.
    peers = {flow: callers | (fleet if use.relay else {}) for use, flow in uses}
    closed = {flow: monitors for _, flow in seen.measured}
    found = filters.obstacles(
        [flow for _, flow in uses],
        {family: address for family, address in locals_.items() if address},
        peers | closed,
        only,
        closed,
    )
    return [each for each in found if each.answer in ("yes", "likely")]


def _and_redirected(seen: Seen, flows: Sequence[Flow]) -> tuple[Flow, ...]:
    """Flows, and those of ports that callready's own filter leads to theirs."""
    host = seen.node.settings
    found = dict.fromkeys(flows)
    for pool in host.turn_pools:
        for way in ways(host, pool):
            behind = Flow(seen.node.name, way.proto, way.listens_on, way.listens_on)
            for flow in flows if way.port != way.listens_on else ():
                if flow.meets(behind):
                    found[behind._replace(first=way.port, last=way.port, family=flow.family)] = None
    return tuple(found)


def _foreign(seen: Seen, rules: list[Obstacle]) -> Cause:
    """The cause that rules of one chain are which do the same."""
    one = rules[0]
    whose = f"{one.program}'s" if one.program else "another program's"
    does = {"drop": "drop", "reject": "refuse", "mangle": "spoil"}.get(one.verdict, "divert")
    rule = f"rule{'s' * (len(rules) > 1)} in table {one.table}, chain {one.chain}"
    does += "s" * (len(rules) == 1)
    flows = _and_redirected(seen, [flow for each in rules for flow in each.flows])
    way = {"in": " from callers", "out": " to callers"}.get("".join(one.directions), "")
    remotes = list(dict.fromkeys(each for rule in rules for each in rule.remotes))[:4]
    if one.is_for_some and one.directions == ("in",):
        way = f" from {', '.join(remotes)}"
    some = "" if one.all_sizes else f", packets of {one.sizes[0]}-{one.sizes[1]} bytes"
    rate = f", above {one.rate}" if one.rate else ""
    return seen.cause(
        "foreign-filter",
        Place.FILTER,
        f"{whose} {rule}, {does} {in_words(flows)}{way}{some}{rate}",
        "; ".join(dict.fromkeys(each.mend for each in rules)),
        *(f"{each.hook}: {each.rule}{_count(each)}" for each in rules),
        f"for {', '.join(remotes)}" if one.is_for_some else "",
        breaks=flows,
        checks=("test_firewall", "test_certificate_file", "test_sweep"),
        only="" if one.all_sizes or one.sizes[0] < LARGE else "large",
    )


def _count(rule: Obstacle) -> str:
    return "" if rule.packets is None else f", counted {rule.packets} packets"

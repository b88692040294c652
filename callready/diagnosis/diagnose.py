"""From what checks found to what is wrong: causes that somebody saw, then those that the packets
counted on the hosts leave, each with all that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from callready.diagnosis.counting import Size
from callready.diagnosis.model import (
    Cause,
    Diagnosis,
    Exchange,
    Explained,
    Fails,
    Flow,
    Place,
    Symptom,
    Tried,
    in_words,
)
from callready.diagnosis.narrowing import (
    NEARLY_ALL,
    SOME,
    Counts,
    Hop,
    Loss,
    connects,
    hops,
    loss,
    sent,
)

LookAgain = Callable[[Sequence[Symptom]], tuple[Counts, Sequence[Symptom]]]
"""Makes what failed happen once more while packets are counted; what was counted, and what failed
again of it."""

LOOKS = 3
"""How often what passes when it is looked at again is tried: each time media and relays have other
ports, and the network may lose those of a part of the range."""


def diagnose(
    failed: Sequence[Symptom],
    passed: Sequence[Symptom] = (),
    tried: Sequence[Tried] = (),
    look_again: LookAgain | None = None,
) -> Diagnosis:
    """The causes of what failed, those first that explain most.

    Args:
        failed: checks that failed.
        passed: checks that did not, for what they rule out.
        tried: how the paths were found.
        look_again: asked for what no cause explains that was seen.
    """
    causes = _with_ssh([_silent(each, passed) for each in _seen(failed)])
    lost = [each for each in _left(failed, causes) if each.exchanges and each.fails]
    if lost and look_again:
        inferred, counts = _looked(lost, passed, look_again)
        dark = {each.host for each in causes if is_blind(each)} - counts.keys()
        inferred += _uncounted(_left(lost, [*causes, *inferred]), dark)
        # A host that cannot be looked at because of what its callers suffer from too.
        hosts = {each.host for each in inferred}
        causes = [each for each in causes if not (is_blind(each) and each.host in hosts)]
        causes = [each for each in causes if not _unreached(each, failed, inferred)]
        causes = _with_ssh([*causes, *inferred])
    explained = [
        Explained(cause, tuple(each for each in failed if _is_of(each, cause))) for cause in causes
    ]
    explained.sort(key=lambda each: (each.cause.latent, -len(each.symptoms)))
    return Diagnosis(tuple(explained), tuple(_left(failed, causes)), tuple(tried))


def _looked(
    lost: Sequence[Symptom], passed: Sequence[Symptom], look_again: LookAgain
) -> tuple[list[Cause], Counts]:
    """What packets say of symptoms, and what was counted first."""
    first, again = look_again(lost)
    found = _losses(again, first)
    causes = _inferred(found, lost, passed)
    failed_again = list(again)
    for _ in range(LOOKS - 1):
        rest = [each for each in _left(lost, causes) if each not in failed_again]
        if not rest:
            break
        counts, again = look_again(rest)
        failed_again += again
        found += _losses(again, counts)
        causes = _inferred(found, lost, passed)
    return causes, first


def _unreached(cause: Cause, failed: Sequence[Symptom], inferred: Sequence[Cause]) -> bool:
    """Whether it says of an app that it does not answer, and what asks it is lost on the way."""
    said = [each for each in failed if cause in each.causes]
    return cause.place is Place.APP and all(
        any(each.follows_from(other) for other in inferred) for each in said
    )


def _is_of(symptom: Symptom, cause: Cause) -> bool:
    blind = any(is_blind(each) and each.host == cause.host for each in symptom.causes)
    keeps_out = cause.key == "host-unreachable" or cause.place in (
        Place.EDGE,
        Place.FILTER,
        Place.NAME,
    )
    return symptom.follows_from(cause) or (blind and keeps_out)


def _left(failed: Iterable[Symptom], causes: Sequence[Cause]) -> list[Symptom]:
    """What no cause explains."""
    return [each for each in failed if not any(_is_of(each, cause) for cause in causes)]


def blind(host: str, why: str) -> Cause:
    """A host that cannot be looked at."""
    return Cause(
        "host-unreachable",
        host,
        Place.NETWORK,
        f"{host} cannot be looked at: {why}",
        f"ssh to {host} with the inventory's user, key and known_hosts, and sudo there",
    )


def is_blind(cause: Cause) -> bool:
    """Whether it is that a host cannot be looked at, and nothing more is known of it."""
    return cause.key == "host-unreachable" and not cause.breaks


def _with_ssh(causes: Sequence[Cause]) -> list[Cause]:
    """Without hosts that cannot be looked at because of another cause, which breaks SSH too."""

    def breaks_ssh(host: str) -> bool:
        ssh = Flow(host, "tcp", 22, 22)
        return any(flow.meets(ssh) for each in causes for flow in each.breaks)

    return [each for each in causes if not (is_blind(each) and breaks_ssh(each.host))]


def _silent(cause: Cause, passed: Sequence[Symptom]) -> Cause:
    """Of a host of which nothing answers, that it is off, or cut off."""
    host = cause.host
    if not is_blind(cause) or any(flow.host == host for each in passed for flow in each.flows):
        return cause
    return replace(
        cause,
        what=f"nothing of {host} answers: it is off, or cut off from here",
        mend=f"the provider's console of {host}: is it up, and does it have its network?",
        evidence=(cause.what,),
        breaks=(Flow(host, "tcp", 1, 65535), Flow(host, "udp", 1, 65535)),
    )


def _uncounted(lost: Sequence[Symptom], dark: set[str]) -> list[Cause]:
    """What can be said of hosts that cannot be looked at: the one that all of these need, by what
    still gets there. A host that counts nothing for another reason is blamed for nothing."""
    found = []
    for host in sorted(dark):
        there = [[e.flow for e in each.exchanges if e.flow.host == host] for each in lost]
        mine = [each for each, found in zip(lost, there, strict=True) if found]
        if not mine:
            continue
        flows = tuple(dict.fromkeys(found[-1] for found in there if found))
        large = all(each.fails == "large" for each in mine)
        words = in_words(flows)
        found.append(
            Cause(
                "large-packets-lost" if large else "lost-before-host",
                host,
                Place.EDGE,
                f"{'large ' * large}packets to {host} are not answered ({words})",
                _MTU.format(host=host)
                if large
                else KINDS["before"].mend.format(flows=words, host=host),
                (f"{host} cannot be looked at, so nothing was counted there",),
                flows,
                ruled_out=("ports and programs: small packets pass",) if large else (),
            )
        )
        lost = [each for each in lost if each not in mine]
    return found


def _seen(failed: Sequence[Symptom]) -> list[Cause]:
    """What checks found to be a cause, without those that follow from another one."""
    by: dict[Cause, list[Symptom]] = {}
    for symptom in failed:
        for cause in symptom.causes:
            by.setdefault(cause, []).append(symptom)

    def follows(cause: Cause, other: Cause) -> bool:
        return cause != other and all(
            other not in symptom.causes and symptom.follows_from(other) for symptom in by[cause]
        )

    return [
        cause
        for cause in by
        if not any(follows(cause, other) and not follows(other, cause) for other in by)
    ]


@dataclass(frozen=True)
class Kind:
    """What is said of a kind of loss: `packets` says which ones, `flows` are theirs, `host` has
    them or stands behind the place, `a` and `b` are the hosts on both sides."""

    key: str
    place: Place
    what: str
    mend: str
    ruled_out: str


KINDS = {
    "before": Kind(
        "lost-before-host",
        Place.EDGE,
        "{packets} to {host} are sent from here and do not arrive there ({flows})",
        "open {flows} to {host} in the provider's firewall, and on the way there",
        "filters and programs on {host}: what is lost does not arrive at its network card",
    ),
    "behind": Kind(
        "lost-behind-host",
        Place.EDGE,
        "{packets} from {host} leave it and do not get here ({flows})",
        "the way back from {host}: its provider's firewall and routes, and this machine's own "
        "filters and network",
        "filters and programs on {host}: the answers leave it",
    ),
    "here": Kind(
        "this-network",
        Place.HERE,
        "a filter on this machine keeps {packets} to {host} back ({flows})",
        "nft list ruleset here; or verify from another machine, where callers are",
        "everything behind this machine: the packets do not leave it",
    ),
    "between": Kind(
        "packets-lost",
        Place.EDGE,
        "{packets} are lost between here and {host} ({flows})",
        "what loses them or limits their rate, there or back: the provider's protection against "
        "floods, a full link, and this machine's own network",
        "filters and programs on {host}: what arrives there is answered",
    ),
    "relay": Kind(
        "relay-cut-off",
        Place.EDGE,
        "{packets} from {a} to {b}, of relayed callers, are lost between them ({flows})",
        "let {a} reach {b} over UDP, both ways, in the provider's firewall and private network",
        "filters on both: packets leave {a} and do not arrive at {b}",
    ),
    "in": Kind(
        "filter-drops",
        Place.FILTER,
        "{host} drops {packets} on the way in, between its network card and the program ({flows})",
        "nft list ruleset on {host}: a rule or a policy of another program; then ip rule, and "
        "net.ipv4.conf.*.rp_filter there",
        "the network before {host}: packets arrive there",
    ),
    "out": Kind(
        "filter-drops",
        Place.FILTER,
        "{host} drops {packets} on the way out, between the program and its network card ({flows})",
        "nft list ruleset on {host}: a rule of an output or postrouting chain; then ip route and "
        "ip rule there",
        "the network before {host}, and the program there: it answers",
    ),
    "silent": Kind(
        "no-answer",
        Place.UNIT,
        "{host} takes connections, and what listens there does not answer ({flows})",
        "systemctl status and the journal of that unit on {host}: it hangs or is overloaded, or "
        "what is behind it does",
        "the network and every filter: connections are made",
    ),
    "program": Kind(
        "no-answer",
        Place.UNIT,
        "{packets} reach {host}, and what listens there does not answer ({flows})",
        "systemctl status and the journal of that unit on {host}: it hangs, is overloaded, or "
        "another program has its port",
        "the network and every filter on the way there: packets get to the program",
    ),
}


_MTU = (
    "the MTU on the way to {host} (ping -M do -s 1400 {host}): a link with a smaller one, and "
    "filters that keep ICMP 'fragmentation needed' or ICMPv6 'packet too big' back"
)


def _kind(lost: Loss, fails: Fails, counts: Counts) -> str:
    before, after = lost.before, lost.after
    if fails == "here":
        return "here"
    if after is None and before.point == "let_in":
        return "silent"
    if after is None:
        return "between" if fails == "some" and not sent(lost.exchange.flow, counts) else "behind"
    if before.host == after.host:
        return {"let_in": "in", "answered": "program"}.get(after.point, "out")
    return "relay" if before.host else "before"


def _losses(symptoms: Iterable[Symptom], counts: Counts) -> list[tuple[str, Fails, Loss]]:
    """Where the packets of symptoms are lost, of which kind that is, and what fails."""
    parts = (
        part
        for each in symptoms
        for part in (
            [replace(each, exchanges=(e,)) for e in each.exchanges] if each.apart else [each]
        )
    )
    found = [(each.fails, at) for each in parts if (at := _loss(each, counts))]
    return [(_kind(at, fails, counts), fails, at) for fails, at in found]


def _inferred(
    found: Sequence[tuple[str, Fails, Loss]], lost: Sequence[Symptom], passed: Sequence[Symptom]
) -> list[Cause]:
    """What the counted packets say of symptoms, those of the same kind and place in one."""
    certain = [at for _, fails, at in found if not _is_unclear(fails, at)]
    lossy = [at.exchange.flow for _, fails, at in found if fails == "some"]
    kinds: dict[tuple[str, object, bool], list[Loss]] = {}
    for kind, fails, at in found:
        flow = at.exchange.flow
        if _is_unclear(fails, at) and any(
            flow.meets(other.exchange.flow) and not _leaves(other) for other in certain
        ):
            continue  # it follows from those
        of_some_ports = fails == "all" and flow.first < flow.last
        if of_some_ports and any(flow.meets(other) for other in lossy):
            of_some_ports = False
        some = fails == "some" or (at.is_partial and not of_some_ports)
        kinds.setdefault((kind, (at.before.host, at.host, at.size), some), []).append(at)
    causes = [_cause(KINDS[kind], losses, some) for (kind, _, some), losses in kinds.items()]
    causes = _here(_at_one_host(causes, passed), passed, "lost-before-host", "this-network")
    # Large packets are those of paths; large ones back are those that a relay sends to itself.
    paths = [each for each in passed if each.check == "test_path"]
    if any(kind == "behind" and at.size == "large" for kind, _, at in found):
        paths = [each for each in paths if any(map(_is_echoed, each.exchanges))]
    causes = _here(causes, paths, "large-packets-lost")
    return _lossy_here(causes, lost, passed)


def _is_echoed(exchange: Exchange) -> bool:
    return exchange.relay is not None and exchange.relay.host == exchange.flow.host


def _lossy_here(
    found: Sequence[Cause], lost: Sequence[Symptom], passed: Sequence[Symptom]
) -> list[Cause]:
    """One cause at this machine instead of one at each of several hosts, where a part of the
    packets is lost, and none of those that are asked over UDP is without loss."""
    lossy = [
        each
        for each in found
        if each.key in ("packets-lost", "large-packets-lost", "lost-behind-host")
        and each.place is Place.EDGE
        and {flow.host for flow in each.breaks} == {each.host}
    ]
    suffer = {flow.host for each in lost for flow in each.flows}
    asked = {flow for each in (*lost, *passed) for flow in each.flows}
    if (
        len({each.host for each in lossy}) < 2
        or all(each.key != "packets-lost" for each in lossy)
        or {flow.host for flow in asked if flow.proto == "udp"} - suffer
    ):
        return list(found)
    everything: list[Flow] = []
    for host in {flow.host for flow in asked}:
        everything += Flow(host, "tcp", 1, 65535), Flow(host, "udp", 1, 65535)
    here = replace(
        lossy[0],
        key="this-network",
        host="",
        place=Place.HERE,
        what="a part of the packets between here and every host is lost",
        mend="the link and the limits of this machine (tc qdisc, a full line); verify from where "
        "callers are",
        evidence=tuple(text for cause in lossy for text in cause.evidence),
        breaks=tuple(everything),
        ruled_out=("a single host or its provider: all of them suffer alike",),
        only="",
    )
    return [here, *(each for each in found if each not in lossy)]


def _leaves(lost: Loss) -> bool:
    """Whether it is lost behind the SFU on its way to a relay, as what is lost on its way here."""
    is_left = lost.before.point == "left" and lost.before.host == lost.exchange.flow.host
    return is_left and lost.exchange.relay is not None


def _is_unclear(fails: Fails, lost: Loss) -> bool:
    """Whether packets were seen to be lost nowhere, or large ones only, which is true of a part of
    all of them too."""
    return lost.size == "large" or (lost.after is None and fails != "some")


def _at_one_host(found: Sequence[Cause], passed: Sequence[Symptom]) -> list[Cause]:
    """What is lost between two hosts too, where one of them is cut off from here: one cause."""
    causes: list[Cause] = []
    between: list[Cause] = []
    for cause in found:
        is_relayed = cause.place is Place.EDGE and len({f.host for f in cause.breaks}) > 1
        (between if is_relayed else causes).append(cause)
    works = [flow for each in passed for flow in each.flows if flow.family]

    def is_same(one: Cause, relayed: Cause) -> bool:
        if any(flow.meets(other) for flow in one.breaks for other in relayed.breaks):
            return True
        every = [Flow(one.host, "udp", 1, 65535, f.family) for f in relayed.breaks]
        udp = [flow for flow in one.breaks if flow.proto == "udp"]
        return any(flow.meets(each) for flow in udp for each in every) and not any(
            flow.meets(each) for flow in works for each in every
        )

    for cause in between:
        edges = [
            (one.host != cause.host, number)
            for number, one in enumerate(causes)
            if one.place is Place.EDGE and is_same(one, cause)
        ]
        _, index = min(edges, default=(True, None))
        if index is None:
            causes.append(cause)
            continue
        one = causes[index]
        breaks = tuple(dict.fromkeys((*one.breaks, *cause.breaks)))
        causes[index] = replace(one, evidence=one.evidence + cause.evidence, breaks=breaks)
    return causes


def _loss(symptom: Symptom, counts: Counts) -> Loss | None:
    """Where the packets of a symptom are lost first."""
    last = symptom.exchanges[-1]
    if symptom.fails == "here":  # it is said of UDP alone, of TCP connections it is not
        near = [each for each in symptom.exchanges if not each.relay]
        first = next((each for each in near if each.flow.proto == "udp"), near[0])
        return Loss(first, Hop("", "sent", 0), Hop(first.flow.host, "arrived", 0), "small")
    share = NEARLY_ALL if symptom.fails == "some" else SOME
    for exchange in symptom.exchanges:
        if found := loss(exchange, counts, share=share):
            return found
        if symptom.fails == "large" and (found := loss(exchange, counts, "large")):
            return found
    if symptom.fails in ("some", "large"):
        last = next(each for each in reversed(symptom.exchanges) if not each.relay)
    if last.relay:
        return None
    if symptom.fails == "all" and connects(last.flow, counts):
        found = loss(last, counts, "large")
        if found and found.before.point != "sent":  # nobody knows whether any was
            return found
        there = sum(hop.packets for hop in hops(last, counts, "small")[:1])
        return Loss(last, Hop(last.flow.host, "let_in", there), None, "small")
    size: Size = "large" if symptom.fails == "large" else "small"
    at = hops(last, counts, "small")[-1]
    return Loss(last, at, None, size) if at.packets else None


def _cause(kind: Kind, losses: Sequence[Loss], is_partial: bool) -> Cause:
    one = losses[0]
    flows = tuple(dict.fromkeys(each.flow for each in losses))
    ends = ((each.exchange.flow, each.exchange.relay) for each in losses)
    breaks = tuple(dict.fromkeys(flow for both in ends for flow in both if flow))
    key, packets = kind.key, "packets"
    if one.size == "large":
        key, packets = "large-packets-lost", "large packets"
    elif is_partial:
        key, packets = "packets-lost", "some packets"
    elif any(each.is_partial for each in losses):
        packets = "packets of some ports"
    hosts = {"host": one.host, "a": one.before.host, "b": one.host}
    words = {"packets": packets, "flows": in_words(flows), **hosts}
    mend = kind.mend.format(**words)
    if kind.place is Place.EDGE and key == "large-packets-lost":
        mend = _MTU.format(host=one.host)
    elif kind.place is Place.EDGE and key == "packets-lost":
        mend = KINDS["between"].mend
    families = {flow.family for flow in flows} - {0}
    ruled_out = [kind.ruled_out.format(**words)]
    if len(families) == 1:
        ruled_out.append(f"IPv{10 - families.pop()}, which is not affected")
    if one.size == "large":
        ruled_out.append("ports and programs: small packets pass")
    seen = (f"{each.flow}: {_seen_of(each, is_partial)}" for each in losses)
    return Cause(
        key,
        one.host,
        kind.place,
        kind.what.format(**words),
        mend,
        tuple(dict.fromkeys(seen)),
        breaks,
        ruled_out=tuple(ruled_out),
        only="large" if one.size == "large" else "",
    )


_AT = {
    "sent": "sent by the relays of {0}",
    "arrived": "arrived at {0}",
    "let_in": "got to the program on {0}",
    "answered": "answered by it",
    "left": "left {0}",
}


def _seen_of(lost: Loss, is_partial: bool) -> str:
    if lost.before.point == "let_in" and lost.after is None:
        return "connected from here, and nothing came back"
    if not lost.before.packets:
        return "the kernel refuses to send (EPERM)"
    after = "not all got here" if is_partial else "none got here"
    return f"{_seen_at(lost.before)}, {_seen_at(lost.after) if lost.after else after}"


def _seen_at(hop: Hop) -> str:
    if not hop.host:
        return f"{hop.packets if hop.packets > 1 else 'packets'} were sent from here"
    return f"{hop.packets or 'none'} {_AT[hop.point].format(hop.host)}"


def _here(found: Sequence[Cause], passed: Sequence[Symptom], *keys: str) -> list[Cause]:
    """One cause at this machine instead of one of these keys at each host, where nothing of a
    protocol and family gets from here to any of several hosts."""
    own = (each for symptom in passed for each in symptom.exchanges if not each.relay)
    fine = {(each.flow.proto, each.flow.family) for each in own}
    before = [each for each in found if each.key in keys and each.place is not Place.FILTER]
    hosts: dict[tuple[str, int], set[str]] = {}
    for cause in before:
        for flow in cause.breaks:
            hosts.setdefault((flow.proto, flow.family), set()).add(cause.host)
    nowhere = {
        (proto, family)
        for (proto, family), at in hosts.items()
        if len(at | hosts.get((proto, 0), set())) > 1
    } - fine
    protos = {proto.upper() for proto, _ in nowhere}

    def is_here(flow: Flow) -> bool:
        return (flow.proto, flow.family) in nowhere or (
            not flow.family and flow.proto.upper() in protos
        )

    same = [cause for cause in before if all(map(is_here, cause.breaks))]
    if len({cause.host for cause in same}) < 2:
        return list(found)
    flows = tuple(flow for cause in same for flow in cause.breaks)
    families = sorted({flow.family for flow in flows} - {0})
    over = " and ".join(f"IPv{family}" for family in families) or "any family"
    here = replace(
        same[0],
        key="this-network",
        host="",
        place=Place.HERE,
        what=f"{' and '.join(sorted(protos, reverse=True))} over {over} gets from here to no host"
        + ", where packets are large" * (same[0].only == "large"),
        mend="a filter on this machine or on its way out; verify from where callers are, or have "
        "deploys probe from another host (deploy.gate_from)",
        evidence=tuple(text for cause in same for text in cause.evidence),
        breaks=flows,
        ruled_out=("filters of the hosts: nothing arrives at any of them",),
    )
    return [here, *(cause for cause in found if cause not in same)]

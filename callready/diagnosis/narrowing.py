"""Where packets are lost: what was counted on the hosts along an exchange, hop by hop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from callready.diagnosis.counting import POINTS, Counted, Size, Watched
from callready.diagnosis.model import Exchange, Flow, Place

Counts = Mapping[str, Mapping[tuple[Watched, Size], Counted]]
"""By host; of the empty one, this machine, what is known to have left it."""

SOME = 0.9
"""Share of the packets that has to get from one hop to the next; fewer are a loss."""

NEARLY_ALL = 0.97
"""The same where it is known that some are lost. The least that counts as that is 5 % of both ways
(verify.max_loss), and counters end at slightly different times."""


@dataclass(frozen=True)
class Hop:
    """A place on a host that packets of an exchange pass, one of POINTS, and how many did; `sent`
    are those of this machine (whose name is empty), or of a relay."""

    host: str
    point: str
    packets: int


@dataclass(frozen=True)
class Loss:
    """Packets of an exchange that get to one hop and not, or not all, to the next one; `after` is
    None where that is this machine."""

    exchange: Exchange
    before: Hop
    after: Hop | None
    size: Size

    @property
    def place(self) -> Place:
        """Where they are lost."""
        if self.after is None or self.before.host != self.after.host:
            return Place.EDGE
        return Place.UNIT if self.after.point == "answered" else Place.FILTER

    @property
    def is_partial(self) -> bool:
        """Whether some of them get there."""
        return self.after is not None and self.after.packets > 0

    @property
    def host(self) -> str:
        """The host that has it, or stands before it."""
        return self.after.host if self.after and self.after.host else self.before.host

    @property
    def flow(self) -> Flow:
        """They, as `host` sees them: those of a relay by the relay's ports."""
        relay = self.exchange.relay
        return relay if relay and relay.host == self.host else self.exchange.flow


def watch(
    exchanges: Iterable[Exchange], here: Sequence[str], addresses: Mapping[str, Sequence[str]]
) -> dict[str, list[Watched]]:
    """What to count on which host.

    Args:
        exchanges: those that are looked at.
        here: addresses that hosts see this machine by; empty where that is not known.
        addresses: of each host of the fleet.
    """
    everybody = tuple(text for each in addresses.values() for text in each)
    found: dict[str, dict[Watched, None]] = {}
    for exchange in exchanges:
        relay = exchange.relay
        client = relay.host if relay else ""
        for flow in _of_one_family(exchange.flow):
            whom = tuple(addresses[client]) if client else tuple(here)
            strangers = () if whom else everybody
            one = Watched(flow, client, whom, strangers, exchange.behind)
            found.setdefault(flow.host, {})[one] = None
        for flow in _of_one_family(relay) if relay else ():
            far = exchange.flow.host
            other = Watched(flow, far, tuple(addresses[far]))
            found.setdefault(flow.host, {})[other] = None
    return {host: list(items) for host, items in found.items()}


def _of_one_family(flow: Flow) -> list[Flow]:
    return [flow] if flow.family else [flow._replace(family=4), flow._replace(family=6)]


def hops(exchange: Exchange, counts: Counts, size: Size) -> list[Hop]:
    """Where its packets were seen, on their way there and back."""
    relay = exchange.relay
    there = _counted(counts, exchange.flow, relay.host if relay else "", size)
    found = [Hop(exchange.flow.host, point, getattr(there, point)) for point in _POINTS]
    if relay is None:
        return found
    near = _counted(counts, relay, exchange.flow.host, size)
    sent = [Hop(relay.host, "sent", near.answered), Hop(relay.host, "left", near.left)]
    return [*sent, *found, *(Hop(relay.host, p, getattr(near, p)) for p in _POINTS[:2])]


_POINTS = tuple(point.name for point in POINTS)


def _counted(counts: Counts, flow: Flow, client: str, size: Size) -> Counted:
    found = [
        value
        for (each, of), value in counts.get(flow.host, {}).items()
        if of == size and each.client == client and each.flow.meets(flow)
    ]
    return Counted(*(sum(getattr(value, point) for value in found) for point in _POINTS))


def sent(flow: Flow, counts: Counts) -> int:
    """How many small packets of a flow left this machine; 0 where that is not known, as where more
    arrived: somebody else sends too."""
    known = sum(
        value.left for (each, _), value in counts.get("", {}).items() if each.flow.meets(flow)
    )
    return known if known >= _counted(counts, flow, "", "small").arrived else 0


def connects(flow: Flow, counts: Counts) -> bool:
    """Whether this machine can connect to a flow's port over TCP."""
    return flow.proto == "tcp" and any(
        value.answered and each.flow.meets(flow) for (each, _), value in counts.get("", {}).items()
    )


def loss(
    exchange: Exchange, counts: Counts, size: Size = "small", share: float = SOME
) -> Loss | None:
    """The first hop that its packets do not get to, or not all; None where they all get back to
    the host that has to send them to this machine, where the relay sends none, and where nobody
    counted.

    Of large packets, whose answers may be small, each direction is looked at by itself. `share` has
    to get from each hop to the next.
    """
    if size == "small" and not exchange.relay and connects(exchange.flow, counts):
        return None
    if {exchange.flow.host, *([exchange.relay.host] if exchange.relay else [])} - counts.keys():
        return None
    found = hops(exchange, counts, size)
    if exchange.relay is None:
        known = sent(exchange.flow, counts) if size == "small" else 0
        found = [Hop("", "sent", known or max(1, found[0].packets)), *found]
    if not found[0].packets:
        return None
    for before, after in pairwise(found):
        if size == "large" and (before.point, after.point) == ("let_in", "answered"):
            continue
        is_answer = after.point == "answered"
        least = 1 if is_answer or exchange.flow.proto == "tcp" else share * before.packets
        if before.packets and after.packets < least:
            return Loss(exchange, before, after, size)
    return None

"""What is verified: an inventory, and the ways in which callers reach its hosts. Nothing is
connected to before a check asks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal

from aioice.ice import get_host_addresses
from pydantic import SecretStr
from pyinfra.api.host import Host as Connection

from callready.diagnosis.model import Path
from callready.probes import Finding, ProbeError, legs
from callready.probes.legs import LOSS
from callready.probes.turn import Credentials, TurnServer, mint
from callready.release import android
from callready.rollout.ssh import hosts_of
from callready.secrets.loading import validate
from callready.settings.android import Android
from callready.settings.fleet import Fleet
from callready.settings.inventory import inventory_data
from callready.settings.livekit import LiveKit
from callready.settings.models import Verify
from callready.settings.pools import Transport, Way, handed_out, ways
from callready.settings.problem import SettingsError
from callready.settings.turn import Pool
from tasks import declare
from tests.verify.servers import Family, Server


@dataclass(frozen=True)
class Turn:
    """A TURN pool on one of its hosts, and one way into it."""

    server: Server
    pool_name: str
    way: Way

    @property
    def name(self) -> str:
        """The host's name in the inventory."""
        return self.server.name

    def __str__(self) -> str:
        return f"{self.name}-{self.pool_name}-{self.way.over.replace(' on ', '-')}"

    @property
    def pool(self) -> Pool:
        """The pool's settings."""
        return self.server.settings.turn_pools[self.pool_name]

    def at(self, address: str) -> TurnServer:
        """It at one of its host's addresses, or by name."""
        way, server = self.way, self.server
        return TurnServer(address, way.port, way.transport, server.settings.name, server.ca)

    @property
    def by_name(self) -> TurnServer:
        """As the URIs say that callers are given."""
        return self.at(self.server.settings.name)

    @property
    def by_family(self) -> dict[Family, TurnServer]:
        """By address family, of those that this machine can try."""
        return {family: self.at(text) for family, text in self.server.addresses.items()}

    def credentials(self, lasting: float = 0) -> Credentials:
        """Fresh ones of this pool, for so many seconds at least."""
        return credentials(self.pool, lasting)


def credentials(pool: Pool, lasting: float = 0) -> Credentials:
    """As the app mints them, or the pool's first fixed user."""
    if pool.secrets:
        return mint(pool.secrets[0], 600 + round(lasting))
    name, secret = next(iter(pool.users.items()))
    return Credentials(name, secret.get_secret_value())


@dataclass(frozen=True)
class Sfu:
    """LiveKit as callers reach it: one URL, of one or more hosts.

    Args:
        server: the first of them, or the one that is to have the room.
        is_node: whether rooms may be on other hosts, so that one has to be placed there.
    """

    server: Server
    livekit: LiveKit
    addresses: frozenset[str]
    is_node: bool

    @property
    def name(self) -> str:
        """The host's name in the inventory."""
        return self.server.name

    def __str__(self) -> str:
        return self.name

    @property
    def url(self) -> str:
        """What clients are told."""
        return self.livekit.url

    @property
    def limits(self) -> Verify:
        """What is asked of its calls."""
        return self.server.settings.verify

    @property
    def key(self) -> tuple[str, SecretStr]:
        """The API key that the app has, and its secret."""
        return next(iter(self.livekit.keys.items()))

    @property
    def ca(self) -> str | None:
        """The private authority that callers trust, if there is one."""
        return self.server.ca


@dataclass(frozen=True)
class Pair:
    """An SFU, and a way through a TURN pool that is used with it."""

    sfu: Sfu
    turn: Turn

    @property
    def name(self) -> str:
        """The SFU's host name in the inventory."""
        return self.sfu.name

    def __str__(self) -> str:
        return f"{self.sfu}-{self.turn}"


@dataclass(frozen=True)
class Route:
    """A path that media can take.

    Args:
        sfu: at its other end; None between two relays of a pool that relays anywhere.
        turn: the way through a TURN server, or None.
        proto: of direct packets.
        family: address family of the caller's packets.
        relay: address family of the relay.
    """

    sfu: Sfu | None
    turn: Turn | None
    proto: Literal["udp", "tcp"]
    family: Family
    relay: Family = 4

    @property
    def server(self) -> Server:
        """Where the caller's packets go."""
        if self.turn:
            return self.turn.server
        assert self.sfu
        return self.sfu.server

    @property
    def name(self) -> str:
        """The SFU's host name in the inventory, or the TURN server's where there is none."""
        return self.sfu.name if self.sfu else self.server.name

    @property
    def can_be_tried(self) -> bool:
        """Whether it can be tried from here."""
        return not self.obstacle

    @property
    def obstacle(self) -> str:
        """Why it cannot be tried from here, if it cannot."""
        if self.family not in self.server.addresses:
            return f"no route for IPv{self.family} from here"
        if self.sfu and self.sfu.is_node and not self.sfu.server.node_id:
            return f"{self.sfu} does not say which node it is (livekit.logging.level)"
        return ""

    @property
    def path(self) -> Path:
        """As a diagnosis names it; `sfu` is empty between two relays."""
        sfu = self.sfu.name if self.sfu else ""
        if not self.turn:
            return Path(sfu, self.proto.upper(), self.family)
        return Path(sfu, self.turn.way.path, self.family, self.turn.pool_name, self.turn.name)

    @property
    def words(self) -> str:
        """As a person says it."""
        if not self.turn:
            return f"direct {'UDP' if self.proto == 'udp' else 'ICE/TCP'}, IPv{self.family}"
        over = self.turn.way.over.upper().replace("ON", "on")
        relay = ", IPv6 relay" * (self.relay == 6)
        text = f"{self.turn.name} over {over}, IPv{self.family}{relay} ({self.turn.pool_name})"
        return text if self.sfu else f"{text}, to itself"

    @property
    def call(self) -> str:
        """Of a call that may take it, as a person says it."""
        return f"through {self.turn.name} over {self.turn.way.over}" if self.turn else "direct"

    @property
    def through(self) -> legs.Through:
        """As the probe takes it, with fresh credentials."""
        assert self.turn
        server = self.turn.by_family[self.family]
        who = self.turn.credentials()
        return legs.Through(server, who, self.family, self.relay)

    def __str__(self) -> str:
        way = str(self.turn or self.proto) + "-relay6" * (self.relay == 6)
        return "-".join([*([str(self.sfu)] if self.sfu else []), way, f"ipv{self.family}"])


@dataclass(frozen=True)
class Checkout:
    """An Android app's checkout, where it is, and the files that it shall have."""

    name: str
    connection: Connection
    settings: Android
    files: Mapping[str, bytes]

    def __str__(self) -> str:
        return self.name


@dataclass
class Site:
    """An inventory under verification."""

    inventory: str
    fleet: Fleet
    servers: dict[str, Server]
    checkouts: list[Checkout] = field(default_factory=list)
    attempts: int | None = None
    soak: float = 0
    full_sweep: bool = False
    mapped: set[str] = field(default_factory=set)
    """This machine's addresses as servers saw them."""
    _tried: dict[str, dict[str, legs.Leg] | ProbeError] = field(default_factory=dict)
    _trying: Lock = field(default_factory=Lock)
    _again: bool = False

    @classmethod
    def load(cls, inventory: str) -> Site:
        """Read the settings as the deploy reads them; raises SettingsError."""
        data = inventory_data(inventory)
        fleet = validate(inventory, data)
        declared = [declare(fleet, name) for name in fleet.hosts]
        managed = [node for node in declared if node.release.files or node.release.environments]
        if not managed:
            raise SettingsError(f"{inventory}: no host has a role, so there is nothing to verify")
        apps = [name for name in fleet.group("android") if android.files(fleet, name)]
        connections = hosts_of(data, [*(node.name for node in managed), *apps], fleet)
        servers = {node.name: Server(node, connections[node.name]) for node in managed}
        checkouts = [
            Checkout(name, connections[name], settings, android.files(fleet, name))
            for name in apps
            if (settings := fleet[name].android)
        ]
        return cls(inventory, fleet, servers, checkouts)

    def hosts(self) -> list[Server]:
        """The hosts that the deploy manages."""
        return list(self.servers.values())

    def turns(self, *transports: Transport) -> list[Turn]:
        """Every pool on every host, by each way into it over one of these transports (default:
        UDP)."""
        return [
            Turn(server, name, way)
            for server in self.servers.values()
            for name in server.settings.turn_pools
            for way in ways(server.settings, name)
            if way.transport in (transports or ("udp",))
        ]

    def internet_turns(self) -> list[Turn]:
        """Those that relay to peers anywhere: for peer-to-peer calls."""
        return [turn for turn in self.turns() if turn.pool.peers == "internet"]

    def pairs(self, *transports: Transport) -> list[Pair]:
        """Each SFU with every way through the TURN pool that it hands out."""
        return [
            Pair(sfu, turn)
            for sfu in self.sfus()
            for turn in self.turns(*transports)
            if turn.pool_name == sfu.livekit.turn_pool
        ]

    def routes(self) -> list[Route]:
        """Every path to every SFU, and between two relays of the pools that no SFU hands out. Of
        SFUs that are one service the first is reached through each TURN host, the others through
        those that they hand out."""
        found = []
        used = set()
        for node in self.nodes():
            used.add(node.livekit.turn_pool)
            protos: tuple[Literal["udp", "tcp"], ...] = ("udp", "tcp")
            direct = protos if node.livekit.rtc.tcp_port else protos[:1]
            found += [Route(node, None, p, f) for p in direct for f in node.server.families]
        first = self.sfus()
        for node in self.nodes():
            told = {host.name for host, _ in handed_out(self.fleet, node.name)}
            found += [
                Route(node, turn, turn.way.proto, family)
                for turn in self.turns("udp", "tcp", "tls")
                if turn.pool_name == node.livekit.turn_pool
                if node in first or turn.server.settings.name in told
                for family in turn.server.families
            ]
        found += [
            Route(sfu, turn, turn.way.proto, family)
            for turn in self.turns("udp", "tcp", "tls")
            if turn.pool_name not in used
            for sfu in ((None,) if turn.pool.peers == "internet" else self.sfus())
            for family in turn.server.families
        ]
        return found

    def soaks(self) -> list[Route]:
        """The ways on which calls last, if that is asked for: directly, and each through TURN."""
        if not self.soak:
            return []
        direct = [Route(sfu, None, "udp", 4) for sfu in self.sfus()]
        pairs = self.pairs("udp", "tcp", "tls")
        return direct + [Route(pair.sfu, pair.turn, pair.turn.way.proto, 4) for pair in pairs]

    def relays_of_ipv6(self) -> list[Route]:
        """IPv6 relays, which clients can ask for, one on each host that has them."""
        return [
            Route(sfu, turn, "udp", 6, 6)
            for route in self.routes()
            for sfu, turn in ((route.sfu, route.turn),)
            if turn and (route.proto, route.family) == ("udp", 6)
            if not sfu or sfu.server.settings.address6
        ]

    def tried(self, route: Route) -> legs.Leg:
        """How a path was found: those of one SFU, and those of no SFU, are tried once, all at the
        same time.

        Raises:
            ProbeError: nobody can join.
        """
        mine = [r for r in (*self.routes(), *self.relays_of_ipv6()) if r.sfu == route.sfu]
        with self._trying:
            key = str(route.sfu)
            if key not in self._tried:
                try:
                    found = _legs(route.sfu, [r for r in mine if r.can_be_tried])
                    lossy = [r for r in mine if r.can_be_tried and found[str(r)].failed == LOSS]
                    if lossy and not self._again:  # a busy machine loses packets too
                        found |= _legs(route.sfu, lossy)
                    self._tried[key] = found
                except ProbeError as error:
                    self._tried[key] = error
        tried = self._tried[key]
        if isinstance(tried, ProbeError):
            raise tried
        return tried[str(route)]

    def sent(self) -> Iterator[tuple[Route, int]]:
        """Each path as it was tried last, with the UDP packets that were sent for it."""
        for route in (*self.routes(), *self.relays_of_ipv6()):
            legs_there = self._tried.get(str(route.sfu))
            if isinstance(legs_there, dict) and (leg := legs_there.get(str(route))):
                yield route, leg.sent

    def forget(self) -> None:
        """Try the paths anew when somebody asks for them again."""
        self._tried.clear()
        self._again = True

    def expect_passing(self, sfu: Sfu | None, turn: Turn | None = None) -> None:
        """Rather than have a call wait for a way that is known to be dead.

        Args:
            sfu: the call's; None between two relays.
            turn: the way it is forced through; None where it may take every path.

        Raises:
            ProbeError: what was found, if no packet passes there over any address family.
        """
        legs_there = [
            self.tried(route)
            for route in self.routes()
            if route.sfu == sfu and turn in (None, route.turn) and route.can_be_tried
        ]
        errors = [leg.error for leg in legs_there]
        first = next(iter(errors), None)
        if first and all(errors):
            raise ProbeError(first.suffers, first.look_at, first.evidence)

    def is_closed(self, sfu: Sfu) -> bool:
        """Whether a direct path to it is closed; raises ProbeError if nobody can join."""
        direct = [r for r in self.routes() if r.sfu == sfu and not r.turn and r.can_be_tried]
        return any(self.tried(route).error for route in direct)

    def rivals(self, turn: Turn) -> dict[str, Pool]:
        """The other pools of the fleet: their credentials must be worthless at this one."""
        return {
            other.pool_name: other.pool
            for other in self.turns()
            if other.pool_name != turn.pool_name
        }

    def neighbours(self) -> list[Pair]:
        """Each SFU with the pools that are not its own: both must work at the same time."""
        return [
            Pair(sfu, turn)
            for sfu in self.sfus()
            for turn in self.internet_turns()
            if turn.pool_name != sfu.livekit.turn_pool
        ]

    def sfus(self) -> list[Sfu]:
        """One entry for each LiveKit URL that clients are told."""
        urls: dict[str, Sfu] = {}
        for node in self.nodes():
            urls.setdefault(node.url, node)
        return list(urls.values())

    def nodes(self) -> list[Sfu]:
        """One entry for each host with an SFU, by which its own rooms are reached."""
        return [
            Sfu(server, livekit, self.sfu_addresses, bool(self.fleet.cluster(server.name)))
            for server in self.servers.values()
            if (livekit := server.settings.sfu)
        ]

    @property
    def sfu_addresses(self) -> frozenset[str]:
        """The public addresses of all SFUs."""
        return frozenset(
            address
            for host in self.fleet.group("livekit").values()
            for address in (host.address, host.address6)
            if address
        )

    def hide(self, text: str) -> str:
        """`text` without any secret of the inventory."""
        for secret in self.fleet.secrets:
            text = text.replace(secret, "••••••")
        return text

    def hide_caller(self, text: str) -> str:
        """`text` without an address of this machine, unless it is one of the hosts' itself."""
        settings = [server.settings for server in self.servers.values()]
        hosts = {address for host in settings for address in (host.address, host.address6)}
        for address in {*get_host_addresses(True, True), *self.mapped} - hosts:
            ends = r"(?!\w|::?\w)" if ":" in address else r"(?!\w|\.\d)(?::\d+)?"
            at = r"(?<![\w.:])" + re.escape(address) + ends
            text = re.sub(at, "the caller's address", text)
        return text


def _legs(sfu: Sfu | None, routes: list[Route]) -> dict[str, legs.Leg]:
    through = {str(route): route.through for route in routes if route.turn}
    if not sfu:
        return dict(zip(through, legs.try_relays([*through.values()]), strict=True))
    ways, limit = [*through.values()], sfu.limits.max_loss
    url, at, node_id = sfu.url, None, sfu.server.node_id if sfu.is_node else ""
    if sfu.is_node and (door := sfu.server.entrance):
        url, at = door.url, (door.address, door.port)
    got = legs.try_all(url, *sfu.key, ways, sfu.ca, max_loss=limit, at=at, node_id=node_id)
    found = dict(zip(through, got.relayed, strict=True))
    for route in routes:
        if not route.turn:
            way = route.path.way, route.family
            tried = [leg for leg in got.direct if (leg.way, leg.family) == way]
            # LiveKit may offer addresses of networks that callers are not in.
            tried.sort(key=lambda leg: leg.error is not None)
            none = f"{sfu.url} offers no {route.proto.upper()} candidate of IPv{route.family}"
            look_at = "rtc.node_ip, rtc.tcp_port and the interfaces that LiveKit may use"
            missing = legs.Leg(*way, failed="offer", error=Finding(none, look_at))
            found[str(route)] = tried[0] if tried else missing
    return found


def bracketed(address: str) -> str:
    """An address as it stands in a URL."""
    return f"[{address}]" if ":" in address else address

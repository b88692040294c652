"""What is verified: the hosts of an inventory as they should be and as they are, and the ways in
which callers reach them. Nothing is connected to before a check asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, Literal

from paramiko import SSHException
from pydantic import SecretStr
from pyinfra.api.config import Config
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host as Connection
from pyinfra.api.inventory import Inventory
from pyinfra.api.state import State
from testinfra.backend.base import BaseBackend, CommandResult
from testinfra.host import Host

from callready.probes import ProbeError, local_address
from callready.probes.turn import Credentials, TurnServer, mint
from callready.release.declaration import Release
from callready.release.facts import Facts, SurveyError
from callready.release.node import Node
from callready.release.plan import Plan, plan
from callready.rollout.remote import as_root, survey
from callready.rollout.ssh import log_in
from callready.secrets.loading import validate
from callready.settings.fleet import Fleet
from callready.settings.inventory import inventory_data
from callready.settings.models import LiveKit, Pool
from callready.settings.pools import Transport, Way, ways
from callready.settings.problem import SettingsError
from tasks import declare

Family = Literal[4, 6]


class RootShell(BaseBackend):  # type: ignore[misc]  # testinfra has no types
    """testinfra over the deploy's own connection: the same user, key, jump host and sudo."""

    NAME = "callready"

    def __init__(self, connection: Connection, node: Node) -> None:
        super().__init__(node.name)
        self._connection, self._node = connection, node

    def run(self, command: str, *args: str, **_: Any) -> CommandResult:
        command = self.get_command(command, *args)
        script = f"( {command}\n) < /dev/null\nprintf '%s\\n' $? >&2\n"
        _ok, output = as_root(self._connection, self._node, script)
        if not output.stderr_lines or not output.stderr_lines[-1].isdigit():
            raise ProbeError(
                f"{self.hostname} cannot be looked at: its shell broke off", "SSH and sudo there"
            )
        *words, status = output.stderr_lines
        text = "".join(f"{line}\n" for line in output.stdout_lines)
        return self.result(int(status), command.encode(), text, "\n".join(words))


class Server:
    """A host of the inventory. What it is now is read in one survey, when first asked for."""

    def __init__(self, node: Node, connection: Connection) -> None:
        self.name, self.settings = node.name, node.settings
        self.planned: Release = node.release
        """What the deploy would put there, as far as that is known without a look at it."""
        self._node, self._connection, self._lock = node, connection, Lock()
        self._seen: Facts | ProbeError | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def facts(self) -> Facts:
        """What the survey found."""
        with self._lock:
            if self._seen is None:
                try:
                    self._connection.connect(show_errors=False, raise_exceptions=True)
                    self._seen = survey(self._connection, self._node)
                    self._node.learn(self._seen)
                except (PyinfraError, SettingsError, SurveyError, SSHException, OSError) as error:
                    self._seen = ProbeError(
                        f"{self.name} cannot be looked at",
                        f"ssh to {self.name} with the inventory's user, key and known_hosts, "
                        "and sudo there",
                        str(error),
                    )
        if isinstance(self._seen, ProbeError):
            raise self._seen
        return self._seen

    @property
    def node(self) -> Node:
        """The host as the settings want it, with sshd's real ports."""
        assert self.facts
        return self._node

    @property
    def release(self) -> Release:
        """What the deploy would put there."""
        return self.node.release

    @cached_property
    def plan(self) -> Plan:
        """What a deploy would change."""
        return plan(self.release, self.facts)

    @cached_property
    def host(self) -> Host:
        """testinfra's view of it, for what the survey has not."""
        backend = RootShell(self._connection, self.node)
        return Host(backend)

    @property
    def ca(self) -> str | None:
        """The private authority that callers trust, if there is one."""
        return self.settings.tls.ca if self.settings.tls else None

    def changes(self, *kinds: str) -> list[str]:
        """Things of these kinds that are not as the settings say."""
        return [change.what for change in self.plan.changes if change.kind in kinds]

    @cached_property
    def addresses(self) -> dict[Family, str]:
        """Its public addresses, of the families that this machine has a route for."""
        found: dict[Family, str] = {}
        if self.settings.address:
            found[4] = self.settings.address
        if self.settings.address6 and local_address(self.settings.address6):
            found[6] = self.settings.address6
        return found

    def disconnect(self) -> None:
        """Close the connection, if there is one."""
        if self._connection.connected:
            self._connection.disconnect()


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

    def credentials(self) -> Credentials:
        """Fresh ones of this pool."""
        return credentials(self.pool)


def credentials(pool: Pool) -> Credentials:
    """As the app mints them, or the pool's first fixed user."""
    if pool.secrets:
        return mint(pool.secrets[0], 600)
    name, secret = next(iter(pool.users.items()))
    return Credentials(name, secret.get_secret_value())


@dataclass(frozen=True)
class Sfu:
    """LiveKit as callers reach it: one URL, of one or more hosts."""

    server: Server
    livekit: LiveKit
    addresses: frozenset[str]

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


@dataclass
class Site:
    """An inventory under verification."""

    inventory: str
    fleet: Fleet
    servers: dict[str, Server]
    attempts: int = 5
    full_sweep: bool = False

    @classmethod
    def load(cls, inventory: str) -> Site:
        """Read the settings as the deploy reads them; raises SettingsError."""
        data = inventory_data(inventory)
        fleet = validate(inventory, data)
        declared = [declare(fleet, name) for name in fleet.hosts]
        managed = [node for node in declared if node.release.files or node.release.environments]
        if not managed:
            raise SettingsError(f"{inventory}: no host has a role, so there is nothing to verify")
        connections = _connections(data, [node.name for node in managed])
        for connection in connections.values():
            log_in(connection, fleet)
        servers = {node.name: Server(node, connections[node.name]) for node in managed}
        return cls(inventory, fleet, servers)

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
        for server in self.servers.values():
            if livekit := server.settings.sfu:
                urls.setdefault(livekit.url, Sfu(server, livekit, self.sfu_addresses))
        return list(urls.values())

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


def _connections(data: Mapping[str, Mapping[str, Any]], names: list[str]) -> dict[str, Connection]:
    strict = {"ssh_strict_host_key_checking": "yes"}
    hosts = [(name, {**strict, **data[name]}) for name in names]
    inventory = Inventory((hosts, {}))
    State(inventory, Config())
    return {host.name: host for host in inventory}


def bracketed(address: str) -> str:
    """An address as it stands in a URL."""
    return f"[{address}]" if ":" in address else address

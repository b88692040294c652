"""A host of an inventory under verification: what it shall be, and what is seen of it."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from threading import Lock
from typing import Any, Literal, cast

from paramiko import SSHException
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host as Connection
from testinfra.backend.base import BaseBackend, CommandResult
from testinfra.host import Host

from callready.diagnosis.hosts import causes
from callready.diagnosis.inspection import Inspection, inspect
from callready.diagnosis.model import Cause
from callready.diagnosis.seen import Seen
from callready.probes import ProbeError, catalogue, local_address
from callready.probes.kinds import LiveKit
from callready.release.declaration import Release
from callready.release.facts import Facts, SurveyError
from callready.release.node import Node
from callready.release.plan import Plan, plan
from callready.rollout.remote import as_root, survey
from callready.rollout.rollout import NODE_ID
from callready.rollout.ssh import dial
from callready.settings.problem import SettingsError

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


class Unseen(ProbeError):
    """A host that cannot be looked at."""

    def __init__(self, host: str, why: str) -> None:
        super().__init__(
            f"{host} cannot be looked at",
            f"ssh to {host} with the inventory's user, key and known_hosts, and sudo there",
            why,
        )
        self.host, self.why = host, why


class Server:
    """A host of the inventory. What it is now is read in one survey, when first asked for."""

    def __init__(self, node: Node, connection: Connection) -> None:
        self.name, self.settings = node.name, node.settings
        self.planned: Release = node.release
        """What the deploy would put there, as far as that is known without a look at it."""
        self._node, self._connection, self._lock = node, connection, Lock()
        self._seen: Facts | ProbeError | None = None
        self._inspected: Inspection | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def facts(self) -> Facts:
        """What the survey found."""
        with self._lock:
            if self._seen is None:
                try:
                    self._connect()
                    self._seen = survey(self._connection, self._node)
                    self._node.learn(self._seen)
                except (PyinfraError, SettingsError, SurveyError, SSHException, OSError) as error:
                    self._seen = Unseen(self.name, str(error))
        if isinstance(self._seen, ProbeError):
            raise self._seen
        return self._seen

    def _connect(self) -> None:
        """Over the family that works: what the other one suffers from is to be found out."""
        options = self._connection.connector.data.get("ssh_paramiko_connect_kwargs") or {}
        sock = dial(self._connection, self._node)
        data = cast(dict[str, Any], self._connection.connector.data)
        if sock:
            data["ssh_paramiko_connect_kwargs"] = {**options, "sock": sock}
        try:
            self._connection.connect(show_errors=False, raise_exceptions=True)
        finally:
            data["ssh_paramiko_connect_kwargs"] = options  # the socket is good for once

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
    def inspection(self) -> Inspection:
        """What of its state the survey has not."""
        node = self.node
        with self._lock:
            if self._inspected is None:
                try:
                    self._inspected = inspect(self._connection, node, self.callers)
                except (SurveyError, PyinfraError, SSHException, OSError) as error:
                    raise Unseen(self.name, str(error)) from None
        return self._inspected

    @property
    def callers(self) -> tuple[str, ...]:
        """The addresses that this machine comes from."""
        return tuple(filter(None, map(local_address, self.addresses.values())))

    @cached_property
    def causes(self) -> list[Cause]:
        """What is wrong with the host itself."""
        return causes(Seen(self.node, self.facts, self.plan, self.inspection, self.callers))

    @cached_property
    def node_id(self) -> str:
        """That of its SFU in a cluster, which is in its log only, from level info on; empty where
        that cannot be read."""
        with suppress(ProbeError):
            return str(self.host.run(NODE_ID).stdout).strip()
        return ""

    @cached_property
    def entrance(self) -> LiveKit | None:
        """How callers come to this SFU and to no other one; None if that is a proxy's affair."""
        probes = catalogue.probes(self.name, self.settings, list(self.addresses.values())[:1])
        return next((each for each in probes if type(each) is LiveKit), None)

    @property
    def ca(self) -> str | None:
        """The private authority that callers trust, if there is one."""
        return self.settings.tls.ca if self.settings.tls else None

    @property
    def roles(self) -> tuple[str, ...]:
        """What it is for callers."""
        settings = self.settings
        return (
            *(["SFU"] if settings.sfu else []),
            *(f"TURN {pool}" for pool in settings.turn_pools),
            *(["App"] if settings.backend else []),
            *(["Edge"] if settings.edge_backends else []),
        )

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

    @property
    def families(self) -> list[Family]:
        """The address families it has."""
        return [4, 6] if self.settings.address6 else [4]

    def disconnect(self) -> None:
        """Close the connection, if there is one."""
        if self._connection.connected:
            self._connection.disconnect()

"""A host as it shall be and as it is: what the causes on it are told by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from callready.diagnosis.inspection import Inspection
from callready.diagnosis.model import Cause, Fails, Flow, Place
from callready.release.declaration import ROOT
from callready.release.facts import Facts
from callready.release.node import Node
from callready.release.plan import Plan
from callready.settings.pools import EDGE
from callready.settings.pools import unit as turn_unit
from callready.settings.ports import (
    ALERTMANAGER,
    CALLER,
    EGRESS,
    EXPORTERS,
    LIVEKIT,
    LOG_RECEIVER,
    LOGS,
    MEASURE,
    PROMETHEUS,
    REDIS,
    Use,
)

FIREWALL = "callready-firewall.service"
# What units of watching read beside their unit file: the folder or file of it, by the unit's name.
_READ_BY = {
    f"{ROOT}/monitor/alertmanager": ALERTMANAGER,
    f"{ROOT}/monitor/caller": CALLER,
    f"{ROOT}/monitor/": PROMETHEUS,
    f"{ROOT}/exporters.yml": EXPORTERS,
    f"{ROOT}/measure.conf": MEASURE,
    f"{ROOT}/redis/": REDIS,
    "/etc/egress/": EGRESS,
    "/usr/local/lib/callready/measure": MEASURE,
}
GIB = 2**30

# Checks by what they are about.
OF_UNIT = (
    "test_units",
    "test_listening",
    "test_listeners",
    "test_exposure",
    "test_journal",
    "test_sweep",
)
OF_CALLS = (
    *("test_direct", "test_relayed", "test_attempts", "test_side_by_side"),
    *("test_path", "test_ipv6_relay"),
)
OF_SIGNALLING = ("test_health", "test_tokens", "test_signalling", "test_candidates", "test_https")
OF_CLUSTER = ("test_serving", "test_understood", "test_rooms", "test_first_joins")
OF_TURN = (
    *("test_certificate_file", "test_stun", "test_allocation", "test_anonymous"),
    *("test_other_pools_credentials", "test_forbidden_peers", "test_tcp_relaying"),
    *("test_media", "test_certificate", "test_peer_to_peer"),
)
OF_EDGE = ("test_redirects", "test_tls_versions", "test_certificate*", "test_pins", "test_behind")
OF_APP = (
    *("test_workers", "test_health", "test_websocket", "test_call_from_the_app"),
    *("test_api_is_guarded", "test_https"),
)
OF_RECORDING = ("test_recorded", "test_refused", "test_sound_of_rooms")
_OF_WATCHING = {
    ALERTMANAGER: ("test_alerts",),
    CALLER: ("test_test_calls",),
    LOGS: ("*:test_logs",),
    LOG_RECEIVER: ("test_logs",),
}
# Of the monitor: nobody is measured where it does not work.
OF_MONITOR = ("test_password", "test_targets", "test_test_calls", "test_alerts", "*:test_measured")


@dataclass(frozen=True)
class Seen:
    """A host as it shall be, as it is, and what lies between; `callers`, addresses of ours."""

    node: Node
    facts: Facts
    plan: Plan
    inspection: Inspection
    callers: tuple[str, ...] = ()

    def cause(
        self,
        key: str,
        place: Place,
        what: str,
        mend: str,
        *evidence: str,
        breaks: tuple[Flow, ...] = (),
        checks: tuple[str, ...] = (),
        latent: bool = False,
        only: Fails = "",
    ) -> Cause:
        """A cause on this host; empty evidence is left out."""
        shown = tuple(filter(None, evidence))
        where = key, self.node.name, place
        return Cause(*where, what, mend, shown, breaks, checks, latent=latent, only=only)

    def changed(self, *kinds: str) -> list[str]:
        """What differs from what the deploy would put there, without remarks."""
        return [c.what.partition(" (")[0] for c in self.plan.changes if c.kind in kinds]

    def flows(self, unit: str = "", family: int = 0) -> tuple[Flow, ...]:
        """What callers exchange with a unit, with all of them; over a family, over either."""
        one: Literal[0, 4, 6] = 4 if family == 4 else 6 if family == 6 else 0
        return tuple(
            flow._replace(family=one)
            for use, flow in (*self.uses, *self.measured)
            if not unit or self._serves(unit, use)
        )

    @cached_property
    def uses(self) -> list[tuple[Use, Flow]]:
        """What of the port plan is for callers, and its flows."""
        return [
            (use, Flow(self.node.name, "udp" if use.proto == "udp" else "tcp", use.first, use.last))
            for use in self.node.ports
            if use.role in ("livekit", "coturn", "edge", "acme")
            and use.audience == "anyone"
            and use.proto in ("udp", "tcp")
        ]

    @cached_property
    def measured(self) -> list[tuple[Use, Flow]]:
        """What of the port plan is for the monitor, and its flows."""
        return [
            (use, Flow(self.node.name, "tcp", use.first, use.last))
            for use in self.node.ports
            if use.unit == EXPORTERS
        ]

    def _serves(self, unit: str, use: Use) -> bool:
        pools = self.node.settings.turn_pools
        is_pool = any(unit == turn_unit(name) and use.service == f"coturn {name}" for name in pools)
        return use.unit == unit or (is_pool and use.unit in ("", unit))

    def checks(self, unit: str) -> tuple[str, ...]:
        """The checks that fail when a unit does not answer."""
        if unit == LIVEKIT:
            more = (*OF_CLUSTER, "test_binary", "test_measured")
            return (*OF_UNIT, *OF_SIGNALLING, *OF_CALLS, *more)
        if unit == EDGE:
            behind = (*OF_SIGNALLING, *OF_EDGE, *OF_CALLS, *OF_TURN)
            of_monitor = OF_MONITOR if self.node.settings.watches else ()
            return (*OF_UNIT, *behind, "test_measured", *of_monitor)
        if unit == REDIS:  # every SFU of it is concerned
            users = (*OF_SIGNALLING, *OF_CALLS, *OF_CLUSTER, "test_access")
            return (*OF_UNIT, "test_saved", *(f"*:{check}" for check in users))
        if unit == EGRESS:
            return (*OF_UNIT, *OF_RECORDING, "test_measured")
        if unit == PROMETHEUS:
            return (*OF_UNIT, *OF_MONITOR)
        if unit.startswith("callready-"):
            return (*OF_UNIT, "test_measured", *_OF_WATCHING.get(unit, ()))
        if unit.startswith("turnserver@"):
            return (*OF_UNIT, *OF_TURN, "test_tls_versions")
        return (*OF_UNIT, *OF_APP)

    def listeners(self, unit: str) -> dict[str, str]:
        """Who else listens where a unit shall, by `proto/port`."""
        return {
            f"{item.proto}/{item.port}": f"{item.process} of {item.unit}"
            for item in self.facts.listeners
            if item.unit not in (unit, "-")
        }

    @property
    def has_table(self) -> bool:
        """Whether callready's packet filter is loaded."""
        return "inet callready" in self.facts.tables

    @cached_property
    def is_undeployed(self) -> bool:
        """Whether the host runs, unedited, a release that is not what the inventory says."""
        return bool(
            self.facts.manifest
            and self.facts.current != self.node.release.id
            and not any("edited" in change.what for change in self.plan.changes)
            and not self.plan.drifted
        )

    def edited(self, unit: str = "") -> list[str]:
        """Managed files that are not as rendered; those that a unit reads at its start."""
        # Said with the unit: what is off, or masked, or gone.
        off, gone = set[str](), set[str]()
        for name, state in self.inspection.units.items():
            load = state.get("LoadState")
            if state.get("UnitFileState") not in ("enabled", "static") or load != "loaded":
                off.add(name)
            if load in ("masked", "not-found"):
                gone.add(name)

        def is_said(path: str) -> bool:
            name = path.rpartition("/")[2]
            return name in gone or (name in off and ".wants/" in path)

        found = [path for path in self.changed("file", "link") if not is_said(path)]
        return [path for path in found if unit in ("", self.reader(path))]

    def reader(self, path: str) -> str:
        """The unit that a managed file is for; empty if it is none's in particular."""
        for unit in self.node.release.services:
            base = unit.partition("@")[0] + "@.service" if "@" in unit else unit
            if f"/{unit}" in path or f"/{base}" in path:
                return unit
        if path.startswith("/etc/coturn/"):
            return turn_unit(path.rpartition("/")[2].removesuffix(".conf"))
        if path.startswith("/etc/livekit/"):
            return LIVEKIT
        for start, unit in _READ_BY.items():
            if path.startswith(start):
                return unit
        return EDGE if "haproxy" in path else ""

    @cached_property
    def refused(self) -> dict[str, str]:
        """The host's certificates of the fleet that a deploy would replace, by what it has them
        for: why."""
        if self.is_undeployed:
            return {}
        found = (what.removeprefix("of the fleet for ") for what in self.changed("certificate"))
        words = (each.partition(": ") for each in found)
        return {kind: why for kind, _, why in words if kind in self.node.release.identities}

    @cached_property
    def ageing(self) -> set[str]:
        """Those of them that are good for a while."""
        return {kind for kind, why in self.refused.items() if "it ends on" in why}

    def kinds(self, unit: str) -> list[str]:
        """For what a unit has certificates of the fleet."""
        release = self.node.release
        file = release.files.get(f"/etc/systemd/system/{unit}")
        text = file.content.decode() if file else ""
        return [kind for kind in release.identities if f"{ROOT}/fleet/{kind}/" in text]

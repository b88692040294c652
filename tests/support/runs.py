"""Runs of a verification, as its report is given them: of small and large fleets, well and
broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal

from callready.diagnosis.model import (
    Cause,
    Diagnosis,
    Explained,
    Path,
    Place,
    Symptom,
    Tried,
)
from callready.probes import Finding
from callready.probes.legs import Step
from tests.verify import history
from tests.verify.history import Machine, Row, Run

WHEN = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
Family = Literal[4, 6]

STOPPED = Cause(
    "unit-stopped",
    "turn1.lab.test",
    Place.UNIT,
    "turnserver@calls.service is stopped",
    "systemctl start turnserver@calls",
    evidence=("inactive (dead) since 2026-11-29 11:58:03", "nothing listens on 3478/udp"),
    checks=("test_path", "test_relayed"),
    ruled_out=("packet filter: 3478/udp is accepted", "certificate: valid for 89 days"),
)
FOREIGN = Cause(
    "foreign-filter",
    "sfu1.lab.test",
    Place.FILTER,
    "rule of table inet operator drops 50000-60000/udp over IPv6",
    "nft delete rule inet operator input handle 4",
    evidence=(
        "meta nfproto ipv6 udp dport 50000-60000 drop: 214 packets",
        "16 of our checks arrived at the host, none at LiveKit",
    ),
    ruled_out=("callready's filter is loaded as rendered", "rtc.node_ip is the host's address"),
)
PASSWORD = Cause(
    "ssh-password",
    "app1.lab.test",
    Place.NEXT,
    "sshd will take passwords after its next reload",
    "rm /etc/ssh/sshd_config.d/50-cloud-init.conf && systemctl reload ssh",
    evidence=("sshd -T: passwordauthentication yes",),
    latent=True,
)


def fleet(sfus: int, turns: int, apps: int = 1) -> list[Machine]:
    """Hosts of a fleet; a single one has every role."""
    if not turns:
        return [Machine("calls.example.com", ("SFU", "TURN calls", "App", "Edge"))]
    pools = [f"TURN {'avatar' if number == 2 else 'calls'}" for number in range(1, turns + 1)]
    return [
        *(Machine(f"sfu{number}.lab.test", ("SFU", "Edge")) for number in range(1, sfus + 1)),
        *(Machine(f"turn{number}.lab.test", (pool,)) for number, pool in enumerate(pools, 1)),
        *(Machine(f"app{number}.lab.test", ("App", "Edge")) for number in range(1, apps + 1)),
    ]


def tried(path: Path, ok: bool | None = True, rtt: float = 0.002) -> Tried:
    """A path as it is found on a quick network, or as far as it came."""
    names = [] if path.way == "UDP" else ["TCP"]
    names += ["TLS"] * ("TLS" in path.way) + ["allocate", "permission"] * bool(path.turn)
    names += ["ICE", "ICE 600 B", "ICE 1200 B"]
    times = [rtt * (4 if name == "TLS" else 1) for name in ["DNS", *names]]
    steps = [
        Step(name, sum(times[:index]), times[index]) for index, name in enumerate(["DNS", *names])
    ]
    if ok is None:
        return Tried(path, None, why="this machine has no route for IPv6")
    if not ok:
        return Tried(
            path, False, tuple(steps[:2]), None, f"{steps[2].name}: no answer in time", "all"
        )
    return Tried(path, True, tuple(steps), rtt)


def paths(machines: Sequence[Machine], is_ok: Callable[[Path], bool | None]) -> list[Tried]:
    """Every path of a fleet."""
    found = []
    families: tuple[Family, Family] = (4, 6)
    for sfu in [each.name for each in machines if "SFU" in each.roles]:
        every = [Path(sfu, way, family) for way in ("UDP", "TCP") for family in families]
        every += [
            Path(sfu, f"TURN/{way}", family, "calls", each.name)
            for each in machines
            if "TURN calls" in each.roles
            for way in ("UDP", "TCP", "TLS", "TLS 443")
            for family in families
        ]
        found += [
            tried(path, is_ok(path), 0.0015 * (1 + index % 5)) for index, path in enumerate(every)
        ]
    return found


def run(
    machines: Sequence[Machine],
    causes: Sequence[Cause] = (),
    is_ok: Callable[[Path], bool | None] = lambda path: True,
    rows: Sequence[Row] = (),
) -> Run:
    """A run: its checks are those of its paths, and `rows`."""
    every = paths(machines, is_ok)
    checks = [
        Row(
            each.path.sfu,
            "test_path",
            _title(each.path),
            each.ok is not False,
            _figure(each),
            _why(each),
        )
        for each in every
    ]
    for number, machine in enumerate(machines):
        checks += [
            Row(machine.name, "test_system", "System and clock", True, "debian 13 amd64"),
            Row(machine.name, "test_units", "Units run with their configuration", True),
        ]
        if "SFU" in machine.roles:
            calls = tuple(0.09 + 0.013 * (each * (number + 3) % 9) for each in range(14))
            checks += [
                Row(machine.name, "test_signalling", "Signalling hands out our ICE servers", True),
                Row(machine.name, "test_attempts", "Calls connect", True, "14 of 14", (), calls),
            ]
        if "App" in machine.roles:
            title = "App is well: https://app1.lab.test/health"
            checks.append(Row(machine.name, "test_health", title, True, "200 in 22 ms"))
        if "TURN avatar" in machine.roles:
            title = "Peer to peer, both relayed (avatar)"
            checks.append(Row(machine.name, "test_peer_to_peer", title, True, "24 ms"))
    order = [each.name for each in machines]
    checks = sorted([*checks, *rows], key=lambda row: order.index(row.host))
    symptoms = [Symptom(row.check, row.host, row.title) for row in checks if not row.ok]
    explained = [
        Explained(cause, tuple(s for s in symptoms if _explains(cause, s))) for cause in causes
    ]
    diagnosis = Diagnosis(tuple(explained), paths=tuple(every))
    diagnosed = history.diagnosed(diagnosis, checks)
    hosts = tuple(machines)
    return Run("inventories/lab", WHEN, 12.3, len(checks), tuple(checks), hosts=hosts, **diagnosed)


def _title(path: Path) -> str:
    if not path.turn:
        return f"Path: direct {path.way}, IPv{path.family}"
    return f"Path: {path.turn} over {path.way[5:]}, IPv{path.family} ({path.pool})"


def _figure(each: Tried) -> str:
    return f"RTT {each.rtt * 1000:.1f} ms" if each.rtt else each.why


def _why(each: Tried) -> tuple[Finding, ...]:
    if each.ok is not False:
        return ()
    return (Finding("no media passes", "the diagnosis", each.why),)


def _explains(cause: Cause, symptom: Symptom) -> bool:
    if cause.key == "unit-stopped":
        return cause.host in symptom.title
    if cause.key == "foreign-filter":
        return "direct UDP, IPv6" in symptom.title
    return symptom.follows_from(replace(cause, checks=("test_ssh",)))

"""What a deploy does about recordings: what it says of them, how it waits for them, and what it leaves
alone."""

from __future__ import annotations

import dataclasses
from unittest.mock import Mock

import pytest

from callready.diagnosis.hosts import causes
from callready.diagnosis.inspection import parse
from callready.diagnosis.model import Cause
from callready.diagnosis.seen import Seen
from callready.release.declaration import Release
from callready.release.facts import Facts
from callready.release.manifest import Manifest
from callready.release.plan import Plan, plan, plan_return
from callready.rollout import gate
from callready.rollout.deployment import Deployment
from callready.settings.fleet import Fleet
from callready.settings.ports import EGRESS, EGRESS_SPACE
from tasks import declare
from tests.support.inventories import SFU1, Edit, box, deployed

pytestmark = pytest.mark.usefixtures("project")

DIGEST = f"sha256:{'ab' * 32}"
GROUPS = ["livekit", "turn", "app", "redis", "egress"]


def recording(*edits: Edit) -> Fleet:
    """All on one host, recordings too."""
    return box(
        (SFU1, "groups", GROUPS),
        (
            "*",
            "redis",
            {"livekit_password": "secret:redis/livekit", "egress_password": "secret:redis/egress"},
        ),
        ("*", "egress", {"digest": DIGEST, "cpu_cost": {}}),
        *edits,
    )


def released(*edits: Edit) -> Release:
    return declare(recording(*edits), SFU1).release


def functions(made: Plan) -> list[str]:
    return [step.function for step in made.steps]


def notes(made: Plan) -> str:
    return "\n".join(made.notes)


def test_a_fleet_that_records_nothing_has_none_of_it() -> None:
    release = declare(box(), SFU1).release
    assert not {EGRESS, EGRESS_SPACE} & release.services.keys()
    assert release.egress_drain == 0


def older(release: Release, recordings: int = 0) -> Facts:
    """A host on which egress has another configuration than the release says."""
    facts = dataclasses.replace(deployed(release), recordings=recordings)
    facts.images = {release.image.reference} if release.image else set()
    facts.subordinates = {name: {*release.subordinates} for name in ("subuid", "subgid")}
    facts.units[EGRESS] = dataclasses.replace(facts.units[EGRESS], fingerprint="another")
    return facts


@pytest.mark.parametrize(
    ("count", "words"), [(0, "no recordings run"), (1, "1 recording runs"), (2, "2 recordings run")]
)
def test_a_deploy_says_how_many_recordings_run_and_waits_for_them(count: int, words: str) -> None:
    release = released((SFU1, "egress.drain", 600))
    made = plan(release, older(release, recordings=count))
    assert (
        f"{words} now: egress takes no new ones, up to 600 s are waited for those that run, and what "
        "runs then is ended, with complete files" in made.notes
    )
    assert functions(made) == ["lock_host", "drain_egress", "restart", "wait_for_ports"]
    assert [step.line for step in made.steps][1] == "drain_egress 600"


def test_recordings_end_before_anything_is_armed() -> None:
    release = released()
    facts = older(release)
    facts.files["/etc/egress/egress.yaml"] = dataclasses.replace(
        facts.files["/etc/egress/egress.yaml"], sha256="another"
    )
    steps = functions(plan(release, facts))
    assert steps.index("stage") < steps.index("drain_egress") < steps.index("arm")


def test_who_does_not_want_to_wait_is_told_what_happens() -> None:
    release = released((SFU1, "egress.drain", 0))
    made = plan(release, older(release, recordings=1))
    assert "1 recording runs now: what runs when egress stops is ended, with" in notes(made)
    assert "drain_egress" not in functions(made)


@pytest.mark.parametrize("verb", ["rollback", "remove"])
def test_the_way_back_waits_for_recordings_too(verb: str) -> None:
    release = released()
    facts = dataclasses.replace(deployed(release), recordings=3)
    units = {
        unit: line._replace(fingerprint="x" if unit == EGRESS else line.fingerprint)
        for unit, line in facts.manifest.units.items()
        if verb == "rollback" or unit != EGRESS
    }
    earlier = dataclasses.replace(facts.manifest, units=units)
    made = plan_return(release, "earlier", earlier, facts, verb)
    assert "3 recordings run now" in notes(made)
    assert functions(made)[:3] == ["lock_host", "drain_egress", "arm"]


def test_a_host_that_records_no_more_waits_for_its_recordings() -> None:
    facts = dataclasses.replace(deployed(released()), recordings=1)
    groups = [name for name in GROUPS if name != "egress"]
    gone = declare(recording((SFU1, "groups", groups), ("*", "egress", None)), SFU1).release
    made = plan(gone, facts)
    assert "1 recording runs now" in notes(made)
    assert (
        notes(plan_return(gone, "earlier", Manifest(), facts, "remove")).count("1 recording") == 1
    )


def test_without_room_nothing_is_started_and_that_is_said() -> None:
    release = released()
    facts = dataclasses.replace(older(release), held=(3_210_000_000, 5_000_000_000))
    facts.units[EGRESS] = dataclasses.replace(facts.units[EGRESS], active="inactive", pid=0)
    made = plan(release, facts)
    assert functions(made) == []
    assert (
        "callready-egress.service takes no recordings until there is room, then starts by itself: "
        "3.2 GB are free in /var/lib/egress, fewer than 5.0 GB (egress.min_free)" in made.notes
    )


def test_without_room_no_recording_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    node = declare(recording(), SFU1)
    kinds = [Mock(kind=kind) for kind in ("join", "recording")]
    monkeypatch.setattr(gate, "probes", lambda *_: kinds)

    def probed(held: tuple[int, int] | None) -> list[str]:
        facts = dataclasses.replace(deployed(node.release), held=held)
        return [probe.kind for probe in Deployment(node, facts, Plan()).probes]

    assert probed(None) == ["join", "recording"]
    assert probed((1, 2)) == ["join"]


def test_a_restart_of_livekit_says_what_recordings_get() -> None:
    service = released().services["livekit-server.service"]
    assert "what is recorded then" in service.restart_means
    assert "recorded" not in (
        declare(box(), SFU1).release.services["livekit-server.service"].restart_means
    )


def unit(name: str, *edits: Edit) -> str:
    return released(*edits).files[f"/etc/systemd/system/{name}"].content.decode()


def test_egress_starts_after_what_was_cut_off_is_kept_and_only_with_room() -> None:
    text = unit(EGRESS)
    started = [line for line in text.splitlines() if line.startswith("ExecStart")]
    kept = next(i for i, line in enumerate(started) if line.endswith("/egress keep"))
    made = next(i for i, line in enumerate(started) if "install -d" in line)
    run = next(i for i, line in enumerate(started) if "podman run" in line)
    assert made < kept < run
    assert "ExecCondition=/usr/local/lib/callready/egress may-start\n" in text
    assert "ExecStop=/usr/local/lib/callready/egress stop\n" in text
    assert EGRESS_SPACE in text


def test_room_is_looked_at_in_bytes_and_nothing_is_removed_unless_that_is_said() -> None:
    text = unit(EGRESS_SPACE)
    assert "ExecStartPre=/usr/local/lib/callready/egress space 5000000000\n" in text
    assert "ExecStart=/usr/local/lib/callready/egress watch 5000000000\n" in text
    assert "CapabilityBoundingSet=CAP_KILL CAP_DAC_READ_SEARCH\n" in text
    text = unit(EGRESS_SPACE, (SFU1, "egress.min_free", 0.5), (SFU1, "egress.retention_days", 30))
    assert "ExecStart=/usr/local/lib/callready/egress watch 500000000 30\n" in text
    assert "CapabilityBoundingSet=CAP_KILL CAP_DAC_READ_SEARCH CAP_DAC_OVERRIDE\n" in text


ACTIVE = [f"unit\t{EGRESS}\tActiveState\tactive", f"unit\t{EGRESS}\tUnitFileState\tenabled"]
STOPPED = [line.replace("\tactive", "\tinactive") for line in ACTIVE]


def found(unit_lines: list[str], held: tuple[int, int] | None = None, **known: int) -> list[Cause]:
    """What a diagnosis finds of recordings on a host that knows this of them."""
    node = declare(recording(), SFU1)
    facts = dataclasses.replace(deployed(node.release), held=held)
    known = {"pulseaudio": 1, "draining": 0, "orphans": 0, "backup": 0, **known}
    lines = [*unit_lines, *(f"egress\t{name}\t{value}" for name, value in known.items()), "end"]
    seen = Seen(node, facts, plan(node.release, facts), parse(lines))
    about = ("recordings", "sound", "unit-stopped")
    return [cause for cause in causes(seen) if cause.key.startswith(about)]


@pytest.mark.parametrize(
    ("unit_lines", "held", "known", "key", "mend"),
    [
        (STOPPED, (10**9, 5 * 10**9), {}, "recordings-held", "make room"),
        (STOPPED, None, {"draining": 1}, "recordings-draining", "wait;"),
        (STOPPED, None, {}, "unit-stopped", "systemctl start callready-egress"),
        (ACTIVE, None, {"pulseaudio": 0}, "sound-server-dead", "systemctl restart"),
        (ACTIVE, None, {"orphans": 2}, "recordings-cut-off", "save what is there"),
        (ACTIVE, None, {"backup": 3}, "recordings-not-uploaded", "upload what is there"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_keeps_a_host_from_recording_is_named(
    unit_lines: list[str],
    held: tuple[int, int] | None,
    known: dict[str, int],
    key: str,
    mend: str,
) -> None:
    (cause,) = found(unit_lines, held, **known)
    assert cause.key == key and mend in cause.mend
    assert cause.latent == (key in ("recordings-cut-off", "recordings-not-uploaded"))
    assert cause.latent or {"test_recorded", "test_sound_of_rooms"} & {*cause.checks}


def test_a_host_that_records_well_has_none_of_these_causes() -> None:
    assert found(ACTIVE) == []

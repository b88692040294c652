"""The plan: what a deploy would change on a host, from what the host is; nothing if nothing."""

import base64
import dataclasses
import hashlib
import io
import re
import shlex
import sqlite3
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.x509 import DNSName
from pydantic import SecretBytes, SecretStr

from callready.release import sysctls
from callready.release.bundle import bundle as pack
from callready.release.declaration import ROOT, Release, Row
from callready.release.facts import EnvironmentFact, Facts, Listener
from callready.release.manifest import LinkLine, Manifest, UnitLine
from callready.release.plan import (
    NONE,
    Plan,
    plan,
    plan_return,
    row_hash,
    rows_sql,
)
from callready.settings.problem import SettingsError
from tasks import declare
from tests.support.inventories import (
    SCHEMA,
    SECRETS,
    SFU1,
    TURN1,
    Authority,
    Edit,
    bare,
    box,
    deployed,
    load,
)

pytestmark = pytest.mark.usefixtures("project")

LIVEKIT = "/etc/livekit/livekit.yaml"
CALLS, AVATAR = "/etc/coturn/calls.conf", "/etc/coturn/avatar.conf"
CALLS_DB = "/var/lib/turn/calls.db"
TLS_CALLS = "192.0.2.11:5349"
SFU_UNIT, AVATAR_UNIT = "livekit-server.service", "turnserver@avatar.service"
EDGE: tuple[Edit, ...] = (SFU1, "edge", {}), (SFU1, "name", "turn.callready.test")


@pytest.fixture
def release() -> Release:
    return declare(box(), SFU1).release


def said(made: Plan) -> list[str]:
    return [" ".join(change) for change in made.changes]


def functions(made: Plan) -> list[str]:
    """The steps by function, `restart livekit-server.service` with its unit; without the locks."""
    calls = [shlex.split(step.line) for step in made.steps]
    named = ("restart", "reload", "wait_for_ports", "stop", "withdraw", "mask")
    return [
        " ".join(call[:2]) if call[0] in named else call[0]
        for call in calls
        if call[0] != "lock_host"
    ]


def replace(facts: Facts, path: str, **changes: object) -> None:
    facts.files[path] = dataclasses.replace(facts.files[path], **changes)  # type: ignore[arg-type]


def test_a_host_as_it_should_be_needs_nothing(release: Release) -> None:
    made = plan(release, deployed(release))
    assert (said(made), made.steps, made.notes) == ([], [], [])


def test_everything_new_on_a_bare_host_is_listed_and_done_in_order(release: Release) -> None:
    made = plan(release, bare())
    lines = said(made)
    assert lines[:8] == [
        "+ mask coturn.service",
        "+ package ca-certificates",
        "+ package curl",
        "+ package nftables",
        "+ package openssl",
        "+ package systemd-timesyncd",
        "+ package coturn 4.6.1-2",
        "+ package sqlite3",
    ]
    assert "+ user livekit" in lines
    assert "+ binary /opt/livekit/1.13.5/livekit-server" in lines
    for path in release.files:
        assert f"+ file {path}" in lines
    for path in release.links:
        assert f"+ link {path}" in lines
    secret, avatar = (SECRETS[name] for name in ("turn/calls", "turn/avatar"))
    for text in (
        f"+ row {CALLS_DB} callready.test secret "
        + row_hash(("turn_secret", "callready.test", SecretStr(secret))),
        "+ row /var/lib/turn/avatar.db avatar.callready.test secret "
        + row_hash(("turn_secret", "avatar.callready.test", SecretStr(avatar))),
        f"+ certificate {SFU1} serial {release.certificates[SFU1].serial}",
        "+ environment /srv/app/.env: LIVEKIT_URL, LIVEKIT_API_KEY, LIVEKIT_API_SECRET, STUN_URIS, "
        "TURN_URIS, TURN_SECRET, TURN_TTL",
        "+ firewall table inet callready",
        "+ unit turnserver@calls.service: start",
        "+ unit turnserver@avatar.service: start",
        "+ unit livekit-server.service: start",
        "! unit app.service: restart, it reads /srv/app/.env",
    ):
        assert text in lines
    # coturn must not start as an open relay, and nothing may listen before the packet filter.
    assert functions(made) == [
        "check_candidates",
        "mask coturn.service",
        "install_packages",
        "create_users",
        "install_livekit",
        "write_rows",
        "write_rows",
        "install_pair",
        "stage",
        "arm",
        "activate",
        "reload_manager",
        "set_sysctls",
        "write_environment",
        "load_firewall",
        "restart turnserver@calls.service",
        "wait_for_ports turnserver@calls.service",
        "restart turnserver@avatar.service",
        "wait_for_ports turnserver@avatar.service",
        "restart livekit-server.service",
        "wait_for_ports livekit-server.service",
        *["wait_for_certificate"] * 4,
        "apply_environment",
        "confirm",
    ]


def edit_calls(facts: Facts) -> None:
    replace(facts, CALLS, sha256="0" * 64)


def open_livekit(facts: Facts) -> None:
    replace(facts, LIVEKIT, mode=0o644)


def give_away(facts: Facts) -> None:
    replace(facts, CALLS, group="root")


def put_a_file_over_the_link(facts: Facts) -> None:
    replace(facts, CALLS, link="")


def remove_a_file(facts: Facts) -> None:
    del facts.files[AVATAR]


def retarget_a_link(facts: Facts) -> None:
    replace(facts, "/usr/local/bin/livekit-server", link="/opt/livekit/1.9.0/livekit-server")


def be_another_release(facts: Facts) -> None:
    facts.folder = "0123456789abcdef"


def drop_a_package(facts: Facts) -> None:
    del facts.packages["nftables"]


def use_chrony(facts: Facts) -> None:
    del facts.packages["systemd-timesyncd"]
    facts.packages["chrony"] = "4.3-2"


def drop_the_user(facts: Facts) -> None:
    facts.users.clear()


def drop_the_binary(facts: Facts) -> None:
    facts.binaries.clear()


def unmask(facts: Facts) -> None:
    masked = facts.units["coturn.service"]
    facts.units["coturn.service"] = dataclasses.replace(masked, load="loaded")


def lower_a_buffer(facts: Facts) -> None:
    facts.sysctls["net.core.rmem_max"] = "212992"


def lose_the_secret(facts: Facts) -> None:
    facts.rows[CALLS_DB].clear()


def have_an_old_secret(facts: Facts) -> None:
    facts.rows[CALLS_DB].add("feedfeedfeedfeed")


def have_another_certificate(facts: Facts) -> None:
    facts.pairs = dict.fromkeys(facts.pairs, "feedfeedfeedfeed")
    facts.served = dict.fromkeys(facts.served, "beef")


def serve_the_old_certificate(facts: Facts) -> None:
    facts.served[TLS_CALLS, SFU1] = "beef"


def change_the_environment(facts: Facts) -> None:
    facts.environments["/srv/app/.env"] = EnvironmentFact(0o600, "app", "0" * 64, "0" * 64)


def edit_the_environment(facts: Facts) -> None:
    found = facts.environments["/srv/app/.env"]
    facts.environments["/srv/app/.env"] = dataclasses.replace(found, sha256="0" * 64)


def open_the_environment(facts: Facts) -> None:
    found = facts.environments["/srv/app/.env"]
    facts.environments["/srv/app/.env"] = dataclasses.replace(found, mode=0o640)


def fail_to_restart_the_app(facts: Facts) -> None:
    found = facts.environments["/srv/app/.env"]
    facts.environments["/srv/app/.env"] = dataclasses.replace(found, applied="")


def change_the_table(facts: Facts) -> None:
    facts.ruleset = "changed"


def lose_the_table(facts: Facts) -> None:
    facts.ruleset = ""


def unit(name: str, **changes: object) -> Callable[[Facts], None]:
    def edit(facts: Facts) -> None:
        facts.units[name] = dataclasses.replace(facts.units[name], **changes)  # type: ignore[arg-type]

    edit.__name__ = f"{name} {changes}"
    return edit


FILES = ["stage", "arm", "activate", "reload_manager", "confirm"]
CALLS_UNIT = "turnserver@calls.service"
OLD = "restart, its process is older than its configuration"


@pytest.mark.parametrize(
    ("edit", "lines", "steps"),
    [
        (edit_calls, [f"~ file {CALLS} (edited on the host since the last deploy)"], FILES),
        (open_livekit, [f"~ file {LIVEKIT}"], FILES),
        (give_away, [f"~ file {CALLS}"], FILES),
        (put_a_file_over_the_link, [f"~ file {CALLS}"], FILES),
        (remove_a_file, [f"+ file {AVATAR}"], FILES),
        (retarget_a_link, ["~ link /usr/local/bin/livekit-server"], FILES),
        (be_another_release, ["~ release 0123456789abcdef -> ID: its name differs"], FILES),
        (drop_a_package, ["+ package nftables"], ["check_candidates", "install_packages"]),
        (use_chrony, [], []),
        (drop_the_user, ["+ user livekit"], ["create_users"]),
        (drop_the_binary, ["+ binary /opt/livekit/1.13.5/livekit-server"], ["install_livekit"]),
        (unmask, ["+ mask coturn.service"], ["mask coturn.service"]),
        (lower_a_buffer, ["~ sysctl net.core.rmem_max = 5000000"], ["set_sysctls"]),
        (
            lose_the_secret,
            [
                f"+ row {CALLS_DB} callready.test secret "
                + row_hash(("turn_secret", "callready.test", SecretStr(SECRETS["turn/calls"])))
            ],
            ["write_rows"],
        ),
        (have_an_old_secret, [f"- row {CALLS_DB} feedfeedfeedfeed"], ["write_rows"]),
        (
            change_the_environment,
            [
                "~ environment /srv/app/.env: LIVEKIT_URL, LIVEKIT_API_KEY, LIVEKIT_API_SECRET, "
                "STUN_URIS, TURN_URIS, TURN_SECRET, TURN_TTL",
                "! unit app.service: restart, it reads /srv/app/.env",
            ],
            ["write_environment", "apply_environment"],
        ),
        (
            edit_the_environment,
            [
                "~ environment /srv/app/.env: LIVEKIT_URL, LIVEKIT_API_KEY, LIVEKIT_API_SECRET, "
                "STUN_URIS, TURN_URIS, TURN_SECRET, TURN_TTL",
                "! unit app.service: restart, it reads /srv/app/.env",
            ],
            ["write_environment", "apply_environment"],
        ),
        (
            open_the_environment,
            [
                "~ environment /srv/app/.env: LIVEKIT_URL, LIVEKIT_API_KEY, LIVEKIT_API_SECRET, "
                "STUN_URIS, TURN_URIS, TURN_SECRET, TURN_TTL"
            ],
            ["write_environment"],
        ),
        (
            fail_to_restart_the_app,
            ["! unit app.service: restart, it reads /srv/app/.env"],
            ["apply_environment"],
        ),
        (change_the_table, ["~ firewall table inet callready"], ["load_firewall"]),
        (lose_the_table, ["+ firewall table inet callready"], ["load_firewall"]),
        (
            serve_the_old_certificate,
            [f"~ unit {CALLS_UNIT}: reload its certificate, no call is touched"],
            [f"reload {CALLS_UNIT}", "wait_for_certificate"],
        ),
        (
            unit(CALLS_UNIT, fingerprint="0" * 16),
            [f"! unit {CALLS_UNIT}: {OLD}"],
            [f"restart {CALLS_UNIT}", f"wait_for_ports {CALLS_UNIT}"],
        ),
        (
            unit(CALLS_UNIT, fingerprint="-"),
            [f"! unit {CALLS_UNIT}: {OLD}"],
            [f"restart {CALLS_UNIT}", f"wait_for_ports {CALLS_UNIT}"],
        ),
        (
            unit(CALLS_UNIT, given=("0" * 64,)),
            [f"! unit {CALLS_UNIT}: restart, it was started with an edited file"],
            [f"restart {CALLS_UNIT}", f"wait_for_ports {CALLS_UNIT}"],
        ),
        (
            unit(CALLS_UNIT, binary="/usr/bin/turnserver (deleted)"),
            [f"! unit {CALLS_UNIT}: restart, its binary was replaced"],
            [f"restart {CALLS_UNIT}", f"wait_for_ports {CALLS_UNIT}"],
        ),
        (
            unit(SFU_UNIT, active="failed", pid=0, fingerprint="-"),
            [f"+ unit {SFU_UNIT}: start"],
            [f"restart {SFU_UNIT}", f"wait_for_ports {SFU_UNIT}"],
        ),
        (unit(SFU_UNIT, needs_reload=True), [], ["reload_manager"]),
    ],
)
def test_each_difference_is_told_and_mended_and_nothing_else(
    release: Release, edit: Callable[[Facts], None], lines: list[str], steps: list[str]
) -> None:
    facts = deployed(release)
    edit(facts)
    made = plan(release, facts)
    assert [line.replace(release.id, "ID") for line in said(made)] == lines
    assert functions(made) == steps


def test_a_renewed_certificate_is_installed_and_reloaded_but_nothing_restarts(
    release: Release,
) -> None:
    facts = deployed(release)
    have_another_certificate(facts)
    made = plan(release, facts)
    assert said(made) == [
        f"~ certificate {SFU1} serial {release.certificates[SFU1].serial}",
        f"~ unit {CALLS_UNIT}: reload its certificate, no call is touched",
        "~ unit turnserver@avatar.service: reload its certificate, no call is touched",
    ]
    assert functions(made) == [
        "install_pair",
        f"reload {CALLS_UNIT}",
        "reload turnserver@avatar.service",
        *["wait_for_certificate"] * 4,
    ]


def test_a_renewal_is_no_new_release(authority: Authority) -> None:
    before = declare(box(), SFU1).release
    for path, new in zip(
        ("chain.pem", "key.pem"), authority.issue(DNSName("*.callready.test")), strict=True
    ):
        Path("certificates", path).unlink()
        Path("certificates", path).symlink_to(new)
    after = declare(box(), SFU1).release
    assert after.id == before.id
    assert after.certificates[SFU1].digest != before.certificates[SFU1].digest


@pytest.mark.parametrize(
    ("path", "value", "files", "restarts"),
    [
        ("turn.pools.calls.user_quota", 5, {CALLS}, {CALLS_UNIT}),
        ("livekit.logging.level", "debug", {LIVEKIT}, {SFU_UNIT}),
        ("livekit.keys.APIunit", "secret:livekit/second", {LIVEKIT}, {SFU_UNIT}),
        (
            "turn.pools.calls.secrets",
            ["secret:livekit/second", "secret:turn/calls"],
            {"/etc/livekit/turn_secret"},
            {SFU_UNIT},
        ),
        ("turn.pools.avatar.secrets", ["secret:livekit/second"], set(), set()),
        (
            "firewall.extra_ports",
            ["443/tcp"],
            {"/etc/sysctl.d/60-callready.conf", f"{ROOT}/nftables.conf"},
            set(),
        ),
    ],
)
def test_a_setting_changes_its_files_and_restarts_what_reads_them_alone(
    path: str, value: object, files: set[str], restarts: set[str]
) -> None:
    facts = deployed(declare(box(), SFU1).release)
    made = plan(declare(box(("*", path, value)), SFU1).release, facts)
    changed = {c.what for c in made.changes if c.kind == "file"}
    drop_ins = {f"/etc/systemd/system/{unit}.d/callready.conf" for unit in restarts}
    assert changed == files | drop_ins
    assert {c.what for c in made.changes if c.mark == "!" and OLD in c.what} == {
        f"{unit}: {OLD}" for unit in restarts
    }


def test_another_version_of_livekit_is_installed_beside_and_started() -> None:
    facts = deployed(declare(box(), SFU1).release)
    release = declare(box((SFU1, "livekit.version", "1.13.1")), SFU1).release
    made = plan(release, facts)
    assert "+ binary /opt/livekit/1.13.1/livekit-server" in said(made)
    assert "~ link /usr/local/bin/livekit-server" in said(made)
    assert f"! unit {SFU_UNIT}: {OLD}" in said(made)
    (step,) = (shlex.split(step.line) for step in made.steps if step.function == "install_livekit")
    assert step == [
        "install_livekit",
        "https://github.com/livekit/livekit/releases/download",
        "1.13.1",
        "livekit_1.13.1_linux_amd64.tar.gz",
        "",
    ]


def test_what_a_host_no_longer_runs_is_stopped_and_taken_away() -> None:
    facts = deployed(declare(box(), SFU1).release)
    release = declare(
        box(
            (SFU1, "pools", ["calls"]),
            (TURN1, "pools", ["calls", "avatar"]),
            (TURN1, "turn.pools.calls.max_port", 57343),
            (TURN1, "turn.pools.avatar.min_port", 57344),
            (TURN1, "turn.pools.avatar.listening_port", 3479),
            (TURN1, "turn.pools.avatar.tls_listening_port", 5350),
        ),
        SFU1,
    ).release
    made = plan(release, facts)
    gone = [
        AVATAR,
        "/etc/systemd/system/turnserver@avatar.service.d/callready.conf",
        "/etc/systemd/system/multi-user.target.wants/turnserver@avatar.service",
    ]
    assert [c.what for c in made.changes if c.mark == "-"] == ["turnserver@avatar.service", *gone]
    steps = [step.function for step in made.steps]
    assert steps.index("stage") < steps.index("stop") < steps.index("activate")
    (withdrawn,) = (step.line for step in made.steps if step.function == "withdraw")
    assert shlex.split(withdrawn) == ["withdraw", *gone]


def test_going_back_says_what_it_does_to_calls_and_waits_for_them() -> None:
    release = declare(box((SFU1, "deploy", {"drain": 30}), *EDGE), SFU1).release
    facts = deployed(release)
    facts.listeners.append(Listener("udp", "192.0.2.11", 50123, "livekit-server", SFU_UNIT))

    def earlier(*changed: str) -> Manifest:
        """The manifest of a release in which some units are other ones."""
        units = {
            unit: line._replace(fingerprint="another") if unit in changed else line
            for unit, line in facts.manifest.units.items()
            if unit != AVATAR_UNIT
        }
        return dataclasses.replace(facts.manifest, units=units)

    made = plan_return(release, "earlier", earlier(SFU_UNIT, "haproxy.service"), facts, "rollback")
    assert said(made) == [
        f"~ release {facts.folder} -> earlier",
        f"! unit {AVATAR_UNIT}: stop",
        f"! unit {SFU_UNIT}: restart, the earlier release has it otherwise",
        "~ unit haproxy.service: reload, no connection is dropped",
    ]
    assert [note for note in made.notes if "1 media ports in use" in note]
    assert [step.function for step in made.steps] == [
        "lock_host",
        "drain",
        "drain",
        "arm",
        "return_to",
        "confirm",
    ]
    same = plan_return(release, "earlier", facts.manifest, facts, "rollback")
    assert [step.function for step in same.steps] == ["lock_host", "arm", "return_to", "confirm"]


def test_what_a_removal_left_when_it_was_cut_short_is_removed_by_the_next() -> None:
    release, facts = declare(box(), SFU1).release, bare()
    assert plan_return(release, NONE, Manifest(), facts, "remove").steps == []
    facts.has_state = True
    made = plan_return(release, NONE, Manifest(), facts, "remove")
    assert [step.function for step in made.steps] == ["lock_host", "uninstall"]


def test_a_firewall_that_is_switched_off_is_taken_down() -> None:
    facts = deployed(declare(box(), SFU1).release)
    made = plan(declare(box((SFU1, "firewall.enabled", False)), SFU1).release, facts)
    assert "- firewall table inet callready" in said(made)
    assert f"- file {ROOT}/nftables.conf" in said(made)
    assert "unload_firewall" in functions(made)


def test_a_sysctl_of_several_numbers_may_be_printed_with_tabs() -> None:
    release = Release()
    release.sysctl("net.ipv4.udp_mem", "190000 250000 380000")
    assert plan(release, Facts(sysctls={"net.ipv4.udp_mem": "190000\t250000\t380000"})).steps == []
    assert plan(release, Facts(sysctls={"net.ipv4.udp_mem": "190000\t250000\t1"})).steps != []


def test_no_file_of_callready_s_can_be_the_app_s_environment_file(release: Release) -> None:
    edge = declare(box(*EDGE), SFU1).release
    for path in {*release.files, *release.links, *release.databases, *edge.files, *edge.links}:
        with pytest.raises(SettingsError, match=f"app.env_file: {path} is not the app's"):
            box((SFU1, "app.env_file", path))


PORTS, BUFFER = "net.ipv4.ip_local_reserved_ports", "net.core.rmem_max"


@pytest.mark.parametrize(
    ("key", "theirs", "joined"),
    [
        (BUFFER, "16000000", "16000000"),
        (BUFFER, "212992", "5000000"),
        (BUFFER, "many", "5000000"),
        (PORTS, "", "3478-3479,5349-5350,7880-7881,49152-65535"),
        (PORTS, "8080,9000-9010", "3478-3479,5349-5350,7880-7881,8080,9000-9010,49152-65535"),
        (PORTS, "3480,48000-50000", "3478-3480,5349-5350,7880-7881,48000-65535"),
    ],
)
def test_what_others_have_set_is_joined(key: str, theirs: str, joined: str) -> None:
    assert sysctls.join(key, {BUFFER: "5000000", PORTS: RESERVED}[key], theirs) == joined
    assert sysctls.covers(key, joined, {BUFFER: "5000000", PORTS: RESERVED}[key])
    assert sysctls.covers(key, theirs, joined) == (theirs == joined)


RESERVED = "3478-3479,5349-5350,7880-7881,49152-65535"


def test_a_kernel_setting_of_others_is_neither_lowered_nor_replaced() -> None:
    here = declare(box(), SFU1)
    own = here.release.sysctls[PORTS]
    found = bare()
    found.elsewhere = {BUFFER: ("16000000", "/etc/sysctl.d/10-x.conf"), PORTS: ("8080", "-")}
    here.learn(found)
    assert here.release.sysctls[BUFFER] == "16000000"
    assert here.release.sysctls[PORTS] == sysctls.join(PORTS, own, "8080")
    text = here.release.files[sysctls.FILE].content.decode()
    assert f"{BUFFER} = 16000000\n" in text and "8080," in text
    facts = deployed(here.release)
    # More than that, by hand, is no drift.
    facts.sysctls |= {BUFFER: "32000000", PORTS: facts.sysctls[PORTS] + ",9999"}
    assert plan(here.release, facts).changes == []
    facts.sysctls |= {BUFFER: "5000000"}
    assert said(plan(here.release, facts)) == [f"~ sysctl {BUFFER} = 16000000"]


def test_what_a_later_file_takes_away_at_boot_is_a_note(release: Release) -> None:
    facts = deployed(release)
    facts.elsewhere = {BUFFER: ("212992", "/etc/sysctl.d/99-x.conf")}
    assert plan(release, facts).notes == [
        f"sysctl {BUFFER}: after a boot it is 212992, because /etc/sysctl.d/99-x.conf comes after "
        "/etc/sysctl.d/60-callready.conf: write 5000000 there, or take the line out"
    ]
    for value, file in (
        ("212992", "/etc/sysctl.d/10-x.conf"),
        ("212992", "-"),
        ("6000000", "/etc/sysctl.d/99-x.conf"),
    ):
        facts.elsewhere = {BUFFER: (value, file)}
        assert plan(release, facts).notes == []


def test_what_a_kernel_setting_was_is_noted_even_where_it_is_right(release: Release) -> None:
    facts = bare()
    facts.sysctls = dict(release.sysctls)
    assert "set_sysctls" in functions(plan(release, facts))


def test_a_port_that_was_reserved_for_us_alone_is_given_back(release: Release) -> None:
    """Somebody else's in its place would be no drift."""
    facts = deployed(release)
    facts.sysctls[PORTS] += ",9999"
    replace(facts, sysctls.FILE, sha256="0" * 64)
    assert "set_sysctls" in functions(plan(release, facts))


def test_whose_mask_it_is_is_noted_at_the_first_deploy(release: Release) -> None:
    facts = bare()
    facts.units["coturn.service"] = deployed(release).units["coturn.service"]
    assert "mask coturn.service" in functions(plan(release, facts))
    assert "+ mask coturn.service" not in said(plan(release, facts))


def test_a_sysctl_that_a_container_cannot_set_is_a_note(release: Release) -> None:
    facts = deployed(release)
    facts.sysctls["net.core.rmem_max"] = "-"
    made = plan(release, facts)
    assert (said(made), made.steps) == ([], [])
    assert made.notes == ["sysctl net.core.rmem_max: not applicable, this container cannot set it"]


def test_no_plan_shows_a_secret(release: Release) -> None:
    made = plan(release, bare())
    lines = [step.line for step in made.steps]
    shown = "\n".join([*said(made), *lines, *made.notes, release.manifest.text, repr(made)])
    assert not [name for name, value in SECRETS.items() if value in shown]
    assert release.certificates[SFU1].key.decode().splitlines()[1] not in shown


def test_the_release_is_named_after_what_it_is(release: Release) -> None:
    assert release.id == hashlib.sha256(release.manifest.text.encode()).hexdigest()[:16]
    assert re.fullmatch("[0-9a-f]{16}", release.id)
    assert declare(box(), SFU1).release.id == release.id
    assert declare(box((SFU1, "livekit.port", 7890)), SFU1).release.id != release.id


# The bundle


def members(bundle: str) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(bundle))) as tar:
        return {member.name: member for member in tar}


def content(bundle: str, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(bundle))) as tar:
        file = tar.extractfile(name)
        assert file
        return file.read()


def test_the_bundle_has_all_that_the_steps_and_the_manifest_name(release: Release) -> None:
    made = plan(release, bare())
    bundle = pack(release, made.steps)
    found = members(bundle)
    assert {"apply.sh", "manifest", "steps"} < found.keys()
    assert all(m.isfile() and m.mode == 0o600 for m in found.values())
    steps = content(bundle, "steps").decode()
    assert steps.splitlines() == [step.line for step in made.steps]
    assert content(bundle, "manifest").decode() == release.manifest.text
    hashes = {file.sha256 for file in release.manifest.files.values()}
    hashes |= {
        word
        for step in made.steps
        if step.function in ("write_rows", "install_pair")
        for word in shlex.split(step.line)
        if re.fullmatch("[0-9a-f]{64}", word)
    }
    assert {name.removeprefix("files/") for name in found if name.startswith("files/")} == hashes
    assert "environment/srv/app/.env" in found
    for name in hashes:
        assert hashlib.sha256(content(bundle, f"files/{name}")).hexdigest() == name


def test_secrets_are_in_the_bundles_files_and_nowhere_else(release: Release) -> None:
    bundle = pack(release, plan(release, bare()).steps)
    used = [SECRETS[name].encode() for name in ("livekit/api_secret", "turn/calls", "turn/avatar")]
    for name in members(bundle):
        if not name.startswith(("files/", "environment/")):
            assert not [value for value in used if value in content(bundle, name)], name
    inside = b"".join(content(bundle, name) for name in members(bundle) if "files/" in name)
    assert all(value in inside for value in used)


def test_every_step_is_a_function_of_the_script(release: Release) -> None:
    folder = Path(__file__).parents[2] / "callready/release/host"
    script = "".join((folder / name).read_text() for name in ("release.sh", "apply.sh"))
    defined = set(re.findall(r"(?m)^(\w+)\(\) *\{", script))
    for facts in (bare(), deployed(release)):
        have_another_certificate(facts)
        facts.manifest.units["old.service"] = UnitLine("old.service", "", "-", "restart", "-")
        facts.manifest.links["/etc/old"] = LinkLine("/etc/old", "/etc/older")
        assert {step.function for step in plan(release, facts).steps} <= defined


# Rows of coturn's user database, by the sqlite3 program that runs on a host


def rows(*items: tuple[str, str, str]) -> tuple[Row, ...]:
    return tuple((table, realm, SecretStr(value)) for table, realm, value in items)


def apply(path: Path, sql: SecretBytes | str) -> None:
    text = sql if isinstance(sql, str) else sql.get_secret_value().decode()
    subprocess.run(["sqlite3", "-bail", path], input=f".timeout 5000\n{text}".encode(), check=True)


def table(path: Path) -> set[tuple[str, ...]]:
    with sqlite3.connect(path) as database:
        return {
            (name, *row)
            for name in ("turn_secret", "turnusers_lt")
            for row in database.execute(f"SELECT * FROM {name}")
        }


@pytest.fixture
def database(tmp_path: Path) -> Path:
    apply(tmp_path / "calls.db", SCHEMA)
    return tmp_path / "calls.db"


def test_rows_become_exactly_what_is_declared(database: Path) -> None:
    secret, user = "turn_secret", "turnusers_lt"
    old = rows(
        (secret, "r.test", "old"),
        (secret, "s.test", "s"),
        (user, "r.test", "ann:aa"),
        (user, "r.test", "bob:bb"),
    )
    apply(database, rows_sql(old))
    assert table(database) == {
        ("turn_secret", "r.test", "old"),
        ("turn_secret", "s.test", "s"),
        ("turnusers_lt", "r.test", "ann", "aa"),
        ("turnusers_lt", "r.test", "bob", "bb"),
    }
    apply(database, rows_sql(old))
    assert len(table(database)) == 4
    new = rows(
        (secret, "r.test", "new"),
        (secret, "r.test", "old"),
        (user, "r.test", "bob:new"),
        (user, "s.test", "bob:bb"),
    )
    apply(database, rows_sql(new))
    assert table(database) == {
        ("turn_secret", "r.test", "new"),
        ("turn_secret", "r.test", "old"),
        ("turnusers_lt", "r.test", "bob", "new"),
        ("turnusers_lt", "s.test", "bob", "bb"),
    }
    apply(database, rows_sql(rows((secret, "r.test", "new"))))
    # Another realm is none of ours: somebody else has put it there.
    assert table(database) == {
        ("turn_secret", "r.test", "new"),
        ("turnusers_lt", "s.test", "bob", "bb"),
    }


@pytest.mark.parametrize(
    "value", ["it's", "'; DROP TABLE turn_secret; --", '"', "a:b", "ü", "%s\\"]
)
def test_a_secret_is_data_whatever_it_contains(database: Path, value: str) -> None:
    apply(database, rows_sql(rows(("turn_secret", "r.test", value))))
    assert table(database) == {("turn_secret", "r.test", value)}


def test_a_failing_statement_changes_nothing(database: Path) -> None:
    apply(database, rows_sql(rows(("turn_secret", "r.test", "old"))))
    fail = "BEGIN SELECT RAISE(ABORT, 'disk full'); END;"
    apply(database, f"CREATE TRIGGER full BEFORE DELETE ON turn_secret {fail}")
    with pytest.raises(subprocess.CalledProcessError):
        apply(database, rows_sql(rows(("turn_secret", "r.test", "new"))))
    assert table(database) == {("turn_secret", "r.test", "old")}


def test_fixed_users_are_stored_as_rfc_8489_keys_and_never_as_passwords() -> None:
    fleet = load(
        ("*", "turn.pools.calls.secrets", ...),
        ("*", "turn.pools.calls.users", {"bob": "secret:turn/user"}),
    )
    (row,) = declare(fleet, TURN1).release.databases[CALLS_DB]
    # printf %s bob:callready.test:unit-turn-fixed-user-password-0006 | md5sum
    assert row == ("turnusers_lt", "callready.test", SecretStr(f"bob:{BOB}"))
    made = plan(declare(fleet, TURN1).release, bare())
    assert f"+ row {CALLS_DB} callready.test user bob {row_hash(row)}" in said(made)


BOB = (
    subprocess.run(
        ["md5sum"],
        input=b"bob:callready.test:unit-turn-fixed-user-password-0006",
        capture_output=True,
        check=True,
    )
    .stdout[:32]
    .decode()
)


def test_an_edge_that_others_started_is_restarted_and_ours_is_reloaded() -> None:
    release = declare(box((SFU1, "edge", {}), (SFU1, "name", "turn.callready.test")), SFU1).release
    for fingerprint, step in (("-", "restart"), ("0" * 16, "reload")):
        facts = deployed(release)
        unit("haproxy.service", fingerprint=fingerprint)(facts)
        assert functions(plan(release, facts))[0] == f"{step} haproxy.service"

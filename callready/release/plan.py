"""The difference between what a host shall be and what it is: in words, and as the steps of
`host/apply.sh` that lead from one to the other."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import SecretBytes

from callready.release import sysctls
from callready.release.declaration import ROOT, Release, Row, Service
from callready.release.facts import Facts, FileFact, UnitFact
from callready.release.manifest import FORMAT, Manifest, UnitLine
from callready.release.programs import PACKAGES
from callready.settings.egress import FOLDER
from callready.settings.ports import EGRESS

NONE = "none"  # the release that a host has before its first one
# By which the history tells what was deployed together.
RUN = datetime.now(UTC).isoformat(timespec="milliseconds")
RULES = f"{ROOT}/nftables.conf"
REDIS_NEAR = 0.005  # seconds

Argument = str | SecretBytes


class Change(NamedTuple):
    """One line of the plan: `+` new, `~` changed, `-` gone, `!` a service interrupted."""

    mark: str
    kind: str
    what: str


class Step(NamedTuple):
    """A call of one of apply.sh's functions. Content among its arguments travels beside the
    script; the function is given its name."""

    function: str
    arguments: tuple[Argument, ...]

    @property
    def line(self) -> str:
        """The call as the shell reads it."""
        words = (
            content_name(each.get_secret_value()) if isinstance(each, SecretBytes) else each
            for each in self.arguments
        )
        return shlex.join([self.function, *words])

    @property
    def contents(self) -> list[bytes]:
        """The content among its arguments."""
        return [a.get_secret_value() for a in self.arguments if isinstance(a, SecretBytes)]


def step(function: str, *arguments: Argument) -> Step:
    """A call of one of apply.sh's functions."""
    return Step(function, arguments)


@dataclass
class Plan:
    """What would change on a host: `install` has the steps that install programs, `prepare` those
    that add what nothing uses yet, `switch` those that change what runs, `after` those that follow
    the confirmation, and `prune` those that, when the whole fleet is confirmed, take away what no
    host uses any more. `release` is what has to be confirmed (empty if files stay as they are),
    `running` the release that the plan was made for."""

    running: str = NONE
    verb: str = "deploy"
    release: str = ""
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    install: list[Step] = field(default_factory=list)
    prepare: list[Step] = field(default_factory=list)
    switch: list[Step] = field(default_factory=list)
    after: list[Step] = field(default_factory=list)
    prune: list[Step] = field(default_factory=list)
    drifted: list[str] = field(default_factory=list)  # edited on the host

    def add(self, mark: str, kind: str, what: str) -> None:
        """Note a change."""
        self.changes.append(Change(mark, kind, what))

    # Each script locks the host: the one that switches, if the host still has the release that the
    # plan was made for; the one after it by confirming.

    @property
    def installing(self) -> list[Step]:
        """The script that installs programs."""
        return [step("lock_host"), *self.install] if self.install else []

    @property
    def switching(self) -> list[Step]:
        """The script that prepares and switches."""
        steps = self.prepare + self.switch
        return [step("lock_host", self.running), *steps] if steps else []

    @property
    def confirming(self) -> list[Step]:
        """The script that confirms, and does what follows."""
        if self.release:
            return [step("confirm", self.release, self.verb, RUN), *self.after]
        return [step("lock_host"), *self.after] if self.after else []

    @property
    def pruning(self) -> list[Step]:
        """The script that takes away what nothing uses any more."""
        return [step("lock_host"), *self.prune] if self.prune else []

    @property
    def changes_host(self) -> bool:
        """Whether it switches or confirms anything."""
        return bool(self.switching or self.confirming)

    @property
    def steps(self) -> list[Step]:
        """All of them."""
        return self.installing + self.switching + self.confirming + self.pruning


def plan(release: Release, facts: Facts) -> Plan:
    """What it takes to bring a host from `facts` to `release`; empty if nothing."""
    made = Plan(running=facts.folder or NONE)
    _programs(made, release, facts)
    _rows(made, release, facts)
    _certificates(made, release, facts)
    _identities(made, release, facts)
    _files(made, release, facts)
    _kernel(made, release, facts)
    _environments(made, release, facts)
    _firewall(made, release, facts)
    _units(made, release, facts)
    _acme(made, release, facts)
    _timers(made, release, facts)
    _serving(made, release, facts)
    _redis(made, facts)
    _readers(made, release, facts)
    if made.release and not {"file", "link", "unit", "environment"} & {
        c.kind for c in made.changes
    }:
        why = _differing(facts.manifest, release.manifest)
        made.add("~", "release", f"{made.running} -> {made.release}: {why}")
    return made


def plan_return(
    release: Release, previous: str, manifest: Manifest, facts: Facts, verb: str
) -> Plan:
    """What it takes to have an earlier release again.

    Args:
        release: what the inventory says, for what a restart does to calls.
        previous: the earlier release's folder; `none`: what was before the first.
        manifest: of the earlier release.
        facts: what the host is.
        verb: `rollback`, or `remove`, after which nothing else of callready stays either.
    """
    made = Plan(running=facts.folder, verb=verb)
    if facts.folder:
        made.release = previous.partition("-")[0]
        made.add("~", "release", f"{facts.folder} -> {previous}")
        for unit in facts.manifest.units:
            _unit_returns(made, release, facts, unit, manifest.units.get(unit))
        made.switch = [
            step("arm", str(release.confirm_timeout), previous),
            step("return_to", previous),
        ]
    if verb == "remove" and facts.has_state:
        made.add("-", "callready", "and the packages and users it added")
        made.after.append(step("uninstall", *release.masks, *release.new_masks))
    return made


def _unit_returns(
    made: Plan, release: Release, facts: Facts, unit: str, earlier: UnitLine | None
) -> None:
    found, service = facts.units.get(unit), release.services.get(unit)
    if earlier is None:
        made.add("!", "unit", f"{unit}: stop")
    elif found and found.fingerprint == earlier.fingerprint:
        return
    elif earlier.how == "reload":
        made.add("~", "unit", f"{unit}: reload, no connection is dropped")
        return
    else:
        made.add("!", "unit", f"{unit}: restart, the earlier release has it otherwise")
    if service:
        _interrupt(made, release, facts, service)
    elif unit == EGRESS:
        _end_recordings(made, release, facts)


def _programs(made: Plan, release: Release, facts: Facts) -> None:
    missing = {
        names.partition(" | ")[0]: version
        for names, version in release.packages.items()
        if not any(name in facts.packages for name in names.split(" | "))
    }
    if missing:
        wanted = (f"{n}={v}" if v else n for n, v in missing.items())
        made.install.append(step("check_candidates", *wanted))
    new = [unit for unit, package in release.new_masks.items() if package in missing]
    for unit in [*release.masks, *new]:
        is_masked = unit in facts.units and facts.units[unit].load == "masked"
        if not is_masked:
            made.add("+", "mask", unit)
        if not is_masked or not facts.folder:  # whose mask it is, is noted at first
            made.install.append(step("mask", unit))
    for name, version in missing.items():
        made.add("+", "package", f"{name} {facts.candidates.get(name) or version}".strip())
    if missing:
        made.install.append(step("install_packages", *missing))
    for user in release.users:
        if user not in facts.users:
            made.add("+", "user", user)
            made.install.append(step("create_users", user))
    archive = release.archive
    if archive and archive.binary not in facts.binaries:
        name = f"livekit_{archive.version}_linux_{facts.arch}.tar.gz"
        made.add("+", "binary", archive.binary)
        sha256 = archive.sha256.get(facts.arch, "")
        made.install.append(
            step("install_livekit", archive.base_url, archive.version, name, sha256)
        )
    _image(made, release, facts)
    programs = release.programs
    if programs and programs.python not in facts.binaries:
        made.add("+", "binary", programs.python)
        contents = [PACKAGES.read_bytes(), programs.archive]
        arguments: list[Argument] = [SecretBytes(each) for each in contents]
        for wheel in programs.files():
            arguments += [wheel.name, SecretBytes(wheel.read_bytes())]
        name = programs.python.split("/")[3]
        made.install.append(step("install_programs", name, programs.index, *arguments))


def _image(made: Plan, release: Release, facts: Facts) -> None:
    why = (
        "the packet filter takes that user's containers for recordings: usermod(8) gives it others"
    )
    for line in release.subordinates:
        if any(line not in facts.subordinates.get(file, ()) for file in ("subuid", "subgid")):
            made.add("+", "range", f"{line} (subuid, subgid)")
            made.install.append(step("reserve_ids", line))
        made.notes += [f"{other} overlaps {line}: {why}" for other in _overlapping(line, facts)]
    image = release.image
    if image and image.reference not in facts.images:
        made.add("+", "image", f"{image.reference} ({image.version})")
        authority = [SecretBytes(image.authority)] if image.authority else []
        made.install.append(step("install_image", image.reference, str(image.user), *authority))


def _overlapping(line: str, facts: Facts) -> list[str]:
    """The lines of subuid(5) and subgid(5) of others whose numbers are also in this one's."""
    first, count = map(int, line.split(":")[1:])
    found = list[str]()
    for other in sorted(set[str]().union(*facts.subordinates.values()) - {line}):
        _, start, size = f"{other}::".split(":")[:3]
        is_range = start.isdigit() and size.isdigit()
        if is_range and int(start) < first + count and first < int(start) + int(size):
            found.append(other)
    return found


def _rows(made: Plan, release: Release, facts: Facts) -> None:
    for path, rows in release.databases.items():
        wanted = {row_hash(row): row for row in rows}
        have = facts.rows.get(path, set())
        for digest, row in wanted.items():
            if digest not in have:
                made.add("+", "row", f"{path} {_row_name(row)} {digest}")
        for digest in sorted(have - wanted.keys()):
            made.add("-", "row", f"{path} {digest}")
        if wanted.keys() - have or path not in facts.databases:
            made.prepare.append(step("write_rows", path, rows_sql(rows, prune=False)))
        if have - wanted.keys():
            made.prune.append(step("write_rows", path, rows_sql(rows)))


def _certificates(made: Plan, release: Release, facts: Facts) -> None:
    for name, c in release.certificates.items():
        if c.asked:
            if name not in facts.pairs:
                made.prepare.append(step("install_placeholder", name, c.group))
        elif c.digest != facts.pairs.get(name):
            made.add(
                "~" if name in facts.pairs else "+", "certificate", f"{name} serial {c.serial}"
            )
            chain, key = SecretBytes(c.chain), SecretBytes(c.key)
            made.prepare.append(step("install_pair", name, chain, key, c.group))


def _identities(made: Plan, release: Release, facts: Facts) -> None:
    for kind, identity in release.identities.items():
        assert release.authority
        found, why = facts.identities.get(kind), "there is none"
        if found:
            why = release.authority.refuses(identity, found.certificate)
            why = why or ("" if found.has_key else "the key is another one's")
        if why:
            made.add("~" if found else "+", "certificate", f"of the fleet for {kind}: {why}")
            certificate, key = map(SecretBytes, release.authority.issue(identity))
            made.prepare.append(step("install_identity", kind, certificate, key))
    for kind in facts.identities.keys() - release.identities.keys():
        made.add("-", "certificate", f"of the fleet for {kind}")
        made.after.append(step("drop_identity", kind))


def _files(made: Plan, release: Release, facts: Facts) -> None:
    running, before = facts.manifest, len(made.changes)
    for path, file in sorted(release.files.items()):
        found = facts.files.get(path)
        live = f"{ROOT}/current/files{path}"
        if found != FileFact(live, file.mode, file.owner, file.group, file.sha256):
            remark = ""
            if found and path in running.files and found.sha256 != running.files[path].sha256:
                made.drifted.append(path)
                remark = " (edited on the host since the last deploy)"
            elif facts.templates.get(path, file.template) != file.template:
                remark = " (callready's template of it has changed)"
            made.add("~" if found else "+", "file", path + remark)
    for path, target in sorted(release.links.items()):
        found = facts.files.get(path)
        if found is None or found.link != target:
            made.add("~" if found else "+", "link", path)
    units_gone = [
        unit
        for unit in (*running.units, *running.timers)
        if unit not in release.services.keys() | release.timers.keys()
    ]
    gone = [
        path
        for path in (*running.files, *running.links)
        if path not in release.files.keys() | release.links.keys()
    ]
    for unit in units_gone:
        made.add("-", "unit", unit)
    for path in gone:
        made.add("-", "file", path)
    if len(made.changes) == before and (not release.manifest or facts.current == release.id):
        return
    made.release = release.id
    made.prepare.append(step("stage", release.id))
    if EGRESS in units_gone:
        _end_recordings(made, release, facts)
    made.switch.append(step("arm", str(release.confirm_timeout)))
    # Before the manifest that names them is replaced: a run cut short is taken up again.
    if units_gone:
        # The last that was started goes first: what it ends with may need the others.
        made.switch.append(step("stop", *reversed(units_gone)))
    if RULES in gone:
        made.add("-", "firewall", "table inet callready")
        made.switch.append(step("unload_firewall"))
    if gone:
        made.switch.append(step("withdraw", *gone))
    made.switch += [step("activate"), step("reload_manager")]
    if running and not facts.templates and len(made.changes) > before:
        made.notes.append(
            f"release {facts.folder} does not say which templates it was made from (callready "
            "0.1.0): what differs may come from them (CHANGELOG.md), not from the inventory"
        )


def _differing(running: Manifest, wanted: Manifest) -> str:
    """Why a release is switched that changes no file, for people."""
    if running and running.format != wanted.format:
        return f"its manifest is in format {running.format}, now {FORMAT}"
    parts = [
        f.name for f in fields(Manifest) if getattr(running, f.name) != getattr(wanted, f.name)
    ]
    return f"its {' and '.join(parts)} differ" if parts else "its name differs"


def _kernel(made: Plan, release: Release, facts: Facts) -> None:
    wrong = False
    for key, value in release.sysctls.items():
        found = facts.sysctls.get(key, "")
        if found == "-":
            made.notes.append(f"sysctl {key}: not applicable, this container cannot set it")
        elif not sysctls.covers(key, found, value):
            wrong = True
            made.add("~", "sysctl", f"{key} = {value}")
        theirs, file = facts.elsewhere.get(key, (value, ""))
        if Path(file).name > Path(sysctls.FILE).name and not sysctls.covers(key, theirs, value):
            made.notes.append(
                f"sysctl {key}: after a boot it is {theirs}, because {file} comes after "
                f"{sysctls.FILE}: write {value} there, or take the line out"
            )
    # With a new file, too: what it was before callready is kept, and what was ours alone goes.
    ours, on_host = release.files.get(sysctls.FILE), facts.files.get(sysctls.FILE, FileFact())
    if wrong or (ours and ours.sha256 != on_host.sha256):
        made.switch.append(step("set_sysctls"))


def _redis(made: Plan, facts: Facts) -> None:
    if facts.redis_rtt > REDIS_NEAR:
        made.notes.append(
            f"Redis is {facts.redis_rtt * 1000:.1f} ms away (at most {REDIS_NEAR * 1000:.0f} are "
            "good): each message of a join goes there and back; put it nearer to this host"
        )


def _environments(made: Plan, release: Release, facts: Facts) -> None:
    for path, env in release.environments.items():
        found = facts.environments.get(path)
        if found is None or (found.mode, found.owner, found.sha256) != (
            0o600,
            env.owner,
            env.sha256,
        ):
            made.add("~" if found else "+", "environment", f"{path}: {', '.join(env.values)}")
            made.switch.append(step("write_environment", path, env.owner))


def _firewall(made: Plan, release: Release, facts: Facts) -> None:
    if not made.release and any(
        facts.units[unit].needs_reload for unit in release.services if unit in facts.units
    ):
        made.switch.append(step("reload_manager"))
    rules = release.files.get(RULES)
    if rules and facts.ruleset != rules.sha256:
        made.add("~" if facts.ruleset else "+", "firewall", "table inet callready")
        made.switch.append(step("load_firewall"))


def _units(made: Plan, release: Release, facts: Facts) -> None:
    for unit, service in release.services.items():
        found = facts.units.get(unit)
        if unit == EGRESS and facts.held and not (found and found.is_running):
            free, least = facts.held
            made.notes.append(
                f"{unit} takes no recordings until there is room, then starts by itself: "
                f"{_gigabytes(free)} are free in {FOLDER}, fewer than {_gigabytes(least)} "
                "(egress.min_free)"
            )
            continue
        needs = _needs(service, found)
        if not needs and unit in facts.outdated:
            needs = "!", "restart, its certificate of the fleet was replaced", "restart"
        if needs:
            mark, words, function = needs
            made.add(mark, "unit", f"{unit}: {words}")
            made.switch.append(step(function, unit))
            if mark == "!":
                _interrupt(made, release, facts, service)
            made.switch.append(step("wait_for_ports", unit, *service.listens))
        elif _serves_another(release, facts, unit):
            made.add("~", "unit", f"{unit}: reload its certificate, no call is touched")
            made.switch.append(step("reload", unit))


def _needs(service: Service, found: UnitFact | None) -> tuple[str, str, str] | None:
    """What a unit needs to run as declared: mark, words and function; None: nothing."""
    if found is None or not found.is_running:
        return "+", "start", "restart"
    if service.reloads and found.fingerprint not in (service.fingerprint, "-"):
        return "~", "reload, no connection is dropped", "reload"
    if found.fingerprint != service.fingerprint:
        return "!", "restart, its process is older than its configuration", "restart"
    if found.given != service.given:
        return "!", "restart, it was started with an edited file", "restart"
    if found.binary.endswith("(deleted)"):
        return "!", "restart, its binary was replaced", "restart"
    return None


def _serves_another(release: Release, facts: Facts, unit: str) -> bool:
    """Whether a unit serves another certificate than the one that is installed."""
    return any(
        owner == unit
        and facts.served.get((endpoint, c.name)) != (c.serial or facts.serials.get(c.name))
        for c in release.certificates.values()
        for endpoint, owner in c.endpoints
    )


def _interrupt(made: Plan, release: Release, facts: Facts, service: Service) -> None:
    """Say what it does to calls and recordings, and wait for them if that is wanted."""
    if service.unit == EGRESS:
        _end_recordings(made, release, facts)
    if not service.restart_means:
        return
    if service.drain is None:
        made.notes.append(f"restarting {service.unit}: {service.restart_means}")
        return
    ports = media_ports(facts, service)
    made.notes.append(
        f"restarting {service.unit} ({ports} media ports in use): {service.restart_means}"
    )
    if not release.drain:
        return
    seconds, media = str(release.drain), service.media or "-"
    if service.drain == "TERM":
        made.notes.append(
            f"waiting up to {seconds} s for them first, and for the WebSockets that it relays for "
            "other SFUs, which take its new calls. When it has been told, it takes no new rooms "
            "until it restarts: if the deploy is stopped (Ctrl-C) while it waits, nothing is "
            "switched, and it restarts when its calls have ended or that time is over"
        )
        signalling = service.listens[0]
        made.prepare.append(step("drain_node", seconds, signalling, media, *service.listens))
    else:
        new = "" if service.drain else "; it takes new calls all the while"
        made.notes.append(f"waiting up to {seconds} s for them first{new}")
        signal = service.drain or "-"
        made.prepare.append(step("drain", service.unit, signal, seconds, media, *service.listens))


def _end_recordings(made: Plan, release: Release, facts: Facts) -> None:
    """Say what becomes of the recordings of this host, and wait for them if that is wanted."""
    count, seconds = facts.recordings, release.egress_drain
    runs = f"{count or 'no'} {'recording runs' if count == 1 else 'recordings run'} now"
    wait = f"egress takes no new ones, up to {seconds} s are waited for those that run, and "
    then = f"what runs {'then' if seconds else 'when egress stops'} is ended, with complete files"
    made.notes.append(f"{runs}: {wait * bool(seconds)}{then}")
    if seconds:
        made.prepare.append(step("drain_egress", str(seconds)))


def _acme(made: Plan, release: Release, facts: Facts) -> None:
    unissued = release.unissued(facts)
    for c in unissued:
        if facts.asked.get(c.name) == c.request:
            made.add("~", "certificate", f"{c.name} from ACME again: its renewal failed")
        else:
            made.add("~" if c.name in facts.pairs else "+", "certificate", f"{c.name} from ACME")
        made.after.append(step("request_certificate", c.name, c.request, *c.asked))
    if unissued or any(
        facts.served.get((endpoint, c.name)) != facts.serials.get(c.name)
        for c in release.certificates.values()
        for endpoint, _ in c.endpoints
        if c.asked
    ):
        made.after.append(step("take_up"))
    for name, request in facts.asked.items():
        if request and not (name in release.certificates and release.certificates[name].asked):
            made.add("-", "certificate", f"{name} is not renewed any more")
            made.after.append(step("unask", name))


def _timers(made: Plan, release: Release, facts: Facts) -> None:
    for timer in release.timers:
        path = f"/etc/systemd/system/{timer}"
        found, file, on_host = (
            facts.units.get(timer),
            release.files.get(path),
            facts.files.get(path),
        )
        is_right = found and found.is_running and found.enabled == "enabled"
        if not is_right or (file and on_host and on_host.sha256 != file.sha256):
            made.add("+", "unit", f"{timer}: start")
            made.after.append(step("start_timer", timer))


def _serving(made: Plan, release: Release, facts: Facts) -> None:
    for c in release.certificates.values():
        for endpoint, _ in c.endpoints:
            if not c.asked and facts.served.get((endpoint, c.name)) != c.serial:
                made.switch.append(step("wait_for_certificate", endpoint, c.name, c.serial))


def _readers(made: Plan, release: Release, facts: Facts) -> None:
    for path, env in release.environments.items():
        found = facts.environments.get(path)
        # A restart since the last deploy may have read what somebody wrote in between.
        is_read = found and env.sha256 == found.sha256 == found.applied
        if is_read or not (env.units or env.commands):
            continue
        for unit in env.units:
            made.add("!", "unit", f"{unit}: restart, it reads {path}")
        for command in env.commands:
            made.add("!", "command", f"{command}: run, {path} changed")
        made.switch.append(
            step(
                "apply_environment", path, env.sha256, " ".join(env.units), "\n".join(env.commands)
            )
        )


def media_ports(facts: Facts, service: Service) -> int:
    """UDP ports that a unit has open beside its own: one for each relayed allocation of coturn, one
    or more for each participant of LiveKit."""
    ports = {i.port for i in facts.listeners if i.unit == service.unit and i.proto == "udp"}
    return len(ports - {int(port[4:]) for port in service.listens if port.startswith("udp/")})


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def content_name(content: bytes) -> str:
    """The name of a piece of content in the bundle."""
    return hashlib.sha256(content).hexdigest()


def row_hash(row: Row) -> str:
    """The name of a secret row in plans and surveys."""
    table, realm, value = row
    text = "\t".join((table, realm, value.get_secret_value()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _row_name(row: Row) -> str:
    table, realm, value = row
    if table == "turn_secret":
        return f"{realm} secret"
    return f"{realm} user {value.get_secret_value().partition(':')[0]}"


COLUMNS = {"turn_secret": ("realm", "value"), "turnusers_lt": ("realm", "name", "hmackey")}
"""Of coturn's user database (its schema.sql)."""


def rows_sql(rows: Iterable[Row], prune: bool = True) -> SecretBytes:
    """SQL that makes the tables hold these rows, and no other one of their realms if `prune`."""
    rows = list(rows)
    realms = ", ".join(sorted({f"'{realm}'" for _, realm, _ in rows}))
    sql = ["BEGIN IMMEDIATE;"]
    kept: dict[str, list[str]] = {table: [] for table in COLUMNS}
    for table, realm, secret in rows:
        columns = COLUMNS[table]
        texts = (realm, *secret.get_secret_value().split(":", len(columns) - 2))
        values = ["'" + text.replace("'", "''") + "'" for text in texts]
        into = f"{table} ({', '.join(columns)})"
        sql.append(f"INSERT OR REPLACE INTO {into} VALUES ({', '.join(values)});")
        pairs = zip(columns, values, strict=True)
        kept[table].append(" AND ".join(f"{column} = {value}" for column, value in pairs))
    for table, conditions in kept.items() if prune else ():
        where = " OR ".join(f"({condition})" for condition in conditions)
        but = f" AND NOT ({where})" if where else ""
        sql.append(f"DELETE FROM {table} WHERE realm IN ({realms}){but};")
    return SecretBytes("\n".join([*sql, "COMMIT;", ""]).encode())

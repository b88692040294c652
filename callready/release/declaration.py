"""What a host shall be: roles declare it here, `plan` compares it with what the host is, and
`bundle` packs what `host/apply.sh` needs to get there."""

from __future__ import annotations

import base64
import hashlib
import io
import shlex
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from callready.release.facts import HOST, EnvironmentFact, Facts, FileFact, host_script
from callready.release.render import render

ROOT = "/etc/callready"
NONE = "none"  # the release that a host has before its first one
# By which the history tells what was deployed together.
RUN = datetime.now(UTC).isoformat(timespec="milliseconds")
# What apply.sh finds beside itself.
SCRIPTS = {
    "apply.sh": HOST.joinpath("apply.sh").read_bytes(),
    "release": host_script("release.sh"),
    "certificates": host_script("certificates.sh"),
    "revert.service": HOST.joinpath("revert.service").read_bytes(),
    "boot.service": HOST.joinpath("boot.service").read_bytes(),
}


class File(NamedTuple):
    """A managed file; `secret` ones are never shown, only named."""

    content: bytes
    mode: int
    owner: str
    group: str
    secret: bool

    @property
    def sha256(self) -> str:
        """Of the content, hex."""
        return hashlib.sha256(self.content).hexdigest()


class Service(NamedTuple):
    """A unit that must run with exactly the inputs that `fingerprint` names, of which `given` are
    the SHA-256 of its credentials (sorted), and listen on `listens` (`udp/3478`); a `reloads` one
    takes new inputs without dropping a connection; `restart_means` is what a restart does to
    calls, `drain` the signal that makes it take no new ones (empty: it has none)."""

    unit: str
    fingerprint: str
    given: tuple[str, ...]
    listens: tuple[str, ...]
    reloads: bool = False
    restart_means: str = ""
    drain: str = ""


class Rows(NamedTuple):
    """The rows a coturn user database must hold: (table, realm, value) with value as
    `secret` or `name:hmackey`."""

    path: str
    rows: tuple[tuple[str, str, str], ...]


class Certificate(NamedTuple):
    """The certificate pair for a name, the group that reads it, and who serves it where:
    (`address:port`, unit). One that certbot gets on the host has no content here but `asked`,
    certbot's arguments."""

    name: str
    digest: str
    chain: bytes
    key: bytes
    serial: str
    group: str
    endpoints: tuple[tuple[str, str], ...]
    asked: tuple[str, ...] = ()

    @property
    def request(self) -> str:
        """What the authority is asked for, as noted on the host."""
        return hashlib.sha256("\0".join(self.asked).encode()).hexdigest()[:16]

    def path(self, file: str) -> str:
        """Where `fullchain.pem`, `privkey.pem` and `both.pem` are on the host."""
        return f"{ROOT}/tls/{self.name}/current/{file}"


class Environment(NamedTuple):
    """Our keys in an application's environment file, and what reads it."""

    path: str
    owner: str
    lines: tuple[str, ...]
    units: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the sorted lines, as the survey computes it."""
        return hashlib.sha256(
            "".join(f"{line}\n" for line in sorted(self.lines)).encode()
        ).hexdigest()

    @property
    def keys(self) -> list[str]:
        """The names before the equals signs."""
        return [line.partition("=")[0] for line in self.lines]


class Archive(NamedTuple):
    """A release of livekit-server to have installed."""

    base_url: str
    version: str
    sha256: Mapping[str, str]

    @property
    def binary(self) -> str:
        """Where it is installed."""
        return f"/opt/livekit/{self.version}/livekit-server"


class Change(NamedTuple):
    """One line of the plan: `+` new, `~` changed, `-` gone, `!` a service interrupted."""

    mark: str
    kind: str
    what: str


@dataclass
class Plan:
    """What would change on a host, in words and as the steps of apply.sh: `base` installs
    programs, `prepare` adds what nothing uses yet, `switch` changes what runs, `keep` follows the
    confirmation, and `prune`, when the whole fleet is confirmed, takes away what no host uses any
    more. `release` is what has to be confirmed (empty if files stay as they are)."""

    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    base: list[str] = field(default_factory=list)
    prepare: list[str] = field(default_factory=list)
    switch: list[str] = field(default_factory=list)
    keep: list[str] = field(default_factory=list)
    prune: list[str] = field(default_factory=list)
    drifted: list[str] = field(default_factory=list)  # edited on the host
    release: str = ""
    verb: str = "deploy"

    def add(self, mark: str, kind: str, what: str) -> None:
        """Note a change."""
        self.changes.append(Change(mark, kind, what))

    @property
    def steps(self) -> list[str]:
        """All of them."""
        return self.base + self.prepare + self.switch + self.keep + self.prune

    def take(self, folder: str) -> None:
        """Each script takes the host's lock; the one that switches, if the host still has the
        release that the plan was made for. The one after the confirmation begins with that."""
        if self.base:
            self.base.insert(0, step("lock_host"))
        if self.prepare or self.switch:
            self.prepare.insert(0, step("lock_host", folder))
        if self.release:
            self.keep.insert(0, step("confirm", self.release, self.verb, RUN))
        elif self.keep:
            self.keep.insert(0, step("lock_host"))
        if self.prune:
            self.prune.insert(0, step("lock_host"))


def step(function: str, *arguments: str) -> str:
    """A call of one of apply.sh's functions."""
    return shlex.join([function, *arguments])


@dataclass
class Release:
    """The declared state of one host. Roles fill it in; the order of declarations does not
    matter, except that units restart in the order they were declared."""

    files: dict[str, File] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    masks: list[str] = field(default_factory=list)
    packages: dict[str, str] = field(default_factory=dict)
    users: list[str] = field(default_factory=list)
    services: dict[str, Service] = field(default_factory=dict)
    sysctls: dict[str, str] = field(default_factory=dict)
    databases: dict[str, Rows] = field(default_factory=dict)
    certificates: dict[str, Certificate] = field(default_factory=dict)
    environments: dict[str, Environment] = field(default_factory=dict)
    timers: dict[str, str] = field(default_factory=dict)  # and the services they start
    promises: list[str] = field(default_factory=list)  # what callers get, as gate.promises says
    archive: Archive | None = None
    confirm_timeout: int = 60  # seconds
    drain: int = 0  # seconds

    def file(
        self,
        path: str,
        template: str | None = None,
        *,
        content: bytes = b"",
        mode: int = 0o644,
        owner: str = "root",
        group: str = "root",
        secret: bool = False,
        **context: Any,
    ) -> None:
        """A file at `path` from a template of `templates/` (or with `content`)."""
        body = render(template, **context) if template else content
        self.files[path] = File(body, mode, owner, group, secret)

    def package(self, name: str, version: str = "") -> None:
        """A Debian package, or `one | another` where any of them will do (the first is installed);
        `version` is the upstream version it must have."""
        self.packages[name] = version

    def user(self, name: str) -> None:
        """A system user without home or shell."""
        self.users.append(name)

    def mask(self, unit: str) -> None:
        """A unit that must never start by itself, masked before any package is installed."""
        self.masks.append(unit)

    def sysctl(self, key: str, value: str | int) -> None:
        """A kernel setting; where a host cannot set it, the plan says so."""
        self.sysctls[key] = str(value)

    def install(self, base_url: str, version: str, sha256: Mapping[str, str]) -> str:
        """A livekit-server release; returns the path of its binary."""
        self.archive = Archive(base_url, version, sha256)
        return self.archive.binary

    def service(
        self,
        unit: str,
        *,
        inputs: Iterable[str] = (),
        credentials: Iterable[str] = (),
        binary: str = "",
        listens: Iterable[str] = (),
        reloads: bool = False,
        restart_means: str = "",
        drain: str = "",
    ) -> None:
        """A unit that runs now with the declared contents of `inputs` (its unit file among them,
        where that is ours), of `credentials` (LoadCredential) and with `binary`.

        The process carries a fingerprint of all that in its environment, or notes it in
        /run/callready where it reloads, so "needs a restart" is a fact of the process, whichever
        run changed its files; the copies of its credentials tell whether somebody edited one and
        restarted it.
        """
        given = sorted(self.files[path].sha256 for path in credentials)
        inputs = list(inputs)
        parts = [self.files[path].sha256 for path in inputs] + given + [binary]
        read = b"".join(self.files[path].content for path in inputs)
        fingerprint = hashlib.sha256(read if reloads else "".join(parts).encode()).hexdigest()[:16]
        self.file(
            f"/etc/systemd/system/{unit}.d/callready.conf",
            "drop-in.conf.j2",
            fingerprint=fingerprint,
            unit=unit,
            reloads=reloads,
            inputs=" ".join(inputs),
        )
        if reloads:
            note = HOST.joinpath("note-inputs.sh").read_bytes()
            self.file("/usr/local/lib/callready/note-inputs", content=note, mode=0o755)
        self.services[unit] = Service(
            unit, fingerprint, tuple(given), tuple(listens), reloads, restart_means, drain
        )

    def enable(self, unit: str, unit_file: str, target: str = "multi-user.target") -> None:
        """Start `unit` at boot."""
        self.links[f"/etc/systemd/system/{target}.wants/{unit}"] = unit_file

    def secret_rows(self, path: str, rows: Iterable[tuple[str, str, str]]) -> None:
        """The rows of a coturn user database; coturn reads them live (no restart)."""
        self.databases[path] = Rows(path, tuple(rows))

    def environment(
        self,
        path: str,
        owner: str,
        values: Mapping[str, str],
        units: Iterable[str],
        commands: Iterable[str],
    ) -> None:
        """Keys of an application's environment file; other keys in it are kept."""
        lines = tuple(f"{key}={value}" for key, value in values.items())
        self.environments[path] = Environment(path, owner, lines, tuple(units), tuple(commands))

    def go_back(
        self, previous: str, manifest: Iterable[tuple[str, ...]], facts: Facts, verb: str
    ) -> Plan:
        """What it takes to have an earlier release again, with its manifest (`none`: what was
        before the first); with `remove` nothing else of callready stays either."""
        plan = Plan(verb=verb)
        if facts.folder:
            plan.release = previous.partition("-")[0]
            plan.add("~", "release", f"{facts.folder} -> {previous}")
            earlier = {line[1]: line for line in manifest if line[0] == "unit"}
            for _, unit, *_ in (line for line in facts.manifest if line[0] == "unit"):
                self._plan_return(plan, facts, unit, earlier.get(unit))
            plan.switch = [
                step("arm", str(self.confirm_timeout), previous),
                step("return_to", previous),
            ]
        if verb == "remove" and facts.has_state:
            plan.add("-", "callready", "and the packages and users it added")
            plan.keep.append(step("uninstall", *self.masks))
        plan.take(facts.folder)
        return plan

    def _plan_return(
        self, plan: Plan, facts: Facts, unit: str, earlier: tuple[str, ...] | None
    ) -> None:
        found, service = facts.units.get(unit), self.services.get(unit)
        if earlier is None:
            plan.add("!", "unit", f"{unit}: stop")
        elif found is None or found.fingerprint != earlier[2]:
            if earlier[4] == "reload":
                plan.add("~", "unit", f"{unit}: reload, no connection is dropped")
                return
            plan.add("!", "unit", f"{unit}: restart, the earlier release has it otherwise")
        else:
            return
        if service:
            self._interrupt(plan, facts, service)

    @property
    def manifest(self) -> str:
        """The release as text: every file with mode, owner and hash, every link and unit."""
        lines = [
            f"file\t{path}\t{f.mode:04o}\t{f.owner}\t{f.group}\t{f.sha256}"
            for path, f in sorted(self.files.items())
        ]
        lines += [f"link\t{path}\t{target}" for path, target in sorted(self.links.items())]
        lines += [
            "\t".join(
                [
                    "unit",
                    s.unit,
                    s.fingerprint,
                    "".join(f"{g}," for g in s.given) or "-",
                    "reload" if s.reloads else "restart",
                    " ".join(s.listens) or "-",
                ]
            )
            for s in self.services.values()
        ]
        lines += [f"timer\t{t}" for t in self.timers if f"/etc/systemd/system/{t}" in self.files]
        lines += [
            "\t".join(
                ["environment", e.path, e.owner, e.sha256, " ".join(e.units) or "-", *e.commands]
            )
            for e in self.environments.values()
        ]
        lines += [f"certificate\t{name}" for name in self.certificates]
        lines += [f"database\t{path}" for path in self.databases]
        lines += [f"promise\t{promise}" for promise in self.promises]
        return "".join(f"{line}\n" for line in lines)

    @property
    def id(self) -> str:
        """The release's name: what it is made of."""
        return hashlib.sha256(self.manifest.encode()).hexdigest()[:16]

    def survey_variables(self) -> dict[str, Iterable[str]]:
        """What `host/survey.sh` has to look at."""
        endpoints = [
            f"{endpoint},{c.name}"
            for c in self.certificates.values()
            for endpoint, _ in c.endpoints
        ]
        return {
            "FILES": [*self.files, *self.links],
            "PACKAGES": [name for item in self.packages for name in item.split(" | ")],
            "CANDIDATES": [name for name, version in self.packages.items() if version],
            "USERS": [*self.users, *(e.owner for e in self.environments.values())],
            "UNITS": [
                *self.services,
                *self.masks,
                *self.timers,
                *self.timers.values(),
                *(unit for e in self.environments.values() for unit in e.units),
                "firewalld.service",
            ],
            "SYSCTLS": self.sysctls,
            "DATABASES": self.databases,
            "TLS_ENDPOINTS": endpoints,
            "ENVIRONMENTS": [f"{e.path}:{','.join(e.keys)}" for e in self.environments.values()],
            "BINARIES": [self.archive.binary] if self.archive else [],
        }

    def plan(self, facts: Facts) -> Plan:
        """What it takes to bring a host from `facts` to this release; empty if nothing."""
        plan = Plan()
        self._plan_base(plan, facts)
        self._plan_state(plan, facts)
        changed = self._plan_files(plan, facts)
        self._plan_kernel(plan, facts)
        self._plan_environment(plan, facts)
        self._plan_units(plan, facts, changed)
        plan.take(facts.folder or NONE)
        return plan

    def _plan_base(self, plan: Plan, facts: Facts) -> None:
        missing = {
            names.partition(" | ")[0]: version
            for names, version in self.packages.items()
            if not any(name in facts.packages for name in names.split(" | "))
        }
        if missing:
            plan.base.append(
                step("check_candidates", *(f"{n}={v}" if v else n for n, v in missing.items()))
            )
        for unit in self.masks:
            if unit not in facts.units or facts.units[unit].load != "masked":
                plan.add("+", "mask", unit)
                plan.base.append(step("mask", unit))
        for name, version in missing.items():
            plan.add("+", "package", f"{name} {facts.candidates.get(name) or version}".strip())
        if missing:
            plan.base.append(step("install_packages", *missing))
        for user in self.users:
            if user not in facts.users:
                plan.add("+", "user", user)
                plan.base.append(step("create_users", user))
        if self.archive and self.archive.binary not in facts.binaries:
            name = f"livekit_{self.archive.version}_linux_{facts.arch}.tar.gz"
            plan.add("+", "binary", self.archive.binary)
            plan.base.append(
                step(
                    "install_livekit",
                    self.archive.base_url,
                    self.archive.version,
                    name,
                    self.archive.sha256.get(facts.arch, ""),
                )
            )

    def _plan_files(self, plan: Plan, facts: Facts) -> bool:
        changed = False
        for path, file in sorted(self.files.items()):
            found = facts.files.get(path)
            wanted = FileFact(
                f"{ROOT}/current/files{path}", file.mode, file.owner, file.group, file.sha256
            )
            if found != wanted:
                changed = True
                if drifted := self._drifted(facts, path, found):
                    plan.drifted.append(path)
                edited = " (edited on the host since the last deploy)" if drifted else ""
                plan.add("~" if found else "+", "file", path + edited)
        for path, target in sorted(self.links.items()):
            found = facts.files.get(path)
            if found is None or found.link != target:
                changed = True
                plan.add("~" if found else "+", "link", path)
        gone = [
            line[1]
            for line in facts.manifest
            if line[0] in ("file", "link") and line[1] not in self.files.keys() | self.links.keys()
        ]
        units_gone = [
            line[1]
            for line in facts.manifest
            if line[0] in ("unit", "timer")
            and line[1] not in self.services.keys() | self.timers.keys()
        ]
        for unit in units_gone:
            plan.add("-", "unit", unit)
        for path in gone:
            plan.add("-", "file", path)
        if changed or gone or (self.manifest and facts.current != self.id):
            changed = True
            plan.release = self.id
            plan.prepare.append(step("stage", self.id))
            plan.switch.append(step("arm", str(self.confirm_timeout)))
            # Before the manifest that names them is replaced: a run cut short is taken up again.
            if units_gone:
                plan.switch.append(step("stop", *units_gone))
            if f"{ROOT}/nftables.conf" in gone:
                plan.add("-", "firewall", "table inet callready")
                plan.switch.append(step("unload_firewall"))
            if gone:
                plan.switch.append(step("withdraw", *gone))
            plan.switch.append(step("activate"))
            plan.switch.append(step("reload_manager"))
        return changed

    def _drifted(self, facts: Facts, path: str, found: FileFact | None) -> bool:
        """Whether the host's file is not what the last release put there."""
        return any(
            found and line[:2] == ("file", path) and found.sha256 != line[5]
            for line in facts.manifest
        )

    def _plan_state(self, plan: Plan, facts: Facts) -> None:
        for path, item in self.databases.items():
            wanted = {row_hash(row) for row in item.rows}
            have = facts.rows.get(path, set())
            for row in item.rows:
                if row_hash(row) not in have:
                    plan.add("+", "row", f"{path} {_row_name(row)} {row_hash(row)}")
            for digest in sorted(have - wanted):
                plan.add("-", "row", f"{path} {digest}")
            if wanted - have or path not in facts.databases:
                plan.prepare.append(
                    step("write_rows", path, content_name(rows_sql(item, prune=False)))
                )
            if have - wanted:
                plan.prune.append(step("write_rows", path, content_name(rows_sql(item))))
        for name, c in self.certificates.items():
            if c.asked:
                if name not in facts.pairs:
                    plan.prepare.append(step("install_placeholder", name, c.group))
            elif c.digest != facts.pairs.get(name):
                mark = "~" if name in facts.pairs else "+"
                plan.add(mark, "certificate", f"{name} serial {c.serial}")
                plan.prepare.append(
                    step("install_pair", name, content_name(c.chain), content_name(c.key), c.group)
                )

    def _plan_kernel(self, plan: Plan, facts: Facts) -> None:
        wrong = [key for key, value in self.sysctls.items() if _differs(facts, key, value)]
        for key in wrong:
            plan.add("~", "sysctl", f"{key} = {self.sysctls[key]}")
        if wrong:
            plan.switch.append(step("set_sysctls"))
        for key in self.sysctls:
            if facts.sysctls.get(key) == "-":
                plan.notes.append(f"sysctl {key}: not applicable, this container cannot set it")

    def _plan_environment(self, plan: Plan, facts: Facts) -> None:
        for path, env in self.environments.items():
            mode = EnvironmentFact(0o600, env.owner, env.sha256, "")
            found = facts.environments.get(path)
            if found is None or (found.mode, found.owner, found.sha256) != mode_of(mode):
                plan.add("~" if found else "+", "environment", f"{path}: {', '.join(env.keys)}")
                plan.switch.append(step("write_environment", path, env.owner))

    def _plan_units(self, plan: Plan, facts: Facts, changed: bool) -> None:
        stale = [
            unit
            for unit in facts.units
            if facts.units[unit].needs_reload and not changed and unit in self.services
        ]
        if stale:
            plan.switch.append(step("reload_manager"))
        firewall = self.files.get(f"{ROOT}/nftables.conf")
        if firewall and facts.ruleset != f"{firewall.sha256}":
            plan.add("~" if facts.ruleset else "+", "firewall", "table inet callready")
            plan.switch.append(step("load_firewall"))
        for unit, service in self.services.items():
            found = facts.units.get(unit)
            if found is None or not found.is_running:
                plan.add("+", "unit", f"{unit}: start")
                plan.switch.append(step("restart", unit))
            elif service.reloads and found.fingerprint not in (service.fingerprint, "-"):
                plan.add("~", "unit", f"{unit}: reload, no connection is dropped")
                plan.switch.append(step("reload", unit))
            elif found.fingerprint != service.fingerprint:
                plan.add(
                    "!", "unit", f"{unit}: restart, its process is older than its configuration"
                )
                plan.switch.append(step("restart", unit))
            elif found.given != service.given:
                plan.add("!", "unit", f"{unit}: restart, it was started with an edited file")
                plan.switch.append(step("restart", unit))
            elif found.binary.endswith("(deleted)"):
                plan.add("!", "unit", f"{unit}: restart, its binary was replaced")
                plan.switch.append(step("restart", unit))
            else:
                self._plan_reload(plan, facts, unit)
                continue
            if plan.changes[-1].mark == "!":
                self._interrupt(plan, facts, service)
            plan.switch.append(step("wait_for_ports", unit, *service.listens))
        self._plan_acme(plan, facts)
        for c in self.certificates.values():
            for endpoint, _unit in c.endpoints:
                if not c.asked and facts.served.get((endpoint, c.name)) != c.serial:
                    plan.switch.append(step("wait_for_certificate", endpoint, c.name, c.serial))
        for path, env in self.environments.items():
            found_env = facts.environments.get(path)
            # A restart since the last deploy may have read what somebody wrote in between.
            is_read = found_env and env.sha256 == found_env.sha256 == found_env.applied
            if not is_read and (env.units or env.commands):
                for unit in env.units:
                    plan.add("!", "unit", f"{unit}: restart, it reads {path}")
                for command in env.commands:
                    plan.add("!", "command", f"{command}: run, {path} changed")
                plan.switch.append(
                    step(
                        "apply_environment",
                        path,
                        env.sha256,
                        " ".join(env.units),
                        "\n".join(env.commands),
                    )
                )

    def _interrupt(self, plan: Plan, facts: Facts, service: Service) -> None:
        """Say what it does to calls, and wait for them if that is wanted."""
        if not service.restart_means:
            return
        ports = media_ports(facts, service)
        plan.notes.append(
            f"restarting {service.unit} ({ports} media ports in use): {service.restart_means}"
        )
        if self.drain:
            plan.notes.append(f"waiting up to {self.drain} s for them first{_new_calls(service)}")
            plan.prepare.append(
                step("drain", service.unit, service.drain or "-", str(self.drain), *service.listens)
            )

    def unissued(self, facts: Facts) -> list[Certificate]:
        """The certificates that the ACME server has to be asked for: those it was not asked for
        in this way yet, and all after a renewal that failed."""
        failed = any(
            unit in facts.units and facts.units[unit].active == "failed"
            for unit in self.timers.values()
        )
        return [
            c
            for c in self.certificates.values()
            if c.asked and (failed or facts.asked.get(c.name) != c.request)
        ]

    def _plan_acme(self, plan: Plan, facts: Facts) -> None:
        unissued = self.unissued(facts)
        for c in unissued:
            if facts.asked.get(c.name) == c.request:
                plan.add("~", "certificate", f"{c.name} from ACME again: its renewal failed")
            else:
                plan.add(
                    "~" if c.name in facts.pairs else "+", "certificate", f"{c.name} from ACME"
                )
            plan.keep.append(step("request_certificate", c.name, c.request, *c.asked))
        if unissued or any(
            facts.served.get((endpoint, c.name)) != facts.serials.get(c.name)
            for c in self.certificates.values()
            for endpoint, _ in c.endpoints
            if c.asked
        ):
            plan.keep.append(step("take_up"))
        for name, request in facts.asked.items():
            if request and not (name in self.certificates and self.certificates[name].asked):
                plan.add("-", "certificate", f"{name} is not renewed any more")
                plan.keep.append(step("unask", name))
        for timer in self.timers:
            found, file = facts.units.get(timer), self.files.get(f"/etc/systemd/system/{timer}")
            on_host = facts.files.get(f"/etc/systemd/system/{timer}")
            is_right = found and found.is_running and found.enabled == "enabled"
            if not is_right or (file and on_host and on_host.sha256 != file.sha256):
                plan.add("+", "unit", f"{timer}: start")
                plan.keep.append(step("start_timer", timer))

    def _plan_reload(self, plan: Plan, facts: Facts, unit: str) -> None:
        if any(
            owner == unit
            and facts.served.get((endpoint, c.name)) != (c.serial or facts.serials.get(c.name))
            for c in self.certificates.values()
            for endpoint, owner in c.endpoints
        ):
            plan.add("~", "unit", f"{unit}: reload its certificate, no call is touched")
            plan.switch.append(step("reload", unit))

    def bundle(self, steps: Iterable[str]) -> str:
        """What apply.sh needs to run `steps`, as base64 of a compressed tar archive."""
        contents = {f.sha256: f.content for f in self.files.values()}
        blobs = [rows_sql(i, prune) for i in self.databases.values() for prune in (False, True)]
        blobs += [blob for c in self.certificates.values() for blob in (c.chain, c.key)]
        contents |= {content_name(blob): blob for blob in blobs}
        members = {
            **SCRIPTS,
            "manifest": self.manifest.encode(),
            "steps": "".join(f"{line}\n" for line in steps).encode(),
            **{f"files/{name}": content for name, content in contents.items()},
            **{f"environment{e.path}": _lines(e) for e in self.environments.values()},
        }
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(content), 0o600
                tar.addfile(info, io.BytesIO(content))
        return base64.encodebytes(buffer.getvalue()).decode()


def content_name(content: bytes) -> str:
    """The name of a piece of content in the bundle."""
    return hashlib.sha256(content).hexdigest()


def mode_of(fact: EnvironmentFact) -> tuple[int, str, str]:
    """What of an environment file must be as declared."""
    return fact.mode, fact.owner, fact.sha256


def _new_calls(service: Service) -> str:
    return "" if service.drain else "; it takes new calls all the while"


def media_ports(facts: Facts, service: Service) -> int:
    """UDP ports that a unit has open beside its own: one for each relayed allocation of coturn, one
    or more for each participant of LiveKit."""
    ports = {i.port for i in facts.listeners if i.unit == service.unit and i.proto == "udp"}
    return len(ports - {int(port[4:]) for port in service.listens if port.startswith("udp/")})


def row_hash(row: tuple[str, str, str]) -> str:
    """The name of a secret row in plans and surveys."""
    return hashlib.sha256("\t".join(row).encode()).hexdigest()[:16]


def _row_name(row: tuple[str, str, str]) -> str:
    table, realm, value = row
    return (
        f"{realm} user {value.partition(':')[0]}" if table == "turnusers_lt" else f"{realm} secret"
    )


def rows_sql(item: Rows, prune: bool = True) -> bytes:
    """SQL that makes the tables hold these rows, and no other one if `prune`."""

    def quote(text: str) -> str:
        return "'" + text.replace("'", "''") + "'"

    sql = ["BEGIN IMMEDIATE;"]
    keep: dict[str, list[str]] = {"turn_secret": [], "turnusers_lt": []}
    for table, realm, value in item.rows:
        name, _, key = value.partition(":")
        columns, values = ("realm, value", (realm, value))
        if table == "turnusers_lt":
            columns, values = ("realm, name, hmackey", (realm, name, key))  # type: ignore[assignment]
        sql.append(
            f"INSERT OR REPLACE INTO {table} ({columns}) VALUES ({', '.join(map(quote, values))});"
        )
        condition = zip(columns.split(", "), values, strict=True)
        keep[table].append(" AND ".join(f"{column} = {quote(v)}" for column, v in condition))
    for table, conditions in keep.items() if prune else ():
        where = " OR ".join(f"({condition})" for condition in conditions)
        sql.append(f"DELETE FROM {table}" + (f" WHERE NOT ({where});" if where else ";"))
    return "\n".join([*sql, "COMMIT;", ""]).encode()


def _lines(env: Environment) -> bytes:
    return "".join(f"{line}\n" for line in env.lines).encode()


def _differs(facts: Facts, key: str, wanted: str) -> bool:
    found = facts.sysctls.get(key, "")
    return found != "-" and found.split() != wanted.split()

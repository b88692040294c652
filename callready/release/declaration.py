"""What a host shall be: the roles in `tasks/` declare it here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import SecretStr

from callready.release.authority import Authority, Identity
from callready.release.facts import HOST, Facts
from callready.release.manifest import (
    EnvironmentLine,
    FileLine,
    LinkLine,
    Manifest,
    NameLine,
    Promise,
    UnitLine,
    words,
)
from callready.release.programs import Programs
from callready.release.render import digest, render
from callready.settings.fleet import FLEET_CA

ROOT = "/etc/callready"

Row = tuple[str, str, SecretStr]
"""A row of coturn's user database: table, realm, and the secret or `name:hmackey`."""


@dataclass(frozen=True)
class File:
    """A managed file, and the digest of the template that it was made from."""

    content: bytes = field(repr=False)
    mode: int
    owner: str
    group: str
    template: str = ""

    @property
    def sha256(self) -> str:
        """Of the content, hex."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Service:
    """A unit that must run with exactly the inputs that `fingerprint` names, of which `given` are
    the SHA-256 of its credentials (sorted), and listen on `listens` (`udp/3478`); a `reloads` one
    takes new inputs without dropping a connection; `restart_means` is what a restart does to
    calls, `drain` the signal that makes it take no new ones (empty: it has none; None: it has no
    calls to wait for; TERM: others take its new rooms), `media` the one of its TCP ports to which
    calls connect beside UDP."""

    unit: str
    fingerprint: str
    given: tuple[str, ...]
    listens: tuple[str, ...]
    reloads: bool = False
    restart_means: str = ""
    drain: str | None = ""
    media: str = ""

    @property
    def line(self) -> UnitLine:
        """As the manifest has it."""
        given, how = "".join(f"{digest}," for digest in self.given), ("restart", "reload")
        listens = words(self.listens)
        return UnitLine(self.unit, self.fingerprint, given or "-", how[self.reloads], listens)


@dataclass(frozen=True)
class Certificate:
    """The certificate pair for a name, the group that reads it, and who serves it where:
    (`address:port`, unit). One that certbot gets on the host has no content here but `asked`,
    certbot's arguments."""

    name: str
    digest: str
    chain: bytes
    key: bytes = field(repr=False)
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


@dataclass(frozen=True)
class Environment:
    """Our keys in an application's environment file, and what reads it."""

    owner: str
    values: Mapping[str, SecretStr]
    units: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def text(self) -> SecretStr:
        """The lines as they stand in the file."""
        lines = (f"{key}={value.get_secret_value()}\n" for key, value in self.values.items())
        return SecretStr("".join(lines))

    @property
    def sha256(self) -> str:
        """Of the sorted lines, as the survey computes it."""
        lines = sorted(self.text.get_secret_value().splitlines(keepends=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Archive:
    """A release of livekit-server to have installed."""

    base_url: str
    version: str
    sha256: Mapping[Any, str]

    @property
    def binary(self) -> str:
        """Where it is installed."""
        return f"/opt/livekit/{self.version}/livekit-server"


@dataclass(frozen=True)
class Image:
    """A container's image to have pulled: NAME@DIGEST, of which version, the number of its user,
    and the authority (PEM) that its registry's HTTPS is signed by, if not a public one."""

    reference: str
    version: str
    user: int
    authority: bytes = b""


@dataclass
class Release:
    """The declared state of one host. Roles fill it in; the order of declarations does not
    matter, except that units restart in the order they were declared."""

    files: dict[str, File] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    masks: list[str] = field(default_factory=list)
    new_masks: dict[str, str] = field(default_factory=dict)  # unit to package
    packages: dict[str, str] = field(default_factory=dict)
    users: list[str] = field(default_factory=list)
    services: dict[str, Service] = field(default_factory=dict)
    sysctls: dict[str, str] = field(default_factory=dict)
    databases: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    certificates: dict[str, Certificate] = field(default_factory=dict)
    identities: dict[str, Identity] = field(default_factory=dict)
    authority: Authority | None = None
    environments: dict[str, Environment] = field(default_factory=dict)
    timers: dict[str, str] = field(default_factory=dict)  # and the services they start
    promises: list[Promise] = field(default_factory=list)
    archive: Archive | None = None
    programs: Programs | None = None
    image: Image | None = None
    redis: tuple[str, int] | None = None  # of its SFU, if that is elsewhere: name or address, port
    subordinates: list[str] = field(default_factory=list)  # lines of subuid(5)
    confirm_timeout: int = 60  # seconds
    drain: int = 0  # seconds
    egress_drain: int = 0  # seconds

    def file(
        self,
        path: str,
        template: str | None = None,
        *,
        content: bytes = b"",
        mode: int = 0o644,
        owner: str = "root",
        group: str = "root",
        **context: Any,
    ) -> None:
        """A file at `path` from a template of `templates/` (or with `content`)."""
        body = render(template, **context) if template else content
        origin = digest(template) if template else ""
        self.files[path] = File(body, mode, owner, group, origin)

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

    def mask_new(self, unit: str, package: str = "") -> None:
        """A unit that its package (of the same name, or what that comes with) must not start when
        callready installs it; on a host that has the package it is the operator's."""
        self.new_masks[unit] = package or unit.rpartition(".")[0]

    def sysctl(self, key: str, value: str | int) -> None:
        """A kernel setting; where a host cannot set it, the plan says so."""
        self.sysctls[key] = str(value)

    def install(self, base_url: str, version: str, sha256: Mapping[Any, str]) -> str:
        """A livekit-server release; returns the path of its binary."""
        self.archive = Archive(base_url, version, sha256)
        return self.archive.binary

    def install_image(self, reference: str, version: str, user: int, authority: bytes) -> None:
        """A container's image, as `Image` has it."""
        self.image = Image(reference, version, user, authority)

    def reserve_ids(self, name: str, first: int, count: int) -> None:
        """User and group numbers of the host for what runs in a container (subuid(5))."""
        self.subordinates = [f"{name}:{first}:{count}"]

    def service(
        self,
        unit: str,
        *,
        inputs: Iterable[str] = (),
        credentials: Iterable[str] = (),
        binary: str = "",
        listens: Iterable[str] = (),
        reloads: bool = False,
        in_container: bool = False,
        restart_means: str = "",
        drain: str | None = "",
        media: str = "",
    ) -> None:
        """A unit that runs now with the declared contents of `inputs` (its unit file among them,
        where that is ours), of `credentials` (LoadCredential) and with `binary`.

        The process carries a fingerprint of all that in its environment, or, where it reloads or is
        a container's and has another environment, notes it in /run/callready. So "needs a restart"
        is a fact of the process, whichever run changed its files; the copies of its credentials
        tell whether somebody edited one and restarted it.
        """
        given = sorted(self.files[path].sha256 for path in credentials)
        inputs = list(inputs)
        parts = [self.files[path].sha256 for path in inputs] + given + [binary]
        read = b"".join(self.files[path].content for path in inputs)
        is_noted = reloads or in_container
        fingerprint = hashlib.sha256(read if is_noted else "".join(parts).encode()).hexdigest()[:16]
        self.file(
            f"/etc/systemd/system/{unit}.d/callready.conf",
            "drop-in.conf.j2",
            fingerprint=fingerprint,
            unit=unit,
            reloads=reloads,
            is_noted=is_noted,
            inputs=" ".join(inputs),
        )
        if is_noted:
            note = HOST.joinpath("note-inputs.sh").read_bytes()
            self.file("/usr/local/lib/callready/note-inputs", content=note, mode=0o755)
        self.services[unit] = Service(
            unit,
            fingerprint,
            tuple(given),
            tuple(listens),
            reloads,
            restart_means,
            drain,
            media,
        )

    def enable(self, unit: str, unit_file: str, target: str = "multi-user.target") -> None:
        """Start `unit` at boot."""
        self.links[f"/etc/systemd/system/{target}.wants/{unit}"] = unit_file

    def secret_rows(self, path: str, rows: Iterable[Row]) -> None:
        """The rows of a coturn user database; coturn reads them live (no restart)."""
        self.databases[path] = tuple(rows)

    def identity(
        self, kind: str, secrets: Sequence[SecretStr], identity: Identity
    ) -> tuple[str, ...]:
        """A certificate of the fleet's authority, whose own is FLEET_CA.

        Args:
            kind: what the host has it for, such as `host`.
            secrets: what the authority's key is made from; those of others that are accepted
                come after the one that signs.
            identity: what it says.

        Returns:
            What a unit loads as credentials to have it: it restarts when they change.
        """
        self.authority = self.trust(secrets)[0]
        self.identities[kind] = identity
        folder = f"{ROOT}/fleet/{kind}"
        return (f"fleet.cert:{folder}/cert.pem", f"fleet.key:{folder}/key.pem")

    def trust(self, secrets: Sequence[SecretStr]) -> list[Authority]:
        """The authorities of the fleet that the host accepts, in FLEET_CA."""
        authorities = [Authority(secret) for secret in secrets]
        self.file(FLEET_CA, content=b"".join(each.certificate for each in authorities))
        return authorities

    def environment(
        self,
        path: str,
        owner: str,
        values: Mapping[str, str | SecretStr],
        units: Iterable[str],
        commands: Iterable[str],
    ) -> None:
        """Keys of an application's environment file; other keys in it are kept."""
        hidden = {
            key: value if isinstance(value, SecretStr) else SecretStr(value)
            for key, value in values.items()
        }
        self.environments[path] = Environment(owner, hidden, tuple(units), tuple(commands))

    @property
    def manifest(self) -> Manifest:
        """The release as it is noted on the host."""
        files = (
            FileLine(path, f"{f.mode:04o}", f.owner, f.group, f.sha256)
            for path, f in sorted(self.files.items())
        )
        return Manifest(
            files={line.path: line for line in files},
            links={path: LinkLine(path, target) for path, target in sorted(self.links.items())},
            units={unit: service.line for unit, service in self.services.items()},
            timers={
                t: NameLine(t) for t in self.timers if f"/etc/systemd/system/{t}" in self.files
            },
            environments={
                path: EnvironmentLine(
                    path, e.owner, e.sha256, words(e.units), "\t".join(e.commands)
                )
                for path, e in self.environments.items()
            },
            certificates={name: NameLine(name) for name in self.certificates},
            databases={path: NameLine(path) for path in self.databases},
            promises=self.promises,
        )

    @property
    def id(self) -> str:
        """The release's name: what it is made of."""
        return self.manifest.id

    @property
    def templates(self) -> dict[str, str]:
        """The digest of the template of each file that has one: noted beside the manifest, so
        that a later callready can say whether a file changes because its template did."""
        return {path: file.template for path, file in self.files.items() if file.template}

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
            "DATABASES": [
                f"{path}:{','.join(sorted({realm for _, realm, _ in rows}))}"
                for path, rows in self.databases.items()
            ],
            "TLS_ENDPOINTS": endpoints,
            "ENVIRONMENTS": [
                f"{path}:{','.join(e.values)}" for path, e in self.environments.items()
            ],
            "PLACES": [*self.files, *self.links, *self.databases, *self.environments],
            "REDIS": map(str, self.redis or ()),
            "IMAGES": [self.image.reference] if self.image else [],
            "BINARIES": [
                *([self.archive.binary] if self.archive else []),
                *([self.programs.python] if self.programs else []),
            ],
        }

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

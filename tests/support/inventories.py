"""An inventory's host data as pyinfra merges it, three hosts as production has them, and what a
survey finds on a host: tests make one change at a time to either."""

import copy
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID

from callready.release.declaration import ROOT, Release
from callready.release.facts import EnvironmentFact, Facts, FileFact, UnitFact
from callready.release.plan import row_hash
from callready.secrets.loading import validate
from callready.settings.fleet import Fleet
from callready.settings.problem import SettingsError

SERVER = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
SHA256 = hashes.SHA256()
SOURCE = "inventories/test"
SFU1, TURN1, TURN2 = "sfu1.callready.test", "turn1.callready.test", "turn2.callready.test"
MON1, REC1 = "mon1.callready.test", "rec1.callready.test"

Edit = tuple[str, str, Any]  # inventory name or "*", dotted path, value (... takes the key out)

# Not one of them is a value of production; each is long enough and they all differ.
SECRETS = {
    "livekit/api_secret": "unit-livekit-api-secret-000000001",
    "livekit/prometheus": "unit-livekit-prometheus-000000002",
    "livekit/second": "unit-livekit-second-key-000000003",
    "turn/calls": "unit-turn-calls-shared-secret-0004",
    "turn/avatar": "unit-turn-avatar-shared-secret-005",
    "turn/user": "unit-turn-fixed-user-password-0006",
    "redis/password": "unit-redis",
    "redis/livekit": "unit-redis-livekit-password-0000009",
    "redis/egress": "unit-redis-egress-password-00000010",
    "egress/livekit": "unit-livekit-key-of-egress-000011",
    "egress/s3": "unit-s3",
    "sudo/prod": "unit-sudo",
    "fleet/ca": "unit-fleet-authority-00000000007",
    "monitor/password": "unit-monitor-password-0000000008",
    "short": "unit-only-31-characters-long-00",
}

CALLS = {"realm": "callready.test", "secrets": ["secret:turn/calls"]}
GROUP = {
    "ssh_user": "debian",
    "livekit": {
        "url": "wss://livekit.callready.test",
        "keys": {"APIunit": "secret:livekit/api_secret"},
    },
    "turn": {
        "pools": {
            "calls": CALLS,
            "avatar": {
                "realm": "avatar.callready.test",
                "secrets": ["secret:turn/avatar"],
                "peers": "internet",
            },
        }
    },
    "tls": {"certificate": "certificates/chain.pem", "key": "certificates/key.pem"},
}
HOSTS = {
    SFU1: {"groups": ["livekit"], "address": "192.0.2.11", "address6": "2001:db8::11"},
    TURN1: {
        "groups": ["turn"],
        "address": "192.0.2.21",
        "address6": "2001:db8::21",
        "pools": ["calls"],
    },
    TURN2: {"groups": ["turn"], "address": "192.0.2.22", "pools": ["avatar"]},
}


def merged(*edits: Edit) -> dict[str, dict[str, Any]]:
    """The data of every host after `edits`."""
    data = {name: copy.deepcopy({**GROUP, **own}) for name, own in HOSTS.items()}
    for host, path, value in edits:
        for name in data if host == "*" else [host]:
            *parents, key = path.split(".")
            section: dict[str, Any] = data.setdefault(name, {})
            for parent in parents:
                section = section.setdefault(parent, {})
            if value is ...:
                del section[key]
            else:
                section[key] = copy.deepcopy(value)
    return data


def load(*edits: Edit) -> Fleet:
    """The fleet of the three hosts after `edits`; raises SettingsError."""
    return validate(SOURCE, merged(*edits))


def said(*edits: Edit) -> list[str]:
    """The lines of the error, each without the inventory it starts with."""
    with pytest.raises(SettingsError) as error:
        load(*edits)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{SOURCE}: ") for line in lines)
    return [line.removeprefix(f"{SOURCE}: ") for line in lines]


def write_store(entries: dict[str, str]) -> Path:
    """The secrets file of the inventory, below the working folder."""
    path = Path(f"{SOURCE}.secrets.yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(entries))
    path.chmod(0o600)
    return path


def _common(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


class Authority:
    """Signs certificates for tests; every file is new."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _common("callready unit test authority")
        folder.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC)
        own = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(self.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=30))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, SHA256)
        )
        self.file = str(folder / "ca.pem")
        Path(self.file).write_bytes(own.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        *names: x509.GeneralName,
        days: float = 30,
        since: float = -1,
        password: bytes = b"",
        key: CertificateIssuerPrivateKeyTypes | None = None,
        usage: Sequence[x509.ExtensionType] = (SERVER,),
        hashed: hashes.SHA256 | hashes.SHA384 = SHA256,
        subject: str = "leaf",
    ) -> tuple[str, str]:
        """Paths of a certificate and its key, valid from `since` to `days` (days from now)."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_common(subject))
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=since))
            .not_valid_after(now + timedelta(days=days))
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        for extension in usage:
            builder = builder.add_extension(extension, critical=False)
        certificate = builder.sign(self.key, hashed)
        stem = self.folder / f"{certificate.serial_number:x}"
        stem.with_suffix(".pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        encryption = (
            serialization.BestAvailableEncryption(password)
            if password
            else serialization.NoEncryption()
        )
        stem.with_suffix(".key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
            )
        )
        os.chmod(stem.with_suffix(".key"), 0o600)
        return str(stem.with_suffix(".pem")), str(stem.with_suffix(".key"))


def box(*edits: Edit) -> Fleet:
    """All on one host: the SFU, both pools and the app that reads its keys."""
    return load(
        (SFU1, "groups", ["livekit", "turn", "app"]),
        (SFU1, "pools", ["calls", "avatar"]),
        (SFU1, "turn.pools.calls.min_port", 60001),
        (SFU1, "turn.pools.calls.max_port", 62767),
        (SFU1, "turn.pools.avatar.min_port", 62768),
        (SFU1, "turn.pools.avatar.listening_port", 3479),
        (SFU1, "turn.pools.avatar.tls_listening_port", 5350),
        (SFU1, "app", {"env_file": "/srv/app/.env", "owner": "app", "restart": ["app.service"]}),
        *edits,
    )


WATCHED: list[Edit] = [
    (MON1, "groups", ["monitor"]),
    (MON1, "address", "192.0.2.41"),
    (MON1, "address6", "2001:db8::41"),
    (MON1, "internal_address", "10.0.0.41"),
    (MON1, "edge", {}),
    (MON1, "tls", GROUP["tls"]),
    ("*", "fleet_ca", "secret:fleet/ca"),
    (
        "*",
        "monitor",
        {
            "url": "https://monitor.callready.test",
            "password": "secret:monitor/password",
            "page": {"webhooks": ["https://hooks.callready.test/x"]},
        },
    ),
    (SFU1, "livekit.prometheus", {"password": "secret:livekit/prometheus"}),
]


def watched(*edits: Edit) -> Fleet:
    """The three hosts, and one that watches them."""
    return load(*WATCHED, *edits)


EGRESS = {"digest": f"sha256:{'5' * 64}", "livekit_key": "APIrecord"}
RECORDED: list[Edit] = [
    (SFU1, "groups", ["livekit", "redis"]),
    (REC1, "groups", ["egress"]),
    (REC1, "address", "192.0.2.51"),
    (REC1, "livekit", GROUP["livekit"]),
    ("*", "livekit.keys.APIrecord", "secret:egress/livekit"),
    ("*", "fleet_ca", "secret:fleet/ca"),
    (
        "*",
        "redis",
        {"livekit_password": "secret:redis/livekit", "egress_password": "secret:redis/egress"},
    ),
    ("*", "egress", EGRESS),
]


def recorded(*edits: Edit) -> Fleet:
    """The three hosts, and one that records; Redis is beside the SFU."""
    return load(*RECORDED, *edits)


# Two SFUs that are one service, and two TURN hosts of its pool, one of which has Redis.
SHARED: list[Edit] = [
    ("*", "edge", {}),
    ("*", "fleet_ca", "secret:fleet/ca"),
    ("*", "redis", {"livekit_password": "secret:redis/livekit"}),
    ("*", "turn", {"pools": {"calls": CALLS}, "min_port": 60001}),
    (TURN1, "groups", ["livekit", "turn"]),
    (TURN1, "livekit.prometheus", {"password": "secret:livekit/prometheus"}),
    (TURN2, "groups", ["turn", "redis"]),
    (TURN2, "pools", ["calls"]),
]


def bare() -> Facts:
    """A Debian host that nothing was deployed to, with the app's user."""
    return Facts(
        os="debian",
        os_version="13",
        arch="amd64",
        users={"root", "app"},
        candidates={"coturn": "4.6.1-2"},
        ssh_ports={22},
    )


def deployed(release: Release) -> Facts:
    """What the survey finds on a host that is exactly what `release` says."""
    facts = bare()
    facts.folder = release.id
    facts.manifest = release.manifest
    facts.templates = release.templates
    facts.packages = {name.partition(" | ")[0]: "4.6.1-2" for name in release.packages}
    facts.users |= set(release.users)
    for path, file in release.files.items():
        facts.files[path] = FileFact(
            f"{ROOT}/current/files{path}", file.mode, file.owner, file.group, file.sha256
        )
    for path, target in release.links.items():
        facts.files[path] = FileFact(link=target)
    for unit, service in release.services.items():
        facts.units[unit] = UnitFact(
            "loaded",
            "active",
            "enabled",
            4711,
            False,
            service.fingerprint,
            "/usr/bin/daemon",
            service.given,
        )
    for unit in release.masks:
        facts.units[unit] = UnitFact("masked", "inactive", "masked", 0, False, "-", "-")
    facts.ruleset = release.files[f"{ROOT}/nftables.conf"].sha256
    facts.sysctls = dict(release.sysctls)
    facts.databases = set(release.databases)
    for path, rows in release.databases.items():
        facts.rows[path] = {row_hash(row) for row in rows}
    for name, pair in release.certificates.items():
        facts.pairs[name] = pair.digest
        facts.served |= {(endpoint, name): pair.serial for endpoint, _ in pair.endpoints}
    for path, env in release.environments.items():
        facts.environments[path] = EnvironmentFact(0o600, env.owner, env.sha256, env.sha256)
    if release.archive:
        facts.binaries = {release.archive.binary}
    return facts


SCHEMA = """
CREATE TABLE turnusers_lt (realm varchar(127) default '', name varchar(512), hmackey char(128),
    PRIMARY KEY (realm,name));
CREATE TABLE turn_secret (realm varchar(127), value varchar(256), primary key (realm,value));
"""  # of /usr/share/coturn/schema.sql, 4.6.1

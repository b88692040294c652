"""An inventory's host data as pyinfra merges it: three hosts as production has them, to which
tests make one change at a time."""

import copy
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from callready.settings.fleet import Fleet

SOURCE = "inventories/test"
SFU1, TURN1, TURN2 = "sfu1.callready.test", "turn1.callready.test", "turn2.callready.test"

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
    "sudo/prod": "unit-sudo",
    "short": "unit-only-31-characters-long-00",
}

GROUP = {
    "ssh_user": "debian",
    "livekit": {
        "url": "wss://livekit.callready.test",
        "keys": {"APIunit": "secret:livekit/api_secret"},
    },
    "turn": {
        "pools": {
            "calls": {"realm": "callready.test", "secrets": ["secret:turn/calls"]},
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
            section = data.setdefault(name, {})
            for parent in parents:
                section = section.setdefault(parent, {})
            if value is ...:
                del section[key]
            else:
                section[key] = copy.deepcopy(value)
    return data


def load(*edits: Edit) -> Fleet:
    """The fleet of the three hosts after `edits`; raises SettingsError."""
    return Fleet.from_data(SOURCE, merged(*edits))


def write_store(entries: dict[str, str]) -> Path:
    """The secrets file of the inventory, below the working folder."""
    path = Path(f"{SOURCE}.secrets.yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(entries))
    path.chmod(0o600)
    return path


class Authority:
    """Signs certificates for tests; every file is new."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name(
            [x509.NameAttribute(x509.NameOID.COMMON_NAME, "callready unit test authority")]
        )
        folder.mkdir(parents=True, exist_ok=True)

    def issue(
        self, *names: x509.GeneralName, days: float = 30, since: float = -1, password: bytes = b""
    ) -> tuple[str, str]:
        """Paths of a certificate and its key, valid from `since` to `days` (days from now)."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=since))
            .not_valid_after(now + timedelta(days=days))
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        stem = self.folder / f"{certificate.serial_number:x}"
        stem.with_suffix(".pem").write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
        )
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

"""The fleet's authority: always the same for a secret, and its certificates as OpenSSL sees them."""

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import SecretStr

from callready.release import authority
from callready.release.authority import Authority, Identity
from callready.release.declaration import Release
from callready.release.facts import Facts, IdentityFact
from callready.release.plan import plan

SECRET, OTHER = SecretStr("a" * 32), SecretStr("b" * 32)
HOST = Identity("turn1.example.com", ("192.0.2.21", "2001:db8::21"), ("server",))
AUTHORITY = Authority(SECRET)


def der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def test_a_secret_makes_the_same_authority_each_time() -> None:
    assert Authority(SECRET).certificate == AUTHORITY.certificate
    assert Authority(OTHER).certificate != AUTHORITY.certificate
    assert SECRET.get_secret_value() not in repr(vars(AUTHORITY))


@pytest.mark.parametrize(
    ("identity", "purpose", "accepted"),
    [
        (HOST, "sslserver", True),
        (HOST, "sslclient", False),
        (Identity("monitor", (), ("client",)), "sslclient", True),
        (Identity("monitor", (), ("client",)), "sslserver", False),
        (Identity("long" * 20 + ".example.com", (), ("server", "client")), "sslclient", True),
    ],
)
def test_openssl_accepts_it_for_its_use_alone(
    tmp_path: Path, identity: Identity, purpose: str, accepted: bool
) -> None:
    leaf, _ = AUTHORITY.issue(identity)
    for name, content in (("ca", AUTHORITY.certificate), ("leaf", leaf)):
        (tmp_path / name).write_bytes(content)
    command = ["openssl", "verify", "-x509_strict", "-purpose", purpose]
    named = ["-verify_ip", identity.addresses[0]] if identity.addresses else []
    run = subprocess.run([*command, *named, "-CAfile", tmp_path / "ca", tmp_path / "leaf"])
    assert (run.returncode == 0) == accepted


@pytest.mark.parametrize(
    ("maker", "identity", "why"),
    [
        (AUTHORITY, HOST, ""),
        (Authority(OTHER), HOST, "another authority"),
        (AUTHORITY, Identity(HOST.name, ("192.0.2.22",), HOST.usages), "other addresses"),
        (AUTHORITY, Identity("turn2", HOST.addresses, HOST.usages), "another name"),
        (AUTHORITY, Identity(HOST.name, HOST.addresses, ("client",)), "another use"),
    ],
)
def test_why_a_certificate_is_replaced(maker: Authority, identity: Identity, why: str) -> None:
    said = AUTHORITY.refuses(HOST, der(maker.issue(identity)[0]))
    assert why in said and bool(why) == bool(said)


@pytest.mark.parametrize(("days", "replaced"), [(170, False), (190, True), (400, True)])
def test_it_is_replaced_past_half_its_life(
    monkeypatch: pytest.MonkeyPatch, days: int, replaced: bool
) -> None:
    leaf = der(AUTHORITY.issue(HOST)[0])

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Later":
            moment = datetime.now(UTC) + timedelta(days=days)
            return cls.fromtimestamp(moment.timestamp(), UTC)

    monkeypatch.setattr(authority, "datetime", Later)
    assert ("half of its life" in AUTHORITY.refuses(HOST, leaf)) == replaced


def test_what_is_damaged_or_has_another_key_is_replaced() -> None:
    release = Release()
    release.identity("host", [SECRET], HOST)
    leaf = der(AUTHORITY.issue(HOST)[0])
    for found, why in (
        (IdentityFact(b"", False), "damaged"),
        (IdentityFact(leaf, False), "the key is another one's"),
    ):
        (change,) = (
            each
            for each in plan(release, Facts(identities={"host": found})).changes
            if each.kind == "certificate"
        )
        assert why in change.what
    assert not [
        each
        for each in plan(release, Facts(identities={"host": IdentityFact(leaf, True)})).prepare
        if each.function == "install_identity"
    ]

"""The fleet's own authority: the certificates by which its hosts know each other.

Its key is made from a secret of the store and stays here. Its own certificate is always the same
for the same secret, so that it may stand in a release; those of hosts are state, as ACME's are.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import SecretStr

LIFETIME = timedelta(days=365)
# A host whose clock is late takes a new one too.
_BEFORE = timedelta(days=1)
_SINCE, _UNTIL = datetime(2024, 1, 1, tzinfo=UTC), datetime(2054, 1, 1, tzinfo=UTC)
_USAGES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}


@dataclass(frozen=True)
class Identity:
    """What a certificate says of its host.

    Args:
        name: the subject's common name.
        addresses: by which others connect to it.
        usages: `server`, `client` or both (RFC 5280, section 4.2.1.12).
    """

    name: str
    addresses: tuple[str, ...]
    usages: tuple[str, ...]

    @property
    def alternatives(self) -> list[x509.GeneralName]:
        """Its subjectAltName."""
        own = [x509.DNSName(self.name)]
        return [*own, *(x509.IPAddress(ipaddress.ip_address(each)) for each in self.addresses)]

    @property
    def purposes(self) -> list[x509.ObjectIdentifier]:
        """Its extendedKeyUsage."""
        return [_USAGES[each] for each in self.usages]


class Authority:
    """Signs the certificates of a fleet; the key is Ed25519, whose signatures hold no chance
    (RFC 8032)."""

    def __init__(self, secret: SecretStr) -> None:
        seed = HKDF(hashes.SHA256(), 32, salt=None, info=b"callready fleet authority").derive(
            secret.get_secret_value().encode()
        )
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self._public = self._key.public_key()
        digest = hashlib.sha256(self._public.public_bytes_raw()).digest()
        self._name = _name(f"callready fleet authority {digest.hex()[:8]}")
        self._identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._public)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        self.certificate = _pem(
            x509.CertificateBuilder(self._name, self._name, self._public)
            .serial_number(int.from_bytes(digest[:16]) >> 1)
            .not_valid_before(_SINCE)
            .not_valid_after(_UNTIL)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._public), critical=False)
            .sign(self._key, None)
        )

    def issue(self, identity: Identity) -> tuple[bytes, bytes]:
        """A new certificate and its key (EC P-256), PEM."""
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        leaf = (
            x509.CertificateBuilder(self._name, _name(identity.name), key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BEFORE)
            .not_valid_after(now + LIFETIME)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(identity.alternatives), critical=False)
            .add_extension(x509.ExtendedKeyUsage(identity.purposes), critical=True)
            .add_extension(self._identifier, critical=False)
            .sign(self._key, None)
        )
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return _pem(leaf), private

    def refuses(self, identity: Identity, certificate: bytes) -> str:
        """Why a host's certificate (DER) has to be replaced; empty if it does."""
        try:
            leaf = x509.load_der_x509_certificate(certificate)
            self._public.verify(leaf.signature, leaf.tbs_certificate_bytes)
        except ValueError:
            return "it is damaged"
        except InvalidSignature:
            return "another authority has signed it"
        since, until = leaf.not_valid_before_utc, leaf.not_valid_after_utc
        if (now := datetime.now(UTC)) > since + (until - since) / 2:
            ends = "ends" if now < until else "ended"
            return f"half of its life is over, it {ends} on {until:%Y-%m-%d}"
        usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if leaf.subject != _name(identity.name) or [*names] != identity.alternatives:
            return "the host has another name or other addresses"
        return "" if [*usages] == identity.purposes else "it is for another use"


def common_name(name: str) -> str:
    """As the subject of a certificate has a name: at most 64 characters of it (RFC 5280, appendix
    A.1); the whole name is in subjectAltName."""
    return name[:64]


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name(name))])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)

"""Certificate files as an operator names them, checked before anything is pushed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization


class CertificateError(ValueError):
    """Why a pair of files cannot be served."""


@dataclass(frozen=True)
class Pair:
    """A certificate chain and its key, PEM; the key stays out of every repr."""

    chain: bytes
    key_bytes: bytes
    serial: int
    not_after: datetime

    def __repr__(self) -> str:
        return f"Pair(serial={self.serial:x}, not_after={self.not_after:%Y-%m-%d})"

    @property
    def digest(self) -> str:
        """A name for exactly this pair."""
        return hashlib.sha256(self.chain + self.key_bytes).hexdigest()[:16]


def read_pair(certificate: str, key: str, name: str) -> Pair:
    """Read a PEM chain (leaf first) and its private key, to be served as `name`.

    Raises CertificateError if a file is missing or unreadable, the two do not match, the leaf
    does not cover `name` (RFC 9525: subjectAltName only) or is not valid now.
    """
    chain_bytes, key_bytes = _read(certificate, "certificate"), _read(key, "key")
    try:
        leaf = x509.load_pem_x509_certificates(chain_bytes)[0]
    except ValueError:
        raise CertificateError(f"certificate {certificate} holds no PEM certificate") from None
    try:
        private = serialization.load_pem_private_key(key_bytes, None)
    except (ValueError, TypeError):
        raise CertificateError(f"key {key} is not an unencrypted PEM private key") from None
    spki = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*spki) != leaf.public_key().public_bytes(*spki):
        raise CertificateError(f"key {key} does not belong to certificate {certificate}")
    names = _names(leaf)
    if not any(_covers(pattern, name) for pattern in names):
        raise CertificateError(
            f"certificate {certificate} is for {', '.join(names) or 'no name'}, not for {name}"
        )
    now, until, since = datetime.now(UTC), leaf.not_valid_after_utc, leaf.not_valid_before_utc
    if until < now:
        raise CertificateError(
            f"certificate {certificate} expired on {until:%Y-%m-%d %H:%M} UTC: renew it"
        )
    if since > now:
        raise CertificateError(
            f"certificate {certificate} is not valid before {since:%Y-%m-%d %H:%M} UTC"
        )
    return Pair(chain_bytes, key_bytes, leaf.serial_number, leaf.not_valid_after_utc)


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise CertificateError(f"{what} {path}: {error.strerror}") from None


def _names(leaf: x509.Certificate) -> list[str]:
    try:
        san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return san.get_values_for_type(x509.DNSName) + [
        str(address) for address in san.get_values_for_type(x509.IPAddress)
    ]


def _covers(pattern: str, name: str) -> bool:
    pattern, name = pattern.lower(), name.lower()
    return pattern == name or (
        pattern.startswith("*.") and name.partition(".")[2] == pattern.removeprefix("*.")
    )

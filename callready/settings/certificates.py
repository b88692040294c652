"""Certificate files as an operator names them, checked before anything is pushed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, PublicKeyAlgorithmOID, SignatureAlgorithmOID

# What Chromium and Android (BoringSSL) offer in a handshake and Safari with them; Firefox alone
# takes P-521 too. RSA from 2048 bits (CA/Browser Forum, Baseline Requirements, 6.1.5) to
# BoringSSL's limit, and not under the identifier of RSA-PSS, whose signatures nobody offers.
_CURVES = ("secp256r1", "secp384r1")
_RSA_BITS = range(2048, 8192 + 1)
_MAKE = "make one with an EC P-256 or a 2048-bit RSA key"
# Baseline Requirements, 7.1.3.2: SHA-1 and MD5 are forged.
_SIGNATURES = {
    SignatureAlgorithmOID.RSA_WITH_SHA256,
    SignatureAlgorithmOID.RSA_WITH_SHA384,
    SignatureAlgorithmOID.RSA_WITH_SHA512,
    SignatureAlgorithmOID.RSASSA_PSS,
    SignatureAlgorithmOID.ECDSA_WITH_SHA256,
    SignatureAlgorithmOID.ECDSA_WITH_SHA384,
    SignatureAlgorithmOID.ECDSA_WITH_SHA512,
}
_HASHES = {"sha256", "sha384", "sha512"}
_T = TypeVar("_T", bound=x509.ExtensionType)


class CertificateError(ValueError):
    """Why a pair of files cannot be served."""


@dataclass(frozen=True)
class Pair:
    """A certificate chain and its key, PEM; the key stays out of every repr."""

    chain: bytes
    key_bytes: bytes
    leaf: x509.Certificate

    def __repr__(self) -> str:
        return f"Pair(serial={self.serial:x}, not_after={self.leaf.not_valid_after_utc:%Y-%m-%d})"

    @property
    def serial(self) -> int:
        """The certificate's."""
        return self.leaf.serial_number

    @property
    def digest(self) -> str:
        """A name for exactly this pair."""
        return hashlib.sha256(self.chain + self.key_bytes).hexdigest()[:16]


def read_pair(certificate: str, key: str, name: str) -> Pair:
    """Read a PEM chain (leaf first) and its private key, to be served as `name`.

    Raises CertificateError if a file is missing or unreadable, the two do not match, the leaf
    does not cover `name` (RFC 9525: subjectAltName only), is not valid now or is of a kind that
    browsers refuse.
    """
    chain_bytes, key_bytes = _read(certificate, "certificate"), _read(key, "key")
    try:
        chain = x509.load_pem_x509_certificates(chain_bytes)
    except ValueError:
        raise CertificateError(f"certificate {certificate} holds no PEM certificate") from None
    if why := browsers_refuse(chain):
        raise CertificateError(f"certificate {certificate} {why}")
    leaf = chain[0]
    try:
        private = serialization.load_pem_private_key(key_bytes, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
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
    return Pair(chain_bytes, key_bytes, leaf)


def browsers_refuse(chain: Sequence[x509.Certificate]) -> str | None:
    """Why no browser accepts a chain (leaf first), whoever signed it: its keys, its signatures or
    what the leaf is for. OpenSSL, and so HAProxy and coturn, take all of them."""
    for number, each in enumerate(chain):
        if number and each.issuer == each.subject:
            continue  # a root is trusted by itself
        # Of authorities, P-521 is accepted.
        curves = (*_CURVES, "secp521r1") if number else _CURVES
        whose = f"has an authority ({each.subject.rfc4514_string()}) with" if number else "has"
        if kind := _refused_key(each, curves):
            return f"{whose} {kind}, which browsers refuse: {_MAKE}"
        if kind := _refused_signature(each):
            return f"{whose} a signature ({kind}), which browsers refuse: have it signed anew"
    usage = _extension(chain[0], x509.KeyUsage)
    if usage and not usage.digital_signature:
        return (
            "is not for signatures (keyUsage without digitalSignature), with which browsers have a "
            "server prove itself: have it issued anew"
        )
    purposes = _extension(chain[0], x509.ExtendedKeyUsage)
    if purposes and ExtendedKeyUsageOID.SERVER_AUTH not in purposes:
        return "is not for servers (extendedKeyUsage without serverAuth): have it issued anew"
    return None


def lifetime_refused(leaf: x509.Certificate, private: bool) -> str | None:
    """Why browsers refuse how long a certificate is valid; `private`: of an authority that they do
    not know by themselves (Baseline Requirements, 6.3.2; Chromium's CertVerifyProc)."""
    lifetime = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    if private or lifetime <= timedelta(days=398):
        return None
    return (
        f"is valid for {lifetime.days} days: of an authority that browsers know, they refuse more "
        "than 398; if the authority is your own, name it in tls.ca"
    )


def apple_refuses(leaf: x509.Certificate) -> Iterator[str]:
    """What iPhones, iPads and Macs refuse also where the authority is private
    (support.apple.com/103769); other browsers do not."""
    lifetime = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    if lifetime > timedelta(days=825):
        yield f"is valid for {lifetime.days} days, at most 825 are accepted"
    if not _extension(leaf, x509.ExtendedKeyUsage):
        yield "does not say that it is for servers (extendedKeyUsage serverAuth)"


def _refused_key(certificate: x509.Certificate, curves: tuple[str, ...]) -> str | None:
    """The kind of its public key, if browsers refuse it."""
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return "an unknown kind of key"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return None if key.curve.name in curves else f"an EC {key.curve.name} key"
    if certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
        return "an RSA-PSS key"
    if isinstance(key, rsa.RSAPublicKey):
        return None if key.key_size in _RSA_BITS else f"a {key.key_size}-bit RSA key"
    return f"a key of the kind {type(key).__name__.strip('_').removesuffix('PublicKey')}"


def _refused_signature(certificate: x509.Certificate) -> str | None:
    """The kind of the signature on it, if browsers refuse it."""
    oid = certificate.signature_algorithm_oid
    try:
        hashed = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        hashed = None
    if oid in _SIGNATURES and hashed and hashed.name in _HASHES:
        return None
    return f"{oid._name}, {hashed.name if hashed else 'no hash'}"


def _extension(certificate: x509.Certificate, kind: type[_T]) -> _T | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise CertificateError(f"{what} {path}: {error.strerror}") from None


def _names(leaf: x509.Certificate) -> list[str]:
    if not (san := _extension(leaf, x509.SubjectAlternativeName)):
        return []
    return san.get_values_for_type(x509.DNSName) + [
        str(address) for address in san.get_values_for_type(x509.IPAddress)
    ]


def _covers(pattern: str, name: str) -> bool:
    pattern, name = pattern.lower(), name.lower()
    return pattern == name or (
        pattern.startswith("*.") and name.partition(".")[2] == pattern.removeprefix("*.")
    )

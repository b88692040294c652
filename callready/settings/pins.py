"""Whether the keys that Android release builds are pinned to are in the chain that they are shown.

Android compares the SHA-256 of every public key of the chain that it verified, its root included,
with the pins of the longest matching domain; one match is enough (AOSP's
android.security.net.config.NetworkSecurityTrustManager).
"""

from __future__ import annotations

import ssl
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from callready.settings.android import Android, governs


def pin(certificate: x509.Certificate) -> str:
    """The pin of a certificate's key, as a network security configuration has it."""
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return b64encode(sha256(key).digest()).decode()


def chain_pins(chain: bytes, ca_file: str | None) -> tuple[list[str], bool]:
    """The pins of a PEM chain and of its root (of `ca_file`, else the system's); whether that root
    was found. Raises OSError for `ca_file`, ValueError where something is no certificate."""
    certificates = x509.load_pem_x509_certificates(chain)
    if ca_file:
        known = x509.load_pem_x509_certificates(Path(ca_file).expanduser().read_bytes())
    else:
        name = certificates[-1].issuer.public_bytes()
        trusted = ssl.create_default_context().get_ca_certs(binary_form=True)
        known = [x509.load_der_x509_certificate(each) for each in trusted if name in each]
    roots = [each for each in (certificates[-1], *known) if _issued(each, certificates[-1])]
    return [pin(each) for each in dict.fromkeys((*certificates, *roots))], bool(roots)


def _issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def is_pinned(android: Android, name: str) -> bool:
    """Whether release builds compare pins when they connect to `name`."""
    domain = governs(android.domains, name)
    return bool(domain and domain.scope == "release" and domain.pins)


def mismatch(android: Android, name: str, keys: Sequence[str]) -> str | None:
    """What release builds make of a chain with these keys for `name`; None if they accept it."""
    domain = governs(android.domains, name)
    if not domain or not is_pinned(android, name) or set(domain.pins) & set(keys):
        return None
    return (
        f"installed release builds refuse {name}: none of the pins of {domain.host} "
        f"({', '.join(domain.pins)}) matches a key of its chain ({', '.join(keys)}, leaf first)"
    )

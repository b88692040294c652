"""The lab's certificate authority."""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lab import plan

CA_CERTIFICATE, CA_KEY = plan.STATE / "ca.pem", plan.STATE / "ca.key"
CERTIFICATES = plan.STATE / "certs"


def create() -> None:
    """Make the authority unless it is there."""
    if CA_CERTIFICATE.exists():
        return
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"{plan.INSTANCE} lab authority")
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key.public_key(), days=3650)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(CA_KEY, _private(key), 0o600)
    _write(CA_CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def issue(
    name: str, addresses: Sequence[str] = (), days: int = 90, folder: Path = CERTIFICATES
) -> Path:
    """Sign a new certificate and key (EC P-256) for a DNS name and IP addresses.

    Args:
        name: DNS name; also names the files, ``NAME.pem`` (with the authority's) and ``NAME.key``.
        addresses: IPv4 and IPv6 addresses it is valid for too.
        days: valid for this many days from now; negative: it expired that many days ago.
        folder: where the files go.

    Returns:
        The path of the ``.pem`` file.
    """
    authority = x509.load_pem_x509_certificate(CA_CERTIFICATE.read_bytes())
    authority_key = serialization.load_pem_private_key(CA_KEY.read_bytes(), password=None)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.DNSName(name), *(x509.IPAddress(ipaddress.ip_address(a)) for a in addresses)]
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    certificate = (
        _builder(_name(name), authority.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    chain = [certificate, authority]
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{name}.key", _private(key), 0o600)
    pem = b"".join(c.public_bytes(serialization.Encoding.PEM) for c in chain)
    _write(folder / f"{name}.pem", pem, 0o644)
    return folder / f"{name}.pem"


def issue_for_host(host: plan.Host) -> None:
    """Certificates for the host's names and addresses, and for the name that it has in common with
    others, unless there are of this authority."""
    for name in (host.fqdn, host.turn_name, host.app_name):
        if not (CERTIFICATES / f"{name}.pem").exists():
            issue(name, (host.ipv4, host.ipv6))
    if host.name in plan.SERVED_BY and not (CERTIFICATES / f"{plan.SERVICE}.pem").exists():
        issue(plan.SERVICE)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    begin = min(now, end) - datetime.timedelta(days=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    new = path.with_name(f".{path.name}")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
    new.rename(path)

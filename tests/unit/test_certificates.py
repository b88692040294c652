"""Certificate files as operators name them: what may be served, and the sentence where not."""

import ipaddress
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509 import DNSName, IPAddress
from cryptography.x509.oid import ExtendedKeyUsageOID

from callready.release.facts import host_script
from callready.settings.certificates import CertificateError, read_pair
from callready.settings.problem import SettingsError
from tests.support.browser import opens_tls
from tests.support.inventories import SERVER, TURN1, Authority, load


def refusal(chain: str, key: str, name: str = TURN1) -> str:
    with pytest.raises(CertificateError) as error:
        read_pair(chain, key, name)
    return str(error.value)


@pytest.mark.parametrize(
    ("pattern", "name", "covered"),
    [
        ("turn1.callready.test", "turn1.callready.test", True),
        ("Turn1.CallReady.test", "turn1.callready.test", True),
        ("*.callready.test", "turn1.callready.test", True),
        ("*.callready.test", "callready.test", False),
        ("*.callready.test", "a.turn1.callready.test", False),
        ("turn1.callready.test", "turn2.callready.test", False),
        ("callready.test", "turn1.callready.test", False),
        ("*1.callready.test", "turn1.callready.test", False),
    ],
)
def test_a_name_is_covered_as_rfc_9525_has_it(
    authority: Authority, pattern: str, name: str, covered: bool
) -> None:
    chain, key = authority.issue(DNSName("other.test"), DNSName(pattern))
    if covered:
        assert read_pair(chain, key, name).chain == Path(chain).read_bytes()
    else:
        assert refusal(chain, key, name) == (
            f"certificate {chain} is for other.test, {pattern}, not for {name}"
        )


def test_an_address_can_be_the_name(authority: Authority) -> None:
    chain, key = authority.issue(IPAddress(ipaddress.ip_address("192.0.2.21")))
    read_pair(chain, key, "192.0.2.21")


def test_a_certificate_without_a_subject_alternative_name_is_for_no_name(
    authority: Authority,
) -> None:
    chain, key = authority.issue()
    assert refusal(chain, key) == f"certificate {chain} is for no name, not for {TURN1}"


def test_validity_is_checked_on_both_ends(authority: Authority) -> None:
    chain, key = authority.issue(DNSName(TURN1), days=-1 / 24, since=-2)
    assert refusal(chain, key).startswith(f"certificate {chain} expired on ")
    assert refusal(chain, key).endswith(" UTC: renew it")
    chain, key = authority.issue(DNSName(TURN1), days=2, since=1 / 24)
    assert refusal(chain, key).startswith(f"certificate {chain} is not valid before ")


def test_the_key_must_be_the_certificates(authority: Authority, pair: tuple[str, str]) -> None:
    chain, key = authority.issue(DNSName(TURN1))
    assert refusal(chain, pair[1]) == f"key {pair[1]} does not belong to certificate {chain}"
    assert read_pair(chain, key, TURN1)


@pytest.mark.tools
def test_an_rsa_pair_and_a_full_chain_are_served(authority: Authority, tmp_path: Path) -> None:
    chain, key = str(tmp_path / "rsa.pem"), str(tmp_path / "rsa.key")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/",
            "-addext",
            f"subjectAltName=DNS:{TURN1}",
            "-out",
            chain,
            "-keyout",
            key,
        ],
        check=True,
        capture_output=True,
    )
    issuer, _ = authority.issue(DNSName("issuer.test"))
    with open(chain, "a") as file:
        file.write(Path(issuer).read_text())
    pair = read_pair(chain, key, TURN1)
    printed = subprocess.run(
        ["openssl", "x509", "-in", chain, "-noout", "-serial"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"serial={pair.serial:X}" == printed.stdout.strip().replace("serial=0", "serial=")


@pytest.mark.parametrize("which", ["certificate", "key"])
@pytest.mark.parametrize(
    ("what", "reason"),
    [("absent", "No such file or directory"), ("folder", "Is a directory")],
)
def test_a_file_that_cannot_be_read_is_named(
    pair: tuple[str, str], tmp_path: Path, which: str, what: str, reason: str
) -> None:
    (tmp_path / "folder").mkdir()
    files = dict(zip(("certificate", "key"), pair, strict=True)) | {which: str(tmp_path / what)}
    assert refusal(files["certificate"], files["key"]) == f"{which} {tmp_path / what}: {reason}"


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\xff\x00", b"-----BEGIN CERTIFICATE-----"])
def test_a_file_of_something_else_is_named(
    pair: tuple[str, str], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "file").write_bytes(content)
    file = str(tmp_path / "file")
    assert refusal(file, pair[1]) == f"certificate {file} holds no PEM certificate"
    assert refusal(pair[0], file) == f"key {file} is not an unencrypted PEM private key"


def test_the_two_files_swapped_are_noticed(pair: tuple[str, str]) -> None:
    assert refusal(pair[1], pair[0]) == f"certificate {pair[1]} holds no PEM certificate"


def test_an_encrypted_key_is_refused(authority: Authority) -> None:
    chain, key = authority.issue(DNSName(TURN1), password=b"a pass phrase")
    assert refusal(chain, key) == f"key {key} is not an unencrypted PEM private key"


def test_a_pair_has_a_name_of_its_own_and_no_key_in_its_repr(
    authority: Authority, pair: tuple[str, str], tmp_path: Path
) -> None:
    first, again = read_pair(*pair, TURN1), read_pair(*pair, TURN1)
    renewed = read_pair(*authority.issue(DNSName(TURN1)), TURN1)
    assert first.digest == again.digest != renewed.digest
    shutil.copy(pair[0], tmp_path / "longer.pem")
    with open(tmp_path / "longer.pem", "a") as file:
        file.write(Path(pair[0]).read_text())
    assert read_pair(str(tmp_path / "longer.pem"), pair[1], TURN1).digest != first.digest
    assert "PRIVATE" not in repr(first) and f"{first.serial:x}" in repr(first)


def test_a_path_may_start_with_the_home_folder(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for source, name in zip(pair, ("chain.pem", "key.pem"), strict=True):
        shutil.copy(source, tmp_path / name)
    read_pair("~/chain.pem", "~/key.pem", TURN1)


def usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(signs, False, not signs, False, False, False, False, False, False)


# Fewer bits or another curve than browsers take, other signatures, or not for servers.
KINDS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "P-256": (lambda: {}, ""),
    "P-384": (lambda: {"key": ec.generate_private_key(ec.SECP384R1())}, ""),
    "RSA 2048": (lambda: {"key": rsa.generate_private_key(65537, 2048)}, ""),
    "no extendedKeyUsage": (lambda: {"usage": ()}, ""),
    "for signatures": (lambda: {"usage": (SERVER, usage(signs=True))}, ""),
    "Ed25519": (
        lambda: {"key": ed25519.Ed25519PrivateKey.generate()},
        "has a key of the kind Ed25519",
    ),
    "P-521": (lambda: {"key": ec.generate_private_key(ec.SECP521R1())}, "has an EC secp521r1 key"),
    "secp256k1": (
        lambda: {"key": ec.generate_private_key(ec.SECP256K1())},
        "has an EC secp256k1 key",
    ),
    "brainpool": (
        lambda: {"key": ec.generate_private_key(ec.BrainpoolP256R1())},
        "has an EC brainpoolP256r1 key",
    ),
    "RSA 1024": (
        lambda: {"key": rsa.generate_private_key(65537, 1024)},
        "has a 1024-bit RSA key",
    ),
    "RSA 1536": (
        lambda: {"key": rsa.generate_private_key(65537, 1536)},
        "has a 1536-bit RSA key",
    ),
    "DSA": (lambda: {"key": dsa.generate_private_key(2048)}, "has a key of the kind DSA"),
    "for clients": (
        lambda: {"usage": (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]),)},
        "is not for servers",
    ),
}


def handshake(chain: str, key: str, ca: str) -> bool:
    """Whether a client that offers what browsers offer is content with what OpenSSL serves."""
    server = subprocess.Popen(
        # Below Debian's level, as a host may be set: it takes every kind then.
        [
            *("openssl", "s_server", "-accept", "127.0.0.1:0", "-naccept", "1", "-www"),
            *("-cert", chain, "-key", key, "-cipher", "ALL:@SECLEVEL=0"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        line = next(line for line in server.stdout or () if line.startswith("ACCEPT "))
        return opens_tls(line.split()[1], TURN1, ca)
    finally:
        server.kill()
        server.communicate()


def installed(chain: str, key: str, root: Path) -> subprocess.CompletedProcess[str]:
    """What the host's script says to a pair."""
    for folder in ("run", "etc/callready"):
        (root / folder).mkdir(parents=True)
    (root / "script").write_bytes(host_script("certificates.sh"))
    return subprocess.run(
        ["sh", root / "script", "install", TURN1, chain, key, "root"],
        env={"CALLREADY_ROOT": str(root), "PATH": "/usr/bin:/bin"},
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.mark.tools
@pytest.mark.parametrize("kind", KINDS)
def test_what_browsers_refuse_is_refused_everywhere(
    authority: Authority, tmp_path: Path, kind: str
) -> None:
    """By a client that offers only what browsers offer, from files, and on the host."""
    make, why = KINDS[kind]
    chain, key = authority.issue(DNSName(TURN1), **make())
    assert handshake(chain, key, authority.file) == (not why)
    done = installed(chain, key, tmp_path)
    assert (done.returncode == 0) == (not why), done.stderr
    if not why:
        read_pair(chain, key, TURN1)
        return
    assert refusal(chain, key).startswith(f"certificate {chain} {why}")
    assert TURN1 in done.stderr


@pytest.mark.tools
@pytest.mark.parametrize("digest", ["md5", "sha1", "sha224", "sha256"])
def test_signatures_that_are_forged_are_refused(tmp_path: Path, digest: str) -> None:
    chain, key = str(tmp_path / "chain"), str(tmp_path / "key")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", f"-{digest}"),
            *("-subj", "/CN=x", "-addext", f"subjectAltName=DNS:{TURN1}"),
            *("-out", chain, "-keyout", key),
        ],
        check=True,
        capture_output=True,
    )
    done = installed(chain, key, tmp_path)
    if digest == "sha256":
        assert done.returncode == 0, done.stderr
        read_pair(chain, key, TURN1)
    else:
        assert f"has a signature ({digest}WithRSAEncryption, {digest})" in refusal(chain, key)
        assert f"{digest}WithRSAEncryption" in done.stderr


def test_a_key_that_may_not_sign_proves_no_server(authority: Authority) -> None:
    chain, key = authority.issue(DNSName(TURN1), usage=(SERVER, usage(signs=False)))
    assert "keyUsage without digitalSignature" in refusal(chain, key)


def test_an_authority_in_the_chain_is_held_to_the_same(authority: Authority) -> None:
    chain, key = authority.issue(DNSName(TURN1))
    issuer, _ = authority.issue(
        key=rsa.generate_private_key(65537, 1024), usage=(), subject="middle"
    )
    Path(chain).write_bytes(Path(chain).read_bytes() + Path(issuer).read_bytes())
    assert "has an authority (CN=middle) with a 1024-bit RSA key" in refusal(chain, key)


@pytest.mark.parametrize(
    ("days", "ca", "level", "said"),
    [
        (390, False, "", ""),
        (400, False, "error", "is valid for 401 days: of an authority that browsers know, "),
        (400, True, "", ""),
        (900, True, "warning", "iPhones and Macs refuse it: is valid for 901 days"),
    ],
)
def test_how_long_a_certificate_may_be_valid_depends_on_its_authority(
    project: Path, authority: Authority, days: int, ca: bool, level: str, said: str
) -> None:
    chain, key = authority.issue(DNSName("*.callready.test"), days=days)
    tls = {"certificate": chain, "key": key} | ({"ca": authority.file} if ca else {})
    try:
        found = [("warning", str(each)) for each in load(("*", "tls", tls)).warnings]
    except SettingsError as error:
        found = [("error", str(error))]
    assert bool(found) == bool(level)
    assert all(each[0] == level and said in each[1] for each in found)

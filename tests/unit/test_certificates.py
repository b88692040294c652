"""Certificate files as operators name them: what may be served, and the sentence where not."""

import ipaddress
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.x509 import DNSName, IPAddress

from callready.settings.certificates import CertificateError, read_pair
from tests.support.inventories import TURN1, Authority


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

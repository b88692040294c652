"""Android's pins against the certificate files that are about to be served."""

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import DNSName

from callready.settings.fleet import Fleet
from callready.settings.problem import SettingsError
from tests.support.inventories import SFU1, SOURCE, Authority, load

pytestmark = pytest.mark.usefixtures("project")

NAME = "livekit.callready.test"
OTHERS = ["A" * 43 + "=", "B" * 43 + "="]
# As docs/android.md has it.
PIN = (
    "openssl x509 -in {} -pubkey -noout | openssl pkey -pubin -outform der "
    "| openssl dgst -sha256 -binary | base64"
)


def pin_of(path: str) -> str:
    return subprocess.run(
        PIN.format(path), shell=True, text=True, capture_output=True, check=True
    ).stdout.strip()


@pytest.fixture
def files(authority: Authority) -> tuple[str, str]:
    return authority.issue(DNSName(NAME), DNSName("*.callready.test"))


@pytest.fixture
def root(authority: Authority, tmp_path: Path) -> str:
    """The authority's own certificate, which no chain file has."""
    now, name = datetime.now(UTC), authority.name
    builder = x509.CertificateBuilder(name, name, authority.key.public_key(), 1)
    builder = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1))
    path = tmp_path / "root.pem"
    path.write_bytes(builder.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM))
    return str(path)


def fleet(files: tuple[str, str], pins: list[str], ca: str | None = None, **domain: Any) -> Fleet:
    pinned = {"host": NAME, "pins": pins, "pin_expiration": "2099-01-01", **domain}
    return load(
        ("*", "tls", {"certificate": files[0], "key": files[1], **({"ca": ca} if ca else {})}),
        (SFU1, "edge", {}),
        (SFU1, "groups", ["livekit", "android"]),
        (SFU1, "android", {"checkout": "/srv/app", "domains": [pinned]}),
    )


@pytest.mark.tools
def test_a_chain_without_any_pinned_key_is_refused(files: tuple[str, str], root: str) -> None:
    with pytest.raises(SettingsError) as error:
        fleet(files, OTHERS, root)
    leaf = pin_of(files[0])
    assert str(error.value) == (
        f"{SOURCE}: {SFU1}: android.domains: installed release builds refuse {NAME}: none of the "
        f"pins of {NAME} ({', '.join(OTHERS)}) matches a key of its chain ({leaf}, "
        f"{pin_of(root)}, leaf first): {files[0]} needs a pinned key, or the app a release with a "
        "new pin"
    )
    with pytest.raises(SettingsError, match=f"refuse {NAME}: none of the pins of callready.test"):
        fleet(files, OTHERS, root, host="callready.test", include_subdomains=True)


def test_where_the_root_is_not_known_it_is_a_warning(files: tuple[str, str]) -> None:
    (warning,) = fleet(files, OTHERS).warnings
    assert f"refuse {NAME}: none of the pins" in warning


@pytest.mark.tools
def test_one_pinned_key_is_enough(files: tuple[str, str], root: str) -> None:
    for path in (files[0], root):
        assert fleet(files, [OTHERS[0], pin_of(path)], root).warnings == []


def test_debug_builds_and_other_hosts_are_not_this_chains(
    files: tuple[str, str], root: str
) -> None:
    for domain in ({"scope": "debug"}, {"host": "elsewhere.callready.test"}):
        assert fleet(files, OTHERS, root, **domain).warnings == []

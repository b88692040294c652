"""What the unit tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.x509 import DNSName

from tests.support.inventories import SECRETS, Authority, write_store


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate",
        action="store_true",
        help="write tests/unit/data/render again from what is rendered now; then read the diff",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs sqlite3 or openssl needs these programs."""
    for item in items:
        if {"database", "script"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.tools)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A certificate authority."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def pair(authority: Authority) -> tuple[str, str]:
    """A certificate for every name below callready.test, and its key."""
    return authority.issue(DNSName("*.callready.test"))


@pytest.fixture
def project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str]
) -> Iterator[Path]:
    """A working folder with `inventories/test.secrets.yaml` and the certificate that the hosts of
    tests/support/inventories.py name."""
    monkeypatch.chdir(tmp_path)
    write_store(SECRETS)
    (tmp_path / "certificates").mkdir()
    for path, name in zip(pair, ("chain.pem", "key.pem"), strict=True):
        (tmp_path / "certificates" / name).symlink_to(path)
    yield tmp_path

"""What earlier versions of callready wrote on hosts: the manifests in tests/data/releases."""

from collections.abc import Iterable
from hashlib import sha256

import pytest

from callready.release.manifest import Manifest
from tests.support.recorded import FORMATS, Release

PAIRS = [(Release(folder / "a"), Release(folder / "b")) for folder in FORMATS]
# Columns of a line after its kind, at least: an environment file has one more for each command.
COLUMNS = {
    "file": 5,
    "link": 2,
    "unit": 5,
    "environment": 4,
    "certificate": 1,
    "database": 1,
    "promise": 1,
}


def lines(release: Release) -> list[tuple[str, ...]]:
    """A recorded manifest by line and column."""
    return [tuple(line.split("\t")) for line in release.manifest]


@pytest.mark.parametrize("release", [r for pair in PAIRS for r in pair], ids=str)
def test_manifest_is_as_it_was_recorded(release: Release) -> None:
    text = "".join(f"{line}\n" for line in release.manifest)
    assert sha256(text.encode()).hexdigest()[:16] == release.id
    assert {kind for kind, *_ in lines(release)} == COLUMNS.keys()
    for kind, *columns in lines(release):
        assert len(columns) >= COLUMNS[kind] and all(columns)


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=str)
def test_recorded_releases_have_something_in_common_and_something_not(
    a: Release, b: Release
) -> None:
    """Or a way from one to the other would prove less than it says."""
    for kind in ("file", "link", "unit", "database", "promise"):
        names, others = a.names(kind), b.names(kind)
        assert names & others and names - others and others - names, kind


@pytest.mark.parametrize("release", [r for pair in PAIRS for r in pair], ids=str)
def test_every_line_of_an_earlier_format_is_read(release: Release) -> None:
    found = Manifest.read(lines(release))
    names: dict[str, Iterable[str]] = {
        "file": found.files,
        "link": found.links,
        "unit": found.units,
        "environment": found.environments,
        "certificate": found.certificates,
        "database": found.databases,
        "timer": found.timers,
    }
    for kind, read in names.items():
        assert {*read} == release.names(kind), kind
    assert len({promise.key for promise in found.promises}) == len(release.names("promise"))
    assert release.folder.parent.name == f"format{found.format}"

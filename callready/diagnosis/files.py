"""What is wrong with a host's files and programs, and with the release that they are of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from callready.diagnosis.inspection import Read
from callready.diagnosis.model import Cause, Place
from callready.diagnosis.seen import Seen
from callready.release.refusals import is_version
from callready.settings.ports import ALERTMANAGER, LIVEKIT, PROMETHEUS

# Known holes that no configuration closes: package, first and first mended version, what it is.
# coturn's of denied peers are closed by tasks/coturn.py.
HOLES = (
    ("coturn", "0", "4.5.2", "CVE-2020-26262: a relay reaches the host's own services"),
    ("haproxy", "2.2.0", "2.2.16", "CVE-2021-39240 to -39242: requests are smuggled"),
    ("haproxy", "2.4.0", "2.4.3", "CVE-2021-39240 to -39242: requests are smuggled"),
)


def causes(seen: Seen) -> Iterator[Cause]:
    """Files edited or unreadable, programs missing or of another version, a release unfinished."""
    facts, release = seen.facts, seen.node.release
    yield from _edited(seen)
    yield from _unread(seen)
    said = {read.path for read in seen.inspection.reads if read.answer != "yes"}
    if absent := [what for what in seen.changed("package", "user", "binary") if what not in said]:
        what = f"{', '.join(absent)} is not there: what needs it does not start again"
        checks = ("test_packages", "test_binary")
        yield seen.cause(
            "not-installed", Place.NEXT, what, "deploy again", checks=checks, latent=True
        )
    if release.files and (facts.pending or facts.folder != facts.confirmed):
        running, booted = facts.folder or "none", facts.confirmed or "none"
        yield seen.cause(
            "release-unconfirmed",
            Place.NEXT,
            f"release {running} runs and {booted} is booted with",
            "deploy again",
            f"pending: {facts.pending}" if facts.pending else "",
            checks=("test_release",),
            latent=True,
        )
    yield from _versions(seen)


def _edited(seen: Seen) -> Iterator[Cause]:
    if seen.is_undeployed:
        yield seen.cause(
            "not-deployed",
            Place.CONFIGURATION,
            "the host runs another release than the inventory says",
            "deploy",
            f"release {seen.facts.folder}",
            *seen.changed("file", "link"),
            breaks=seen.flows(),
            checks=("test_files", "test_units", "test_firewall", "test_kernel"),
        )
        return
    by_unit: dict[str, list[str]] = {}
    for path in seen.edited():
        by_unit.setdefault(seen.reader(path), []).append(path)
    for unit, paths in by_unit.items():
        # Of a unit that does not run it is said there.
        if not unit or seen.inspection.unit(unit).get("ActiveState") in ("active", "reloading"):
            yield edit(seen, paths, unit)


def edit(seen: Seen, paths: list[str], unit: str, *evidence: str) -> Cause:
    """The cause that files edited on the host are, which a unit reads."""
    found, wanted = seen.facts.units.get(unit), seen.node.release.services.get(unit)
    runs_it = False
    if found and wanted:
        differs = (found.given, found.fingerprint) != (wanted.given, wanted.fingerprint)
        runs_it = differs or not found.is_running
    is_later = bool(unit) and not runs_it
    rereads = unit in (PROMETHEUS, ALERTMANAGER)
    gone = any(path not in seen.facts.files for path in paths)
    what = f"{', '.join(paths)} {'is missing' if gone else 'was edited on the host'}"
    return seen.cause(
        "file-edited",
        Place.NEXT if is_later else Place.CONFIGURATION,
        what + (f": {unit} reads it at its next start" if is_later else ""),
        "deploy again; who edited it: ls -l, journalctl",
        *evidence,
        f"{unit}: {seen.inspection.unit(unit).get('ActiveState')}" if unit else "",
        breaks=seen.flows(unit) if runs_it else (),
        # Prometheus and Alertmanager read theirs again when they get a signal.
        checks=("test_files", *(seen.checks(unit) if runs_it or rereads else ("test_units",))),
        latent=not runs_it,
    )


def _unread(seen: Seen) -> Iterator[Cause]:
    """Of files that the same part of their way keeps from their reader, the first."""
    told = set()
    missing = seen.node.release.environments.keys() - seen.facts.environments.keys()
    for read in seen.inspection.reads:
        if read.path in missing:
            continue
        # Of a unit that does not run it is said there.
        is_for_later = seen.inspection.unit(read.unit).get("ActiveState") == "active"
        key = (read.unit, read.blocked.split(" ")[-1] if read.blocked else read.path)
        if read.answer != "yes" and (is_for_later or read.unit.startswith("/")) and key not in told:
            told.add(key)
            yield from unreadable(seen, [read], latent=True)


def unreadable(seen: Seen, reads: Iterable[Read], latent: bool) -> Iterator[Cause]:
    """Files that their unit cannot open: now, or at its next start."""
    for read in reads:
        what = "is missing" if read.answer == "missing" else f"cannot be opened by {read.user}"
        of = f", which {read.unit} reads at its next start or reload" if latent else ""
        own = f"chown and chmod of {read.blocked.split(' ')[-1]}" if read.blocked else "restore it"
        yield seen.cause(
            "file-unreadable",
            Place.NEXT if latent else Place.UNIT,
            f"{read.path} {what}{of}",
            f"{own}, or deploy again",
            read.blocked,
            breaks=() if latent else seen.flows(read.unit),
            checks=("test_files", "test_certificate_file") if latent else seen.checks(read.unit),
            latent=latent,
        )


def _versions(seen: Seen) -> Iterator[Cause]:
    release, place = seen.node.release, Place.CONFIGURATION
    for package, version in release.packages.items():
        for name in package.split(" | "):
            found = seen.facts.packages.get(name, "")
            shown = f"dpkg: {found}"
            if version and found and not is_version(found, version):
                what = f"{name} is {found}, the inventory says {version}"
                mend = f"apt install {name} of that version, or the version in the inventory"
                checks = ("test_packages",)
                yield seen.cause(
                    "version-differs", place, what, mend, shown, checks=checks, latent=True
                )
            for held, first, mended, words in HOLES:
                if held == name and found and _version(first) <= _version(found) < _version(mended):
                    what, mend = (
                        f"{name} {found} has {words}",
                        f"apt install {name}, {mended} or later",
                    )
                    yield seen.cause("known-hole", place, what, mend, shown, latent=True)
    if release.archive and not seen.is_undeployed and release.archive.binary in seen.facts.binaries:
        path, wanted = release.archive.binary, release.archive.version
        said = seen.inspection.versions.get(path, wanted)
        # What was put over it is said with the unit.
        if not said.endswith(wanted) and LIVEKIT not in seen.inspection.replaced:
            what = f"{path} says {said or 'nothing'} instead of {wanted}"
            mend = f"rm {path}; deploy again, which installs it (see findmnt {path} first)"
            checks = ("test_binary",)
            yield seen.cause("version-differs", Place.NEXT, what, mend, checks=checks, latent=True)
    livekit = seen.facts.units.get(LIVEKIT)
    if release.archive and livekit and livekit.is_running and not seen.is_undeployed:
        binary = livekit.binary.removesuffix(" (deleted)")
        # A process that has not got to its program yet is systemd's.
        if binary != release.archive.binary and "systemd" not in binary:
            yield seen.cause(
                "version-differs",
                Place.UNIT,
                f"LiveKit's process is {binary or 'unknown'}, not {release.archive.binary}",
                f"systemctl restart {LIVEKIT}; drop-ins of it",
                binary,
                breaks=seen.flows(LIVEKIT),
                checks=("test_binary",),
            )


def _version(text: str) -> tuple[int, ...]:
    """The numbers of an upstream version, without epoch and Debian revision."""
    upstream = text.rpartition(":")[2].partition("-")[0]
    return tuple(int(n) for n in re.findall(r"\d+", upstream))

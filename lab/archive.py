"""The LiveKit release archive: built from the Go module, packed as the project releases it."""

import hashlib
import os
import shutil
import tarfile
from pathlib import Path

from lab import plan
from lab.run import Group, LabError, remove_tree, run, say

VERSION = "1.13.5"
MODULE = "github.com/livekit/livekit-server"
WWW = plan.CACHE / "www"


def publish(version: str = VERSION) -> Path:
    """Build and pack livekit-server unless it is there; return the archive's path.

    The layout is the one of the project's release page:
    ``v<version>/livekit_<version>_linux_<arch>.tar.gz`` beside ``checksums.txt``.
    """
    arch = run("dpkg", "--print-architecture").strip()
    folder = WWW / f"v{version}"
    archive = folder / f"livekit_{version}_linux_{arch}.tar.gz"
    if (folder / "checksums.txt").exists() and archive.exists():
        return archive
    build = plan.CACHE / f"build-{version}"
    remove_tree(build)  # of a run that was killed
    build.mkdir(parents=True)
    try:
        server = _compile(version, build)
        folder.mkdir(parents=True, exist_ok=True)
        _pack(server, version, archive)
    finally:
        remove_tree(build)
    return archive


def _pack(server: Path, version: str, archive: Path) -> None:
    say(f"packing {archive.name}")
    partial = server.parent / archive.name
    with tarfile.open(partial, "w:gz", compresslevel=6) as tar:
        tar.add(server, "livekit-server", filter=_as_root)
        licence = _module_cache() / f"{MODULE}@v{version}" / "LICENSE"
        if licence.exists():
            tar.add(licence, "LICENSE", filter=_as_root)
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    checksums = server.parent / "checksums.txt"
    checksums.write_text(f"{digest}  {archive.name}\n")
    partial.rename(archive)
    checksums.rename(archive.with_name("checksums.txt"))  # last: publish() takes it for the end


def _compile(version: str, folder: Path) -> Path:
    target = f"{MODULE}/cmd/server@v{version}"
    Group(f"livekit-{version}").stream(
        go(),
        "install",
        "-v",
        "-ldflags=-s -w",
        target,
        env={**os.environ, "GOBIN": str(folder), "CGO_ENABLED": "0"},
    )
    return folder / "server"


def go() -> str:
    """The path of Go's compiler; raises LabError if there is none."""
    found = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if not found:
        raise LabError("the Go compiler `go` is missing: install 1.24 or later, then try again")
    return found


def _module_cache() -> Path:
    return Path(run(go(), "env", "GOMODCACHE").strip())


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member

"""Programs that tests use and Debian does not package, built from their Go modules and kept."""

import os
import shutil
from pathlib import Path

from lab import plan
from lab.archive import go
from lab.run import Group, remove_tree, run, say

BIN = plan.CACHE / "bin"
MODULES = {
    "sops": "github.com/getsops/sops/v3/cmd/sops@v3.13.3",
    "pebble": "github.com/letsencrypt/pebble/v2/cmd/pebble@v2.10.1",
    "pebble-challtestsrv": "github.com/letsencrypt/pebble/v2/cmd/pebble-challtestsrv@v2.10.1",
    "age-keygen": "filippo.io/age/cmd/age-keygen@v1.3.1",
    "gofakes3": "github.com/johannesboyne/gofakes3/cmd/gofakes3@v1.2.0",
}


def install(*names: str) -> Path:
    """Build what is not there yet (sops takes minutes, once); the folder they are in."""
    for name in names:
        if not (BIN / name).exists():
            _build(name)
    return BIN


def pion_turn() -> Path:
    """Our TURN client on pion's library, built; go.sum has the hashes of what it is built from."""
    BIN.mkdir(parents=True, exist_ok=True)
    folder = Path(__file__).with_name("pion_turn")
    run("env", "CGO_ENABLED=0", go(), "build", "-C", folder, "-o", BIN / "pion-turn", ".")
    return BIN / "pion-turn"


def _build(name: str) -> None:
    say(f"building {name}, once")
    # Without the lab's lock: others need it in these minutes, and the last rename is whole anyway.
    folder = plan.CACHE / f"build-{name}-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        Group(folder.name).stream(
            go(),
            "install",
            "-ldflags=-s -w",
            MODULES[name],
            env={**os.environ, "GOBIN": str(folder), "CGO_ENABLED": "0"},
        )
        BIN.mkdir(exist_ok=True)
        shutil.move(folder / name, BIN / name)
    finally:
        remove_tree(folder)

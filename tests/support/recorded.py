"""Releases as earlier versions of callready sent them to a lab host: tests/data/releases."""

from __future__ import annotations

import io
import runpy
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

RELEASES = Path(__file__).parents[1] / "data/releases"
FORMATS = sorted(RELEASES.glob("format*"))


@dataclass(frozen=True)
class Bundle:
    """What a root shell of the host unpacked and ran, a compressed tar archive."""

    content: bytes = field(repr=False)

    def member(self, name: str) -> str:
        """One of its files."""
        with tarfile.open(fileobj=io.BytesIO(self.content)) as tar:
            file = tar.extractfile(name)
            assert file is not None
            return file.read().decode()

    @property
    def steps(self) -> list[str]:
        """The calls of apply.sh's functions, in order."""
        return self.member("steps").splitlines()

    def killed_after(self, steps: int) -> Bundle:
        """The same bundle, but after so many steps it says so and SIGKILLs its process group."""
        lines = self.steps
        lines.insert(steps, "echo killed; kill -s KILL -- -$$")
        content = "".join(f"{line}\n" for line in lines).encode()
        target = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(self.content)) as old,
            tarfile.open(fileobj=target, mode="w:gz") as new,
        ):
            for info in old:
                file = old.extractfile(info)
                if info.name == "steps":
                    info.size, file = len(content), io.BytesIO(content)
                new.addfile(info, file)
        return Bundle(target.getvalue())


@dataclass(frozen=True)
class Release:
    """A release and the inventory that it was made from."""

    folder: Path

    def __str__(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def bundles(self) -> list[Bundle]:
        """What was sent for it, in order."""
        return [Bundle(path.read_bytes()) for path in sorted(self.folder.glob("*.tar.gz"))]

    @property
    def switch(self) -> Bundle:
        """The bundle that brings the release and waits for the confirmation."""
        (bundle,) = (b for b in self.bundles if any(s.startswith("arm ") for s in b.steps))
        return bundle

    @property
    def manifest(self) -> list[str]:
        """The lines of its manifest."""
        return self.switch.member("manifest").splitlines()

    @property
    def id(self) -> str:
        """What it is called on the host."""
        (stage,) = (s for s in self.switch.steps if s.startswith("stage "))
        return stage.split()[1]

    def names(self, *kinds: str) -> set[str]:
        """The first columns of the manifest's lines of these kinds."""
        lines = (line.split("\t") for line in self.manifest)
        return {name for kind, name, *_ in lines if kind in kinds}

    @property
    def groups(self) -> dict[str, Any]:
        """The inventory's groups of hosts."""
        return _variables(self.folder / "fleet")

    @property
    def data(self) -> dict[str, Any]:
        """The inventory's settings."""
        return _variables(self.folder / "group_data/fleet.py")

    @property
    def secrets(self) -> dict[str, str]:
        """The inventory's store."""
        entries: dict[str, str] = yaml.safe_load((self.folder / "fleet.secrets.yaml").read_text())
        return entries


def _variables(path: Path) -> dict[str, Any]:
    return {k: v for k, v in runpy.run_path(str(path)).items() if not k.startswith("_")}

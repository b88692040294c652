"""callready's own programs on a host: the synthetic caller, with the packages that it needs.

python -m callready.release.programs FOLDER downloads the wheels of these packages, for hosts that
reach no index.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile

from packaging.markers import Marker

import callready
from callready.settings.problem import SettingsError

PACKAGES = Path(__file__).with_name("caller.txt")
"""What it needs, each package with the hashes of its wheels."""
PYTHONS = ("3.11", "3.13")
"""Of Debian 12 and 13."""
ROOMS = ("probes", "secrets", "settings")


@dataclass(frozen=True)
class Programs:
    """The synthetic caller as it is here, to have installed.

    Args:
        wheels: where its packages come from: a folder of this machine, the URL of an index that
            the host reaches, or empty: what pip on the host says.
    """

    wheels: str = ""

    @cached_property
    def sources(self) -> dict[str, bytes]:
        """Its modules by their path."""
        root = Path(callready.__file__).parent
        files = [root / "__init__.py", *(f for room in ROOMS for f in (root / room).glob("*.py"))]
        return {str(f.relative_to(root.parent)): f.read_bytes() for f in sorted(files)}

    @property
    def archive(self) -> bytes:
        """Its modules as a zip, the same bytes each time."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as packed:
            for name, content in self.sources.items():
                packed.writestr(zipfile.ZipInfo(name), content)
        return buffer.getvalue()

    @property
    def python(self) -> str:
        """The interpreter that has them, once they are installed: another one for each version."""
        made = hashlib.sha256(PACKAGES.read_bytes())
        for name, content in self.sources.items():
            made.update(f"{name}\0{len(content)}\0".encode() + content)
        return f"/opt/callready/{made.hexdigest()[:16]}/bin/python3"

    @property
    def index(self) -> str:
        """The index that the host asks, if one is named."""
        return self.wheels if "://" in self.wheels else ""

    def files(self) -> Iterator[Path]:
        """The wheels of the folder, of the packages and versions that are needed; which of them
        are for the host, and whether they are the right ones, is for its pip to say.

        Raises:
            SettingsError: a package has none.
        """
        if not self.wheels or self.index:
            return
        folder = Path(self.wheels).expanduser()
        files = {f: "-".join(f.name.lower().split("-")[:2]) for f in sorted(folder.glob("*.whl"))}
        pins = re.findall(r"^(\S+)==(\S+)", PACKAGES.read_text(), re.MULTILINE)
        wanted = {f"{name.replace('-', '_')}-{version}" for name, version in pins}
        if missing := wanted - {*files.values()}:
            raise SettingsError(
                f"monitor.wheels: {folder} has no wheel of {', '.join(sorted(missing))}: run "
                f"python -m callready.release.programs {folder}"
            )
        yield from (file for file, what in files.items() if what in wanted)


def download(folder: Path) -> None:
    """The wheels of all packages, for the Pythons of Debian and this machine's kind of processor.

    Raises:
        CalledProcessError: pip has said why.
    """
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    for version in PYTHONS:
        with NamedTemporaryFile("w", suffix=".txt") as wanted:
            wanted.write(_for(version))
            wanted.flush()
            what = ["--only-binary", ":all:", "--python-version", version, "-r", wanted.name]
            subprocess.run([*download, *what, "-d", folder], check=True)


def _for(python: str) -> str:
    """The packages that a Python needs: pip asks the markers of the one that it runs in."""
    lines = []
    for entry in re.split(r"^(?=\S)", PACKAGES.read_text(), flags=re.MULTILINE):
        pin, _, marker = entry.partition("\\")[0].partition(" ; ")
        here = {"python_full_version": f"{python}.0", "python_version": python}
        if pin and (not marker or Marker(marker).evaluate(here)):
            lines.append(f"{pin} \\{entry.partition(chr(92))[2]}")
    return "".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m callready.release.programs", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    download(parser.parse_args().folder)

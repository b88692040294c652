"""Programs of Debian that tests run without having them installed."""

import os
import platform
import subprocess
from pathlib import Path


def unpack(folder: Path, *packages: str) -> Path:
    """Packages of this machine's Debian, and the libraries that it lacks, unpacked; none is
    installed, because some start then. Returns their root folder."""
    archives = folder / "archives"
    (archives / "partial").mkdir(parents=True)
    subprocess.run(
        [
            "apt-get",
            "install",
            "--download-only",
            "--reinstall",
            "--yes",
            "--quiet",
            "--no-install-recommends",
            f"-oDir::Cache::archives={archives}",
            "-oAPT::Sandbox::User=root",
            *packages,
        ],
        check=True,
        capture_output=True,
    )
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg", "-x", archive, folder / "root"], check=True)
    return folder / "root"


def libraries(root: Path) -> Path:
    """Where the libraries of unpacked packages are."""
    return root / f"usr/lib/{platform.machine()}-linux-gnu"


def environment(root: Path) -> dict[str, str]:
    """In which their programs find them."""
    return {**os.environ, "LD_LIBRARY_PATH": str(libraries(root))}

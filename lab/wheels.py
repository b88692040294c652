"""The wheels of the synthetic caller's packages."""

from pathlib import Path

from callready.release.programs import PACKAGES, download
from lab import plan
from lab.run import remove_tree, say

FOLDER = plan.CACHE / "wheels"


def publish() -> Path:
    """Download them, unless all are there; return their folder."""
    done = FOLDER / PACKAGES.name
    if done.exists() and done.read_bytes() == PACKAGES.read_bytes():
        return FOLDER
    say("downloading the synthetic caller's packages")
    remove_tree(FOLDER)
    download(FOLDER)
    done.write_bytes(PACKAGES.read_bytes())
    return FOLDER

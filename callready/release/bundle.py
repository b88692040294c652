"""What travels to a host: scripts, steps, and the files that they name, in one archive."""

from __future__ import annotations

import base64
import io
import tarfile
from collections.abc import Iterable

from callready.release.declaration import HOST, Release
from callready.release.plan import Step, content_name

# The file of host/ that a step finds beside apply.sh, by the name that it has there.
SCRIPTS = {
    "arm": {"revert.service": "revert.service", "boot.service": "boot.service"},
    "pair": {"certificates": "certificates.sh"},
    "placeholder": {"certificates": "certificates.sh"},
    "serving": {"certificates": "certificates.sh"},
}


def bundle(release: Release, steps: Iterable[Step]) -> str:
    """What apply.sh needs to run `steps`, as base64 of a compressed tar archive."""
    steps = list(steps)
    scripts = {"apply.sh": "apply.sh", "release": "release.sh"}
    members: dict[str, bytes] = {}
    for step in steps:
        scripts |= SCRIPTS.get(step.function, {})
        members |= {f"files/{content_name(each)}": each for each in step.contents}
        if step.function == "stage":
            members |= _staged(release)
    members |= {name: HOST.joinpath(file).read_bytes() for name, file in scripts.items()}
    members["steps"] = "".join(f"{step.line}\n" for step in steps).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o600
            tar.addfile(info, io.BytesIO(content))
    return base64.encodebytes(buffer.getvalue()).decode()


def _staged(release: Release) -> dict[str, bytes]:
    templates = "".join(f"{path}\t{text}\n" for path, text in release.templates.items())
    return {
        "manifest": release.manifest.text.encode(),
        "templates": templates.encode(),
        **{f"files/{file.sha256}": file.content for file in release.files.values()},
        **{
            f"environment{path}": env.text.get_secret_value().encode()
            for path, env in release.environments.items()
        },
    }

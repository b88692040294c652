"""What travels to a host: scripts, steps, and the files that they name, in one archive."""

from __future__ import annotations

import base64
import io
import tarfile
from collections.abc import Iterable, Mapping

from callready.release.declaration import Release
from callready.release.facts import HOST, host_script
from callready.release.plan import Step, content_name

# What travels with every script, and what some steps find beside it, by the names they have there.
APPLY = {"apply.sh": HOST.joinpath("apply.sh").read_bytes(), "release": host_script("release.sh")}
UNITS = {name: HOST.joinpath(name).read_bytes() for name in ("revert.service", "boot.service")}
CERTIFICATES = {"certificates": host_script("certificates.sh")}
NEEDS = {
    "arm": UNITS,
    "install_pair": CERTIFICATES,
    "install_placeholder": CERTIFICATES,
    "wait_for_certificate": CERTIFICATES,
}


def bundle(release: Release, steps: Iterable[Step]) -> str:
    """What apply.sh needs to run `steps`, as base64 of a compressed tar archive."""
    steps = list(steps)
    members = {**APPLY, "steps": "".join(f"{step.line}\n" for step in steps).encode()}
    for step in steps:
        members |= NEEDS.get(step.function, {})
        members |= {f"files/{content_name(each)}": each for each in step.contents}
        if step.function == "stage":
            members |= _staged(release)
    return pack(members)


def pack(members: Mapping[str, bytes]) -> str:
    """A compressed tar archive in base64."""
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

"""Releases of LiveKit that nobody has published, served as those of the lab are."""

from __future__ import annotations

import functools
import hashlib
import http.server
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab import archive, plan


@contextmanager
def published(folder: Path, versions: Mapping[str, bytes | None]) -> Iterator[str]:
    """The lab's LiveKit and more releases of it, arguments as `repack`; the URL of the download
    page."""
    first = archive.publish()
    (folder / f"v{archive.VERSION}").symlink_to(first.parent)
    for version, binary in versions.items():
        repack(first, folder, version, binary)
    server = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer((plan.MACHINE.ipv4, 0), server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        try:
            yield f"http://{plan.MACHINE.ipv4}:{httpd.server_port}"
        finally:
            httpd.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def repack(source: Path, www: Path, version: str, binary: bytes | None = None) -> None:
    """Publish a release whose program is another one's with a byte more, or is `binary`."""
    folder = www / f"v{version}"
    unpacked = folder / "unpacked"
    unpacked.mkdir(parents=True)
    with tarfile.open(source) as tar:
        tar.extractall(unpacked, filter="data")
    program = unpacked / "livekit-server"
    program.write_bytes(program.read_bytes() + b"\0" if binary is None else binary)
    target = folder / source.name.replace(archive.VERSION, version)
    subprocess.run(["tar", "-C", unpacked, "-I", "gzip -1", "-cf", target, "."], check=True)
    shutil.rmtree(unpacked)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    (folder / "checksums.txt").write_text(f"{digest}  {target.name}\n")

"""The stand-in for LiveKit's egress (lab/egress): its image, and the registry it is pulled from."""

import contextlib
import gzip
import hashlib
import http.client
import json
import os
import ssl
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from lab import ca, plan
from lab.archive import go
from lab.run import Group, LabError, locked, remove_tree, run, say
from lab.services import wait_for

SOURCE = Path(__file__).with_name("egress")
STATE = plan.STATE / "registry"
CACHE = plan.CACHE / "egress"
PROGRAM = Path("/usr/bin/docker-registry")
PORT = 5000
REGISTRY = f"{plan.MACHINE.fqdn}:{PORT}"
NAME = f"{REGISTRY}/livekit/egress"
DIGEST = STATE / "egress.digest"  # of the image that was pushed last

# Upstream's image is Ubuntu 24.04 with GStreamer and Chrome; this has what the stand-in calls.
SUITE = "trixie"
PACKAGES = "bash,ca-certificates,ffmpeg,pulseaudio,pulseaudio-utils,tini"
LEFT_OUT = (
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    # What ffmpeg loads only to draw on a screen.
    "/usr/lib/*/dri/*",
    "/usr/lib/*/libgallium*",
    "/usr/lib/*/libLLVM*",
    "/usr/lib/*/libz3*",
)
# $1 is the new root. Upstream does the same with `useradd`, where Ubuntu's own user has uid 1000.
CUSTOMIZE = """
set -e
chroot "$1" useradd --create-home --shell /bin/bash --uid 1001 --gid root \
    --groups sudo,pulse,pulse-access egress
chroot "$1" install -d -o egress -g root /home/egress/tmp /home/egress/.cache \
    /home/egress/.cache/xdgr
echo 'rlimit-nofile = -1' >> "$1/etc/pulse/daemon.conf"
ln -s usr/bin/tini "$1/tini"
chroot "$1" ffmpeg -v error -f lavfi -i sine=d=0.1 -c:a libopus -f ogg -y /dev/null
"""
BLOBS = "/v2/livekit/egress/blobs"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def publish() -> str:
    """Build the image unless it is there, start the registry and push it.

    Returns:
        The image's digest, ``sha256:…``; `NAME` is what it is called.
    """
    # Without the lab's lock: others need it in these minutes.
    layers = (_base(), _top())
    with locked():
        start()
    config = {
        "architecture": run("dpkg", "--print-architecture").strip(),
        "os": "linux",
        "config": {
            "User": "egress",
            "Env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/chrome",
                "XDG_RUNTIME_DIR=/home/egress/.cache/xdgr",
            ],
            "Entrypoint": ["/entrypoint.sh"],
        },
        "rootfs": {"type": "layers", "diff_ids": [unpacked for _, unpacked in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _push(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [
            _push(packed, "application/vnd.oci.image.layer.v1.tar+gzip") for packed, _ in layers
        ],
    }
    content = json.dumps(manifest).encode()
    digest = _digest(content)
    _ask("PUT", f"/v2/livekit/egress/manifests/{digest}", content, MANIFEST)
    DIGEST.write_text(digest)
    return digest


def unpack(folder: Path) -> None:
    """Put what is in the image into a folder, for what runs it without a container."""
    for layer, _ in (_base(), _top()):
        with tarfile.open(fileobj=BytesIO(layer), mode="r:gz") as tar:
            tar.extractall(folder, filter="tar")


def start() -> None:
    """Start Debian's registry on the bridge, with a certificate of the lab's, unless it runs."""
    group = Group("service-registry")
    if not PROGRAM.exists():
        raise LabError("missing programs: apt-get install docker-registry")
    if not group.running():
        STATE.mkdir(parents=True, exist_ok=True)
        machine = plan.MACHINE
        certificate = ca.issue(machine.fqdn, (machine.ipv4, machine.ipv6), folder=STATE)
        configuration = {
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": str(STATE / "storage")}},
            "http": {
                "addr": f"{machine.ipv4}:{PORT}",
                "relativeurls": True,
                "tls": {
                    "certificate": str(certificate),
                    "key": str(certificate.with_suffix(".key")),
                },
            },
        }
        (STATE / "config.yml").write_text(json.dumps(configuration))
        group.start(PROGRAM, "serve", STATE / "config.yml")
    wait_for(PORT, group)


def stop() -> None:
    """End the registry."""
    Group("service-registry").kill()


def _base() -> tuple[bytes, str]:
    """The layer with Debian's part, and its digest unpacked; another recipe gives other files."""
    entrypoint = SOURCE / "entrypoint.sh"
    recipe = (SUITE, PACKAGES, LEFT_OUT, CUSTOMIZE, entrypoint.read_text())
    layer = CACHE / f"base-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]}.tar.gz"
    unpacked = layer.with_suffix(".sha256")
    if not unpacked.exists():
        with _folder() as folder:
            tar = folder / "base.tar"
            Group(folder.name).stream(
                "mmdebstrap",
                "--mode=root",
                "--variant=essential",
                f"--include={PACKAGES}",
                *(f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT),
                "--skip=output/dev",
                f"--customize-hook={CUSTOMIZE}",
                f"--customize-hook=copy-in {entrypoint} /",
                SUITE,
                tar,
                env={**os.environ, "LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": "1767225600"},
            )
            digest = _digest(tar.read_bytes())
            run("gzip", "--fast", "--no-name", tar)
            CACHE.mkdir(exist_ok=True)
            tar.with_name("base.tar.gz").rename(layer)
            unpacked.write_text(digest)  # last: it says that the layer is whole
    return layer.read_bytes(), unpacked.read_text()


def _top() -> tuple[bytes, str]:
    """The layer with the program and the authority that the lab's certificates are of."""
    say("building the stand-in for egress")
    content = BytesIO()
    with _folder() as folder, tarfile.open(fileobj=content, mode="w") as tar:
        program = folder / "egress"
        flags = ("-trimpath", "-ldflags=-s -w")
        run("env", "CGO_ENABLED=0", go(), "build", "-C", SOURCE, *flags, "-o", program, ".")
        for name, file, mode in (
            ("usr/bin/egress", program, 0o755),
            ("etc/ssl/certs/lab.pem", ca.CA_CERTIFICATE, 0o644),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.mode = file.stat().st_size, mode
            with file.open("rb") as reader:
                tar.addfile(member, reader)
    tar_file = content.getvalue()
    return gzip.compress(tar_file, compresslevel=1, mtime=0), _digest(tar_file)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder to build in, which `lab down` removes if this process is killed."""
    folder = plan.CACHE / f"build-egress-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        remove_tree(folder)


def _push(blob: bytes, media_type: str) -> dict[str, object]:
    digest = _digest(blob)
    try:
        _ask("HEAD", f"{BLOBS}/{digest}")
    except urllib.error.HTTPError:
        place = _ask("POST", f"{BLOBS}/uploads/").headers["Location"]
        _ask("PUT", f"{place}&digest={digest}", blob, "application/octet-stream")
    return {"mediaType": media_type, "digest": digest, "size": len(blob)}


def _ask(
    method: str, path: str, body: bytes = b"", media_type: str | None = None
) -> http.client.HTTPResponse:
    headers = {"Content-Type": media_type} if media_type else {}
    request = urllib.request.Request(
        f"https://{REGISTRY}{path}", body or None, headers, method=method
    )
    trusted = ssl.create_default_context(cafile=str(ca.CA_CERTIFICATE))
    with urllib.request.urlopen(request, timeout=60, context=trusted) as answer:
        assert isinstance(answer, http.client.HTTPResponse)
        return answer


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"

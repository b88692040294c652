"""Root images: a minimal Debian per suite, as a cloud provider would deliver it, made once."""

import hashlib
import os
from pathlib import Path

from lab import plan
from lab.run import Group, remove_tree, run

# What an OVH image has and a deploy may count on. Deliberately absent: nftables, python3, curl,
# sqlite3, and of course coturn and livekit. systemd-resolved is there because Debian's cloud
# images have it, with its LLMNR listeners that nobody planned.
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "systemd-timesyncd",
    "systemd-resolved",
    "dbus",
    "openssh-server",
    "sudo",
    "iproute2",
    "procps",
    "netbase",
    "ca-certificates",
)
# $1 is the new root. Host keys and the machine's name must not be shared by all its copies.
CUSTOMIZE = """
set -e
chroot "$1" useradd --create-home --shell /bin/bash --uid 1000 debian
echo 'debian ALL=(ALL) NOPASSWD:ALL' > "$1/etc/sudoers.d/90-cloud"
chmod 440 "$1/etc/sudoers.d/90-cloud"
printf 'PasswordAuthentication no\\nKbdInteractiveAuthentication no\\n' \
    > "$1/etc/ssh/sshd_config.d/50-cloud.conf"
chroot "$1" systemctl enable systemd-networkd.service
rm -f "$1"/etc/ssh/ssh_host_* "$1/etc/hostname"
"""


def path(suite: str) -> Path:
    """Where the image of this suite lies; another recipe gives another folder."""
    recipe = hashlib.sha256(repr((PACKAGES, CUSTOMIZE)).encode()).hexdigest()[:8]
    return plan.CACHE / "roots" / f"{suite}-{recipe}"


def build(suite: str) -> Path:
    """Make the image of this suite unless it is there; return its folder."""
    image = path(suite)
    if image.exists():
        return image
    partial = image.with_name(f"{image.name}.partial")
    remove_tree(partial)  # of a run that was killed
    image.parent.mkdir(parents=True, exist_ok=True)
    # No mirror argument: mmdebstrap knows Debian's own, and uses this machine's apt settings.
    # The package lists stay, so that a host's first `apt-get update` finds nothing to fetch.
    Group(f"image-{suite}").stream(
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        f"--include={','.join(PACKAGES)}",
        "--skip=cleanup/apt/lists",
        f"--customize-hook={CUSTOMIZE}",
        suite,
        partial,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    partial.rename(image)
    return image


def repositories(image: Path) -> set[str]:
    """The package repositories the image was built from, as URLs."""
    return set(run("chroot", image, "apt-get", "indextargets", "--format", "$(REPO_URI)").split())

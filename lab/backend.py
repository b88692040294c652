"""The app on a host, installed by hand as an app developer does it (examples/backend/README.md):
callready only writes its .env and restarts it."""

import shlex
import time
from pathlib import Path

from lab import ca, hosts, plan
from lab.run import LabError, say

EXAMPLE = Path(__file__).parents[1] / "examples/backend"
PACKAGES = "gunicorn python3-fastapi python3-jwt python3-uvicorn python3-websockets"
SCRIPT = """
set -e
export DEBIAN_FRONTEND=noninteractive
dpkg-query -W {packages} > /dev/null 2>&1 || {{
    apt-get -qq update
    apt-get -qq -y --no-install-recommends install {packages} < /dev/null
}} > /run/backend.log 2>&1 || {{ tail -n 5 /run/backend.log >&2; exit 1; }}
id app > /dev/null 2>&1 ||
    useradd --system --user-group --home-dir /srv/app --no-create-home --shell /usr/sbin/nologin app
mkdir -p /srv/app /etc/systemd/system/backend.service.d
{files}
systemctl daemon-reload
systemctl enable --quiet backend.socket backend.service
"""
PLACES = {
    "backend.py": "/srv/app",
    "recordings.html": "/srv/app",
    "backend.socket": "/etc/systemd/system",
    "backend.service": "/etc/systemd/system",
}
AUTHORITY = "/srv/app/authority.pem"  # by which it knows LiveKit
TRUST = f"[Service]\nEnvironment=SSL_CERT_FILE={AUTHORITY}\n"


def install(host: plan.Host) -> None:
    """Packages, the program, its user and its units, enabled; it starts once it has its .env.

    Raises:
        LabError: something in the host failed, with its own words.
    """
    began = time.monotonic()
    files = {f"{place}/{name}": (EXAMPLE / name).read_text() for name, place in PLACES.items()}
    files[AUTHORITY] = ca.CA_CERTIFICATE.read_text()
    files["/etc/systemd/system/backend.service.d/authority.conf"] = TRUST
    written = (f"printf %s {shlex.quote(text)} > {path}" for path, text in files.items())
    script = SCRIPT.format(packages=PACKAGES, files="\n".join(written))
    done = hosts.ssh(host, "sudo -n sh -s", input=script)
    if done.returncode:
        raise LabError(f"{host.name}: the example backend cannot be installed: {done.stderr}")
    say(f"{host.fqdn} has the example backend, installed in {time.monotonic() - began:.1f} s")

"""The app on a host, installed by hand as an app developer does it (examples/backend/README.md):
callready only writes its .env and restarts it."""

import shlex
import time
from pathlib import Path

from lab import hosts, plan
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
mkdir -p /srv/app
printf %s {program} > /srv/app/backend.py
printf %s {unit} > /etc/systemd/system/backend.service
systemctl daemon-reload
systemctl enable --quiet backend.service
"""


def install(host: plan.Host) -> None:
    """Packages, the program, its user and its unit, enabled; it starts once it has its .env.

    Raises:
        LabError: something in the host failed, with its own words.
    """
    began = time.monotonic()
    script = SCRIPT.format(
        packages=PACKAGES,
        program=shlex.quote((EXAMPLE / "backend.py").read_text()),
        unit=shlex.quote((EXAMPLE / "backend.service").read_text()),
    )
    done = hosts.ssh(host, "sudo -n sh -s", input=script)
    if done.returncode:
        raise LabError(f"{host.name}: the example backend cannot be installed: {done.stderr}")
    say(f"{host.fqdn} has the example backend, installed in {time.monotonic() - began:.1f} s")

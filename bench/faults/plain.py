"""A TURN host with pyinfra's own operations, as a usual deploy does it: files, then nft -f and
restarts of what changed. `work` names the files, made by callready's templates."""

import json
import os
import time
from pathlib import Path

from pyinfra.context import config, host
from pyinfra.operations import apt, files, python, server, systemd
from pyinfra.operations.util import any_changed

config.SUDO = True
work = json.loads(Path(host.data.work).read_text())
mark = Path(host.data.work).with_name("held")


def stand_still() -> None:
    """Where the faults strike: half of the files are new."""
    if os.environ.get("FAULTS_HOLD"):
        mark.touch()
        while mark.exists():
            time.sleep(0.1)


apt.packages(name="Packages", packages=work["packages"])
files.link(name="Mask", path="/etc/systemd/system/coturn.service", target="/dev/null")
for path, database in work["databases"].items():
    server.shell(
        name=path,
        commands=f"[ -e {path} ] || sqlite3 {path} < /usr/share/coturn/schema.sql; "
        f"chown turnserver: {path}",
    )
    files.put(name=f"Rows of {path}", src=database, dest=f"{path}.sql", mode="600")
    server.shell(name=f"Load {path}.sql", commands=f"sqlite3 {path} < {path}.sql > /dev/null")
changed = []
for number, (path, (source, user, group, mode)) in enumerate(work["files"].items()):
    if number == len(work["files"]) // 2:
        python.call(name="Node the faults strike", function=stand_still)
    changed.append(files.put(name=path, src=source, dest=path, user=user, group=group, mode=mode))
changed += [files.link(name=p, path=p, target=target) for p, target in work["links"].items()]
server.sysctl(
    name="Reserved ports", key="net.ipv4.ip_local_reserved_ports", value=work["reserved_ports"]
)
systemd.daemon_reload(name="Reload systemd", _if=any_changed(*changed))
server.shell(
    name="Firewall", commands="nft -f /etc/callready/nftables.conf", _if=any_changed(*changed)
)
for unit in work["units"]:
    systemd.service(name=f"{unit} runs", service=unit, running=True)
    systemd.service(
        name=f"{unit} restarts", service=unit, restarted=True, _if=any_changed(*changed)
    )
for unit in work["no_units"]:
    systemd.service(name=f"{unit} stops", service=unit, running=False)
for path in work["no_files"]:
    files.file(name=f"No {path}", path=path, present=False)

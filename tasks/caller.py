"""The synthetic caller on the host of group monitor."""

import hashlib
from dataclasses import replace
from pathlib import Path

from callready.probes.caller import configuration
from callready.probes.catalogue import watched
from callready.release.node import Node
from callready.release.programs import Programs
from callready.settings.ports import CALLER, CALLER_PORT
from tasks.monitor import FOLDER

CONFIG = f"{FOLDER}/caller.json"
UNIT_FILE = f"/etc/systemd/system/{CALLER}"


def caller(node: Node) -> None:
    """What callers need of every host is tried all the time, and calls are made over each path."""
    if not (settings := node.settings.watches):
        return
    release = node.release
    release.programs = programs = Programs(settings.wheels or "")
    for _ in programs.files():
        break  # a folder without them is said before anything is touched
    release.package("python3-venv")
    release.user("callready-caller")
    probes = watched(node.fleet, node.name, settings.livekit_key, settings.turn_secret)
    authorities = {each.ca: _authority(node, each.ca) for each in probes if each.ca}
    asked = [replace(each, ca=authorities[each.ca]) if each.ca else each for each in probes]
    text = configuration(asked, settings.calls_a_minute)
    release.file(CONFIG, content=text.encode(), mode=0o600)
    release.file(UNIT_FILE, f"{CALLER}.j2", python=programs.python, config=CONFIG)
    release.enable(CALLER, UNIT_FILE)
    release.service(
        CALLER,
        inputs=[UNIT_FILE, *authorities.values()],
        credentials=[CONFIG],
        binary=programs.python,
        listens=[f"tcp/{CALLER_PORT}"],
    )


def _authority(node: Node, ca: str) -> str:
    """Where a private authority is on the host."""
    content = Path(ca).read_bytes()
    path = f"{FOLDER}/{hashlib.sha256(content).hexdigest()[:16]}.pem"
    node.release.file(path, content=content)
    return path

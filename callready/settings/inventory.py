"""An inventory's data as pyinfra merges it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from callready.settings.problem import SettingsError


def inventory_data(inventory: str) -> dict[str, dict[str, Any]]:
    """The merged data of every host as pyinfra itself prints it, without connecting.

    Raises SettingsError with pyinfra's own words if it cannot read the inventory.
    """
    if not Path(inventory).is_file():
        raise SettingsError(f"{inventory}: no such inventory file")
    command = [sys.executable, "-m", "pyinfra", inventory, "debug-inventory", "--json"]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYINFRA_PROGRESS": "off"}
    )
    try:
        hosts = json.loads(run.stdout)
    except json.JSONDecodeError:
        raise SettingsError(f"{inventory}: {_complaint(run.stderr)}") from None
    return {host["name"]: {**host["data"], "groups": host["groups"]} for host in hosts}


def _complaint(output: str) -> str:
    """What pyinfra stumbled over and where, without its traceback and its hints."""
    what = re.findall(r"^(?:\w+(?:Error|Exception):.*|--> [\w ]*error: .*)", output, re.MULTILINE)
    where = re.findall(r'^  File "(.*)", line (\d+)', output, re.MULTILINE)
    said = re.sub("^--> (pyinfra error: )?", "", what[-1]) if what else ""
    message = said or "pyinfra cannot read it"
    return f"{where[-1][0]}, line {where[-1][1]}: {message}" if where else message

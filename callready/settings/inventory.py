"""An inventory's data as pyinfra merges it, and what pyinfra would leave out of it or misread."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from callready.settings.models import ROLES
from callready.settings.problem import Findings, Problem, SettingsError

# The groups that get something; others are the operator's own.
GROUPS = ROLES | {"android"}


# A host and its own data.
Pair = tuple[str, dict[str, Any]]


def inventory_data(inventory: str) -> dict[str, dict[str, Any]]:
    """The merged data of every host as pyinfra itself prints it, without connecting.

    Raises SettingsError with pyinfra's own words if it cannot read the inventory, and if there is
    nothing to deploy in it.
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
        complaint = _complaint(run.stderr).removeprefix(f"{inventory}: ")
        raise SettingsError(f"{inventory}: {complaint}") from None
    data = {host["name"]: {**host["data"], "groups": host["groups"]} for host in hosts}
    require_roles(inventory, data)
    return data


def _complaint(output: str) -> str:
    """What pyinfra stumbled over and where, without its traceback and its hints."""
    if refused := re.search(
        r"^--> (?=[\w ]*error: )(?:pyinfra error: (?:nothing was .*\n)?)?([^\0]*)",
        output,
        re.MULTILINE,
    ):
        return refused[1].strip()
    what = re.findall(r"^\w+(?:Error|Exception):.*", output, re.MULTILINE)
    where = re.findall(r'^  File "(.*)", line (\d+)', output, re.MULTILINE)
    message = what[-1] if what else "pyinfra cannot read it"
    return f"{where[-1][0]}, line {where[-1][1]}: {message}" if where else message


def require_roles(source: str, data: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise SettingsError where no host has a role that a service needs."""
    if not data:
        raise SettingsError(f"{source}: no hosts: is it the right file?")
    groups = {group for host in data.values() for group in host["groups"]}
    if groups.isdisjoint({"livekit", "turn"}):
        meant = (f"; did you mean {role} by {group}?" for group, role in mistyped(groups))
        raise SettingsError(
            f"{source}: no host in group livekit or turn: nothing to deploy" + "".join(meant)
        )


def mistyped(groups: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Groups that are none of ours and look like one, each with the one it looks like."""
    for group in sorted(set(groups) - GROUPS):
        if close := get_close_matches(group.lower(), sorted(GROUPS), n=1, cutoff=0.8):
            yield group, close[0]


def misread(variables: Mapping[str, Any]) -> Findings:
    """What pyinfra would leave out of the variables of an inventory file or misread, with at most a
    line among others: groups and hosts of the wrong shape, and one host twice.

    A group is a list of hosts, or such a list and data for the group (pyinfra_cli/inventory.py).
    """
    groups: dict[str, list[Pair]] = {}
    for group, value in variables.items():
        if group.startswith("_"):
            continue
        is_ours = group in GROUPS | {"all"}
        has_data = isinstance(value, tuple) and [*map(type, value)] == [list, dict]
        hosts = value[0] if has_data else value
        if isinstance(hosts, list) and (is_ours or not all(map(_wrong_host, hosts))):
            groups[group] = []
            for index, host in enumerate(hosts):
                if why := _wrong_host(host):
                    yield [], Problem(f"{group}[{index}]", why)
                else:
                    groups[group].append(host if isinstance(host, tuple) else (host, {}))
        elif is_ours or (isinstance(value, list | tuple) and value):
            given = "one host alone" if not _wrong_host(value) else _kind(value)
            given = "one of something else" if isinstance(value, list) else given
            why = f"must be a list of hosts in [ ], not {given}"
            yield [], Problem(group, why if is_ours else f"{why}; or begin its name with _")
    yield from _twice(groups)
    if "all" in groups:
        listed = {name for name, _ in groups["all"]}
        why = "is not in the group all, so pyinfra leaves it out: add it there, or take all out"
        for group, pairs in groups.items():
            yield from (([name], Problem(group, why)) for name, _ in pairs if name not in listed)


def _twice(groups: Mapping[str, list[Pair]]) -> Findings:
    """Hosts of which pyinfra would take the last one's data, or two where there is one."""
    spelt: dict[str, str] = {}
    said: dict[tuple[str, str], tuple[str, Any]] = {}
    for group, pairs in groups.items():
        names = [name for name, _ in pairs]
        for name in dict.fromkeys(names):
            if names.count(name) > 1:
                yield [name], Problem(group, "has it twice: write it once, with all its data")
            first = spelt.setdefault(_machine(name), name)
            if first != name:
                yield [first, name], Problem(group, f"is one host: write {first} everywhere")
        for name, data in pairs:
            for key, value in data.items():
                where, other = said.setdefault((name, key), (group, value))
                if other != value and where != group:
                    why = f"differs between the groups {where} and {group}: write it once"
                    yield [name], Problem(key, why)


def one_machine(data: Mapping[str, Mapping[str, Any]]) -> Findings:
    """Hosts that pyinfra reaches at the same place: each would replace what the other has got."""
    places: dict[tuple[Any, ...], list[str]] = {}
    for name, host in data.items():
        where = host.get("ssh_hostname") or name.removeprefix("@ssh/")
        more = (host.get("ssh_port") or 22, host.get("ssh_config_file"))
        places.setdefault((str(where).casefold(), *map(str, more)), []).append(name)
    for names in places.values():
        if len(names) > 1:
            why = "is the same for all of them: one host has one name, in every group that it is in"
            yield names, Problem("ssh_hostname", why)


def _machine(name: str) -> str:
    """A host's name as DNS compares it (RFC 4343)."""
    return name.removeprefix("@ssh/").removesuffix(".").casefold()


def _wrong_host(value: Any) -> str | None:
    """Why this is no host of a group, or None."""
    name, *rest = value if isinstance(value, tuple) and value else (value,)
    if not isinstance(name, str) or not name or len(rest) > 1:
        wanted = 'must be a host, its name or ("NAME", {"address": "…"})'
        return f"{wanted}, not {_kind(value)}"
    if isinstance(value, tuple) and [*map(type, rest)] != [dict]:
        given = _kind(rest[0]) if rest else "a name alone"
        return f'must have the data of {name} in {{ }}: ("{name}", {{"address": "…"}}), not {given}'
    if wrong := [key for key in (rest[0] if rest else ()) if not isinstance(key, str)]:
        return f"must have keys in quotes in the data of {name}, not {_kind(wrong[0])}"
    if rest and "groups" in rest[0]:
        return f"{name} is in the groups whose lists have it: take groups out of its data"
    return None


def _kind(value: Any) -> str:
    kinds = {str: "text", int: "a number", float: "a number", dict: "a mapping", list: "a list"}
    kinds |= {tuple: "a tuple", set: "a set", bool: str(value)}
    if value is None or value == "":
        return repr(value)
    return kinds.get(type(value), f"a {type(value).__name__}")

"""From an inventory to the validated settings of every host: all errors of all hosts at once,
before any connection."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pyinfra.api.arguments import all_argument_meta
from pyinfra.connectors.ssh import connector_data_meta

from callready.secrets.store import Store, references, resolve, rotating, sharing
from callready.settings.checks import check
from callready.settings.fields import model_in
from callready.settings.fleet import Fleet
from callready.settings.inventory import inventory_data, one_machine, require_roles
from callready.settings.models import HostSettings
from callready.settings.problem import Findings, Problem, SettingsError
from callready.settings.types import INLINE
from callready.settings.uris import peers

# pyinfra's own host data: connector settings and global arguments.
SSH, ARGUMENT = "ssh_", "_"


def load_fleet(inventory: str) -> Fleet:
    """Read an inventory file as pyinfra merges it; raises SettingsError."""
    return validate(inventory, inventory_data(inventory))


def validate(source: str, data: Mapping[str, Mapping[str, Any]]) -> Fleet:
    """The fleet of merged host data (`groups` among its keys); raises SettingsError."""
    report = Report(source)
    store = Store(source)
    entries = store.read()
    require_roles(source, data)
    report.placeholders(data)
    report.extend(one_machine(data))
    for message in sharing(name for host in data.values() for _, name in references(host)):
        report.error([], "", message)
    hosts: dict[str, HostSettings] = {}
    logins: dict[str, dict[str, Any]] = {}
    known: set[str] = set()
    for name, plain in data.items():
        raw = rotating(plain, entries)
        values: dict[str, str] = {}
        for path, reference in references(raw):
            value = store.lookup(entries, reference)
            if not value:
                report.error(
                    [name],
                    path,
                    f"{store.path} has no entry {reference}: "
                    f"run make secrets ENV={Path(source).name}",
                )
            elif not value.isprintable() or value != value.strip():
                report.error(
                    [name],
                    path,
                    "has a line break or a blank at its end; programs differ in reading that",
                )
            values[reference] = value or "-" * 32
        known.update(values.values())
        report.pyinfra(name, raw)
        logins[name] = {
            key: resolve(value, values)
            for key, value in raw.items()
            if key.startswith(SSH) and any(references(value))
        }
        own = {
            key: value
            for key, value in raw.items()
            if key == "ssh_port" or not key.startswith((SSH, ARGUMENT))
        }
        own.setdefault("name", name.rpartition("/")[2].lstrip("@"))
        own["elsewhere"] = {
            g for other, host in data.items() if other != name for g in host["groups"]
        }
        try:
            hosts[name] = HostSettings.model_validate(resolve(own, values))
        except ValidationError as error:
            report.invalid(name, error)
    for name, host in hosts.items():
        hosts[name] = host.model_copy(update={"peers": peers(hosts, name)})
    if not report.errors:
        report.extend(check(Fleet(source, hosts)))
    if report.errors:
        raise SettingsError("\n".join(report.lines("error")))
    return Fleet(source, hosts, list(report.lines("warning")), frozenset(known), logins)


# pydantic's types of errors in words that an operator needs no Python for.
_WORDS = {
    "missing": "is missing",
    "too_short": "is empty",
    **dict.fromkeys(("string_type", "invalid_key"), "must be text in quotes"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be True or False"),
    **dict.fromkeys(
        ("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "must be a whole number"
    ),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "must be a number"),
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list in [ ]"),
    "dict_type": "must be a mapping in { }",
    "model_type": "must be a mapping in { }",
}


# example.com and names below it, and no name that only contains it.
_PLACEHOLDER = re.compile(
    r"(?<![\w-])(?:(?i:example\.com)(?![\w-]|\.\w)|CHANGE-ME(?![\w-]))", re.ASCII
)


class Report:
    """Findings, merged over the hosts that share them."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: dict[Problem, list[str]] = {}

    @property
    def errors(self) -> bool:
        """Whether any finding is an error."""
        return any(problem.level == "error" for problem in self.found)

    def add(self, hosts: Iterable[str], problem: Problem) -> None:
        """Note a finding about one or more hosts."""
        known = self.found.setdefault(problem, [])
        known.extend(host for host in hosts if host not in known)

    def extend(self, findings: Findings) -> None:
        """Note findings, each with its hosts."""
        for hosts, problem in findings:
            self.add(hosts, problem)

    def error(self, hosts: Iterable[str], key: str, message: str) -> None:
        """Note an error."""
        self.add(hosts, Problem(key, message))

    def invalid(self, host: str, error: ValidationError) -> None:
        """Note what pydantic found, without the values and in our words."""
        found: list[tuple[str, str]] = []
        for item in error.errors(include_input=False, include_url=False, include_context=False):
            key = ".".join(str(part) for part in item["loc"] if part != "[key]")
            message = _WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
            if item["type"] == "extra_forbidden":
                message = "is not a setting" + _suggestion(item["loc"])
            found.append((key, message))
        for key, message in found:
            # A default of all pools is validated again in each pool: say it once.
            parts = key.split(".")
            common = ".".join(["turn", *parts[3:]]) if parts[:2] == ["turn", "pools"] else key
            if common == key or (common, message) not in found:
                self.error([host], key, message)

    def pyinfra(self, host: str, data: Mapping[str, Any]) -> None:
        """Note what is wrong with pyinfra's own data, of which pyinfra ignores what it does not
        know. Other names that begin with `_` may be variables of an inventory file."""
        for key, value in data.items():
            if key.startswith(SSH):
                if key not in connector_data_meta:
                    close = suggestion(key, connector_data_meta)
                    self.error([host], key, f"is not a setting{close}")
                self._references(host, key, value)
            elif key.startswith(ARGUMENT) and key not in all_argument_meta:
                if close := suggestion(key, all_argument_meta):
                    self.error([host], key, f"is no argument of pyinfra{close}")
            elif key.startswith(ARGUMENT) and (key.endswith("_password") or any(references(value))):
                self.error(
                    [host],
                    key,
                    "is a secret that pyinfra would put into the arguments of a program on the "
                    "host, for every user there to read; callready becomes root by sudo, whose "
                    'password goes over standard input: write sudo_password = "secret:…"',
                )
        if data.get("ssh_key_password") and not data.get("ssh_key"):
            self.error(
                [host], "ssh_key_password", "needs ssh_key: the file that it is the passphrase of"
            )

    def _references(self, host: str, key: str, value: Any) -> None:
        """Note secrets that are written out, and references where pyinfra shows what it gets."""
        if isinstance(value, Mapping):
            for name, item in value.items():
                self._references(host, f"{key}.{name}", item)
            return
        is_secret, is_reference = key.endswith(("password", "passphrase")), any(references(value))
        if is_secret and value and not is_reference:
            self.error([host], key, INLINE)
        elif is_reference and not is_secret:
            self.error([host], key, "is no secret, pyinfra shows it: write the value itself")

    def placeholders(self, data: Mapping[str, Mapping[str, Any]]) -> None:
        """Note names that the shipped examples use and nobody can own (RFC 2606)."""
        found = set(filter(_PLACEHOLDER.search, _words(data)))
        if found:
            env = Path(self.source)
            self.error(
                [],
                "",
                f"still has the example's {', '.join(sorted(found))}: edit {self.source} and "
                f"{env.parent}/group_data/{env.name}.py to name your own hosts",
            )

    def lines(self, level: str) -> Iterable[str]:
        """One line a finding: `inventories/prod: turn1.example.com: turn.min_port: …`."""
        for problem, hosts in self.found.items():
            if problem.level == level:
                where = [self.source, ", ".join(hosts), problem.key, problem.message]
                yield ": ".join(part for part in where if part)


def _words(data: Any) -> Iterable[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _words(key)
            yield from _words(value)
    elif isinstance(data, list | tuple | set | frozenset):
        for value in data:
            yield from _words(value)


def _suggestion(loc: tuple[int | str, ...]) -> str:
    model: type[BaseModel] = HostSettings
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        inner = model_in(field.annotation) if field else None
        model = inner[0] if inner else model  # else an index or a name
    return suggestion(str(loc[-1]), model.model_fields)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is not known: which one may have been meant."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""

"""Secret references (`"secret:turn/calls"`) to values, from the environment or a private file.

python -m callready.secrets ENV    complete inventories/ENV.secrets.yaml with strong secrets
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr

PREFIX = "secret:"


class SecretsError(Exception):
    """The store itself cannot be used; the message says what to do."""


class Store:
    """The secrets of one inventory: `CALLREADY_SECRET_TURN_CALLS` in the environment first, then
    the entry `turn/calls` of `<inventory>.secrets.yaml`, which nobody but its owner may read."""

    def __init__(self, inventory: str) -> None:
        self.path = Path(f"{inventory}.secrets.yaml")

    def read(self) -> dict[str, str]:
        """The entries of the file; none if there is no file.

        Raises SecretsError if others may read it or it is not a mapping of names to strings.
        """
        if not self.path.exists():
            return {}
        if stat.S_IMODE(self.path.stat().st_mode) & 0o077:
            raise SecretsError(f"{self.path}: others may read it; run chmod 600 {self.path}")
        try:
            entries = yaml.safe_load(self.path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError):
            # The parser's message quotes the text, which is secret.
            raise SecretsError(f"{self.path}: not valid YAML") from None
        if not isinstance(entries, dict) or not all(
            isinstance(item, str) for pair in entries.items() for item in pair
        ):
            raise SecretsError(f"{self.path}: must be a mapping of names to quoted strings")
        return entries

    def lookup(self, entries: Mapping[str, str], name: str) -> str | None:
        """The value of `name`, the environment first."""
        variable = "CALLREADY_SECRET_" + name.upper().replace("/", "_").replace("-", "_")
        return os.environ.get(variable) or entries.get(name)

    def write(self, entries: Mapping[str, str]) -> None:
        """Replace the file by `entries`, whole or not at all, mode 0600."""
        descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".secrets-")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write("# callready: secrets of this inventory. Not for version control.\n")
                yaml.safe_dump(dict(entries), file, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except BaseException:
            os.unlink(temporary)
            raise


def references(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every secret reference in inventory data as (dotted path, name)."""
    if isinstance(data, str) and data.startswith(PREFIX):
        yield path, data.removeprefix(PREFIX)
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from references(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from references(value, f"{path}.{index}")


def resolve(data: Any, values: Mapping[str, str]) -> Any:
    """`data` with every reference replaced by its value as a SecretStr, unknown ones by an
    empty one (the caller has reported them)."""
    if isinstance(data, str) and data.startswith(PREFIX):
        return SecretStr(values.get(data.removeprefix(PREFIX), ""))
    if isinstance(data, Mapping):
        return {key: resolve(value, values) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [resolve(value, values) for value in data]
    return data


def complete(inventory: str) -> list[str]:
    """Generate every secret that the inventory refers to and the store does not have.

    Secrets that belong to something else (sudo, Redis) cannot be generated and are returned as
    names to be filled in by hand. Nothing that exists is overwritten.
    """
    from callready.settings.fleet import inventory_data

    store = Store(inventory)
    entries = store.read()
    by_hand: list[str] = []
    wanted = {
        name: path for data in inventory_data(inventory).values() for path, name in references(data)
    }
    for name, path in sorted(wanted.items()):
        if store.lookup(entries, name):
            continue
        if path == "sudo_password" or path.endswith("redis.password"):
            by_hand.append(name)
        else:
            entries[name] = secrets.token_urlsafe(32)
            print(f"generated {name}")
    store.write(entries)
    return by_hand


def main() -> int:
    """The `make secrets` command."""
    if len(sys.argv) != 2:
        print("usage: python -m callready.secrets inventories/ENV", file=sys.stderr)
        return 2
    from callready.settings.fleet import SettingsError

    inventory = sys.argv[1]
    try:
        by_hand = complete(inventory)
    except (SecretsError, SettingsError) as error:
        print(error, file=sys.stderr)
        return 1
    for name in by_hand:
        print(f"{inventory}.secrets.yaml: add {name} by hand, it belongs to something that exists")
    print(f"{inventory}.secrets.yaml is complete" if not by_hand else "not complete yet")
    return 1 if by_hand else 0


if __name__ == "__main__":
    sys.exit(main())

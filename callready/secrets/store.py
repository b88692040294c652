"""Secret references (`"secret:turn/calls"`) to values, from the environment, a file encrypted with
sops, or a private file."""

from __future__ import annotations

import copy
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr

from callready.secrets import sops
from callready.secrets.sops import SecretsError as SecretsError
from callready.settings.fields import secret_fields

PREFIX = "secret:"
# What stands beside a secret while it is rotated (callready/rotate.py) and is accepted too.
NEXT, PREVIOUS = ".next", ".previous"
GENERATION = ".generation"
# The settings that name one of LiveKit's keys.
NAMING_KEYS = ("livekit.webhook.api_key", "monitor.livekit_key", "egress.livekit_key")


class Store:
    """The secrets of one inventory: `CALLREADY_SECRET_TURN_CALLS` in the environment first, then
    the entry `turn/calls` of `<inventory>.secrets.yaml`, which sops has encrypted or nobody but
    its owner may read."""

    def __init__(self, inventory: str) -> None:
        self.path = Path(f"{inventory}.secrets.yaml")

    def read(self) -> dict[str, str]:
        """The entries of the file; none if there is no file. An encrypted one costs a run of sops
        (20 ms), so a process reads it once.

        Raises SecretsError if it cannot be decrypted, others may read it, or it is not a mapping
        of names to strings.
        """
        entries = self._document()
        if sops.is_encrypted(entries):
            entries = sops.decrypt(self.path, entries)
        elif self.path.exists() and stat.S_IMODE(self.path.stat().st_mode) & 0o077:
            raise SecretsError(f"{self.path}: others may read it; run chmod 600 {self.path}")
        if not isinstance(entries, dict) or not all(
            isinstance(item, str) for pair in entries.items() for item in pair
        ):
            raise SecretsError(f"{self.path}: must be a mapping of names to quoted strings")
        for name, value in entries.items():
            if name.endswith(GENERATION) and not value.isdecimal():
                raise SecretsError(f"{self.path}: {name} must be a number in quotes")
        return entries

    def _document(self) -> Any:
        if not self.path.exists():
            return {}
        try:
            return yaml.safe_load(self.path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError):
            # The parser's message quotes the text, which is secret.
            raise SecretsError(f"{self.path}: not valid YAML") from None

    def lookup(self, entries: Mapping[str, str], name: str) -> str | None:
        """The value of `name`, the environment first."""
        return os.environ.get(variable(name)) or entries.get(name)

    def write(self, entries: Mapping[str, str]) -> str:
        """Replace the file by `entries`, whole or not at all, mode 0600; encrypted where there is
        a creation rule for it or it was. Returns "encrypted for N keys" or "".

        Raises SecretsError as `read` does, or if it cannot be encrypted.
        """
        text, old = yaml.safe_dump(dict(entries), sort_keys=True), self._document()
        sealed = sops.encrypt(self.path, text, old)
        if sealed is None:
            header = b"# callready: secrets of this inventory. Not for version control.\n"
            replace_file(self.path, header + text.encode())
            return ""
        keys = sops.recipients(yaml.safe_load(sealed))
        # Every encryption differs: what did not change is left alone, for version control.
        same = sops.is_encrypted(old) and sops.recipients(old) == keys and self.read() == entries
        if not same:
            replace_file(self.path, sealed)
        return f"encrypted for {len(keys)} keys" if len(keys) != 1 else "encrypted for 1 key"


def replace_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file, whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def variable(name: str) -> str:
    """The environment variable of the secret `name`."""
    return "CALLREADY_SECRET_" + name.upper().replace("/", "_").replace("-", "_")


def sharing(names: Iterable[str]) -> Iterator[str]:
    """What is wrong with secrets of which several have one environment variable: what is set for
    one would be taken for the others too."""
    found: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        found.setdefault(variable(name), []).append(f"{PREFIX}{name}")
    for of, several in found.items():
        if len(several) > 1:
            yield f"{' and '.join(several)} share the environment variable {of}: rename one"


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


def rotating(data: Mapping[str, Any], entries: Mapping[str, str]) -> dict[str, Any]:
    """A host's data with the secrets that stand beside others in the store while they are rotated:
    TURN pools and the app accept both, LiveKit knows both, the first one mints.

    Every generation of a LiveKit key has a name of its own (a token is checked with the secret of
    the name in it): `APIprod`, then `APIprod-2`.
    """
    found = copy.deepcopy(dict(data))
    for field in secret_fields(found):
        if field.origin.rotation and isinstance(field.value, Mapping):
            field.section[field.key] = {
                key_name(key, item, entries, step): each
                for key, item in field.value.items()
                for each, step in _generations(item, entries)
            }
            _name_again(found, field.value, entries)
        elif field.origin.rotation and isinstance(field.value, list | tuple | str):
            given = [field.value] if isinstance(field.value, str) else field.value
            both = [each for item in given for each, _ in _generations(item, entries)]
            field.section[field.key] = both if len(both) > 1 else field.value
    return found


def _name_again(data: dict[str, Any], keys: Mapping[str, Any], entries: Mapping[str, str]) -> None:
    """What refers to one of LiveKit's keys, by the name that the key has now."""
    for path in NAMING_KEYS:
        *sections, name = path.split(".")
        section: Any = data
        for each in sections:
            section = section.get(each) if isinstance(section, dict) else None
        if isinstance(section, dict) and (key := str(section.get(name))) in keys:
            section[name] = key_name(key, keys[key], entries)


def key_name(key: str, reference: Any, entries: Mapping[str, str], step: int = 0) -> str:
    """What the LiveKit key that the inventory calls `key` is called `step` generations from now."""
    name = reference.removeprefix(PREFIX) if isinstance(reference, str) else ""
    number = int(entries.get(name + GENERATION, "1")) + step
    return key if number <= 1 else f"{key}-{number}"


def _generations(item: Any, entries: Mapping[str, str]) -> Iterator[tuple[Any, int]]:
    """A reference and those of its secret's next and previous value, where the store has them;
    each with how many generations later it is."""
    yield item, 0
    for beside, step in ((NEXT, 1), (PREVIOUS, -1)):
        if isinstance(item, str) and item.removeprefix(PREFIX) + beside in entries:
            yield f"{item}{beside}", step

"""One thing that is wrong with the settings, and where to mend it."""

from typing import Literal, NamedTuple


class Problem(NamedTuple):
    """A finding about one setting; `key` is its dotted path, `message` says what to do."""

    level: Literal["error", "warning"]
    key: str
    message: str


class SettingsError(Exception):
    """Everything that is wrong with an inventory, one line each."""

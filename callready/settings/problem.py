"""One thing that is wrong with the settings, and where to mend it."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

Level = Literal["error", "warning"]


class Problem(NamedTuple):
    """A finding about one setting; `key` is its dotted path, `message` says what to do."""

    key: str
    message: str
    level: Level = "error"


Findings = Iterator[tuple[list[str], Problem]]
"""Problems, each with the hosts that it is about; none where it is about the inventory."""


class SettingsError(Exception):
    """Everything that is wrong with an inventory, one line each."""

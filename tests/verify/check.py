"""What a check says: its figures, and everything it found wrong, at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from callready.probes import ProbeError
from verify.targets import Site


class Check:
    """One check of one thing; given to the check's function as `check`."""

    def __init__(self) -> None:
        self.figures: list[str] = []
        self._wrong: list[ProbeError] = []

    def figure(self, text: str) -> None:
        """Something measured, for the report's last column."""
        self.figures.append(text)

    def expect(self, is_right: object, suffers: str, look_at: str) -> None:
        """Note what a caller suffers, and what to look at, unless it is right."""
        if not is_right:
            self._wrong.append(ProbeError(suffers, look_at))

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Note a probe's error and go on with the next one."""
        try:
            yield
        except ProbeError as error:
            self._wrong.append(error)

    def conclude(self) -> None:
        """Raise everything that was noted as one ProbeError."""
        if self._wrong:
            suffers = dict.fromkeys(error.suffers for error in self._wrong)
            look_at = dict.fromkeys(error.look_at for error in self._wrong)
            raise ProbeError("; ".join(suffers), "; ".join(look_at))


def each(source: Callable[[Site], Sequence[Any]]) -> pytest.MarkDecorator:
    """One check for each thing that `source` finds in the inventory; none if it finds nothing."""
    return pytest.mark.each.with_args(source)


def ms(seconds: float) -> str:
    """Seconds as milliseconds, with a digit behind the point where that matters."""
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"

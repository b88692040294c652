"""The settings by what their models say about them: which are sections, which are secret."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from callready.settings.models import HostSettings
from callready.settings.types import Origin


class SecretField(NamedTuple):
    """A setting that is a secret, or a list or mapping of them: its dotted path, what its model
    says of it, its value, and the section whose `key` it is."""

    path: str
    origin: Origin
    value: Any
    section: Any
    key: str

    def items(self) -> Iterator[tuple[str, Any]]:
        """Each secret by its path."""
        return _items(self.path, self.value)


def secret_fields(
    section: BaseModel | Mapping[str, Any], model: type[BaseModel] = HostSettings, path: str = ""
) -> Iterator[SecretField]:
    """The secret fields of a host's settings, or of its data in an inventory as it is: what is no
    mapping and should be one is passed over, since validation names it."""
    for name, origin, inner in _secrets_and_sections(model):
        value = getattr(section, name) if isinstance(section, BaseModel) else section.get(name)
        at = f"{path}.{name}".removeprefix(".")
        if origin:
            yield SecretField(at, origin, value, section, name)
        elif inner:
            for path_, item in _items(at, value) if inner[1] else [(at, value)]:
                if isinstance(item, BaseModel | Mapping):
                    yield from secret_fields(item, inner[0], path_)


@cache  # of every host's settings the same, and slow to find out
def _secrets_and_sections(
    model: type[BaseModel],
) -> list[tuple[str, Origin | None, tuple[type[BaseModel], str] | None]]:
    fields = model.model_fields.items()
    found = [(name, origin_of(field), model_in(field.annotation)) for name, field in fields]
    return [each for each in found if each[1] or each[2]]


def _items(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"{path}.{key}", item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"{path}.{index}", item) for index, item in enumerate(value))
    elif value is not None:
        yield path, value


def origin_of(field: FieldInfo) -> Origin | None:
    """What a field says of its secrets; None if it has none."""
    said = map(_origins, (*field.metadata, field.annotation))
    return next(chain.from_iterable(said), None)


def _origins(hint: Any) -> Iterator[Origin]:
    if isinstance(hint, Origin):
        yield hint
    for argument in get_args(hint):
        yield from _origins(argument)


def model_in(hint: Any) -> tuple[type[BaseModel], str] | None:
    """The section that a type leads to, and how: at once, or as items (`[]`) or values (`.NAME`)
    of a collection. None for plain values."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint, ""
    how = {dict: ".NAME", list: "[]", tuple: "[]"}.get(get_origin(hint), "")
    found = filter(None, map(model_in, get_args(hint)))
    return next(((model, inner or how) for model, inner in found), None)

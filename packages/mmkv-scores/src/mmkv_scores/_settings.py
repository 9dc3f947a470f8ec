"""One check of the types of settings, for every scorer; a switch read from text as 'false' would be on."""

from __future__ import annotations

from dataclasses import fields
from types import NoneType
from typing import Any

_TYPES: dict[object, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "bool | None": (bool, NoneType),
}


def check_types(settings: Any) -> None:
    """Raises TypeError unless the fields of a dataclass annotated with a plain type hold one; a bool is no number."""
    for field in fields(settings):
        value, types = getattr(settings, field.name), _TYPES.get(field.type, (object, bool))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeError(f"{type(settings).__name__}: {field.name} must be {field.type}, got {value!r}")


def check_kernel(kernel: int, name: str) -> None:
    """Raises ValueError unless `kernel` is odd and positive: an even one has no centre and shifts the scores."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{name}: the kernel must be odd and positive, got {kernel}")

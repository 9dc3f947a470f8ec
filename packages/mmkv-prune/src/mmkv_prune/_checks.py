"""Checks of settings; every message names the method and the field."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def store(settings: Any, **values: object) -> None:
    """Sets fields of a frozen dataclass from its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(settings, name, value)


def whole(where: str, value: object, low: int) -> int:
    """`value`, an int of at least `low`; a bool is no number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{where} must be at least {low}, got {value}")
    return value


def share(where: str, value: object) -> float:
    """`value`, a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{where} must be a number in (0, 1], got {value!r}")
    if not 0 < value <= 1 or math.isnan(value):
        raise ValueError(f"{where} must be in (0, 1], got {value}")
    return float(value)


def share_or_tokens(where: str, value: object) -> int | float:
    """`value`, an int >= 1 (tokens) or a float in (0, 1] (a share)."""
    return share(where, value) if isinstance(value, float) else whole(where, value, 1)


def each(where: str, values: object, check: Callable[[str, object], T]) -> tuple[T, ...]:
    """A tuple of what `check` makes of each entry of a list or tuple that is not empty."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{where} must be a list or tuple, got {values!r}")
    if not values:
        raise ValueError(f"{where} must not be empty")
    return tuple(check(f"{where}[{i}]", value) for i, value in enumerate(values))


def layers(method: str, values: object) -> tuple[int, ...]:
    """`values` as layer numbers >= 1 in ascending order; layer 0 defines the length of the prompt and stays whole."""
    found = each(f"{method} layers", values, lambda where, value: whole(where, value, 1))
    if any(after <= before for before, after in itertools.pairwise(found)):
        raise ValueError(f"{method} layers must be ascending, got {list(found)}")
    return found


def falling(where: str, values: tuple[int | float, ...], count: int) -> None:
    """Refuses anything but one value for each layer, of one kind, none larger than the one before."""
    if len(values) != count:
        raise ValueError(f"{where} must have one entry for each of the {count} layers, got {list(values)}")
    if len({type(value) for value in values}) > 1:
        raise TypeError(f"{where} must be all shares or all tokens, got {list(values)}")
    if any(after > before for before, after in itertools.pairwise(values)):
        raise ValueError(f"{where} must not grow from layer to layer, got {list(values)}")


def one_of(where: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuses a value that is not among `allowed`."""
    if value not in allowed:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, allowed))}, got {value!r}")

"""Pointers back to an owner."""

from __future__ import annotations

import copy
import weakref
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Owner(Generic[T]):
    """What holds this object, weakly: a cycle would keep tensors until a gc run.

    A deep copy points at the copy of the owner.

    Args:
        owner: must live as long as the result is called.
    """

    def __init__(self, owner: T) -> None:
        self._ref = weakref.ref(owner)

    def __call__(self) -> T:
        owner = self._ref()
        assert owner is not None
        return owner

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner[T]:
        return Owner(copy.deepcopy(self(), memo))

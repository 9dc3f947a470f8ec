"""What an object keeps alive, counted from its tensors and not from what it says about itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def live_tensors(root: Any) -> list[Tensor]:
    """Every tensor reachable from `root` through attributes and containers, not through weak references or modules."""
    seen: dict[int, Any] = {}
    found, queue = [], [root]
    while queue:
        one = queue.pop()
        if id(one) in seen or isinstance(one, (str, bytes, int, float, type, torch.nn.Module)):
            continue
        seen[id(one)] = one
        if isinstance(one, Tensor):
            found.append(one)
        queue.extend(_parts(one))
    return found


def live_bytes(root: Any) -> int:
    """Bytes of all storages behind `live_tensors(root)`, each once: a view counts as what it keeps alive."""
    storages = [tensor.untyped_storage() for tensor in live_tensors(root)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _parts(one: Any) -> Iterator[Any]:
    if isinstance(one, Mapping):
        yield from one.values()
    elif isinstance(one, (list, tuple, set, frozenset)):
        yield from one
    yield from getattr(one, "__dict__", {}).values()
    for base in type(one).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__weakref__", "__dict__") and hasattr(one, name):
                yield getattr(one, name)

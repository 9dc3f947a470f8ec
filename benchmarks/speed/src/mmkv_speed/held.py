"""What caches hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def stock_tensors(cache: Any) -> list[Tensor]:
    """Keys and values of a stock cache."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def stock_entries(cache: Any) -> int:
    """KV pairs of a stock cache, over all layers and heads."""
    return sum(layer.keys[..., 0].numel() for layer in cache.layers)

"""RandomDrop: the control every content-aware method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from . import _checks
from ._choose import keep_best, rounded
from .types import Seen

_STEPS = (0x2545F491, 0x9E3779B1, 0x85EBCA77)


@dataclass(frozen=True, slots=True)
class RandomDrop:
    """Keeps vision tokens by a hash of (seed, layer, number of the vision token in its row).

    The same on every device, in every batch and behind any padding, which is why the token's number among the row's
    vision tokens is hashed and not its column. Defaults as FastV's. `round(N * keep)` of the prompt's N vision tokens
    stay, at least one; a later layer chooses among the survivors.

    Attributes:
        layers: (2,).
        keep: share of the prompt's vision tokens left by each layer, in (0, 1], not growing.
        seed: 0.
    """

    layers: tuple[int, ...] = (2,)
    keep: tuple[float, ...] = (0.5,)
    seed: int = 0

    evidence: ClassVar[None] = None
    positions: ClassVar[Literal["keep"]] = "keep"

    def __post_init__(self) -> None:
        layers = _checks.layers("RandomDrop", self.layers)
        keep = _checks.each("RandomDrop keep", self.keep, _checks.share)
        _checks.falling("RandomDrop keep", keep, len(layers))
        _checks.whole("RandomDrop seed", self.seed, 0)
        _checks.store(self, layers=layers, keep=keep)

    def __call__(self, seen: Seen) -> Tensor:
        """Columns that enter the layer, [B, N] bool."""
        number = seen.prompt.vision.cumsum(-1)
        count = rounded(seen.prompt.counts, self.keep[self.layers.index(seen.layer)])
        return keep_best(seen, hashed_uniform(self.seed, seen.layer, number), count)


def hashed_uniform(seed: int, layer: int, number: Tensor) -> Tensor:
    """float32 in [0, 1) from integers, by multiply-xorshift rounds on 31 bits (no device has an opinion on those)."""
    state = torch.zeros_like(number)
    parts: tuple[int | Tensor, ...] = (seed, layer, number)
    for part, step in zip(parts, _STEPS, strict=True):
        state = ((state ^ (part + 1)) * step) & 0x7FFFFFFF
        state = ((state ^ (state >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
        state = ((state ^ (state >> 12)) * 0x297A2D39) & 0x7FFFFFFF
        state = state ^ (state >> 15)
    return (state >> 7).float() / 2**24

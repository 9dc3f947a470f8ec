"""The same count for every head."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._apportion import water_fill
from ._checks import head_inputs
from .protocols import Counts


@dataclass(frozen=True, slots=True)
class Equal:
    """Every KV head of a layer keeps the capacity (SnapKV and most methods)."""

    counts: ClassVar[Counts] = "equal"

    def __call__(self, backbone: Tensor, is_candidate: Tensor, capacity: Tensor) -> Tensor:
        """Counts `[B, H]` int64; see `equal_counts`."""
        return equal_counts(backbone, is_candidate, capacity)


def equal_counts(backbone: Tensor, is_candidate: Tensor, capacity: Tensor) -> Tensor:
    """Counts `[B, H]` int64, equal wherever the heads' candidates allow, summing to `min(capacity * H, candidates of
    all heads)`.

    Heads differ only if they hold different numbers of candidates (a second turn on a ragged cache): what a short head
    cannot use is spread evenly over the others, a remainder to the earlier heads.

    Args:
        backbone: `[B, H, N]` floating; only its shape is read.
        is_candidate: `[B, H or 1, N]` bool.
        capacity: `[B]` integer.
    """
    per_head = is_candidate.shape[1] > 1 if is_candidate.ndim == 3 else False
    _, sizes, capacity = head_inputs(backbone, is_candidate, capacity)
    if not per_head:
        return torch.minimum(sizes, capacity.unsqueeze(-1))
    ones = torch.ones(sizes.shape, dtype=torch.float64, device=sizes.device)
    return water_fill(capacity * sizes.shape[1], sizes, torch.zeros_like(sizes), ones)

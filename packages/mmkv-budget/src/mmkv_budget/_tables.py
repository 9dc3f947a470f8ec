"""What SparseMM and HeadKV share: a part for everyone, and a pool by head weight over all layers and heads."""

from collections.abc import Callable

import torch
from torch import Tensor

from ._apportion import water_fill
from ._checks import row_pair


def pooled_counts(
    scores: Tensor,
    candidates: Tensor,
    mean_capacity: Tensor,
    everyone: Callable[[Tensor], Tensor],
    exact: bool,
) -> Tensor:
    """Counts `[L, B, H]` int64 on the device of `candidates`.

    Head (l, h) is due `u + w P` of capacity C: u is everyone's part, P = (C - u) L H the pool, w its share of all
    scores. Computed on the CPU in float64, so that every device and batch size gets the same.

    Args:
        scores: `[L, H]` float64, per KV head.
        candidates: `[B]` integer.
        mean_capacity: `[B]` integer.
        everyone: From C `[B]` to u `[B]`.
        exact: True: totals are `min(C, candidates) L H`. False: round half to even, cut to the candidates, nothing
            redistributed; a row with candidates <= C keeps everything.
    """
    device = candidates.device
    candidates, mean_capacity = row_pair(candidates.cpu(), mean_capacity.cpu())
    (layers, heads), batch = scores.shape, len(candidates)
    weights = (scores / scores.sum()).flatten().expand(batch, -1)
    capacity = torch.minimum(candidates, mean_capacity)
    uniform = everyone(capacity)
    limits = candidates.unsqueeze(-1).expand(-1, layers * heads)
    if exact:
        counts = water_fill(capacity * layers * heads, limits, uniform.unsqueeze(-1).expand_as(limits), weights)
    else:
        pool = (capacity - uniform) * layers * heads
        due = torch.round(weights * pool.unsqueeze(-1) + uniform.unsqueeze(-1)).long()
        fits = candidates <= mean_capacity
        counts = torch.where(fits.unsqueeze(-1), limits, torch.minimum(due, limits))
    return counts.view(batch, layers, heads).transpose(0, 1).contiguous().to(device)

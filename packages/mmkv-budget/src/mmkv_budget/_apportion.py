"""Whole tokens out of real-valued shares: exact totals, nobody above what exists.

Everything is deterministic: remainders that agree within 1e-9 are a tie, and the earlier entry wins.
"""

import torch
from torch import Tensor

_NOISE = 1e-9


def floor_times(count: Tensor, share: float) -> Tensor:
    """`int(count * share)` as Python computes it, int64."""
    return (count.double() * share).floor().long()


def floor_divide(count: Tensor, divisor: float) -> Tensor:
    """`count // divisor` as Python computes it, int64."""
    if float(divisor).is_integer():
        return count // int(divisor)
    return torch.floor_divide(count.double(), divisor).long()


def hand_out(whole: Tensor, remainder: Tensor, total: Tensor) -> Tensor:
    """`whole` `[B, M]` plus one for the largest remainders, so that row b sums to `total[b]`; ties to the earlier."""
    missing = (total - whole.sum(-1)).unsqueeze(-1)
    order = remainder.sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(whole.shape[-1], device=whole.device).expand_as(order)
    return whole + torch.zeros_like(whole).scatter(-1, order, (place < missing).long())


def largest_remainder(quota: Tensor, total: Tensor) -> Tensor:
    """`quota` `[B, M]` float64 in whole tokens, int64; rows sum to `total` `[B]`, as the quotas do but for noise."""
    whole = (quota + _NOISE).floor()
    remainder = ((quota - whole).clamp(min=0) / _NOISE).round()
    return hand_out(whole.long(), remainder, total)


def water_fill(total: Tensor, limits: Tensor, base: Tensor, weights: Tensor) -> Tensor:
    """Counts `[B, M]` int64 with row sums `min(total, sum(limits))`, each at most its limit.

    Head m gets `min(limit, base + level * weight)`, the level being what spends the total: what one head cannot hold
    goes to the others by weight. When every head with a weight is full, the rest goes to the heads without one in equal
    parts. Largest remainder makes whole tokens of it.

    Args:
        total: `[B]` int64, at least the sum of `base`.
        limits: `[B, M]` int64.
        base: `[B, M]` int64, cut to the limits.
        weights: `[B, M]` float64, non-negative.
    """
    total = torch.minimum(total, limits.sum(-1))
    base = torch.minimum(base, limits)
    full = torch.where(weights > 0, limits, base)
    reach = full.sum(-1)
    quota = _raise_level(torch.minimum(total, reach), limits, base, weights)
    overflow = _raise_level(torch.maximum(total, reach), limits, full, torch.ones_like(weights))
    return largest_remainder(torch.where((total > reach).unsqueeze(-1), overflow, quota), total)


def _raise_level(total: Tensor, limits: Tensor, base: Tensor, weights: Tensor) -> Tensor:
    """`min(limit, base + level * weight)` `[B, M]` float64 at the level where each row sums to its total."""
    room = (limits - base).double()
    # A head without room is full from the start, whatever its weight; without weight it never fills.
    fills_at = torch.where(room == 0, 0.0, room / weights)
    fills_at, order = fills_at.sort(dim=-1, stable=True)
    taken = room.gather(-1, order).cumsum(-1)
    weight = weights.gather(-1, order)
    weight_left = weight.flip(-1).cumsum(-1).flip(-1) - weight
    spend = (total - base.sum(-1)).double().unsqueeze(-1)
    filled = torch.where(fills_at.isinf(), torch.inf, taken + fills_at * weight_left) <= spend
    full = torch.zeros_like(filled).scatter(-1, order, filled)
    weight_open = weights.masked_fill(full, 0.0).sum(-1, keepdim=True)
    spend_open = spend - room.masked_fill(~full, 0.0).sum(-1, keepdim=True)
    level = torch.where(weight_open > 0, spend_open / weight_open, 0.0)
    return torch.where(full, limits.double(), torch.minimum(base + level * weights, limits.double()))

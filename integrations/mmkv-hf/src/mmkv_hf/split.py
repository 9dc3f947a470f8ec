"""Attention of a short pass over a prefix and a tail that are stored apart: two segments, merged by log-sum-exp."""

from __future__ import annotations

from typing import NamedTuple

import torch
from mmkv_kernels import ragged_attention
from torch import Tensor

from .lazy_cache import packed_columns


class Columns(NamedTuple):
    """Where the two segments of a pass lie, and what is hidden of them; the same for all layers of a pass.

    Attributes:
        offsets: int64 [B * H + 1], of the prefix of each row and KV head.
        prefix_mask: bool [n, P], what each query sees of it; None: everything.
        tail_mask: bool [B, 1, n, T]; None: everything up to itself.
    """

    offsets: Tensor
    prefix_mask: Tensor | None
    tail_mask: Tensor | None


def columns_of(prefix: Tensor, tail: Tensor, mask: Tensor | None, heads: int, count: int) -> Columns:
    """The segments of a pass.

    Args:
        prefix: [B, S] bool.
        tail: [B, S] bool; the last `count` columns are.
        mask: bool [1 or B, 1, n, S] of logical columns, or None for causal.
        heads: H.
        count: n, new tokens.
    """
    lengths = prefix.sum(1).repeat_interleave(heads)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Columns(offsets, _prefix_mask(prefix, mask, heads), _tail_mask(tail, mask, count))


def _prefix_mask(prefix: Tensor, mask: Tensor | None, heads: int) -> Tensor | None:
    if mask is None or bool((mask | ~prefix[:, None, None]).all()):
        return None
    rows = zip(mask.expand(len(prefix), -1, -1, -1), prefix, strict=True)
    return torch.cat([seen[0][:, columns].repeat(1, heads) for seen, columns in rows], dim=1)


def _tail_mask(tail: Tensor, mask: Tensor | None, count: int) -> Tensor | None:
    columns, held = packed_columns(tail), tail.sum(1, keepdim=True)
    is_held = torch.arange(columns.shape[1], device=tail.device) >= columns.shape[1] - held
    if mask is None:
        if bool(is_held.all()):
            return None
        mask = torch.ones(1, 1, count, tail.shape[1], dtype=torch.bool, device=tail.device)
        mask = mask.tril(tail.shape[1] - count)
    places = columns[:, None, None].expand(-1, 1, mask.shape[2], -1)
    seen = mask.expand(len(tail), -1, -1, -1).gather(3, places) & is_held[:, None, None]
    return None if count == 1 and bool(seen.all()) else seen


class Prefix(NamedTuple):
    """What one layer attends to beside its tail: keys [P, D], its anchor's, and values [P, Dv], its own."""

    keys: Tensor
    values: Tensor
    columns: Columns


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix: Prefix, scaling: float, softcap: float | None
) -> Tensor:
    """Attention over prefix and tail.

    Args:
        query: [B, Hq, n, D], of the latest n tokens of the tail.
        key: [B, H, T, D], of the tail.
        value: [B, H, T, Dv].
        prefix: the other segment.
        scaling: of the logits.
        softcap: of the logits.

    Returns:
        [B, n, Hq, Dv].
    """
    found = ragged_attention(
        query,
        prefix.keys,
        prefix.values,
        prefix.columns.offsets,
        key,
        value,
        scaling=scaling,
        softcap=softcap,
        prefix_mask=prefix.columns.prefix_mask,
        tail_mask=prefix.columns.tail_mask,
    )
    return found.out.transpose(1, 2).contiguous()

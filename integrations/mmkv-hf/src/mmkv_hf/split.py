"""Attention of a pass of text over vision and text that are stored apart: two segments, merged by log-sum-exp."""

from __future__ import annotations

from typing import NamedTuple

import torch
from mmkv_kernels import ragged_attention
from torch import Tensor

from .lazy_cache import packed_columns


class Columns(NamedTuple):
    """Where the two segments of a pass lie, and what is hidden of them; the same for all layers of a pass.

    Attributes:
        offsets: int64 [B * H + 1], of the vision tokens of each row and KV head.
        vision_mask: bool [n, P], what each query sees of them; None: everything.
        text_mask: bool [B, 1, n, T]; None: everything up to itself.
    """

    offsets: Tensor
    vision_mask: Tensor | None
    text_mask: Tensor | None


def columns_of(vision: Tensor, text: Tensor, mask: Tensor | None, heads: int, count: int) -> Columns:
    """The segments of a pass.

    Args:
        vision: [B, S] bool.
        text: [B, S] bool, those that are stored; the last `count` are.
        mask: bool [1 or B, 1, n, S] of logical columns, or None for causal.
        heads: H.
        count: n, new tokens.
    """
    lengths = vision.sum(1).repeat_interleave(heads)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Columns(offsets, _vision_mask(vision, mask, heads), _text_mask(text, mask, count))


def _vision_mask(vision: Tensor, mask: Tensor | None, heads: int) -> Tensor | None:
    if mask is None or bool((mask | ~vision[:, None, None]).all()):
        return None
    rows = zip(mask.expand(len(vision), -1, -1, -1), vision, strict=True)
    return torch.cat([seen[0][:, columns].repeat(1, heads) for seen, columns in rows], dim=1)


def _text_mask(text: Tensor, mask: Tensor | None, count: int) -> Tensor | None:
    columns, held = packed_columns(text), text.sum(1, keepdim=True)
    is_held = torch.arange(columns.shape[1], device=text.device) >= columns.shape[1] - held
    if mask is None:
        if bool(is_held.all()):
            return None
        mask = torch.ones(1, 1, count, text.shape[1], dtype=torch.bool, device=text.device)
        mask = mask.tril(text.shape[1] - count)
    places = columns[:, None, None].expand(-1, 1, mask.shape[2], -1)
    seen = mask.expand(len(text), -1, -1, -1).gather(3, places) & is_held[:, None, None]
    return None if count == 1 and bool(seen.all()) else seen


class Segments(NamedTuple):
    """What one layer attends to beside its text: keys [P, D], its anchor's, and values [P, Dv] of vision tokens."""

    keys: Tensor
    values: Tensor
    columns: Columns


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, vision: Segments, scaling: float, softcap: float | None
) -> Tensor:
    """Attention over vision tokens and text.

    Args:
        query: [B, Hq, n, D], of text tokens.
        key: [B, H, T, D], of text tokens.
        value: [B, H, T, Dv].
        vision: the other segment.
        scaling: of the logits.
        softcap: of the logits.

    Returns:
        [B, n, Hq, Dv].
    """
    offsets, vision_mask, text_mask = vision.columns
    found = ragged_attention(
        query,
        vision.keys,
        vision.values,
        offsets,
        key,
        value,
        scaling=scaling,
        softcap=softcap,
        prefix_mask=vision_mask,
        tail_mask=text_mask,
    )
    return found.out.transpose(1, 2).contiguous()

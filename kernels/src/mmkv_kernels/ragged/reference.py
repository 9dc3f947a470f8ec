"""Ragged attention in plain torch: head by head over the prefix, all heads at once over the tail, then one merge."""

from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from .._attend import attend
from ..dense.reference import causal_mask
from ..merge.reference import AttentionOutput, merge_attention_reference


class Prefix(NamedTuple):
    """The ragged part of a cache."""

    keys: Tensor  # [P, D]
    values: Tensor  # [P, Dv]
    lengths: list[int]  # of the B * H heads, sum P
    mask: Tensor | None  # bool [t, P]


class Tail(NamedTuple):
    """The dense part of a cache, after the ragged one."""

    keys: Tensor  # [B, H, n, D]
    values: Tensor  # [B, H, n, Dv]
    mask: Tensor | None  # bool [B, 1 or H, t, n]


def ragged_attention_reference(
    queries: Tensor, prefix: Prefix, tail: Tail, scaling: float, softcap: float | None, causal: bool
) -> AttentionOutput:
    """See `ragged_attention`; arguments are taken as checked."""
    batch, query_heads, rows, size = queries.shape
    heads, entries = tail.keys.shape[1:3]
    folded = queries.reshape(batch, heads, query_heads // heads * rows, size)
    result = _prefix_attention(folded, prefix, scaling, softcap)
    if entries:
        mask = tail.mask
        if mask is None and causal and rows > 1:
            mask = causal_mask(rows, entries, queries.device).expand(batch, -1, -1, -1)
        result = merge_attention_reference(result, attend(folded, tail.keys, tail.values, scaling, softcap, mask))
    out = result.out.reshape(batch, query_heads, rows, tail.values.shape[-1])
    lse = result.lse.reshape(batch, query_heads, rows)
    return AttentionOutput(out.to(queries.dtype).contiguous(), lse.contiguous())


def _prefix_attention(queries: Tensor, prefix: Prefix, scaling: float, softcap: float | None) -> AttentionOutput:
    """Attention of folded queries [B, H, R, D] over the prefix; the result leads with [B, H, R]."""
    batch, heads, rows, size = queries.shape
    if min(prefix.lengths, default=0) == max(prefix.lengths, default=0):
        return _even_prefix_attention(queries, prefix, scaling, softcap)
    # split_with_sizes is split without its Python wrapper, which costs as much as two heads' attention.
    keys = prefix.keys[None, None].split_with_sizes(prefix.lengths, 2)
    values = prefix.values[None, None].split_with_sizes(prefix.lengths, 2)
    masks = repeat(None) if prefix.mask is None else prefix.mask[None, None].split_with_sizes(prefix.lengths, 3)
    parts = [
        attend(q, k, v, scaling, softcap, mask)
        for q, k, v, mask in zip(
            queries.reshape(batch * heads, 1, 1, rows, size).unbind(), keys, values, masks, strict=False
        )
    ]
    out = torch.cat([out for out, _ in parts]).view(batch, heads, rows, prefix.values.shape[-1])
    return AttentionOutput(out, torch.cat([lse for _, lse in parts]).view(batch, heads, rows))


def _even_prefix_attention(queries: Tensor, prefix: Prefix, scaling: float, softcap: float | None) -> AttentionOutput:
    """As `_prefix_attention` where all heads hold equally many: a dense view of the prefix, all heads at once."""
    batch, heads = queries.shape[:2]
    held = prefix.lengths[0] if prefix.lengths else 0
    keys = prefix.keys.view(batch, heads, held, prefix.keys.shape[1])
    values = prefix.values.view(batch, heads, held, prefix.values.shape[1])
    mask = prefix.mask
    if mask is not None:
        mask = mask.view(mask.shape[0], batch, heads, held).permute(1, 2, 0, 3)
    return attend(queries, keys, values, scaling, softcap, mask)

"""Top-k of every head in plain torch, by the value at the cut."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._kth import kth_largest


class HeadTopK(NamedTuple):
    """What every head keeps, row-major by (batch row, KV head)."""

    columns: Tensor  # int64 [T], ascending within a head
    cu_seqlens: Tensor  # int64 [B * H + 1], offsets of the heads


def head_topk_reference(scores: Tensor, counts: Tensor, candidates: Tensor | None, always: Tensor | None) -> HeadTopK:
    """See `head_topk`; arguments are taken as checked."""
    batch, heads, entries = scores.shape
    if always is not None:
        candidates = ~always if candidates is None else candidates & ~always
    flat = counts.dim() == 1
    shape = (batch, 1, heads * entries) if flat else scores.shape
    ranked = scores if candidates is None else scores.masked_fill(~candidates, -torch.inf)
    held = None if candidates is None else candidates.expand_as(scores).reshape(shape)
    kept = _best(ranked.reshape(shape), counts.view(shape[:2]), held).view(scores.shape)
    if always is not None:
        kept = kept | always
    lengths = kept.count_nonzero(-1).flatten()
    columns = kept.flatten().nonzero().squeeze(1).remainder_(max(1, entries))
    return HeadTopK(columns, torch.cat((lengths.new_zeros(1), lengths.cumsum(0))))


def _best(scores: Tensor, counts: Tensor, candidates: Tensor | None) -> Tensor:
    """[S, M, N] bool: the `counts` [S, M] best of scores [S, M, N], which are -inf outside the candidates."""
    if not scores.numel() or not bool((counts > 0).any()):
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = kth_largest(scores, counts.clamp(1, scores.shape[-1]))
    above, tied = scores > cut, scores == cut
    if candidates is not None:
        tied &= candidates
    room = (counts - above.count_nonzero(-1))[..., None]
    if bool((tied.count_nonzero(-1)[..., None] > room).any()):  # rare, and the running sum takes longer than all else
        tied &= tied.cumsum(-1) <= room
    return (above | tied) & (counts > 0)[..., None]

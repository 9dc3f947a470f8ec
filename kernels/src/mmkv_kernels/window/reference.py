"""Window attention in plain torch, one KV head at a time: its logits fit the processor's caches, all heads' do not."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._rows import Visibility, attention_weights, fold_queries, head_range, logit_space


class WindowAttention(NamedTuple):
    """Attention every entry receives from the window's query rows, float32 [B, H, N] each."""

    mean: Tensor
    last: Tensor


def window_attention_reference(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    valid: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    group: str,
) -> WindowAttention:
    """See `window_attention`; arguments are taken as checked."""
    batch, heads, entries, _ = keys.shape
    if mask is None:
        queries = queries[:, :, max(0, queries.shape[2] - entries) :]  # rows before the first entry see nothing
    rows = queries.shape[2]
    received = keys.new_zeros(2, batch, heads, entries, dtype=torch.float32)
    if rows and entries:
        folded = fold_queries(queries, heads, scaling, softcap)
        space = logit_space(folded, entries, rows)
        visibility = Visibility(valid, mask, rows, entries, keys.device)
        for b, part, _, view in visibility.views(batch, rows):
            join = _JOINS[group](row_shares(view.seen), folded.shape[2])
            for h in head_range(part, visibility.heads, heads):
                weights = attention_weights(folded[b, h], keys[b, h], view, softcap, space)
                received[:, b, h] = join(weights)
    return WindowAttention(*(x.clone() for x in received))


Join = Callable[[Tensor], Tensor]
"""Weights [G, R, N] of a KV head's query heads -> the mean and the last row, joined over the group, [2, N]."""


def _mean(shares: Tensor, group: int) -> Join:
    flat = shares.repeat(1, group) / group  # one product is faster than one for each query head
    return lambda weights: flat @ weights.flatten(0, 1)


def _max(shares: Tensor, group: int) -> Join:
    return lambda weights: (shares @ weights).amax(0)


_JOINS = {"mean": _mean, "max": _max}


def row_shares(seen: Tensor) -> Tensor:
    """Weights [2, R] that make rows the mean of the `seen` ones, and the last of those; zeros where there is none."""
    rows = torch.arange(1, seen.shape[0] + 1, device=seen.device)
    last = (rows * seen).argmax()
    return torch.stack((seen / seen.sum().clamp(min=1), ((rows - 1 == last) & seen).float()))

"""Window attention in plain torch, one KV head at a time: its logits fit the processor's caches, all heads' do not."""

from typing import Literal, NamedTuple

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
    group: Literal["mean", "max"],
) -> WindowAttention:
    """See `window_attention`; arguments are taken as checked."""
    batch, heads, entries, _ = keys.shape
    if mask is None:
        queries = queries[:, :, max(0, queries.shape[2] - entries) :]  # rows before the first entry see nothing
    rows = queries.shape[2]
    result = WindowAttention(*(keys.new_zeros(batch, heads, entries, dtype=torch.float32) for _ in range(2)))
    if not rows or not entries:
        return result
    folded = fold_queries(queries, heads, scaling, softcap)
    space = logit_space(folded, entries, rows)
    visibility = Visibility(valid, mask, rows, entries, keys.device)
    for b, part, _, view in visibility.views(batch, rows):
        shares = row_shares(view.seen).expand(folded.shape[2], -1, -1)
        for h in head_range(part, visibility.heads, heads):
            weights = attention_weights(folded[b, h], keys[b, h], view, softcap, space)
            received = torch.bmm(shares, weights)  # [G, 2, N]
            joined = received.mean(0) if group == "mean" else received.amax(0)
            result.mean[b, h], result.last[b, h] = joined.unbind(0)
    return result


def row_shares(seen: Tensor) -> Tensor:
    """Weights [2, R] that make rows the mean of the `seen` ones, and the last of those; zeros where there is none."""
    rows = torch.arange(1, seen.shape[0] + 1, device=seen.device)
    last = (rows * seen).argmax()
    return torch.stack((seen / seen.sum().clamp(min=1), ((rows - 1 == last) & seen).float()))

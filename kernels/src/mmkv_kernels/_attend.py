"""Exact attention of folded queries, shared by the references of `dense` and `ragged`."""

import math

import torch
from torch import Tensor

from ._checks import wide
from .merge.reference import AttentionOutput

# The kernel behind scaled_dot_product_attention on CPUs, called for its log-sum-exp, which the public function drops.
# Plain torch takes its place should a release of torch lack it.
_FLASH = getattr(torch, "_scaled_dot_product_flash_attention_for_cpu", None)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None, visible: Tensor | None
) -> AttentionOutput:
    """Attention of M independent heads, each with its own keys.

    Args:
        queries: [A, M, G * t, D], the query heads of a group one after the other.
        keys: [A, M, n, D].
        values: [A, M, n, Dv].
        scaling: factor of the logits.
        softcap: soft cap of the logits.
        visible: bool [A, 1 or M, t, n] or None (all).

    Returns:
        `out` [A, M, G * t, Dv], the dtype computed in or that of the queries, and `lse` [A, M, G * t].
    """
    if _FLASH is not None and softcap is None and visible is None and _flash_takes(queries, keys, values):
        return AttentionOutput(*_FLASH(queries, keys, values, scale=scaling))
    folded = queries.to(wide(queries.dtype)) * scaling
    out = folded.new_empty(*queries.shape[:3], values.shape[3])
    lse = folded.new_empty(queries.shape[:3])
    for a in range(keys.shape[0]):  # row by row: the heads of several rows cannot always be joined without a copy
        seen = None if visible is None else visible[a]
        out[a], lse[a] = _softmax_attention(folded[a], keys[a], values[a], softcap, seen)
    return AttentionOutput(out, lse)


def _flash_takes(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the fused kernel knows this case; it wants equal head sizes, at least one entry and unit strides."""
    return (
        keys.is_cpu
        and keys.shape == values.shape
        and 0 not in (*queries.shape, *keys.shape)
        and queries.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    )


def _softmax_attention(
    queries: Tensor, keys: Tensor, values: Tensor, softcap: float | None, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries [M, R, D] over [M, n, D] in their dtype; `visible` [1 or M, t, n]."""
    logits = torch.bmm(queries, keys.to(queries.dtype).transpose(1, 2))
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if visible is not None:
        heads, rows = keys.shape[0], visible.shape[1]
        by_query_head = logits.view(heads, queries.shape[1] // rows, rows, keys.shape[1])
        by_query_head.masked_fill_(~visible[:, None], -math.inf)
    lse = logits.logsumexp(-1)
    weights = torch.softmax(logits, -1, out=logits)
    if visible is not None:
        weights.masked_fill_(lse.isneginf().unsqueeze(-1), 0)
    return torch.bmm(weights, values.to(queries.dtype)), lse

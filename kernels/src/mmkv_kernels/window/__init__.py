"""Attention the last query rows pay to every cached entry: window score of SnapKV (arXiv 2404.14469) and its kin."""

from typing import Literal

import torch
from torch import Tensor

from .. import _checks
from .._dispatch import Impl, operator, takes_triton
from .reference import WindowAttention, window_attention_reference

__all__ = ["WindowAttention", "window_attention"]


@torch.no_grad()
def window_attention(
    queries: Tensor,
    keys: Tensor,
    *,
    scaling: float,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    group: Literal["mean", "max"] = "mean",
    impl: Impl = "auto",
) -> WindowAttention:
    """Attention per KV head and entry: the mean over the query rows, and the last row's.

    A query row that sees nothing is padding: it is left out of the mean, and `last` is the last row that does see
    something. Entries that are not valid may hold anything, NaN included, and get 0.

    Args:
        queries: [B, Hq, W, D], post-RoPE; float32, bfloat16, float16 or float64. W may be 0 (all scores 0).
        keys: [B, H, N, D], post-RoPE, same dtype. N may be 0.
        scaling: factor of the logits.
        valid: bool [B, 1 or H, N], the real entries; None: all.
        mask: bool [B, 1 or H, W, N], what each row may see (ANDed with `valid`); None: causal, the rows being the last
            W entries, where a row that is itself no valid entry (or would lie before the first) counts as padding.
        softcap: logits become softcap * tanh(logits / softcap) before masking.
        group: how the G query heads of a KV head are joined, each one's mean over rows (or last row) taken before.
        impl: "auto", "reference" or "triton", see the package.

    Returns:
        `mean` and `last`, float32 [B, H, N] each.

    Raises:
        TypeError: mixed or unsupported dtypes, masks that are not bool.
        ValueError: shapes that disagree, Hq not a multiple of H, unknown `group`, softcap <= 0.
    """
    dims = _checks.Dims()
    dims.bind("queries", queries, "B Hq W D")
    dims.bind("keys", keys, "B H N D")
    dims.flags("valid", valid, "B 1|H N")
    dims.flags("mask", mask, "B 1|H W N")
    dims.grouped()
    _checks.floats(queries=queries, keys=keys)
    _checks.positive_softcap(softcap)
    if group not in ("mean", "max"):
        raise ValueError(f"group must be 'mean' or 'max', got {group!r}")
    return WindowAttention(*_window_attention(queries, keys, scaling, valid, mask, softcap, group, impl))


def _fake(queries: Tensor, keys: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    mean, last = (keys.new_empty(keys.shape[:3], dtype=torch.float32) for _ in range(2))
    return mean, last


@operator(_fake)
def _window_attention(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    valid: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    group: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if takes_triton(impl, keys, keys.shape[3]):
        from .triton import window_attention_triton

        return window_attention_triton(queries, keys, scaling, valid, mask, softcap, group)
    return window_attention_reference(queries, keys, scaling, valid, mask, softcap, group)

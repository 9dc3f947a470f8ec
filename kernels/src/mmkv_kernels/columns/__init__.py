"""Attention every cached entry receives from all query rows: the sums that H2O (arXiv 2306.14048) and its kin keep."""

import torch
from torch import Tensor

from .. import _checks
from .reference import column_sums_reference

__all__ = ["column_sums"]


@torch.no_grad()
def column_sums(
    queries: Tensor,
    keys: Tensor,
    *,
    scaling: float,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    block: int = 256,
) -> tuple[Tensor, Tensor]:
    """Attention each entry receives, summed over rows averaged over a group's query heads, and how many could see it.

    Sums and counts of successive chunks of queries add up. At most `block` query rows of one KV head have logits in
    memory at a time.

    Args:
        queries: [B, Hq, n, D], post-RoPE; float32, bfloat16, float16 or float64.
        keys: [B, H, N, D], post-RoPE, same dtype.
        scaling: factor of the logits.
        valid: bool [B, 1 or H, N], the real entries; None: all.
        mask: bool [B, 1 or H, n, N], what each row may see (ANDed with `valid`); None: causal, the rows being the last
            n entries, where a row that is itself no valid entry (or would lie before the first) counts as padding.
        softcap: logits become softcap * tanh(logits / softcap) before masking.
        block: query rows per step, >= 1.

    Returns:
        Sums, float32 [B, H, N], and counts, int64 [B, 1 or H, N] (1 unless `valid` or `mask` differ between heads).

    Raises:
        TypeError: mixed or unsupported dtypes, masks that are not bool.
        ValueError: shapes that disagree, Hq not a multiple of H, softcap <= 0, block < 1.
    """
    dims = _checks.Dims()
    dims.bind("queries", queries, "B Hq n D")
    dims.bind("keys", keys, "B H N D")
    dims.flags("valid", valid, "B 1|H N")
    dims.flags("mask", mask, "B 1|H n N")
    dims.grouped()
    _checks.floats(queries=queries, keys=keys)
    _checks.positive_softcap(softcap)
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    return column_sums_reference(queries, keys, scaling, valid, mask, softcap, block)

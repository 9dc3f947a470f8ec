"""Grouped-query attention with its log-sum-exp, so that parts can be merged."""

import torch
from torch import Tensor

from .. import _checks
from ..merge import AttentionOutput
from .reference import dense_attention_reference

__all__ = ["dense_attention"]


@torch.no_grad()
def dense_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> AttentionOutput:
    """Attention of query heads over the keys of their KV head, keys never expanded to query heads.

    Args:
        queries: [B, Hq, t, D]; float32, bfloat16, float16 or float64.
        keys: [B, H, n, D], same dtype; n may be 0.
        values: [B, H, n, Dv], same dtype.
        scaling: factor of the logits.
        softcap: logits become softcap * tanh(logits / softcap) before masking.
        mask: bool [B, 1 or H, t, n], what each query may see; takes the place of `causal`.
        causal: without a mask, the queries are the last t entries and see none after themselves.

    Returns:
        `out` [B, Hq, t, Dv] in the queries' dtype and `lse` float32 (float64 for float64) [B, Hq, t]; 0 and
        -inf where a query sees nothing.

    Raises:
        TypeError: mixed or unsupported dtypes, mask not bool.
        ValueError: shapes that disagree, Hq not a multiple of H, softcap <= 0.
    """
    dims = _checks.Dims()
    dims.bind("queries", queries, "B Hq t D")
    dims.bind("keys", keys, "B H n D")
    dims.bind("values", values, "B H n Dv")
    dims.flags("mask", mask, "B 1|H t n")
    dims.grouped()
    _checks.floats(queries=queries, keys=keys, values=values)
    _checks.positive_softcap(softcap)
    return dense_attention_reference(queries, keys, values, scaling, softcap, mask, causal)

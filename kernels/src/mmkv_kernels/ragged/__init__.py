"""Attention over a cache whose heads kept different numbers of entries."""

import torch
from torch import Tensor

from .. import _checks
from .._dispatch import Impl, operator, takes_triton
from ..merge import AttentionOutput
from .reference import Prefix, Tail, ragged_attention_reference

__all__ = ["ragged_attention"]


@torch.no_grad()
def ragged_attention(
    queries: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    cu_seqlens: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    prefix_mask: Tensor | None = None,
    tail_mask: Tensor | None = None,
    causal: bool = True,
    impl: Impl = "auto",
) -> AttentionOutput:
    """Attention of query heads over their KV head's part of a ragged prefix and a dense tail after it.

    Args:
        queries: [B, Hq, t, D], t >= 1; float32, bfloat16, float16 or float64.
        prefix_keys: [P, D], the heads' entries row-major by (batch row, KV head), same dtype.
        prefix_values: [P, Dv], same dtype.
        cu_seqlens: int64 [B * H + 1], offsets of the heads, from 0 to P; a head may be empty.
        tail_keys: [B, H, n, D], same dtype; n may be 0.
        tail_values: [B, H, n, Dv], same dtype.
        scaling: factor of the logits.
        softcap: logits become softcap * tanh(logits / softcap) before masking.
        prefix_mask: bool [t, P]: column p says which of the t queries see prefix entry p (which belongs to one batch
            row and head); None: all.
        tail_mask: bool [B, 1 or H, t, n], what each query sees of the tail; takes the place of `causal`.
        causal: without a tail mask, the queries are the last t tail entries and see none after themselves.
        impl: "auto", "reference" or "triton", see the package.

    Returns:
        `out` [B, Hq, t, Dv] in the queries' dtype and `lse` float32 (float64 for float64) [B, Hq, t]; 0 and
        -inf where a query sees nothing.

    Raises:
        TypeError: mixed or unsupported dtypes, masks not bool, offsets not int64.
        ValueError: shapes or offsets that disagree, Hq not a multiple of H, softcap <= 0.
    """
    dims = _checks.Dims()
    dims.bind("queries", queries, "B Hq t D")
    dims.bind("tail_keys", tail_keys, "B H n D")
    dims.bind("tail_values", tail_values, "B H n Dv")
    dims.bind("prefix_keys", prefix_keys, "P D")
    dims.bind("prefix_values", prefix_values, "P Dv")
    dims.beside("cu_seqlens", cu_seqlens)
    dims.flags("prefix_mask", prefix_mask, "t P")
    dims.flags("tail_mask", tail_mask, "B 1|H t n")
    dims.grouped()
    _checks.floats(
        queries=queries,
        tail_keys=tail_keys,
        tail_values=tail_values,
        prefix_keys=prefix_keys,
        prefix_values=prefix_values,
    )
    _checks.positive_softcap(softcap)
    tensors = queries, prefix_keys, prefix_values, cu_seqlens, tail_keys, tail_values, prefix_mask, tail_mask
    return AttentionOutput(*_ragged_attention(*tensors, scaling, softcap, causal, impl))


def _fake(queries: Tensor, prefix_keys: Tensor, prefix_values: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    out = queries.new_empty(*queries.shape[:3], prefix_values.shape[1])
    return out, queries.new_empty(queries.shape[:3], dtype=_checks.wide(queries.dtype))


@operator(_fake)
def _ragged_attention(
    queries: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    cu_seqlens: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    prefix_mask: Tensor | None,
    tail_mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    causal: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    segments = tail_keys.shape[0] * tail_keys.shape[1]
    lengths = _checks.segment_lengths("cu_seqlens", cu_seqlens, segments, prefix_keys.shape[0])
    tail = Tail(tail_keys, tail_values, tail_mask)
    if takes_triton(impl, queries, queries.shape[3], prefix_values.shape[1]):
        from .triton import ragged_attention_triton

        return ragged_attention_triton(
            queries, prefix_keys, prefix_values, cu_seqlens, prefix_mask, tail, scaling, softcap, causal
        )
    prefix = Prefix(prefix_keys, prefix_values, lengths, prefix_mask)
    return ragged_attention_reference(queries, prefix, tail, scaling, softcap, causal)

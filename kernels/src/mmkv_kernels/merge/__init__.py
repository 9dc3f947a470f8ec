"""Joining attention over two disjoint sets of entries."""

import torch

from .. import _checks
from .._checks import wide
from .reference import AttentionOutput, merge_attention_reference

__all__ = ["AttentionOutput", "merge_attention"]


@torch.no_grad()
def merge_attention(a: AttentionOutput, b: AttentionOutput) -> AttentionOutput:
    """Attention over the union of what `a` and `b` attended to, from their log-sum-exps.

    Args:
        a: `out` [B, Hq, t, Dv] and `lse` [B, Hq, t], float64 beside a float64 `out`, else float32; -inf (with `out` 0)
            where a query sees nothing.
        b: the same queries over other entries.

    Returns:
        Output of the same shapes and dtypes.

    Raises:
        TypeError: mixed or unsupported dtypes.
        ValueError: shapes that disagree.
    """
    dims = _checks.Dims()
    for name, part in (("a", a), ("b", b)):
        dims.bind(f"{name}.out", part.out, "B Hq t Dv")
        dims.bind(f"{name}.lse", part.lse, "B Hq t")
        if part.lse.dtype != wide(part.out.dtype):
            raise TypeError(f"{name}.lse must be {wide(part.out.dtype)}, got {part.lse.dtype}")
    _checks.floats(**{"a.out": a.out, "b.out": b.out})
    return merge_attention_reference(a, b)

"""Dense attention in plain torch."""

import torch
from torch import Tensor

from .._attend import attend
from ..merge.reference import AttentionOutput


def dense_attention_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    softcap: float | None,
    mask: Tensor | None,
    causal: bool,
) -> AttentionOutput:
    """See `dense_attention`; arguments are taken as checked."""
    batch, query_heads, rows, size = queries.shape
    heads, entries = keys.shape[1:3]
    if mask is None and causal and rows > 1:
        mask = causal_mask(rows, entries, keys.device)
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1)
    folded = queries.reshape(batch, heads, query_heads // heads * rows, size)
    out, lse = attend(folded, keys, values, scaling, softcap, mask)
    out = out.reshape(batch, query_heads, rows, values.shape[-1])
    return AttentionOutput(out.to(queries.dtype).contiguous(), lse.reshape(batch, query_heads, rows).contiguous())


def causal_mask(rows: int, entries: int, device: torch.device) -> Tensor:
    """Bool [1, 1, rows, entries]: what rows that are the last entries see."""
    return torch.ones(1, 1, rows, entries, dtype=torch.bool, device=device).tril_(entries - rows)

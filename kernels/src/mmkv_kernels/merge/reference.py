"""Log-sum-exp merge in plain torch."""

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionOutput(NamedTuple):
    """Attention output and the log of its softmax denominator; `lse` -inf and `out` 0 where a query sees nothing."""

    out: Tensor  # [B, Hq, t, Dv], dtype of the queries
    lse: Tensor  # [B, Hq, t] float32, or float64 for float64


def merge_attention_reference(a: AttentionOutput, b: AttentionOutput) -> AttentionOutput:
    """See `merge_attention`; arguments are taken as checked, and any leading dimensions go."""
    lse = torch.logaddexp(a.lse, b.lse)
    share = (b.lse - lse).exp_().masked_fill_(lse.isneginf(), 0)  # -inf - -inf is NaN where neither sees anything
    out = torch.lerp(a.out.to(share.dtype), b.out.to(share.dtype), share.unsqueeze(-1))
    return AttentionOutput(out.to(a.out.dtype), lse)

"""From queries and keys to the attention a method asks for, a few rows of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .prompt import Prompt


@torch.no_grad()
def attention_rows(
    queries: Tensor, keys: Tensor, visible: Tensor, *, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention of R query rows, mean over all query heads, [B, R, K] float32; O(R K) and any attention backend.

    Softmax in float32 over everything a row sees. Keys are not expanded to query heads. A row that sees nothing gets
    zeros; columns that are not visible may hold anything, NaN included.

    Args:
        queries: [B, Hq, R, D] after RoPE, floating.
        keys: [B, H, K, D] after RoPE, Hq a multiple of H.
        visible: [B, R, K] bool, what each row may see.
        scaling: Factor of the logits.
        softcap: Logits are softcap * tanh(logits / softcap), or None.
    """
    (batch, query_heads, rows, _), (_, heads, length, _) = queries.shape, keys.shape
    if query_heads % heads or visible.shape != (batch, rows, length) or visible.dtype != torch.bool:
        raise ValueError(
            f"queries {list(queries.shape)}, keys {list(keys.shape)} and visible {visible.dtype} {list(visible.shape)} "
            "do not fit: expected [B, Hq, R, D], [B, H, K, D] and bool [B, R, K] with Hq a multiple of H"
        )
    total = queries.new_zeros(batch, rows, length, dtype=torch.float32)
    for query, key in zip(queries.float().chunk(heads, 1), keys.unbind(1), strict=True):
        logits = query @ key.float().unsqueeze(1).transpose(-1, -2) * scaling
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        total += logits.masked_fill(~visible.unsqueeze(1), -torch.inf).softmax(-1).sum(1)
    return (total / query_heads).masked_fill(~visible, 0.0)


def last_rows(prompt: Prompt) -> Tensor:
    """[B, N] bool, the last real column of each row."""
    number = prompt.valid.cumsum(-1)
    return prompt.valid & (number == number[:, -1:])


def spread(weights: Tensor, columns: Tensor, real: Tensor, length: int) -> Tensor:
    """Attention over the tokens a layer holds, as `Attention.weights` over the whole prompt: [B, R, N]; 0 elsewhere.

    Args:
        weights: [B, R, K].
        columns: [B, K] int64, the prompt's column of each token (`kept_columns`).
        real: [B, K] bool, False for fillers.
        length: N.
    """
    rows = weights.shape[1]
    weights = weights.masked_fill(~real.unsqueeze(1), 0.0)
    out = weights.new_zeros(*weights.shape[:2], length)
    return out.scatter_add(-1, columns.unsqueeze(1).expand(-1, rows, -1), weights)

"""Pruning before the LLM: what a method sees of the vision tower, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TowerEvidence:
    """Whose attention and keys a method looks at; `tower_attention` and `tower_keys` make them.

    Attributes:
        layer: of the vision tower, as an index from the end: -1 is the last.
        heads: "joined": queries and keys of the whole width, as one head; "apart": attention summed over heads, keys
            averaged.
    """

    layer: int
    heads: Literal["joined", "apart"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch of encoded images, B of up to V tokens, before the projector.

    Attributes:
        features: [B, V, C] floating, without the CLS token (LLaVA: what its tower's layer -2 puts out).
        attention: [B, V] floating, how much each token is attended to; see `TowerEvidence`.
        keys: [B, V, D] floating, by which tokens are compared; see `TowerEvidence`.
        valid: [B, V] bool, or None: all; images of different sizes are padded at the end.
        cls: [B, C], the CLS token's feature, or None: an encoder without one, or one whose CLS token is not passed on.
    """

    features: Tensor
    attention: Tensor
    keys: Tensor
    valid: Tensor | None = None
    cls: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.attention.shape
        fits = self.features.shape[:-1] == shape == self.keys.shape[:-1] and len(shape) == 2
        if not fits or (self.valid is not None and (self.valid.shape != shape or self.valid.dtype != torch.bool)):
            raise ValueError(
                "expected features [B, V, C], attention [B, V], keys [B, V, D] and valid bool [B, V], got "
                f"{list(self.features.shape)}, {list(shape)}, {list(self.keys.shape)} and "
                f"{None if self.valid is None else (self.valid.dtype, list(self.valid.shape))}"
            )
        if self.cls is not None and self.cls.shape != self.features[:, 0:1].squeeze(1).shape:
            raise ValueError(f"cls must be [B, C], got {list(self.cls.shape)}")
        if bool((~self.attention.isfinite() & self.real).any()):
            raise ValueError("attention of the vision tower is NaN or infinite")

    @property
    def real(self) -> Tensor:
        """[B, V] bool."""
        return torch.ones_like(self.attention, dtype=torch.bool) if self.valid is None else self.valid


class Reduced(NamedTuple):
    """Fewer tokens for each image; rows that keep fewer are padded at the end.

    Attributes:
        features: [B, K, C], in the dtype that came in; 0 where not valid.
        source: [B, K] int64, whose place each token takes among the V; -1 for a token without a place (CLS, a merger of
            everything dropped) and for padding. A multi-dimensional RoPE takes its positions from here.
        valid: [B, K] bool.
    """

    features: Tensor
    source: Tensor
    valid: Tensor


@runtime_checkable
class Reducer(Protocol):
    """A method that reduces an image's tokens before the LLM sees them.

    Attributes:
        evidence: what `Encoded.attention` and `Encoded.keys` have to be; None: they are not looked at.
    """

    @property
    def evidence(self) -> TowerEvidence | None: ...
    def __call__(self, seen: Encoded) -> Reduced:
        """The tokens that go on."""
        ...


@torch.no_grad()
def tower_attention(
    queries: Tensor,
    keys: Tensor,
    *,
    heads: Literal["joined", "apart"],
    has_cls: bool,
    valid: Tensor | None = None,
) -> Tensor:
    """`Encoded.attention` from a layer's queries and keys, [B, V] float32.

    With a CLS token, what it attends to among the others (softmax over all, itself included); without, what each token
    receives from all, mean over queries.

    Args:
        queries: [B, T, heads, D], CLS first where there is one: T = V + 1, else T = V.
        keys: [B, T, heads, D].
        heads: "joined" (softmax of the whole width, scaled by its root) or "apart" (summed over heads).
        has_cls: Whether the first token is CLS.
        valid: [B, T] bool, or None: all.
    """
    if heads == "joined":
        queries, keys = queries.flatten(2).unsqueeze(2), keys.flatten(2).unsqueeze(2)
    real = torch.ones_like(queries[..., 0, 0], dtype=torch.bool) if valid is None else valid
    asking = real[:, :1] if has_cls else real
    total = queries.new_zeros(real.shape, dtype=torch.float32)
    for query, key in zip(queries[:, : asking.shape[1]].float().unbind(2), keys.float().unbind(2), strict=True):
        logits = (query @ key.transpose(-1, -2)) * key.shape[-1] ** -0.5
        weights = logits.masked_fill(~real.unsqueeze(1), -torch.inf).softmax(-1)
        total += weights.masked_fill(~asking.unsqueeze(-1), 0.0).sum(1) / asking.sum(-1, keepdim=True).clamp(min=1)
    return total[:, 1:] if has_cls else total


def tower_keys(keys: Tensor, *, heads: Literal["joined", "apart"], has_cls: bool) -> Tensor:
    """`Encoded.keys` from a layer's keys [B, T, heads, D], as `tower_attention`; [B, V, D'] in their dtype."""
    keys = keys[:, 1:] if has_cls else keys
    return keys.flatten(2) if heads == "joined" else keys.mean(2)

"""What two layers must have in common to share attention."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerKind:
    """The shape of a layer's attention; only layers of equal kinds may share a block.

    Attributes:
        query_heads: Hq.
        kv_heads: H.
        head_dim: D of queries and keys.
        rope: anything that tells rotary embeddings apart (theta, scaling); equal for layers that rotate alike.
        full: whether the layer attends to everything before it. Sliding-window, linear and recurrent layers do not, and
            never take part.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    rope: Hashable = None
    full: bool = True


def may_share(kinds: Sequence[LayerKind], layer: int) -> bool:
    """Whether `layer` and the next one may be in one block."""
    return kinds[layer].full and kinds[layer] == kinds[layer + 1]

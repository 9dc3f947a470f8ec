"""What a schedule costs: vision tokens per layer, KV entries, multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch

from . import _checks
from .plan import PrunePlan
from .prompt import Prompt, Shape
from .types import Pruner


def tokens_per_layer(method: Pruner, num_layers: int, *images: Shape) -> tuple[int, ...]:
    """Vision tokens each of the `num_layers` layers sees of one prompt.

    Args:
        method: The method.
        num_layers: Decoder layers of the model.
        images: For each image, its tokens or its grid (frames, rows, columns).

    Raises:
        ValueError: A method whose counts depend on the content, or the plan's own.
    """
    total = sum(shape if isinstance(shape, int) else math.prod(shape) for shape in images)
    text = torch.arange(total + 1) == total  # the last token, which no method may drop
    prompt = Prompt.of(~text.unsqueeze(0), shapes=[images])
    counts = PrunePlan(method, num_layers).counts(prompt)
    if counts is None:
        raise ValueError(f"{type(method).__name__} decides by content how many tokens stay")
    return tuple(counts[:, 0].tolist())


def kv_entries(vision: Iterable[int], text: int = 0) -> int:
    """KV pairs per KV head after prefill, all layers together: vision tokens per layer, and the text in each."""
    return sum(number + text for number in vision)


@dataclass(frozen=True, slots=True)
class Geometry:
    """A decoder, as far as multiply-adds depend on it.

    Attributes:
        hidden: D; the query heads together are assumed as wide.
        ffn: F, of a gated MLP (three matrices).
        kv: width of the KV heads together; None: D, no GQA.
    """

    hidden: int
    ffn: int
    kv: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                _checks.whole(f"Geometry {field.name}", value, 1)

    def layer_macs(self, tokens: int) -> int:
        """Multiply-adds of one layer's prefill of s tokens: 2 s D (D + Dkv) + 2 s² D + 3 s D F.

        The form PyramidDrop and SparseVLM count with (4 s D² without GQA): attention over all s², causal or not; norms,
        softmax, embeddings and the LM head are left out.
        """
        kv = self.hidden if self.kv is None else self.kv
        return tokens * self.hidden * (2 * (self.hidden + kv) + 2 * tokens + 3 * self.ffn)

    def macs(self, vision: Iterable[int], text: int = 0) -> int:
        """Multiply-adds of all layers' prefill, from the vision tokens of each layer and the text in each."""
        return sum(self.layer_macs(number + text) for number in vision)

"""Which tokens of a conversation are vision tokens, for caches whose lazy layers tell them from text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .shortened import length_of


class Vision:
    """Which tokens of a conversation are vision tokens: `seen` [B, S] bool, those of the pass under way included."""

    def __init__(self) -> None:
        self.seen: Tensor | None = None

    def extend(self, new: Tensor) -> None:
        self.seen = new if self.seen is None else torch.cat([self.seen, new], dim=1)

    def rows(self, index: Tensor) -> None:
        self.seen = None if self.seen is None else self.seen[index.to(self.seen.device)]


class VisionCache(Cache):  # type: ignore[misc]
    """A cache that knows what its rows hold: vision tokens, where its layers need it, and which columns of a prompt.

    Attributes:
        vision: shared with the layers.
    """

    vision: Vision

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the latest tokens.

        Raises:
            ValueError: one of them is a vision token.
        """
        count, seen = abs(int(tokens_to_remove)), self.vision.seen
        if count and seen is not None:
            if bool(seen[:, -count:].any()):
                raise ValueError(f"cannot remove {count} tokens: there are vision tokens among them")
            self.vision.seen = seen[:, :-count]
        super().crop(tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given batch rows."""
        self._rows(indices)
        super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search."""
        self._rows(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch row."""
        if self.vision.seen is not None:
            self.vision.seen = self.vision.seen.repeat_interleave(repeats, dim=0)
        length = length_of(self)
        if length is not None:
            length.shortened = length.shortened.repeated(repeats * len(length.shortened.columns))
        super().batch_repeat_interleave(repeats)

    def _rows(self, index: Tensor) -> None:
        """What is known of the tokens, for the given batch rows."""
        self.vision.rows(index)
        length = length_of(self)
        if length is not None:
            length.shortened = length.shortened.rows(index)

    def reset(self) -> None:
        """Forgets everything."""
        self.vision.seen = None
        super().reset()

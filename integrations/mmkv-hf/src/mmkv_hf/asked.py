"""What `generate` is given, of which the model that it calls sees only parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ._compat import modalities
from .grids import Grid, known_grids


class Asked(NamedTuple):
    """A prompt as `generate` has it: one row for all beams and samples, without drafts, images not encoded yet.

    Attributes:
        length: columns of the conversation at its end; N, unless only what is new is given.
        kinds: [P, N] int8, 0 text, 1 image, 2 video; None: nobody knows.
        grids: rows and columns of each image of each row, as `known_grids` has them.
    """

    length: int
    kinds: Tensor | None
    grids: list[list[Grid]] | None

    @classmethod
    def of(cls, config: Any, inputs: dict[str, Any]) -> Asked | None:
        """From the inputs of `generate`; None: there is no prompt among them."""
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        tokens = ids if embeds is None else embeds
        if tokens is None:
            return None
        kinds, mask = modalities(config, ids, inputs.get("mm_token_type_ids")), inputs.get("attention_mask")
        told = mask.shape[-1] if isinstance(mask, Tensor) and mask.ndim == 2 else 0
        return cls(max(tokens.shape[1], told), kinds, known_grids(config, kinds, inputs))

    @property
    def has_images(self) -> bool:
        """Whether there are vision tokens."""
        return self.kinds is not None and bool((self.kinds > 0).any())

    def kinds_for(self, tokens: Tensor) -> Tensor | None:
        """`kinds` for rows [B, n, ...] that the model is given, of which those after the prompt are drafts, text."""
        if self.kinds is None:
            return None
        rows = self.kinds.repeat_interleave(len(tokens) // len(self.kinds), 0)
        return F.pad(rows, (0, tokens.shape[1] - rows.shape[1]))

    def of_prompt(self, kinds: Tensor, past: int) -> Tensor:
        """kinds [B, n] of the tokens after `past` others; what follows the prompt are words, whatever they are."""
        end = max(0, self.length - past)
        return F.pad(kinds[:, :end], (0, kinds[:, end:].shape[1]))

    def grids_for(self, batch: int) -> list[list[Grid]] | None:
        """`grids` for so many rows."""
        return None if self.grids is None else [row for row in self.grids for _ in range(batch // len(self.grids))]

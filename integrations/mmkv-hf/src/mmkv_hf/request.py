"""What the layers of one cache share; layers never point back at the cache, so dropping it frees it at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from mmkv_pipelines import Budget, Pipeline, Round
from torch import Tensor


@dataclass(slots=True)
class Request:
    """One conversation: the method, the budget, and how long the prompt being read is.

    Attributes:
        pipeline: the method.
        budget: KV pairs per KV head.
        prompt_end: logical length at which the prompt being read is complete.
        modality: [B, prompt_end] int8 while a prompt is read, else None.
        protect: [B, prompt_end] bool, tokens that must stay, while a prompt is read.
        failed: why this cache cannot be used any more.
    """

    pipeline: Pipeline
    budget: Budget
    prompt_end: int = 0
    modality: Tensor | None = None
    protect: Tensor | None = None
    failed: str | None = None

    def check(self) -> None:
        """Raises RuntimeError when an earlier compression failed half-way."""
        if self.failed:
            raise RuntimeError(f"this cache is only half compressed because of an earlier error ({self.failed}); make a new one")


@dataclass(slots=True)
class Group:
    """Layers of one kind (self-attention, or cross-attention to the image), compressed together.

    Attributes:
        request: shared by all groups of the cache.
        pipeline: the request's method; without protected entries for cross-attention.
        num_layers: how many layers this group has.
        pairs: how many layers all groups have, for budgets in bytes.
        round: the compression under way.
        uniform: whether the layers of this cache keep the same count everywhere; None until the first one knows.
    """

    request: Request
    pipeline: Pipeline
    num_layers: int
    all_layers: int
    round: Round | None = None
    uniform: bool | None = None
    _finished: int = field(default=0)

    def begin(self, lengths: Tensor, bytes_per_layer: int) -> Round:
        """The compression under way, started by the first layer that asks.

        Args:
            lengths: [B] int64, real tokens of each prompt.
            bytes_per_layer: bytes of one KV pair in all heads of a layer.
        """
        if self.round is None:
            tokens = self.request.budget.per_head(lengths, bytes_per_layer * self.all_layers)
            self.round = self.pipeline.start(tokens, self.num_layers, lengths)
        return self.round

    def finish(self) -> None:
        """One layer more has been compressed; after the last one the shared state is freed."""
        self._finished += 1
        if self._finished == self.num_layers:
            self._finished, self.round = 0, None


def at_slots(x: Tensor, slots: Tensor) -> Tensor:
    """x [P, S] at slots [B, H or 1, N] -> [B, H or 1, N]; x's first entry where the slot is -1.

    P divides B: `generate` repeats every prompt for its beams or samples.
    """
    rows = torch.arange(slots.shape[0], device=x.device) // (slots.shape[0] // x.shape[0])
    return x[rows[:, None, None], slots.clamp(min=0)]

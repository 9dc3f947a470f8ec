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
        seen: tokens that ever reached the self-attention layers.
        padding: [B, n] bool, the queries of the forward pass under way that are padding, for layers whose own mask is
            about images; None where there are none.
        last_layer: index in the model of the last layer that is compressed.
        uneven: whether layers hold different things by design: some are given fewer tokens, or store no keys.
        pending: the layer whose keys were handed out and have not reached mmkv's attention function yet.
        failed: why this cache cannot be used any more.
    """

    pipeline: Pipeline
    budget: Budget
    prompt_end: int = 0
    seen: int = 0
    padding: Tensor | None = None
    last_layer: int = 0
    uneven: bool = False
    pending: int | None = None
    failed: str | None = None

    def advance(self, ordinal: int, seen: int) -> None:
        """A self-attention layer takes in new tokens; the first one says how many all of them will have seen.

        Raises:
            RuntimeError: this layer missed tokens that others saw, because an error stopped an earlier pass.
        """
        if ordinal == 0:
            self.seen = seen
        elif seen != self.seen:
            self.failed = "an error stopped the model in the middle of a forward pass"
            self.check()

    def check(self) -> None:
        """Refuses a cache that an error left half-way.

        Raises:
            RuntimeError: see above, or keys handed out before never reached the "mmkv" attention function.
        """
        if self.pending is not None:
            self.failed = (
                f"the keys of layer {self.pending} did not reach mmkv's attention function; use a CompressedCache "
                "inside `with compress(model, ...)`, or call mmkv_hf.set_attention(model, 'mmkv') first"
            )
        if self.failed:
            raise RuntimeError(f"this cache cannot be used any more, make a new one: {self.failed}")


@dataclass(slots=True)
class Group:
    """Layers of one kind (self-attention, or cross-attention to the image), compressed together.

    Attributes:
        request: shared by all groups of the cache.
        pipeline: the request's method; without protected entries for cross-attention.
        num_layers: how many layers this group has.
        all_layers: how many layers all groups have, for budgets in bytes.
        followers: how many lazy layers keep what those of this group keep, for budgets in bytes.
        is_visual: whether these store keys of their own for text; counted as if all tokens were text.
        modality: [B, prompt_end] int8 while a prompt is read, else None.
        protect: [B, prompt_end] bool, tokens that must stay, while a prompt is read.
        round: the compression under way.
        uniform: whether this round keeps the same count everywhere; None until its first layer knows.
    """

    request: Request
    pipeline: Pipeline
    num_layers: int
    all_layers: int
    followers: int = 0
    is_visual: bool = False
    modality: Tensor | None = None
    protect: Tensor | None = None
    round: Round | None = None
    uniform: bool | None = None
    _finished: int = field(default=0)

    def begin(self, lengths: Tensor, pair: int) -> Round:
        """The compression under way, started by the first layer that asks.

        Args:
            lengths: [B] int64, real tokens of each prompt.
            pair: bytes of one KV pair in all heads of all layers.
        """
        if self.round is None:
            budget = self.request.budget
            tokens = budget.per_head(lengths, pair)
            known = None if budget.bytes is None else pair
            self.round = self.pipeline.start(tokens, self.num_layers, lengths, bytes_per_token=known)
        return self.round

    def finish(self) -> None:
        """One layer more has been compressed; after the last one the shared state is freed."""
        self._finished += 1
        if self._finished == self.num_layers:
            self._finished, self.round, self.uniform = 0, None, None
            self.modality = self.protect = None


def at_slots(x: Tensor, slots: Tensor) -> Tensor:
    """x [P, S] at slots [B, H or 1, N] -> [B, H or 1, N]; x's first entry where the slot is -1.

    P divides B: `generate` repeats every prompt for its beams or samples.

    Raises:
        ValueError: P does not divide B.
    """
    if slots.shape[0] % x.shape[0]:
        raise ValueError(f"modality or protect have {x.shape[0]} rows, which does not fit a batch of {slots.shape[0]}")
    rows = torch.arange(slots.shape[0], device=x.device) // (slots.shape[0] // x.shape[0])
    return x[rows[:, None, None], slots.clamp(min=0)]

"""Greedy decoding of a tiny model on the stock cache, freely or along given tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Generated(NamedTuple):
    """New tokens [B, n] and the model's own logits [B, n, V], float32, from which each of them was chosen."""

    tokens: Tensor
    logits: Tensor


def greedy(
    model: Any,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int = 8,
    *,
    forced: Tensor | None = None,
    **settings: Any,
) -> Generated:
    """Tokens and logits of `model.generate` without sampling.

    Args:
        model: Any model of transformers.
        inputs: Its inputs; left-padded where rows are unequal.
        max_new_tokens: Tokens to generate; with `forced` their number.
        forced: Tokens [B, n] fed instead of the model's choice, so that two runs can be compared step by step.
        **settings: Handed to `generate`, such as `past_key_values`.
    """
    steps = max_new_tokens if forced is None else forced.shape[1]
    prompt = inputs["input_ids"].shape[1]
    if forced is not None:
        settings["logits_processor"] = [_Force(forced, prompt)]
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **settings}
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=steps, **settings)
    return Generated(out.sequences[:, prompt:], torch.stack(out.logits, 1).float())


class _Force:
    """Logits processor that leaves one token to choose per row."""

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.tokens[:, input_ids.shape[1] - self.prompt, None]
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)

"""Rows and padding of the inputs that `families.build` makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmkv_testkit._models import IMAGE

Inputs = dict[str, Tensor]
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "cross_attention_mask")
"""Inputs whose second dimension runs over the columns of the prompt; the rest is images, equally many in each row."""


def row(inputs: Mapping[str, Tensor], i: int) -> Inputs:
    """Inputs of row `i` alone, with its padding, text and images."""
    batch = inputs["input_ids"].shape[0]
    return {name: value.chunk(batch)[i].clone() for name, value in inputs.items()}


def unpadded(inputs: Mapping[str, Tensor], i: int) -> Inputs:
    """Inputs of row `i` alone, without its padding."""
    alone = row(inputs, i)
    real = alone["attention_mask"][0].bool()
    return {name: value[:, real] if name in PER_TOKEN else value for name, value in alone.items()}


def pad(
    inputs: Mapping[str, Tensor],
    *,
    left: Sequence[int] | None = None,
    right: Sequence[int] | None = None,
    image_token_id: int = IMAGE,
) -> Inputs:
    """Inputs of the same width whose row `i` lost text tokens to padding.

    Row `i` loses its first `left[i]` and its last `right[i]` text tokens; as many padding columns are put at its
    start and end. Images stay, so a row that begins with its image moves to the right as a whole.

    Args:
        inputs: Unpadded inputs as made by `families.build`.
        left: Padding columns at the start of each row.
        right: Padding columns at the end of each row.
        image_token_id: Id of the placeholders; by default the one all tiny families use.
    """
    ids = inputs["input_ids"]
    left, right = left or [0] * len(ids), right or [0] * len(ids)
    if not len(left) == len(right) == len(ids):
        raise ValueError(f"one number per row: {len(ids)} rows, left {left}, right {right}")
    if not bool(inputs["attention_mask"].all()):
        raise ValueError("these inputs are padded already")
    order = torch.stack([_order(ids[i], left[i], right[i], image_token_id) for i in range(len(ids))])
    width = ids.shape[1]
    column = torch.arange(width)
    padding = (column < torch.tensor(left)[:, None]) | (column >= width - torch.tensor(right)[:, None])
    padded = dict(inputs)
    for name in set(PER_TOKEN) & set(inputs):
        padded[name] = _take(inputs[name], order)
        padded[name][padding] = 0
    return padded


def _order(ids: Tensor, left: int, right: int, image_token_id: int) -> Tensor:
    """Columns of one row with the text that goes at either end."""
    text = (ids != image_token_id).nonzero().squeeze(1)
    if left + right >= len(text):
        raise ValueError(f"a row has {len(text)} text tokens, {left} + {right} are to become padding: none would stay")
    first, last = text[:left], text[len(text) - right :]
    stays = torch.ones_like(ids, dtype=torch.bool)
    stays[first] = stays[last] = False
    return torch.cat([first, stays.nonzero().squeeze(1), last])


def _take(value: Tensor, order: Tensor) -> Tensor:
    """`value` [B, N, ...] with the columns of each row in the given order [B, N]."""
    return torch.stack([one[columns] for one, columns in zip(value, order, strict=True)])

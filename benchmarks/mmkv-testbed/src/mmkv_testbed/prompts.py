"""From a batch to what the language model reads, without a detour through pixels and tokens of full pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .architecture import Architecture
from .batches import Batch
from .vocabulary import BOS, IMAGE_NAMES, TOKEN_ID, encode


@dataclass(frozen=True, slots=True)
class Prompts:
    """Inputs of the language model: `<bos>`, the images, each with its name if there are several, the questions.

    Attributes:
        embeddings: float32 `[B, S, hidden]`.
        positions: int64 `[B, S]`, or `[3, B, S]` for M-RoPE. Every question starts right after the last image.
        mask: bool `[1, 1, S, S]`, who sees whom: causal, and no question sees another.
        cells: int64 `[N]`, column of each cell.
        start: Column of the first question's first token.
    """

    embeddings: Tensor
    positions: Tensor
    mask: Tensor
    cells: Tensor
    start: int


def question_offsets(block: Tensor) -> Tensor:
    """Place of each token within its question, int64 `[T]`."""
    first = torch.searchsorted(block, torch.arange(int(block[-1]) + 1))
    return torch.arange(len(block)) - first[block]


def question_mask(before: int, block: Tensor) -> Tensor:
    """Causal, and no question sees another, bool `[1, 1, S, S]` for `before` columns and the questions."""
    group = torch.cat([torch.full((before,), -1), block])
    seen = (group == -1) | (group == group[:, None])
    return seen.tril()[None, None]


def _cell_columns(images: int, count: int) -> Tensor:
    """Columns of the cells of `images` crops of `count` cells: after `<bos>` and their names, if they have any."""
    names = torch.arange(images).repeat_interleave(count) + 1 if images > 1 else 0
    columns: Tensor = torch.arange(images * count) + 1 + names
    return columns


def build_prompts(architecture: Architecture, model: Any, batch: Batch) -> Prompts:
    """The language model's inputs for a batch."""
    rows, images = len(batch.cells), batch.images
    cells = batch.cells.view(rows, images, -1)
    patches = batch.patches.view(rows * images, cells.shape[2], -1)
    features = architecture.features(model, patches, cells.flatten(0, 1), batch.columns)
    columns = _cell_columns(images, cells.shape[2])
    start = int(columns[-1]) + 1
    tokens = torch.full((rows, start), TOKEN_ID[BOS])
    free, places = 1, [torch.zeros(1, rows, 1, dtype=torch.int64)]
    for image in range(images):
        if images > 1:
            tokens[:, int(columns[image * cells.shape[2]]) - 1] = encode(IMAGE_NAMES)[image]
            places.append(torch.full((1, rows, 1), free))
            free += 1
        place, free = architecture.positions(cells[:, image], free)
        places.append(place)
    places.append((free + question_offsets(batch.block)).expand(1, rows, -1))
    axes = max(len(place) for place in places)
    positions = torch.cat([place.expand(axes, -1, -1) for place in places], dim=2)
    embed = model.get_input_embeddings()
    before = embed(tokens).index_copy(1, columns, features.view(rows, len(columns), -1))
    return Prompts(
        torch.cat([before, embed(batch.tokens)], dim=1),
        positions[0] if axes == 1 else positions,
        question_mask(start, batch.block),
        columns,
        start,
    )

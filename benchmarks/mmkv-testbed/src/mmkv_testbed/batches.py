"""What one training step looks at: crops of fresh pages with several questions each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .pages import Layout, Page, draw_cells, make_page
from .samples import Task, answer_offsets, answer_words, question_words
from .vocabulary import EOS, FILLERS, GRID, LETTERS, encode

IGNORED: Final = -100
"""Label of tokens that are not answers."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One crop size of the curriculum.

    Attributes:
        size: Rows and columns of the crop.
        records: Records on it.
        questions: Questions per page, all in one sequence, each about another record.
        batch: Pages per step.
        steps: Most steps.
        suffix: Longest run of fillers after a question.
        auxiliary: Weight of the auxiliary losses.
        goal: The stage ends early when digit accuracy over the steps since the last log line passes this.
        decay: Whether the learning rate falls to zero over the second half.
    """

    size: int
    records: int
    questions: int
    batch: int
    steps: int
    suffix: int
    auxiliary: float
    goal: float = 1.0
    decay: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops of equal size, from anywhere in the grid, with the same tasks and suffixes in every row.

    Attributes:
        patches: float32 `[B, N, 192]`, normalised cells.
        cells: int64 `[B, N]`, index of each cell in the full grid.
        tokens: int64 `[B, T]`, all questions and answers.
        labels: int64 `[B, T]`, the answers' tokens; `IGNORED` elsewhere.
        pointers: int64 `[B, T]`, for each answer token the crop's cell that shows it; `IGNORED` elsewhere.
        keys: int64 `[B, R]`, letter number of each record.
        homes: int64 `[B, R]`, the crop's cell that holds its key.
    """

    patches: Tensor
    cells: Tensor
    tokens: Tensor
    labels: Tensor
    pointers: Tensor
    keys: Tensor
    homes: Tensor


def normalised(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Cells as the image processor and the patch convolution see them: `[R, C, 8, 8, 3]` -> float32 `[R * C, 192]`."""
    flat = pixels.transpose(0, 1, 4, 2, 3).reshape(pixels.shape[0] * pixels.shape[1], -1)
    return flat.astype(np.float32) / 127.5 - 1


def random_corners(rng: np.random.Generator, batch: int, size: int) -> Tensor:
    """Top and left of square crops, int64 `[batch, 2]`; one per page, as one for all would pull the places' biases."""
    return torch.from_numpy(rng.integers(0, GRID - size + 1, (batch, 2)))


def crop_cells(corners: Tensor, size: int) -> Tensor:
    """Indices in the full grid of the crops' cells, int64 `[B, size * size]`."""
    within = torch.arange(size)[:, None] * GRID + torch.arange(size)
    return (corners[:, :1] * GRID + corners[:, 1:]) + within.flatten()


def _ask(
    page: Page, task: Task, index: int, fillers: tuple[str, ...], corner: Tensor
) -> tuple[list[int], list[int], list[int]]:
    """Tokens, labels and pointers of one question about a crop with this top left corner."""
    record = page.records[index]
    home = record.cells(page.glyphs.shape[1])
    top, left = (int(i) for i in corner)
    shown = replace(record, row=top + record.row, column=left + record.column)
    question, answer = encode(question_words(task, record.key, fillers)), encode((*answer_words(task, shown), EOS))
    silent = [IGNORED] * len(question)
    cells = [home[offset] for offset in answer_offsets(task)]
    return question + answer, silent + answer, [*silent, *cells, IGNORED]


def make_batch(rng: np.random.Generator, stage: Stage) -> Batch:
    """Fresh pages for one step."""
    size = stage.size
    layout = Layout(size, size, stage.records)
    corners = random_corners(rng, stage.batch, size)
    plan = [
        (tuple(Task)[rng.integers(len(Task))], int(index), int(rng.integers(0, stage.suffix + 1)))
        for index in rng.permutation(stage.records)[: stage.questions]  # never twice: the answer above could be copied
    ]
    pages = [make_page(rng, layout) for _ in range(stage.batch)]
    patches = [normalised(draw_cells(rng, page.glyphs, page.inks, page.textures)) for page in pages]
    rows: list[list[list[int]]] = []
    for page, corner in zip(pages, corners, strict=True):
        parts: list[list[int]] = [[], [], []]
        for task, index, suffix in plan:
            fillers = tuple(FILLERS[i] for i in rng.integers(0, len(FILLERS), suffix))
            for part, more in zip(parts, _ask(page, task, index, fillers, corner), strict=True):
                part.extend(more)
        rows.append(parts)
    tokens, labels, pointers = torch.tensor(rows).unbind(1)
    keys = torch.tensor([[LETTERS.index(record.key) for record in page.records] for page in pages])
    homes = torch.tensor([[record.cells(size)[0] for record in page.records] for page in pages])
    return Batch(torch.from_numpy(np.stack(patches)), crop_cells(corners, size), tokens, labels, pointers, keys, homes)

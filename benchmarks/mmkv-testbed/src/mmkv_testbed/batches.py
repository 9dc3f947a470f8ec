"""What one training step looks at: crops of fresh pages with several questions each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .glyphs import PIXEL_MEAN, PIXEL_STD
from .pages import RECORD_LENGTH, Arrangement, Ink, Layout, Page, draw_cells
from .samples import (
    Corner,
    Question,
    Task,
    answer_ranks,
    answer_words,
    make_pages,
    question_words,
)
from .vocabulary import EOS, FILLERS, GRID, LETTERS, encode

IGNORED: Final = -100
"""Label of tokens that are not answers; pointer of tokens that no cell shows."""


@dataclass(frozen=True, slots=True)
class View:
    """One kind of step: crops of a size and what is asked about them.

    Attributes:
        rows: Rows of a crop.
        columns: Columns of a crop.
        records: Records on a crop.
        questions: Questions per prompt.
        batch: Prompts per step.
        tasks: What is asked; a task listed twice is asked twice as often. All show equally many images.
        arrangements: Of the pages, one for each prompt.
        weight: How often this view is chosen among a stage's.
    """

    rows: int
    columns: int
    records: int
    questions: int
    batch: int
    tasks: tuple[Task, ...]
    arrangements: tuple[Arrangement, ...] = tuple(Arrangement)
    weight: float = 1.0

    @property
    def images(self) -> int:
        """Images in each prompt."""
        return self.tasks[0].images


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts of equal shape: in every row the same number of crops, and the same tasks and suffixes.

    Cells are numbered over all crops of a prompt. Questions do not see one another (`block`): each is a prompt of its
    own that shares the images.

    Attributes:
        patches: float32 `[B, N, 192]`, normalised cells of all crops.
        cells: int64 `[B, N]`, index of each cell in the full grid of its image.
        images: Crops per prompt.
        columns: Cells in a row of a crop.
        tokens: int64 `[B, T]`, all questions and answers.
        block: int64 `[T]`, number of the question a token belongs to.
        tasks: Task of each question.
        labels: int64 `[B, T]`, the answers' tokens; `IGNORED` elsewhere.
        pointers: int64 `[B, T]`, for each answer token the cell that shows it; `IGNORED` elsewhere.
        regions: int64 `[B, T, RECORD_LENGTH]`, all cells of the record the pointer lies in; `IGNORED` elsewhere.
        owners: int64 `[B, T]`, letter number of that record's key; `IGNORED` elsewhere.
        ranks: int64 `[B, T]`, the pointer's place in the record; `IGNORED` elsewhere.
        homes: int64 `[B, R, RECORD_LENGTH]`, cells of every record of every crop.
        keys: int64 `[B, R]`, letter number of each of those records.
    """

    patches: Tensor
    cells: Tensor
    images: int
    columns: int
    tokens: Tensor
    block: Tensor
    tasks: tuple[Task, ...]
    labels: Tensor
    pointers: Tensor
    regions: Tensor
    owners: Tensor
    ranks: Tensor
    homes: Tensor
    keys: Tensor


class Asked(NamedTuple):
    """One question and its answer, token by token; the fields are rows of `Batch`'s."""

    tokens: list[int]
    labels: list[int]
    pointers: list[int]
    regions: list[tuple[int, ...]]
    owners: list[int]
    ranks: list[int]


def normalised(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Cells as the image processor and the patch convolution see them: `[R, C, 8, 8, 3]` -> float32 `[R * C, 192]`."""
    flat = pixels.transpose(0, 1, 4, 2, 3).reshape(pixels.shape[0] * pixels.shape[1], -1)
    centred = (flat.astype(np.float32) / 255 - PIXEL_MEAN) / PIXEL_STD
    return centred.astype(np.float32)


def random_corner(rng: np.random.Generator, rows: int, columns: int) -> Corner:
    """Of a crop; each page has its own, as one for all would pull the places' biases."""
    return Corner(int(rng.integers(0, GRID - rows + 1)), int(rng.integers(0, GRID - columns + 1)))


def crop_cells(corner: Corner, rows: int, columns: int) -> NDArray[np.int64]:
    """Indices in the full grid of a crop's cells, int64 `[rows * columns]`."""
    down, right = np.mgrid[corner.top : corner.top + rows, corner.left : corner.left + columns]
    cells: NDArray[np.int64] = (down * GRID + right).ravel()
    return cells


def _question(rng: np.random.Generator, task: Task, pages: Sequence[Page]) -> Question:
    image = int(rng.integers(len(pages)))
    page = pages[image]
    chosen = rng.permutation(len(page.records))[: task.keys]
    return Question(task, image, tuple(page.records[i] for i in chosen))


def _ask(question: Question, page: Page, fillers: tuple[str, ...], corner: Corner) -> Asked:
    """The question about a crop with this top left corner, token by token."""
    columns = page.glyphs.shape[1]
    before = question.image * page.glyphs.size
    asked = encode(question_words(question, fillers))
    answer = encode((*answer_words(question, corner), EOS))
    homes = [tuple(before + cell for cell in record.cells(columns)) for record in question.records]
    ranks = answer_ranks(question.task)
    silent = [IGNORED] * len(asked)
    nowhere = (IGNORED,) * RECORD_LENGTH
    return Asked(
        asked + answer,
        silent + answer,
        [*silent, *(home[rank] for home in homes for rank in ranks), IGNORED],
        [*(nowhere for _ in asked), *(home for home in homes for _ in ranks), nowhere],
        [*silent, *(LETTERS.index(record.key) for record in question.records for _ in ranks), IGNORED],
        [*silent, *ranks * len(homes), IGNORED],
    )


def _suffix(rng: np.random.Generator, longest: int) -> int:
    """Often none, else any length."""
    return int(rng.integers(0, longest + 1)) if rng.random() < 0.7 else 0


class Row(NamedTuple):
    """One prompt of a batch; the fields are rows of `Batch`'s."""

    patches: NDArray[np.float32]
    cells: NDArray[np.int64]
    asked: list[Asked]
    homes: list[list[int]]
    keys: list[int]


Plan = list[tuple[Task, int]]
"""Task and suffix of each question."""


def _row(rng: np.random.Generator, view: View, plan: Plan) -> Row:
    arrangement = view.arrangements[rng.integers(len(view.arrangements))]
    layout = Layout(view.rows, view.columns, view.records, arrangement, tuple(Ink)[rng.integers(len(Ink))])
    corner, pages = random_corner(rng, view.rows, view.columns), make_pages(rng, view.tasks[0], layout)
    patches = np.concatenate([normalised(draw_cells(rng, page.glyphs, page.inks, page.rulings)) for page in pages])
    asked = []
    for task, suffix in plan:
        question = _question(rng, task, pages)
        fillers = tuple(FILLERS[i] for i in rng.integers(0, len(FILLERS), suffix))
        asked.append(_ask(question, pages[question.image], fillers, corner))
    size, records = view.rows * view.columns, [(i, record) for i, page in enumerate(pages) for record in page.records]
    return Row(
        patches,
        np.tile(crop_cells(corner, view.rows, view.columns), view.images),
        asked,
        [[i * size + cell for cell in record.cells(view.columns)] for i, record in records],
        [LETTERS.index(record.key) for _, record in records],
    )


def make_batch(rng: np.random.Generator, view: View, longest_suffix: int) -> Batch:
    """Fresh pages for one step."""
    plan = [(view.tasks[rng.integers(len(view.tasks))], _suffix(rng, longest_suffix)) for _ in range(view.questions)]
    rows = [_row(rng, view, plan) for _ in range(view.batch)]
    block = [number for number, one in enumerate(rows[0].asked) for _ in one.tokens]

    def joined(field: str) -> Tensor:
        return torch.tensor([[token for one in row.asked for token in getattr(one, field)] for row in rows])

    return Batch(
        patches=torch.from_numpy(np.stack([row.patches for row in rows])),
        cells=torch.from_numpy(np.stack([row.cells for row in rows])),
        images=view.images,
        columns=view.columns,
        block=torch.tensor(block),
        tasks=tuple(task for task, _ in plan),
        homes=torch.tensor([row.homes for row in rows]),
        keys=torch.tensor([row.keys for row in rows]),
        **{field: joined(field) for field in Asked._fields},
    )

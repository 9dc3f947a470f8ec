"""Questions about pages: digits, places or descriptions of one key or two, a key in one of several images."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from .glyphs import CELL
from .pages import FULL_PAGE, Layout, Page, Record, change_digits, draw, make_page
from .vocabulary import COLUMNS, FILLERS, GRID, IMAGE, IMAGE_NAMES, ROWS

MAX_SUFFIX: Final = 24
"""Longest run of filler words between question and answer that the models were trained with."""

CHANGED: Final = 0.5
"""Share of a video's records that have new digits in the next frame."""

_EVALUATION: Final = 1
"""First word of the seeds of samples; training (`train.py`) draws from another stream: samples are always held out."""


class Task(StrEnum):
    """What is asked."""

    VALUE = "value"
    """The digits of a key."""
    DESCRIBE = "describe"
    """A key's ink, row, column and digits."""
    PAIR = "pair"
    """The digits of two keys: the later ones need evidence that the first answer token does not."""
    LIST = "list"
    """Ink, row, column and digits of two keys: a long answer."""
    LOCATE = "locate"
    """Row and column of two keys."""
    IMAGES = "images"
    """The digits of a key on one of two pages."""
    VIDEO = "video"
    """The digits of a key in one of three frames of one page, of which half the records change from frame to frame."""

    @property
    def images(self) -> int:
        """Images in the prompt."""
        return {Task.IMAGES: 2, Task.VIDEO: 3}.get(self, 1)

    @property
    def keys(self) -> int:
        """Keys in the question."""
        return 2 if self in (Task.PAIR, Task.LIST, Task.LOCATE) else 1


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of pixels in image number `image`; `right` and `bottom` are exclusive."""

    image: int
    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about the records of `image`."""

    task: Task
    image: int
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One or several pages, a question about them and the answer.

    Attributes:
        images: RGB pages.
        prompt: Text for the processor, with a placeholder for each image.
        answer: Words the model should produce before the end token.
        task: What is asked.
        records: The records asked about, in the question's order.
        evidence: For each image the vision tokens (row-major cells) that hold the evidence, in ascending order.
        boxes: For each word of the answer the cell that shows it, in pixels.
    """

    images: tuple[Image.Image, ...]
    prompt: str
    answer: str
    task: Task
    records: tuple[Record, ...]
    evidence: tuple[tuple[int, ...], ...]
    boxes: tuple[Box, ...]


class Corner(NamedTuple):
    """Where on a full page a smaller one lies."""

    top: int = 0
    left: int = 0


_ORIGIN: Final = Corner()


def image_words(count: int) -> tuple[str, ...]:
    """The prompt before the question: a placeholder, or several with a name before each."""
    if count == 1:
        return (IMAGE,)
    return tuple(word for name in IMAGE_NAMES[:count] for word in (name, IMAGE))


def question_words(question: Question, fillers: tuple[str, ...]) -> tuple[str, ...]:
    """The prompt after the images: the question, the fillers, the cue to answer."""
    several = question.task.images > 1
    asked = (record.key for record in question.records)
    where = ("within", IMAGE_NAMES[question.image]) if several else ()
    return ("value" if several else question.task.value, "of", *asked, *where, "?", *fillers, "answer", ":")


def answer_words(question: Question, corner: Corner = _ORIGIN) -> tuple[str, ...]:
    """The words of the answer."""
    match question.task:
        case Task.DESCRIBE | Task.LIST:
            parts = ((record.colour, *_place(record, corner), *record.digits) for record in question.records)
        case Task.LOCATE:
            parts = (_place(record, corner) for record in question.records)
        case _:
            parts = (tuple(record.digits) for record in question.records)
    return tuple(word for part in parts for word in part)


def _place(record: Record, corner: Corner) -> tuple[str, str]:
    return ROWS[corner.top + record.row], COLUMNS[corner.left + record.column]


def answer_ranks(task: Task) -> tuple[int, ...]:
    """For each word of the answer about one record, the number of the glyph that shows it (0 is the key)."""
    described = (0, 0, 0, 1, 2, 3, 4)
    return {Task.DESCRIBE: described, Task.LIST: described, Task.LOCATE: (0, 0)}.get(task, (1, 2, 3, 4))


def answer_cells(question: Question, columns: int = GRID) -> tuple[int, ...]:
    """For each word of the answer the row-major cell that shows it, on the page that is asked about."""
    homes = [record.cells(columns) for record in question.records]
    return tuple(home[rank] for home in homes for rank in answer_ranks(question.task))


def make_pages(rng: np.random.Generator, task: Task, layout: Layout) -> tuple[Page, ...]:
    """The pages of one prompt: unrelated ones, or the frames of a video."""
    pages = [make_page(rng, layout)]
    while len(pages) < task.images:
        pages.append(change_digits(rng, pages[-1], CHANGED) if task is Task.VIDEO else make_page(rng, layout))
    return tuple(pages)


def _box(image: int, cell: int, columns: int) -> Box:
    top, left = (CELL * i for i in divmod(cell, columns))
    return Box(image, left, top, left + CELL, top + CELL)


def make_sample(
    seed: int, index: int, task: Task | str = Task.DESCRIBE, suffix: int = MAX_SUFFIX, layout: Layout = FULL_PAGE
) -> Sample:
    """Sample number `index` of `seed`.

    The first page and the places of the records asked about in the page's table depend on `seed`, `index` and `layout`
    only, so samples of several tasks or suffixes are paired.
    """
    task = Task(task)
    tables, choice, noise = np.random.default_rng([_EVALUATION, seed, index]).spawn(3)
    pages = make_pages(tables, task, layout)
    order = choice.permutation(layout.records)
    image = int(choice.integers(task.images))
    fillers = tuple(FILLERS[i] for i in choice.integers(0, len(FILLERS), suffix))
    records = tuple(pages[image].records[i] for i in order[: task.keys])
    question = Question(task, image, records)
    cells = answer_cells(question, layout.columns)
    evidence = tuple(sorted({*cells, *(record.cells(layout.columns)[0] for record in records)}))
    return Sample(
        images=tuple(draw(noise, page) for page in pages),
        prompt=" ".join((*image_words(task.images), *question_words(question, fillers))),
        answer=" ".join(answer_words(question)),
        task=task,
        records=records,
        evidence=tuple(evidence if i == image else () for i in range(task.images)),
        boxes=tuple(_box(image, cell, layout.columns) for cell in cells),
    )


def make_samples(
    count: int, seed: int = 0, task: Task | str = Task.DESCRIBE, suffix: int = MAX_SUFFIX, layout: Layout = FULL_PAGE
) -> list[Sample]:
    """Samples 0 .. `count - 1` of `seed`; a longer list starts with the shorter one."""
    return [make_sample(seed, index, task, suffix, layout) for index in range(count)]

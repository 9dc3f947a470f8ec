"""Questions about pages: `value` asks for a key's digits, `describe` for its ink, row, column and digits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from PIL import Image

from .pages import FULL_PAGE, RECORD_LENGTH, Layout, Record, draw, make_page
from .vocabulary import COLUMNS, FILLERS, IMAGE, ROWS

MAX_SUFFIX: Final = 24
"""Longest run of filler words between question and answer that the model was trained with."""

_EVALUATION: Final = 1
"""First word of the seeds of samples; training (`train.py`) draws from another stream: samples are always held out."""


class Task(StrEnum):
    """What is asked about a key."""

    VALUE = "value"
    DESCRIBE = "describe"


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of cells; `right` and `bottom` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A page, a question about it and the answer.

    Attributes:
        image: RGB page.
        prompt: Text for the processor, with one image placeholder.
        answer: Words the model should produce before the end token.
        task: What is asked.
        record: The record asked about.
        box: The cells that hold the evidence.
        evidence: The same cells as indices of vision tokens, row by row.
    """

    image: Image.Image
    prompt: str
    answer: str
    task: Task
    record: Record
    box: Box
    evidence: tuple[int, ...]


def question_words(task: Task, key: str, fillers: tuple[str, ...]) -> tuple[str, ...]:
    """The prompt after the image: the question, the fillers, the cue to answer."""
    return (task.value, "of", key, "?", *fillers, "answer", ":")


def answer_words(task: Task, record: Record) -> tuple[str, ...]:
    """The words of the answer: 4 digits, for `describe` after ink, row and column."""
    place = (record.colour, ROWS[record.row], COLUMNS[record.column]) if task is Task.DESCRIBE else ()
    return (*place, *record.digits)


def answer_offsets(task: Task) -> tuple[int, ...]:
    """For each word of the answer the cell of the record that shows it (0 is the key's cell)."""
    return (0, 0, 0, 1, 2, 3, 4) if task is Task.DESCRIBE else (1, 2, 3, 4)


def make_sample(
    seed: int, index: int, task: Task | str = Task.DESCRIBE, suffix: int = MAX_SUFFIX, layout: Layout = FULL_PAGE
) -> Sample:
    """Sample number `index` of `seed`.

    Page and key depend on `seed` and `index` only, so samples of two tasks or suffixes are paired.
    """
    task = Task(task)
    rng = np.random.default_rng([_EVALUATION, seed, index])
    page = make_page(rng, layout)
    image = draw(rng, page)
    record = page.records[rng.integers(len(page.records))]
    fillers = tuple(FILLERS[i] for i in rng.integers(0, len(FILLERS), suffix))
    return Sample(
        image=image,
        prompt=" ".join((IMAGE, *question_words(task, record.key, fillers))),
        answer=" ".join(answer_words(task, record)),
        task=task,
        record=record,
        box=Box(record.column, record.row, record.column + RECORD_LENGTH, record.row + 1),
        evidence=record.cells(layout.columns),
    )


def make_samples(
    count: int, seed: int = 0, task: Task | str = Task.DESCRIBE, suffix: int = MAX_SUFFIX, layout: Layout = FULL_PAGE
) -> list[Sample]:
    """Samples 0 .. `count - 1` of `seed`; a longer list starts with the shorter one."""
    return [make_sample(seed, index, task, suffix, layout) for index in range(count)]

"""The cells of one batch of samples: the prompt is read once, then every cell compresses and answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmkv_hf import CompressedCache, Stages
from mmkv_testbed import Sample
from torch import Tensor

from .cells import Cell
from .outcomes import Outcomes, judge
from .replay import Recording, answer, answer_after, first_logits, observed, record, replay
from .stages import build, running
from .worlds import Checkpoint, encode, image_part

_EVERYTHING = 2**40


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What one cell made of one batch.

    Attributes:
        cell: Its key.
        honest: Every answer token, the first included, from the compressed cache.
        usual: The first token from the dense prefill; None where the question never saw a dense cache.
        held: Bytes of the caches after compression, all rows.
        full: Bytes that stock caches take.
        seconds: Of the CPU, to compress and answer twice.
    """

    cell: str
    honest: Outcomes
    usual: Outcomes | None
    held: int
    full: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        usual = None if self.usual is None else self.usual.to_json()
        rest = {"held": self.held, "full": self.full, "seconds": round(self.seconds, 3)}
        return {"cell": self.cell, "honest": self.honest.to_json(), "usual": usual, **rest}

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Block:
        """What `to_json` gave."""
        usual = None if data["usual"] is None else Outcomes.of_json(data["usual"])
        honest = Outcomes.of_json(data["honest"])
        return cls(data["cell"], honest, usual, data["held"], data["full"], data["seconds"])


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A batch that has been read, and what its answers should be."""

    checkpoint: Checkpoint
    inputs: dict[str, Tensor]
    wanted: Tensor
    recording: Recording
    is_whole: bool


def read(checkpoint: Checkpoint, samples: Sequence[Sample], when: str) -> Prompt:
    """Reads a batch once; call it, and `run`, inside `observed(model)`.

    Args:
        checkpoint: Who reads.
        samples: Of one setting.
        when: "after" reads whole prompts, "before" their images only.
    """
    inputs, wanted = encode(checkpoint, samples)
    seen = inputs if when == "after" else image_part(checkpoint, inputs)
    return Prompt(checkpoint, inputs, wanted, record(checkpoint.model, seen), when == "after")


def run(prompt: Prompt, cell: Cell) -> Block:
    """One cell."""
    start = time.process_time()
    with _staged(prompt, cell) as stages:
        cache, first = compressed(prompt, cell) if stages is None else _read_again(prompt, cell, stages)
        held, full = cache.bytes_held, cache.bytes_full
        usual = _usual(prompt, cache, first) if prompt.is_whole else None
        honest = answer(prompt.checkpoint.model, prompt.inputs, cache, prompt.wanted.shape[1])
    seconds = time.process_time() - start
    return Block(cell.key, judge(honest, prompt.wanted), usual, held, full, seconds)


def compressed(prompt: Prompt, cell: Cell) -> tuple[CompressedCache, Tensor]:
    """The cache the cell starts from, and the first token `[B]` of the dense prefill.

    Raises:
        ValueError: The pipeline cannot do it; the message names the cell.
    """
    with _named(cell):
        cache = replay(prompt.checkpoint.model, prompt.recording, *_pipeline(prompt, cell))
    return cache, prompt.recording.logits.argmax(-1)


def _pipeline(prompt: Prompt, cell: Cell) -> tuple[str, int]:
    method = cell.method
    text = "snapkv" if method is None or not method.score else method.text(cell.window, prompt.checkpoint.table)
    return text, cell.budget or _EVERYTHING


@contextmanager
def _staged(prompt: Prompt, cell: Cell) -> Iterator[Stages | None]:
    """The model with the cell's stages, if it has any."""
    if cell.method is None or not cell.method.stages:
        yield None
        return
    checkpoint = prompt.checkpoint
    layers = checkpoint.model.config.get_text_config(decoder=True).num_hidden_layers
    with _named(cell):
        stages = build(cell.method.stages, layers, checkpoint.plan)
        with running(checkpoint.model, stages):
            yield stages


def _read_again(prompt: Prompt, cell: Cell, stages: Stages) -> tuple[CompressedCache, Tensor]:
    """As `compressed`, for a cell whose layers see something else than the recorded ones."""
    model, length = prompt.checkpoint.model, prompt.recording.length
    text, budget = _pipeline(prompt, cell)
    cache = CompressedCache(model, text, budget, prompt_length=length, plan=stages.share)
    return cache, first_logits(model, prompt.inputs, cache).argmax(-1)


@contextmanager
def _named(cell: Cell) -> Iterator[None]:
    """Errors that name the cell."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"cell {cell.key}: {error}") from error


def _usual(prompt: Prompt, cache: CompressedCache, first: Tensor) -> Outcomes:
    tokens = answer_after(prompt.checkpoint.model, prompt.inputs, cache, first, prompt.wanted.shape[1])
    return judge(tokens, prompt.wanted)


def measure(checkpoint: Checkpoint, samples: Sequence[Sample], cells: Sequence[Cell]) -> Iterator[Block]:
    """All these cells, which are of one setting, on one batch."""
    if not cells:
        return
    with observed(checkpoint.model):
        prompt = read(checkpoint, samples, cells[0].setting.when)
        for cell in cells:
            yield run(prompt, cell)

"""What a plan will cost, from one timed batch of every method."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Final

from mmkv_testbed import Task

from .cells import Cell, Method, Setting, by_setting
from .grid import Plan
from .measure import compressed, read, run
from .replay import observed
from .rule import BUDGETS
from .worlds import load, make_block

_PROBED: Final = Setting("probe")
_PROBED_WORDS: Final = 5
"""Of its answers, the end included."""
_LONG: Final = {"describe": 8, "pair": 9, "list": 15}
"""Words of the answers of other tasks, where they are not as many."""


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds per sample.

    Attributes:
        prefill: To draw a page and read a prompt with one image.
        compress: Method, without the settings of its wraps -> to compress a prompt with one image.
        word: Method -> to generate a word of the answer, in both protocols.
    """

    prefill: float
    compress: Mapping[str, float]
    word: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """One model's part of a plan.

    Attributes:
        settings: How many.
        cells: How many.
        hours: Of the CPU.
    """

    settings: int
    cells: int
    hours: float


def probe(folder: Path, table: Path | None, methods: Iterable[Method], samples: int) -> Cost:
    """Times every method on one batch of the default setting."""
    checkpoint = load(folder, table)
    compress, word = {}, {}
    with observed(checkpoint.model):
        read(checkpoint, make_block(_PROBED, 0, 0, 2), "after")  # the first call of anything is slow
        start = time.process_time()
        prompt = read(checkpoint, make_block(_PROBED, 0, 0, samples), "after")
        prefill = (time.process_time() - start) / samples
        for method in methods:
            cell, start = Cell(_PROBED, method, BUDGETS[-2]), time.process_time()
            compressed(prompt, cell)
            compress[method.name] = (time.process_time() - start) / samples
            whole = run(prompt, cell).seconds / samples
            word[method.name] = max(0.0, whole - compress[method.name]) / _PROBED_WORDS
    return Cost(prefill, compress, word)


def estimate(plan: Plan, costs: Mapping[str, Cost], samples: int) -> dict[str, Estimate]:
    """Model -> what its cells will cost; more images and longer answers in proportion."""
    found: dict[str, Estimate] = {}
    for setting, cells in by_setting(plan.cells).items():
        cost, before = costs[setting.model], found.get(setting.model, Estimate(0, 0, 0.0))
        seconds = Task(setting.task).images * cost.prefill + sum(_seconds(cell, cost) for cell in cells)
        hours = before.hours + samples * seconds / 3600
        found[setting.model] = Estimate(before.settings + 1, before.cells + len(cells), hours)
    return found


def _seconds(cell: Cell, cost: Cost) -> float:
    method = Method() if cell.method is None else cell.method
    name = Method(method.score or "snapkv", method.share, tuple(wrap.partition("(")[0] for wrap in method.wraps)).name
    compress, word = (known.get(name, mean(known.values())) for known in (cost.compress, cost.word))
    again = cost.prefill if method.stages else 0.0
    return Task(cell.setting.task).images * (again + compress) + _LONG.get(cell.setting.task, _PROBED_WORDS) * word

"""Measures what a model can do with its full cache: `python -m mmkv_testbed.accuracy --model base-seed0`.

Greedy `generate` from pixels, in float32, on held-out pages. Writes `accuracy.json` into the model's folder, a line for
each task, arrangement and suffix; a task that a model cannot do with the full cache compares no methods.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from tqdm import tqdm

from .evaluate import exact_match
from .load import load, model_names, model_path
from .pages import Arrangement, Ink, Layout
from .samples import MAX_SUFFIX, Task, make_samples

SEED: Final = 20_000
SUFFIXES: Final = (0, MAX_SUFFIX)


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of question, on one kind of page."""

    task: Task
    arrangement: Arrangement
    suffix: int
    ink: Ink = Ink.NORMAL


def measure(model: Any, processor: Any, cell: Cell, count: int, seed: int = SEED) -> dict[str, Any]:
    """Exact match and token accuracy, with standard errors, over `count` held-out pages."""
    samples = make_samples(count, seed, cell.task, cell.suffix, Layout(arrangement=cell.arrangement, ink=cell.ink))
    result = exact_match(model, processor, samples, batch_size=max(1, 16 // cell.task.images))
    (exact, exact_error), (token, token_error) = result.exact_match, result.token_accuracy
    return {
        **asdict(cell),
        "pages": count,
        "exact_match": round(exact, 4),
        "exact_match_se": round(exact_error, 4),
        "token_accuracy": round(token, 4),
        "token_accuracy_se": round(token_error, 4),
    }


def measure_all(model: Any, processor: Any, cells: Sequence[Cell], count: int) -> Iterator[dict[str, Any]]:
    """A line for each cell, as soon as it is known."""
    for cell in tqdm(cells, unit="cell", mininterval=5, disable=None):
        yield measure(model, processor, cell, count)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mmkv_testbed.accuracy", description=__doc__)
    parser.add_argument("--model", choices=model_names(), required=True)
    parser.add_argument("--pages", type=int, default=128)
    parser.add_argument("--tasks", nargs="+", type=Task, choices=list(Task), default=list(Task))
    parser.add_argument("--arrangements", nargs="+", type=Arrangement, default=list(Arrangement))
    parser.add_argument("--inks", nargs="+", type=Ink, default=[Ink.NORMAL])
    parser.add_argument("--suffixes", nargs="+", type=int, default=list(SUFFIXES))
    parser.add_argument("--out", type=Path, help="instead of accuracy.json in the model's folder")
    return parser.parse_args()


def main() -> None:
    """Command line."""
    options = _options()
    torch.set_num_threads(1)
    factors = (options.tasks, options.arrangements, options.suffixes, options.inks)
    lines = []
    for line in measure_all(*load(options.model), [Cell(*values) for values in product(*factors)], options.pages):
        tqdm.write(" ".join(str(value) for value in line.values()))
        lines.append(line)
    report = {"protocol": "greedy generate from pixels, full cache, float32", "seed": SEED, "cells": lines}
    (options.out or model_path(options.model) / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""From a work folder to pages: quality.json, quality.md, quality-guide.md and the pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Final

from . import guide, pages, plots
from .benchmark import Benchmark, joined, read, to_json
from .grid import plan_of_json
from .results import collect
from .runner import able
from .store import WorkFolder, write_atomically

PAGES: Final = ("quality.json", "quality.md", "quality-guide.md")


def write(sources: Sequence[Path], folder: Path) -> None:
    """Writes the pages.

    Args:
        sources: Work folders of runs, finished or not, or the quality.json of them; at least one.
        folder: Where to; made when it is not there.

    Raises:
        OSError: A source holds no results, or the folder cannot be written to.
        ValueError: The sources cannot be joined.
    """
    bench = reduce(joined, (read(source) if source.is_file() else of_work(source) for source in sources))
    folder.mkdir(parents=True, exist_ok=True)
    page = pages.render(bench, plots.draw(bench, folder))
    texts = (json.dumps(to_json(bench)) + "\n", page, guide.render(bench))
    for name, text in zip(PAGES, texts, strict=True):
        write_atomically(folder / name, text)


def of_work(path: Path) -> Benchmark:
    """What a run has measured so far.

    Raises:
        FileNotFoundError: Nothing has been measured there.
    """
    if not (path / "made.json").is_file():
        why = "there is no made.json in it; run the benchmark first" if path.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{path} holds no results: {why}")
    folder = WorkFolder(path)
    made, plan = folder.noted("made.json"), able(folder, plan_of_json(folder.noted("plan.json")))
    blocks = range(-(-made["samples"] // made["block"]))
    return Benchmark.of_run(plan, collect(folder, plan.cells, blocks), made, folder.noted("took.json") or {})

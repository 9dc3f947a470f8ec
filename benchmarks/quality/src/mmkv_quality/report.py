"""From a work folder to pages: quality.json, quality.md, quality-guide.md and the pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Final

from . import guide, pages, plots
from .benchmark import Benchmark, read, to_json
from .grid import plan_of_json
from .results import collect
from .runner import able
from .store import WorkFolder, write_atomically

PAGES: Final = ("quality.json", "quality.md", "quality-guide.md")


def write(source: Path, folder: Path) -> None:
    """Writes the pages.

    Args:
        source: The work folder of a run, finished or not, or the quality.json of one.
        folder: Where to; made when it is not there.

    Raises:
        OSError: The source holds no results, or the folder cannot be written to.
    """
    bench = read(source) if source.is_file() else of_work(source)
    folder.mkdir(parents=True, exist_ok=True)
    bench = replace(bench, took={**bench.took, "pictures": plots.draw(bench, folder)})
    texts = (json.dumps(to_json(bench)) + "\n", pages.render(bench), guide.render(bench))
    for name, text in zip(PAGES, texts, strict=True):
        write_atomically(folder / name, text)


def of_work(path: Path) -> Benchmark:
    """What a run has measured so far.

    Raises:
        FileNotFoundError: Nothing has been measured there.
    """
    if not (path / "made.json").is_file():
        raise FileNotFoundError(f"{path} holds no results: there is no made.json; run the benchmark first")
    folder = WorkFolder(path)
    made, plan = folder.noted("made.json"), able(folder, plan_of_json(folder.noted("plan.json")))
    blocks = range(-(-made["samples"] // made["block"]))
    return Benchmark(plan, collect(folder, plan.cells, blocks), made, folder.noted("took.json") or {})

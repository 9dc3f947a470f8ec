"""`python -m mmkv_quality`: measures the grid and writes the pages."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import estimate, report, runner, worlds
from .cells import Method
from .grid import Plan, make_plan, only, plan_json
from .store import Made, WorkFolder, code_digest, versions

SEED: Final = 31_000
"""Of the benchmark's samples; the models were tested with others while they were made."""
SAMPLES: Final = 512
QUICK_SAMPLES: Final = 100
QUICK_MODELS: Final = ("small-seed0",)
"""For the quick run alone: the whole grid goes to the larger models."""
BLOCK: Final = 64

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()


@app.callback()
def main() -> None:
    """What KV-cache compression costs in answers."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What the user can mend is said in one line."""
    try:
        yield
    except (OSError, ValueError, BrokenExecutor) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="work folder; an interrupted run goes on where it stopped")] = Path(
        "quality-output"
    ),
    pages: Annotated[Path | None, typer.Option(help="folder for the pages, by default the work folder")] = None,
    models: Annotated[
        list[str] | None, typer.Option(help="bundled names or paths; only the first goes through the factors")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="every method, one budget, 100 samples")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="time a few samples, print the cost, stop")] = False,
    head_scores: Annotated[list[str] | None, typer.Option(help="MODEL=PATH: visual-head scores for SparseMM")] = None,
    groups: Annotated[list[str] | None, typer.Option(help="measure these groups of cells only")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="measure these tasks only")] = None,
    pipelines: Annotated[list[str] | None, typer.Option(help="measure these pipelines only")] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help=f"per cell; {SAMPLES}, or {QUICK_SAMPLES} if quick")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes of one thread each")] = os.cpu_count() or 1,
) -> None:
    """Measures every cell that is not measured yet, then writes the pages into the work folder."""
    with _plain_errors():
        folders = {Path(name).name: worlds.find(name) for name in models or _default_models(quick)}
        tables = _tables(head_scores or [], folders)
        whole = make_plan(folders, tables, worlds.plans(folders), quick=quick)
        plan = only(whole, tasks or (), pipelines or (), groups or ())
        count = samples or (QUICK_SAMPLES if quick else SAMPLES)
        job = runner.Run(out, folders, tables, SEED, count, BLOCK, workers)
        if dry_run:
            _print_estimate(plan, job)
        else:
            _measure(job, plan)
            _write([out], pages or out)


@app.command(name="report")
def report_command(
    sources: Annotated[
        list[Path], typer.Argument(help="work folders of runs over the same samples, finished or not, or quality.json")
    ],
    pages: Annotated[Path | None, typer.Option(help="folder for the pages, by default beside the first")] = None,
) -> None:
    """Writes the pages again, of several runs together if several are given."""
    with _plain_errors():
        _write(sources, pages or (sources[0].parent if sources[0].is_file() else sources[0]))


def _write(sources: list[Path], pages: Path) -> None:
    report.write(sources, pages)
    console.print(f"wrote {', '.join(report.PAGES)} and pictures to {pages}")


def _default_models(quick: bool) -> tuple[str, ...]:
    return QUICK_MODELS if quick else tuple(name for name in worlds.bundled() if name not in QUICK_MODELS)


def _tables(given: list[str], folders: Mapping[str, Path]) -> dict[str, Path]:
    """Model -> table: those beside the weights, and those the user names."""
    found = {name: folder / worlds.TABLE for name, folder in folders.items() if (folder / worlds.TABLE).is_file()}
    for item in given:
        name, _, path = item.partition("=")
        if name not in folders or not Path(path).is_file():
            raise ValueError(f"--head-scores is MODEL=PATH with a model of this run and a file, got {item!r}")
        found[name] = Path(path)
    return found


def _measure(job: runner.Run, plan: Plan) -> None:
    folder = WorkFolder(job.folder)
    for path in job.models.values():
        worlds.load(path)  # errors now, and not from a worker
    folder.begin(
        Made(
            seed=job.seed,
            samples=job.samples,
            block=job.block,
            versions=versions(),
            code=code_digest(),
            weights={name: worlds.weights_digest(path) for name, path in job.models.items()},
            tables={name: worlds.file_digest(path) for name, path in job.tables.items()},
        )
    )
    before = (folder.noted("took.json") or {}).get("seconds", 0.0)
    folder.note("plan.json", plan_json(plan))
    start = time.perf_counter()
    try:
        with runner.bar() as progress:
            runner.execute(job, plan, progress)
    finally:
        seconds = round(before + time.perf_counter() - start, 1)
        folder.note("took.json", {"command": _command(sys.argv[1:]), "seconds": seconds, "workers": job.workers})


def _command(arguments: Sequence[str]) -> str:
    """What was asked for, without the names of folders on this machine."""
    said = shlex.join(["python", "-m", "mmkv_quality", *arguments])
    return re.sub(r" --(out|pages)[ =]('[^']*'|\S+)", "", said)


def _print_estimate(plan: Plan, job: runner.Run) -> None:
    count = min(job.block, job.samples)
    costs = {
        name: estimate.probe(folder, job.tables.get(name), _methods(plan, name), count)
        for name, folder in job.models.items()
    }
    expected = estimate.estimate(plan, costs, job.samples)
    table = Table("model", "settings", "cells", "CPU hours", title=f"{job.samples} samples per cell")
    for name, its in expected.items():
        table.add_row(name, str(its.settings), str(its.cells), f"{its.hours:.2f}")
    total = sum(its.hours for its in expected.values())
    table.add_section()
    table.add_row("all", "", str(len(plan.cells)), f"{total:.2f}")
    console.print(table)
    console.print(f"about {total / job.workers:.2f} hours with {job.workers} processes, less what a model cannot do")
    console.print(*(f"left out: {reason.what}: {reason.why}" for reason in plan.left_out), sep="\n", highlight=False)


def _methods(plan: Plan, model: str) -> dict[Method, None]:
    """The methods of a model's cells in the default settings, each once."""
    main = plan.groups[0].cells
    return dict.fromkeys(cell.method for cell in main if cell.method and cell.setting.model == model)

"""Measures a plan with a few worker processes, from wherever an earlier run of it stopped."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Final

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .cells import Cell, Setting, by_setting
from .grid import Plan, without
from .measure import measure
from .store import Unit, WorkFolder
from .worlds import Checkpoint, load, make_block

SCREEN: Final = 0.8
"""Least exact match of the full cache for a setting to be measured: what a model cannot do compares nothing."""


@dataclass(frozen=True, slots=True)
class Run:
    """How to measure.

    Attributes:
        folder: The work folder.
        models: Name -> folder.
        tables: Name -> visual-head scores given by the user.
        seed: Of the samples.
        samples: Per cell.
        block: Samples per batch.
        workers: Processes, of one thread each.
    """

    folder: Path
    models: Mapping[str, Path]
    tables: Mapping[str, Path]
    seed: int
    samples: int
    block: int
    workers: int

    @property
    def blocks(self) -> range:
        """Numbers of the batches of a setting."""
        return range(-(-self.samples // self.block))


def execute(run: Run, plan: Plan, progress: Progress) -> Plan:
    """Measures what is not measured yet.

    Args:
        run: How.
        plan: What.
        progress: Shows it.

    Returns:
        The plan less the settings that the model cannot do.

    Raises:
        ValueError: A cell cannot be measured; finished cells stay.
    """
    screens = [(Unit(setting, 0), (Cell(setting),)) for setting in by_setting(plan.cells)]
    with _pool(run) as pool:
        _measure(pool, screens, progress, "full cache")
        plan = able(pool.folder, plan)
        cells = by_setting(plan.cells)
        jobs = [(Unit(setting, block), its) for setting, its in cells.items() for block in run.blocks]
        _measure(pool, jobs, progress, "all cells")
    return plan


def able(folder: WorkFolder, plan: Plan) -> Plan:
    """The plan less the settings whose first batch says that the model cannot do them."""
    means: dict[Setting, float] = {}
    for setting in by_setting(plan.cells):
        for block in folder.blocks(Unit(setting, 0)):
            if block.cell == Cell(setting).key:
                means[setting] = float(block.honest.exact.mean())
    why = "exact match of the full cache is {:.2f} on the first batch; below {} a setting is not measured"
    return without(plan, {setting: why.format(mean, SCREEN) for setting, mean in means.items() if mean < SCREEN})


Job = tuple[Unit, tuple[Cell, ...]]


@dataclass(frozen=True, slots=True)
class _Pool:
    """Worker processes and where they say that a cell is finished."""

    folder: WorkFolder
    executor: ProcessPoolExecutor
    done: SimpleQueue[int]


@contextmanager
def _pool(run: Run) -> Iterator[_Pool]:
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    done: SimpleQueue[int] = context.SimpleQueue()
    with ProcessPoolExecutor(run.workers, mp_context=context, initializer=_begin, initargs=(run, done)) as executor:
        try:
            yield _Pool(WorkFolder(run.folder), executor, done)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # else leaving would wait for the units under way
            raise


def _measure(pool: _Pool, jobs: Sequence[Job], progress: Progress, title: str) -> None:
    left = [job for job in (_left(pool.folder, *job) for job in jobs) if job[1]]
    total, todo = (sum(len(cells) for _, cells in some) for some in (jobs, left))
    bar = progress.add_task(title, total=total, completed=total - todo)
    _watch([pool.executor.submit(_work, *job) for job in left], pool.done, lambda: progress.advance(bar))


def _left(folder: WorkFolder, unit: Unit, cells: Iterable[Cell]) -> Job:
    """What of a job is not finished."""
    done = {block.cell for block in folder.blocks(unit)}
    return unit, tuple(cell for cell in cells if cell.key not in done)


def _watch(futures: Iterable[Future[None]], done: SimpleQueue[int], on_cell: Callable[[], None]) -> None:
    """Waits for all of them, or for the first error."""
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        while not done.empty():
            done.get()
            on_cell()
        for future in finished:
            future.result()


class _Worker:
    """What a worker process keeps between units."""

    run: Run
    done: SimpleQueue[int]
    name: str | None = None
    checkpoint: Checkpoint


def _begin(run: Run, done: SimpleQueue[int]) -> None:
    """A worker process: one thread, quiet, and gone when its parent is."""
    _Worker.run, _Worker.done = run, done
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(unit: Unit, cells: tuple[Cell, ...]) -> None:
    run, name = _Worker.run, unit.setting.model
    if _Worker.name != name:
        _Worker.checkpoint, _Worker.name = load(run.models[name], run.tables.get(name)), name
    start = unit.block * run.block
    samples = make_block(unit.setting, run.seed, start, min(run.block, run.samples - start))
    folder = WorkFolder(run.folder)
    folder.mend(unit)
    for block in measure(_Worker.checkpoint, samples, cells):
        folder.append(unit, block)
        _Worker.done.put(1)


def bar() -> Progress:
    """A progress bar with counts, elapsed time and time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))

"""What compression costs on the testbed: `python -m mmkv_testbed.demo`.

Every answer token, the first one too, is generated from the compressed cache: a forward pass over the prompt fills and
compresses the cache, the last prompt token is cropped off, and `generate` runs it again on what is left.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from .evaluate import Estimate, Result, batch_inputs, exact_match
from .load import DEFAULT, load, model_names
from .overlay import draw_kept, side_by_side
from .pages import Arrangement, Layout
from .samples import MAX_SUFFIX, Sample, Task, make_samples

WITHOUT_MIXKV: Final = "adakv+bacon"
WITH_MIXKV: Final = "adakv+mixkv+bacon"
PIPELINES: Final = ("snapkv", "adakv", "mixkv", "bacon", WITHOUT_MIXKV, WITH_MIXKV)
BUDGETS: Final = (128, 64, 48, 40)
PICTURED: Final = (("snapkv", 64), (WITH_MIXKV, 64))
PROTOCOL: Final = (
    "Protocol: greedy generation; every answer token, the first included, is generated from the compressed cache "
    "(prefill, crop the last prompt token, run it again inside generate). Budgets are KV pairs per KV head, the window "
    "of 32 included. ± is one standard error over pages; tokens are scored on the freely generated answer."
)

Loaded = tuple[PreTrainedModel, ProcessorMixin]
Kept = dict[tuple[str, int], NDArray[np.float32]]
"""(pipeline, budget) -> `Compressed.shares`."""


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table; `budget` is None for the full cache."""

    pipeline: str
    budget: int | None
    result: Result
    bytes_held: int
    bytes_full: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        (exact, exact_error), (token, token_error) = self.result.exact_match, self.result.token_accuracy
        return {
            "pipeline": self.pipeline,
            "budget": self.budget,
            "exact_match": exact,
            "exact_match_se": exact_error,
            "token_accuracy": token,
            "token_accuracy_se": token_error,
            "bytes_held": self.bytes_held,
            "bytes_full": self.bytes_full,
            "seconds": round(self.seconds, 2),
            "answers": list(self.result.answers),
        }


@dataclass
class Compressed:
    """A `Generate` that answers from a compressed cache and adds up what the caches hold."""

    model: PreTrainedModel
    pipeline: str
    budget: int
    bytes_held: int = 0
    bytes_full: int = 0
    shares: NDArray[np.float32] | None = None
    """Of the first page answered: for each vision token the share of (layer, KV head) pairs that hold it."""

    def __call__(self, inputs: BatchFeature, new_tokens: int) -> Tensor:
        """Generates from the compressed cache of one batch."""
        from mmkv_hf import compress

        with compress(self.model, self.pipeline, budget=self.budget) as session:
            cache = session.cache(**inputs)
            self.model(**inputs, past_key_values=cache, logits_to_keep=1)
            report = session.report()
            self.bytes_held += report.bytes_held
            self.bytes_full += report.bytes_full
            if self.shares is None:
                self.shares = report.vision_kept[0].mean(0).numpy()
            cache.crop(-1)
            text = {name: inputs[name] for name in ("input_ids", "attention_mask")}  # the cache has seen the images
            out: Tensor = self.model.generate(**text, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False)
        return out


def _full_bytes(model: PreTrainedModel, inputs: BatchFeature) -> int:
    """Bytes of keys and values of the prompts without compression."""
    text, attention = model.config.text_config, model.model.language_model.layers[0].self_attn
    per_token: int = 2 * text.num_hidden_layers * text.num_key_value_heads * attention.head_dim * model.dtype.itemsize
    return int(inputs["attention_mask"].sum()) * per_token


def _full_line(loaded: Loaded, samples: Sequence[Sample], batch_size: int) -> Line:
    model, processor = loaded
    start = time.perf_counter()
    result = exact_match(model, processor, samples, batch_size=batch_size)
    size = sum(_full_bytes(model, batch_inputs(processor, [sample])) for sample in samples)
    return Line("full cache", None, result, size, size, time.perf_counter() - start)


def _compressed_line(
    loaded: Loaded, samples: Sequence[Sample], pipeline: str, budget: int, batch_size: int
) -> tuple[Line, NDArray[np.float32] | None]:
    start, generate = time.perf_counter(), Compressed(loaded[0], pipeline, budget)
    result = exact_match(*loaded, samples, generate=generate, batch_size=batch_size)
    seconds = time.perf_counter() - start
    return Line(pipeline, budget, result, generate.bytes_held, generate.bytes_full, seconds), generate.shares


def run(
    workers: Sequence[Loaded],
    samples: Sequence[Sample],
    *,
    pipelines: Sequence[str] = PIPELINES,
    budgets: Sequence[int] = BUDGETS,
    batch_size: int = 20,
    on_line: Callable[[Line], None] = lambda _: None,
) -> tuple[list[Line], Kept]:
    """All rows of the table, and what each configuration kept of the first page.

    Args:
        workers: A model and a processor for each thread; neither can serve two configurations at a time.
        samples: What to ask.
        pipelines: Text forms.
        budgets: KV pairs per KV head.
        batch_size: Pages per call of `generate`.
        on_line: Called from the threads whenever a row is done.
    """
    free: Queue[Loaded] = Queue()
    for worker in workers:
        free.put(worker)

    def work(job: tuple[str, int] | None) -> tuple[Line, NDArray[np.float32] | None]:
        torch.set_num_threads(1)  # one thread per configuration scales better than several within an operator
        loaded = free.get()
        try:
            line, shares = (
                (_full_line(loaded, samples, batch_size), None)
                if job is None
                else _compressed_line(loaded, samples, *job, batch_size)
            )
        finally:
            free.put(loaded)
        on_line(line)
        return line, shares

    jobs = [None, *((pipeline, budget) for pipeline in pipelines for budget in budgets)]
    with ThreadPoolExecutor(len(workers)) as pool:
        done = list(pool.map(work, jobs))
    kept = {(line.pipeline, line.budget): shares for line, shares in done if shares is not None and line.budget}
    return [line for line, _ in done], kept


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:5.1f} ± {100 * estimate.error:3.1f}"


def table(lines: Sequence[Line], title: str) -> Table:
    """The lines as a rich table."""
    out = Table(title=title, caption=PROTOCOL, caption_justify="left")
    for name in ("pipeline", "budget", "exact match %", "token accuracy %", "bytes held", "of full cache"):
        out.add_column(name, justify="left" if name == "pipeline" else "right")
    for before, line in zip([None, *lines], lines, strict=False):
        fresh = before is None or before.pipeline != line.pipeline
        if fresh:
            out.add_section()
        out.add_row(
            line.pipeline if fresh else "",
            "all" if line.budget is None else str(line.budget),
            _percent(line.result.exact_match),
            _percent(line.result.token_accuracy),
            f"{line.bytes_held:,}",
            f"{100 * line.bytes_held / line.bytes_full:.1f} %",
        )
    return out


def verdict(lines: Sequence[Line]) -> str:
    """Which pipeline answers best at each budget, and what MixKV changes here."""
    exact = {(line.pipeline, line.budget): 100 * line.result.exact_match.mean for line in lines if line.budget}
    best, changes = [], []
    for budget in dict.fromkeys(budget for _, budget in exact):
        here = {pipeline: value for (pipeline, its), value in exact.items() if its == budget}
        top = max(here.values())
        winners = ", ".join(pipeline for pipeline, value in here.items() if value == top)
        best.append(f"{budget}: {winners} ({top:.0f} %)")
        if here.keys() >= {WITHOUT_MIXKV, WITH_MIXKV}:
            changes.append(f"{here[WITH_MIXKV] - here[WITHOUT_MIXKV]:+.0f} at {budget}")
    words = [f"Best exact match by budget: {'; '.join(best)}."] if best else []
    if changes:
        words.append(
            f"mixkv changes {WITHOUT_MIXKV} by {', '.join(changes)} (points; one small model, one kind of page)."
        )
    return " ".join(words)


def _picture(sample: Sample, kept: Kept, lines: Sequence[Line], out: Path) -> None:
    answers = {(line.pipeline, line.budget): line.result.answers[0] for line in lines}
    panels = []
    for pipeline, budget in PICTURED:
        if (shares := kept.get((pipeline, budget))) is not None:
            question = sample.prompt.removeprefix("<image> ").partition("?")[0]
            caption = f"{pipeline}, budget {budget}: {question}? {answers[pipeline, budget]}"
            panels.append(draw_kept(sample.images[0], shares, sample.evidence[0], caption))
    if panels:
        side_by_side(panels).save(out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mmkv_testbed.demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder for results.txt, results.json and kept.png"
    )
    parser.add_argument("--model", choices=model_names(), default=DEFAULT)
    parser.add_argument("--pages", type=int, default=100)
    single = [task for task in Task if task.images == 1]
    parser.add_argument("--task", type=Task, choices=single, default=Task.DESCRIBE)
    parser.add_argument("--arrangement", type=Arrangement, choices=list(Arrangement), default=Arrangement.HORIZONTAL)
    parser.add_argument("--suffix", type=int, default=MAX_SUFFIX, help="filler tokens between question and answer")
    parser.add_argument("--pipelines", nargs="+", default=list(PIPELINES))
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads, one configuration each")
    return parser.parse_args()


def _setting(options: argparse.Namespace) -> dict[str, Any]:
    setting = {name: value for name, value in vars(options).items() if name != "out"}
    return {**setting, "dtype": "float32"}


def main() -> None:
    """Command line."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    workers = [load(options.model) for _ in range(options.workers)]
    layout = Layout(arrangement=options.arrangement)
    samples = make_samples(options.pages, seed=options.seed, task=options.task, suffix=options.suffix, layout=layout)
    chosen = {"pipelines": options.pipelines, "budgets": options.budgets, "batch_size": options.batch_size}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("answering", total=1 + len(options.pipelines) * len(options.budgets))
        lines, kept = run(workers, samples, **chosen, on_line=lambda _: progress.advance(bar))
    console = Console(record=True, width=110)
    where = f"{options.model}: {options.task}, {options.arrangement}"
    title = f"{where}, {options.suffix} filler tokens after the question, {options.pages} pages"
    console.print(table(lines, title))
    console.print(verdict(lines), highlight=False)
    console.print(f"{time.perf_counter() - start:.0f} s with {options.workers} threads")
    console.save_text(str(options.out / "results.txt"))
    results = {"protocol": PROTOCOL, "setting": _setting(options), "lines": [line.to_dict() for line in lines]}
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    _picture(samples[0], kept, lines, options.out / "kept.png")
    print(f"wrote results.txt, results.json and kept.png (the vision tokens that were kept) to {options.out}")


if __name__ == "__main__":
    main()

"""What ADSC and lazy attention cost a trained model at once, and what is left of it after a short fine-tuning.

`python benchmarks/finetune/run.py` reads held-out pages with a bundled model, with each method on it as it is,
fine-tunes it inside the method's session on the testbed's training stream, and reads the same pages again. The plain
model is fine-tuned in just the same way, so that what more training gives is not put down to a method.

A killed run goes on from what is in the work folder; `--arms` spreads the arms over processes that share one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from mmkv_hf import prune, share
from mmkv_layershare import LazyPlan
from mmkv_prune import ADSC, Curriculum
from mmkv_quality.rule import scaled_layers
from mmkv_testbed import exact_match, load, make_samples, model_path
from mmkv_testbed.batches import IGNORED, Batch, View, make_batch
from mmkv_testbed.glyphs import CELL
from mmkv_testbed.load import DEFAULT
from mmkv_testbed.model import architecture_of
from mmkv_testbed.pages import Arrangement, Layout
from mmkv_testbed.samples import MAX_SUFFIX, Sample, Task
from mmkv_testbed.vocabulary import BOS, GRID, IMAGE, TOKEN_ID
from torch import Tensor, nn
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent.parent / "results" / "finetune"
TRAINING = (0, 0, 1)
"""Seed of the batches; its first word is that of the testbed's training streams, which no sample is drawn from."""
EVALUATION = 47_000
TASKS = (Task.VALUE, Task.DESCRIBE)
ARRANGEMENTS = (Arrangement.HORIZONTAL, Arrangement.VERTICAL)
STATES = ("as it is", "fine-tuned")
ADSC_LAYERS = (4, 20)
WARM_UP = 20
PUBLISHED = {"ADSC": 98.2, "VLA": 100.3, "GLA": 95.4}
DIFFERS = """Published: ADSC keeps 98.2 % of LLaVA-1.5's accuracy (arXiv 2602.12618, abstract), in a model tuned with
its schedule. Lazy attention keeps 100.3 % with VLA and 95.4 % with GLA on LLaVA-1.5-7B: the means, taken here, of the
twelve ratios in table 1 of arXiv 2602.01901, whose VLA row is that of the post-trained model.

What differs, plainly:

* On these pages every vision token is a glyph of its own, and an answer needs each glyph of a record. Where two of
  three tokens go no further, so do two of three digits, unless the layers before have moved them, which no layer of
  this model was trained to do. The published benchmarks ask about photographs, whose neighbouring tokens say much the
  same. Here an answer with one wrong word is wrong.
* The model is some thousand times smaller and has few layers: a drop or a block takes away a far larger share of
  what it computes. Published lazy layers leave the first two layers and the last alone; the bundled plan, found by
  calibration, cannot.
* ADSC's schedule and curriculum are reconstructed, not the paper's. The papers' data, steps and rates are unknown;
  LLaVA-1.5's own instruction tuning takes 665,000 samples, this one about a thousand."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the outcome; one choice for all arms."""

    model: str = DEFAULT
    steps: int = 150
    batch: int = 8
    rate: float = 1e-3
    pages: int = 256


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to run the model.

    Attributes:
        name: In the table.
        what: In words.
        session: (model, training step) -> the context to run in; None is the step of use.
    """

    name: str
    what: str
    session: Callable[[Any, int | None], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Run:
    """One arm in one state, as it is stored.

    Attributes:
        arm: Its name.
        what: The arm in words.
        state: Of `STATES`.
        hits: Task and arrangement -> for each page "1" where the whole answer is right.
        tokens: Task and arrangement -> share of the answers' words that are right at their place.
        losses: Of the training steps.
        cpu_seconds: Used.
    """

    arm: str
    what: str
    state: str
    hits: dict[str, str]
    tokens: dict[str, float]
    losses: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0


def arms_of(layers: int, plan: LazyPlan, steps: int) -> tuple[Arm, ...]:
    """The plain model first, then each method on a model with so many layers."""
    target = ADSC(layers=scaled_layers(ADSC_LAYERS, layers))
    curriculum = Curriculum(target, steps)
    strides = [curriculum(step).stride[0] for step in range(steps)]
    visual, whole = replace(plan, mode="visual"), replace(plan, mode="global")
    lazy = f"{len(plan.lazy)} of {layers} layers lazy, blocks {', '.join(f'{a} to {b}' for a, b in plan.blocks)}"
    return (
        Arm("full", "nothing dropped, nothing shared", lambda model, step: nullcontext()),
        Arm(
            "ADSC",
            f"stride {target.stride} at the inputs of layers {' and '.join(map(str, target.layers))} of {layers}; "
            f"strides {', '.join(map(str, dict.fromkeys(strides)))} while training",
            lambda model, step: prune(model, target if step is None else curriculum(step)),
        ),
        Arm("VLA", f"{lazy}, at vision tokens", lambda model, step: share(model, visual)),
        Arm("GLA", f"{lazy}, at all tokens", lambda model, step: share(model, whole)),
    )


def stock_inputs(batch: Batch) -> dict[str, Tensor]:
    """A batch of full pages with one question each as the stock model takes it: what its processor would have made."""
    rows = len(batch.patches)
    cells = batch.patches.view(rows, GRID, GRID, 3, CELL, CELL)
    before = torch.tensor([TOKEN_ID[BOS], *[TOKEN_ID[IMAGE]] * GRID**2]).expand(rows, -1)
    ids = torch.cat([before, batch.tokens], 1)
    return {
        "pixel_values": cells.permute(0, 3, 1, 4, 2, 5).reshape(rows, 3, GRID * CELL, GRID * CELL),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.cat([torch.full_like(before, IGNORED), batch.labels], 1),
    }


def training_batches(settings: Settings) -> Iterator[dict[str, Tensor]]:
    """The same batches for every arm."""
    rng = np.random.default_rng(TRAINING)
    view = View(GRID, GRID, Layout().records, 1, settings.batch, TASKS, ARRANGEMENTS)
    for _ in range(settings.steps):
        yield stock_inputs(make_batch(rng, view, MAX_SUFFIX))


def trainable(settings: Settings, model: Any) -> list[nn.Parameter]:
    """The whole language model; the vision tower and projector stay as they are, as in the testbed's own training."""
    architecture_of(settings.model.split("-")[0]).vision(model).requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def factor(step: int, steps: int) -> float:
    """Share of the full learning rate: a short warm-up, a linear end over the second half."""
    return min(1.0, (step + 1) / WARM_UP) * min(1.0, 2 * (1 - step / steps))


def finetune(settings: Settings, model: Any, arm: Arm) -> list[float]:
    """Trains the model inside the arm's sessions; the losses."""
    weights, losses = trainable(settings, model), []
    optimizer = torch.optim.AdamW(weights, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, settings.steps))
    bar = tqdm(training_batches(settings), f"{arm.name}: fine-tuning", settings.steps, mininterval=5, unit="step")
    model.train()
    for step, inputs in enumerate(bar):
        with arm.session(model, step):
            loss = model(**inputs, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
    return losses


CELLS = tuple((task, arrangement) for task in TASKS for arrangement in ARRANGEMENTS)


def held_out(settings: Settings, task: Task, arrangement: Arrangement) -> list[Sample]:
    """The questions of a cell."""
    return make_samples(settings.pages, EVALUATION, task, layout=Layout(arrangement=arrangement))


def untouched(settings: Settings, stride: int) -> dict[str, str]:
    """For each page "1" where all glyphs an answer needs are among every `stride`-th of the image's tokens."""
    found = {}
    for task, arrangement in CELLS:
        samples = held_out(settings, task, arrangement)
        stays = [all(cell % stride == 0 for cell in sample.evidence[0]) for sample in samples]
        found[f"{task} {arrangement}"] = "".join(str(int(stay)) for stay in stays)
    return found


def evaluate(settings: Settings, model: Any, processor: Any, arm: Arm, state: str) -> Run:
    """Reads the held-out pages."""
    run = Run(arm.name, arm.what, state, {}, {})
    for task, arrangement in tqdm(CELLS, f"{arm.name}, {state}: reading", unit="cell"):
        samples = held_out(settings, task, arrangement)
        with arm.session(model, None):
            result = exact_match(model, processor, samples)
        cell = f"{task} {arrangement}"
        run.hits[cell] = "".join(map(str, result.exact.astype(int)))
        run.tokens[cell] = result.token_accuracy.mean
    return run


def measure(settings: Settings, arm: Arm, state: str) -> Run:
    """One arm in one state, from the bundled weights."""
    start = time.thread_time()
    torch.manual_seed(0)
    model, processor = load(settings.model)
    losses = [] if state == STATES[0] else finetune(settings, model, arm)
    run = evaluate(settings, model, processor, arm, state)
    return replace(run, losses=losses, cpu_seconds=time.thread_time() - start)


def stored(path: Path, settings: Settings, make: Callable[[], Run]) -> Run:
    """What is in the file, made now where there is none."""
    if path.exists():
        content = json.loads(path.read_text())
        if content["settings"] != asdict(settings):
            raise SystemExit(f"{path} is from other settings; remove it, or name another --work")
        return Run(**content["run"])
    run = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"settings": asdict(settings), "run": asdict(run)}))
    partial.replace(path)  # a kill while writing leaves no half file to go on from
    return run


def page_scores(run: Run) -> np.ndarray:
    """For each page the share of its questions that are answered: tasks share pages, which are what is drawn."""
    rows = [[[int(hit) for hit in run.hits[f"{task} {arrangement}"]] for task in TASKS] for arrangement in ARRANGEMENTS]
    return np.concatenate([np.mean(tasks, axis=0) for tasks in rows])


def percent(values: np.ndarray, sign: str = "") -> str:
    """Mean and standard error."""
    return f"{100 * values.mean():{sign}.1f} ± {100 * values.std(ddof=1) / len(values) ** 0.5:.1f}"


def retained(mine: np.ndarray, other: np.ndarray) -> str:
    """The ratio of two means over the same pages, in percent, and its standard error, linearised."""
    ratio = mine.mean() / other.mean()
    apart = mine - ratio * other
    return f"{100 * ratio:.1f} ± {100 * apart.std(ddof=1) / len(mine) ** 0.5 / other.mean():.1f}"


def loss_text(losses: list[float]) -> str:
    """Means over the first and over the last tenth of the steps."""
    few = max(1, len(losses) // 10)
    return f"{np.mean(losses[:few]):.2f} → {np.mean(losses[-few:]):.2f}" if losses else "–"


def table_row(runs: dict[tuple[str, str], Run], run: Run) -> list[str]:
    """One line of the table."""
    scores, before = page_scores(run), page_scores(runs[run.arm, STATES[0]])
    cells = [percent(np.array([int(hit) for hit in hits])) for hits in run.hits.values()]
    return [
        run.arm, run.state, *cells, percent(scores), f"{100 * np.mean(list(run.tokens.values())):.1f}",
        percent(scores - before, "+") if run.losses else "–",
        retained(scores, page_scores(runs["full", STATES[0]])),
        "–" if run.arm == "full" else retained(scores, page_scores(runs["full", run.state])),
        f"{PUBLISHED[run.arm]:.1f}" if run.arm in PUBLISHED and run.losses else "–", loss_text(run.losses),
    ]  # fmt: skip


def table(runs: dict[tuple[str, str], Run]) -> list[str]:
    """The table as markdown."""
    cells = [f"{task}, {arrangement}" for task, arrangement in CELLS]
    head = [
        "model", "weights", *cells, "all", "words", "gained", "of full as it is", "of full, same weights", "published",
        "loss",
    ]  # fmt: skip
    rows = [head, ["---"] * len(head), *(table_row(runs, run) for run in runs.values())]
    return [f"| {' | '.join(row)} |" for row in rows]


def surviving(runs: dict[tuple[str, str], Run], whole: dict[str, str]) -> str:
    """How ADSC's answers go together with what its first drop leaves alone."""
    stay = ", ".join(f"{cell} {bits.count('1')} of {len(bits)}" for cell, bits in whole.items())
    agree = [
        sum(a == b for cell in whole for a, b in zip(runs["ADSC", state].hits[cell], whole[cell], strict=True))
        for state in STATES
    ]
    count = sum(map(len, whole.values()))
    return (
        f"Questions all of whose glyphs are among the tokens that ADSC's first drop keeps: {stay}. That these are "
        f"answered and no others holds for {agree[0]} of {count} with ADSC as it is, for {agree[1]} fine-tuned. On "
        f"these pages, {GRID} cells wide, a raster stride that divides the width keeps whole columns."
    )


def render(content: dict[str, Any]) -> str:
    """The page of a result, which holds no number but the result's and the published ones."""
    settings, facts = Settings(**content["settings"]), content["facts"]
    runs = {(run["arm"], run["state"]): Run(**run) for run in content["runs"]}
    minutes = sum(run.cpu_seconds for run in runs.values()) / 60
    return "\n".join([
        "# Fine-tuning with ADSC and with lazy layers",
        "",
        f"`{settings.model}`, float32; {facts['machine']}{facts['note']}; torch {facts['torch']}, transformers "
        f"{facts['transformers']}; {minutes:.0f} minutes of CPU time, every arm on one thread. `nox -s finetune`.",
        "",
        *(f"* {run.arm}: {run.what}." for run in runs.values() if run.state == STATES[0]),
        "",
        f"Fine-tuning: {settings.steps} steps of {settings.batch} fresh pages with one question each, `value` or "
        "`describe`, horizontal or vertical, through the stock model's own loss; AdamW at a peak rate of "
        f"{settings.rate:g}, no decay, {WARM_UP} steps of warm-up, a linear end over the second half, gradients "
        "clipped at 1; all weights of the language model, not the vision tower and the projector. One choice for all "
        "arms, the same pages in the same order, one run each. The optimizer was chosen by ADSC's training loss over "
        "90 steps, beside Muon at the rates of the testbed's training; nothing else was tried.",
        "",
        f"ADSC's layers are the reconstructed default's, {' and '.join(map(str, ADSC_LAYERS))} of 32, scaled by the "
        "number of layers, rounded to the nearest, each at least one later than the one before, never the first: the "
        "quality grid's rule. Lazy layers are those of the plan that ships with the model.",
        "",
        f"Exact match in %, n = {settings.pages} held-out pages in each cell, {MAX_SUFFIX} filler words, with standard "
        f"errors (of none or all right: within {300 / settings.pages:.1f} points with 95 % confidence); 'all', and "
        "what is derived from it, over pages, of which each is asked both questions. 'words': share of the answers' "
        "words that are right. 'gained': points by fine-tuning, pages compared one by one. 'of full': the share of "
        "the plain model's exact match that is retained, beside the plain model as it is, and beside the plain model "
        "with the same training. 'loss': of the answers, means over the first and last tenth of the steps; ADSC's "
        "first ones are of stronger compression.",
        "",
        *table(runs),
        "",
        surviving(runs, content["untouched"]),
        "",
        DIFFERS,
        "",
    ])  # fmt: skip


def gather_facts(note: str) -> dict[str, str]:
    """What has to be said about the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    load_ = "/".join(f"{x:.1f}" for x in os.getloadavg())
    return {
        "machine": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, load {load_}",
        "note": f", {note}" if note else "",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT, help="a bundled LLaVA model")
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning")
    parser.add_argument("--arms", nargs="+", default=["full", "ADSC", "VLA", "GLA"], help="to run now")
    parser.add_argument("--work", type=Path, default=Path("finetune-output"), help="folder to go on from")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the page")
    parser.add_argument("--quick", action="store_true", help="two steps, four pages; prints only")
    return parser.parse_args()


def main() -> None:
    """Measures, prints, writes."""
    arguments = parse()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = Settings(arguments.model, arguments.steps)
    if arguments.quick:
        settings, arguments.work = replace(settings, steps=2, pages=4), arguments.work / "quick"
    plan = LazyPlan.load(model_path(settings.model) / "lazy_plan.json")
    arms = arms_of(plan.num_layers, plan, settings.steps)
    jobs = [(arm, state) for arm in arms for state in STATES]
    paths = {(arm.name, state): arguments.work / f"{arm.name}-{state.replace(' ', '-')}.json" for arm, state in jobs}
    for arm, state in jobs:
        if arm.name in arguments.arms:
            stored(paths[arm.name, state], settings, lambda arm=arm, state=state: measure(settings, arm, state))
    missing = [" ".join(job) for job, path in paths.items() if not path.exists()]
    if missing:
        print("still to run:", ", ".join(missing))
        return
    runs = [json.loads(path.read_text())["run"] for path in paths.values()]
    content = {
        "settings": asdict(settings), "facts": gather_facts(arguments.note),
        "untouched": untouched(settings, ADSC().stride), "runs": runs,
    }  # fmt: skip
    print(render(content))
    if not arguments.quick:
        RESULTS.with_suffix(".json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        RESULTS.with_suffix(".md").write_text(render(content))


if __name__ == "__main__":
    main()

"""Trains a model from scratch on one CPU thread: `python -m mmkv_testbed.train --size base --seed 0 --out DIR`.

1. Alignment: the vision tower and projector learn to emit, for each cell, the sum of the token embeddings of its glyph,
   ink, row, column and ruling.
2. Curriculum: crops of a few dozen cells up to the full page, several questions per prompt, with auxiliary losses that
   exist in training only (`helpers.py`). Without them the model needs several times as long to find the evidence.

A run that was killed continues from its last checkpoint and ends at the same weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .architecture import Architecture
from .batches import Batch, crop_cells, make_batch, normalised, random_corner
from .glyphs import GLYPH_ID, GLYPHS
from .helpers import Helpers
from .model import Size, architecture_of, build_model
from .pages import SHADES, Arrangement, draw_cells
from .prompts import Prompts, build_prompts
from .recipes import Recipe, Stage, recipe_for
from .vocabulary import BLANK, COLOURS, COLUMNS, GRID, ROWS, RULINGS, encode

_TRAINING: Final = 0
"""First word of the training stream's seed; samples use another one (`samples.py`)."""

_DECAY: Final = 0.4
"""Weight decay of the language model's matrices."""
_LOG_EVERY: Final = 25
_CHECKPOINT_SECONDS: Final = 120.0


def _alignment_loss(architecture: Architecture, model: Any, rng: np.random.Generator) -> Tensor:
    """Mean squared distance of random cells' features from the sum of the embeddings of what they show."""
    batch, size = 8, 12
    shape = (batch * size, size)
    rulings = SHADES * len(Arrangement)
    glyphs, inks, papers = (rng.integers(0, n, shape) for n in (len(GLYPHS), len(COLOURS), rulings))
    patches = torch.from_numpy(normalised(draw_cells(rng, glyphs, inks, papers))).view(batch, size * size, -1)
    cells = torch.from_numpy(np.stack([crop_cells(random_corner(rng, size, size), size, size) for _ in range(batch)]))
    features = architecture.features(model, patches, cells, size)
    table = model.get_input_embeddings().weight.detach()

    def embed(words: tuple[str, ...], index: Tensor) -> Tensor:
        rows: Tensor = table[torch.tensor(encode(words))[index]]
        return rows

    glyph, ink, paper = (torch.from_numpy(a).view(batch, -1) for a in (glyphs, inks, papers // SHADES))
    inked = (glyph != GLYPH_ID[BLANK])[..., None]
    extra = inked * embed(COLOURS, ink) + embed(RULINGS, paper)
    if architecture.places:
        extra = extra + embed(ROWS, cells // GRID) + embed(COLUMNS, cells % GRID)
    target = embed(GLYPHS, glyph) + 0.8 * extra
    return F.mse_loss(features, target)


@dataclass(frozen=True, slots=True)
class Optimizers:
    """Muon for the matrices of linear layers, AdamW for everything else."""

    muon: torch.optim.Muon
    adamw: torch.optim.AdamW

    @classmethod
    def aligning(cls, vision: nn.Module) -> Optimizers:
        """For the alignment: with AdamW alone the tower learns several times more slowly."""
        matrices = [module.weight for module in vision.modules() if isinstance(module, nn.Linear)]
        others = _without(vision.parameters(), matrices)
        return cls(torch.optim.Muon(matrices, weight_decay=0.0), torch.optim.AdamW(others, weight_decay=0.0))

    @classmethod
    def learning(cls, model: nn.Module, vision: nn.Module, helpers: Helpers) -> Optimizers:
        """For the curriculum: the vision tower stays as it is, so that image features stay sums of embeddings.

        The decay keeps the layers' outputs from growing until they drown what the features say of a cell's place.
        """
        named = model.named_parameters()
        matrices = [p for name, p in named if p.ndim == 2 and "language_model.layers" in name]
        others = _without(model.parameters(), [*matrices, *vision.parameters()])
        return cls(
            torch.optim.Muon(matrices, weight_decay=_DECAY),
            torch.optim.AdamW([*others, *helpers.parameters()], betas=(0.9, 0.98), weight_decay=0.0),
        )

    def step(self, loss: Tensor, module: nn.Module, rates: tuple[float, float]) -> None:
        """One update of all parameters of `module`."""
        for optimizer, rate in zip((self.muon, self.adamw), rates, strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        self.muon.step()  # type: ignore[no-untyped-call]
        self.adamw.step()


def _without(parameters: Iterable[nn.Parameter], taken: Iterable[Tensor]) -> list[nn.Parameter]:
    ids = {id(parameter) for parameter in taken}
    return [parameter for parameter in parameters if id(parameter) not in ids]


def _answer_loss(model: Any, prompts: Prompts, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers, and for each task the share of answers of which every token is right."""
    hidden = model.model.language_model(
        inputs_embeds=prompts.embeddings,
        position_ids=prompts.positions,
        attention_mask=prompts.mask,
        before_questions=prompts.start,
        use_cache=False,
    ).last_hidden_state
    chosen = batch.labels[0, 1:] >= 0
    target = batch.labels[:, 1:][:, chosen]
    logits = model.lm_head(hidden[:, prompts.start : -1][:, chosen])
    hit = logits.argmax(-1) == target
    numbers = {"tokens": hit.float().mean().item()}
    block = batch.block[1:][chosen]
    for task in dict.fromkeys(batch.tasks):
        answers = [hit[:, block == i].all(1).float().mean() for i, other in enumerate(batch.tasks) if other is task]
        numbers[task.value] = torch.stack(answers).mean().item()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten()), numbers


def _factor(stage: Stage, step: int) -> float:
    """Share of the full learning rate: a short warm-up in every stage, a linear end in the last."""
    warm = stage.rate * min(1.0, (step + 1) / 20)
    return warm * (min(1.0, max(0.02, 2 * (1 - step / stage.steps))) if stage.decay else 1.0)


@dataclass
class Progress:
    """Where a run is; with the weights, all that a resumed run needs to know.

    Attributes:
        stage: Index of the stage that comes next or is under way.
        step: Steps done in it.
        recent: Numbers of the steps since the last line of the curve.
        curve: The log; numbers are means since the line before.
        cpu_seconds: Used so far.
    """

    stage: int = 0
    step: int = 0
    recent: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    cpu_seconds: float = 0.0


def _means(recent: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for numbers in recent for name in numbers})
    columns = {name: [numbers[name] for numbers in recent if name in numbers] for name in names}
    return {name: round(sum(column) / len(column), 4) for name, column in columns.items()}


class Trainer:
    """A training run that can be stepped; `run()` does all of it."""

    def __init__(self, recipe: Recipe) -> None:
        """Fixes the seed and the thread count and builds the untrained model."""
        torch.set_num_threads(1)  # on a shared machine more threads spin instead of working, and the result would vary
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.rng = np.random.default_rng([_TRAINING, recipe.seed])
        self.architecture = architecture_of(recipe.size)
        self.model = build_model(recipe.size).train()
        self.helpers = Helpers(self.model, recipe.head_dropout)
        self.optimizers = Optimizers.learning(self.model, self.architecture.vision(self.model), self.helpers)
        self.progress = Progress()
        self._started, self._stored = time.process_time(), time.monotonic()

    def align(self, steps: int) -> list[float]:
        """The alignment warm-up; returns its losses."""
        vision, losses = self.architecture.vision(self.model), []
        optimizers = Optimizers.aligning(vision)
        for step in tqdm(range(steps), desc="align", mininterval=5, unit="step", disable=None):
            loss = _alignment_loss(self.architecture, self.model, self.rng)
            factor = min(1.0, (step + 1) / 50) * (1 - step / steps)
            optimizers.step(loss, vision, (factor * self.recipe.muon, factor * self.recipe.adamw))
            losses.append(loss.item())
        return losses

    def learn(self, stage: Stage, step: int) -> dict[str, float]:
        """Step number `step` of a stage of the curriculum."""
        view = stage.views[self.rng.choice(len(stage.views), p=stage.shares)]
        batch = make_batch(self.rng, view, stage.suffix)
        prompts = build_prompts(self.architecture, self.model, batch)
        loss, numbers = _answer_loss(self.model, prompts, batch)
        helped, more = self.helpers(prompts, batch, int(self.rng.integers(self.helpers.pointing_layers)))
        factor = _factor(stage, step)
        rates = (factor * self.recipe.muon, factor * self.recipe.adamw)
        self.optimizers.step(loss + stage.auxiliary * helped, self.model, rates)
        return {"loss": loss.item(), **numbers, **more}

    def run(self, checkpoint: Path | None = None, every: float = _CHECKPOINT_SECONDS) -> None:
        """Trains to the end, from the checkpoint if there is one; writes it `every` so many seconds."""
        if checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint)
        else:
            losses = self.align(self.recipe.alignment_steps)
            print(self._log("align", len(losses), {"loss": losses[-1]}))
        self.architecture.vision(self.model).requires_grad_(False)
        while self.progress.stage < len(self.recipe.stages):
            self._run_stage(self.recipe.stages[self.progress.stage], checkpoint, every)
            self.progress.stage, self.progress.step, self.progress.recent = self.progress.stage + 1, 0, []
        self.model.eval()

    def _run_stage(self, stage: Stage, checkpoint: Path | None, every: float) -> None:
        progress = self.progress
        with tqdm(total=stage.steps, initial=progress.step, desc=stage.name, mininterval=5, disable=None) as bar:
            while progress.step < stage.steps:
                progress.recent.append(self.learn(stage, progress.step))
                progress.step += 1
                bar.update()
                if progress.step % _LOG_EVERY == 0 or progress.step == stage.steps:
                    means = _means(progress.recent)
                    progress.recent = []
                    bar.write(self._log(stage.name, progress.step, means))
                    if means["tokens"] > stage.goal:
                        return
                if checkpoint is not None and time.monotonic() - self._stored > every:
                    self._store(checkpoint)

    def _log(self, stage: str, step: int, means: dict[str, float]) -> str:
        now = time.process_time()
        self.progress.cpu_seconds += now - self._started
        self._started = now
        row = {"stage": stage, "step": step, **means, "cpu_seconds": round(self.progress.cpu_seconds, 1)}
        self.progress.curve.append(row)
        return " ".join(f"{k} {v:.3f}" if isinstance(v, float) else str(v) for k, v in row.items())

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "helpers": self.helpers,
            "muon": self.optimizers.muon,
            "adamw": self.optimizers.adamw,
        }

    def _store(self, path: Path) -> None:
        """Writes everything the rest of the run depends on."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"torch": torch.get_rng_state(), "numpy": self.rng.bit_generator.state}
        state |= {"progress": asdict(self.progress), "recipe": asdict(self.recipe)}
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)  # a kill while writing leaves the old checkpoint
        self._stored = time.monotonic()

    def _restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=False)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{path} is a checkpoint of another recipe; remove it to start again")
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["torch"])
        self.rng.bit_generator.state = state["numpy"]
        self.progress = Progress(**state["progress"])


def opening(recipe: Recipe, steps: int = 25) -> list[float]:
    """Losses of `steps` steps of alignment and as many of the first stage: a fingerprint of code and recipe."""
    trainer = Trainer(recipe)
    return trainer.align(steps) + [trainer.learn(recipe.stages[0], step)["loss"] for step in range(steps)]


def _report(trainer: Trainer) -> dict[str, Any]:
    """What was run, on what, and the curve."""
    modules = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "recipe": asdict(trainer.recipe),
        "versions": {"python": platform.python_version(), **modules},
        "cpu_minutes": round(trainer.progress.cpu_seconds / 60, 2),
        "opening": opening(trainer.recipe),
        "curve": trainer.progress.curve,
    }


def save(trainer: Trainer, out: Path) -> None:
    """Writes weights (bfloat16), processor and `training.json`; loading `out` needs nothing but transformers."""
    trainer.model.to(torch.bfloat16).save_pretrained(out)
    trainer.architecture.processor().save_pretrained(out)
    (out / "training.json").write_text(json.dumps(_report(trainer), indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m mmkv_testbed.train", description=__doc__)
    parser.add_argument("--size", type=Size, choices=list(Size), default=Size.BASE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, processor and training.json")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "checkpoint.pt"
    trainer = Trainer(recipe_for(arguments.size, arguments.seed))
    trainer.run(checkpoint)
    save(trainer, arguments.out)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()

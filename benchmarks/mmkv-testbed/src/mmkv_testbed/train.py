"""Trains the shipped model from scratch on one CPU thread: `python -m mmkv_testbed.train --out DIR`.

1. Alignment: the vision tower and projector learn to emit, for each cell, the sum of the token embeddings of its glyph,
   ink, row and column.
2. Curriculum: crops of 6 x 6 up to the full 24 x 24 cells, several questions per page, with two auxiliary losses that
   exist in training only (`Helpers`). Without them the model needs several times as long to find the evidence.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from .batches import Batch, Stage, crop_cells, make_batch, normalised, random_corners
from .glyphs import GLYPH_ID, GLYPHS
from .model import build_model, cell_features
from .pages import VALUE_LENGTH, draw_cells
from .processor import build_processor
from .samples import MAX_SUFFIX
from .vocabulary import (
    BLANK,
    BOS,
    COLOURS,
    COLUMNS,
    DIGITS,
    GRID,
    LETTERS,
    ROWS,
    TOKEN_ID,
    encode,
)

_TRAINING: Final = 0
"""First word of the training stream's seed; samples use another one (`samples.py`)."""

_LOG_EVERY: Final = 25


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the outcome."""

    seed: int = 0
    alignment_steps: int = 1500
    muon: float = 0.02
    adamw: float = 1.5e-3
    stages: tuple[Stage, ...] = (
        Stage(6, 5, 5, 20, 600, suffix=0, auxiliary=1.0, goal=0.90),
        Stage(8, 7, 7, 16, 150, suffix=6, auxiliary=1.0, goal=0.94),
        Stage(12, 14, 12, 10, 200, suffix=16, auxiliary=0.5, goal=0.94),
        Stage(16, 18, 14, 8, 100, suffix=MAX_SUFFIX, auxiliary=0.3, goal=0.95),
        Stage(24, 20, 16, 6, 250, suffix=MAX_SUFFIX, auxiliary=0.05, decay=True),
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the training curve; losses and accuracies are means since the line before."""

    stage: str
    step: int
    loss: float
    digits: float
    place: float
    colour: float
    owner: float
    pointer: float
    cpu_seconds: float


def _alignment_loss(model: LlavaForConditionalGeneration, rng: np.random.Generator) -> Tensor:
    """Mean squared distance of random cells' features from the sum of the embeddings of what they show."""
    batch, size = 8, 12
    shape = (batch * size, size)
    glyphs, inks, textures = (rng.integers(0, n, shape) for n in (len(GLYPHS), len(COLOURS), 4))
    pixels = draw_cells(rng, glyphs, inks, textures)
    patches = torch.from_numpy(normalised(pixels)).view(batch, size * size, -1)
    cells = crop_cells(random_corners(rng, batch, size), size)
    features = cell_features(model, patches, cells)
    table = model.get_input_embeddings().weight.detach()

    def embed(words: tuple[str, ...], index: Tensor) -> Tensor:
        rows: Tensor = table[torch.tensor(encode(words))[index]]
        return rows

    glyph, ink = (torch.from_numpy(a).view(batch, -1) for a in (glyphs, inks))
    place = embed(ROWS, cells // GRID) + embed(COLUMNS, cells % GRID)
    inked = (glyph != GLYPH_ID[BLANK])[..., None]
    target = embed(GLYPHS, glyph) + 0.6 * (inked * embed(COLOURS, ink) + place)
    return F.mse_loss(features, target)


class Helpers(nn.Module):
    """Two training-only losses that tell the model what each layer is for; thrown away afterwards.

    * Owner: a linear probe on the input of layer 1 names, for each digit of a record, the key it belongs to.
    * Pointer: in layer 2 the query heads of KV head 0 attend to the cell that shows the next answer token.
    """

    OWNER_LAYER: Final = 1
    POINTER_LAYER: Final = 2

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        """Hooks the two layers' inputs of `model`."""
        super().__init__()
        self._language_model = [model.model.language_model]  # in a list: its parameters are not this module's
        self.owner = nn.Linear(model.config.text_config.hidden_size, len(LETTERS))
        self._inputs: dict[int, Tensor] = {}
        for index in (self.OWNER_LAYER, self.POINTER_LAYER):
            model.model.language_model.layers[index].register_forward_pre_hook(self._recorder(index))

    def _recorder(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._inputs[index] = args[0]

        return record

    def _normed(self, index: int) -> tuple[Any, Tensor]:
        layer = self._language_model[0].layers[index]
        return layer.self_attn, layer.input_layernorm(self._inputs[index])

    def owners(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of the owner probe; call after the language model ran on `batch`."""
        _, hidden = self._normed(self.OWNER_LAYER)
        first = 1 + batch.homes[:, :, None]  # the image follows <bos>
        digits = (first + 1 + torch.arange(VALUE_LENGTH)).flatten(1)
        logits = self.owner(hidden.gather(1, digits[..., None].expand(-1, -1, hidden.shape[-1]))).flatten(0, 1)
        keys = batch.keys.repeat_interleave(VALUE_LENGTH, 1).flatten()
        return F.cross_entropy(logits, keys), (logits.argmax(-1) == keys).float().mean()

    def pointers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of the pointing heads."""
        attention, hidden = self._normed(self.POINTER_LAYER)
        width, group = attention.head_dim, attention.num_key_value_groups
        first = 1 + batch.cells.shape[1]
        steps = (batch.pointers[0, 1:] >= 0).nonzero()[:, 0]  # step t predicts token t + 1
        target = (1 + batch.pointers[:, 1 + steps])[:, None].expand(-1, group, -1)
        rows, columns = first + steps, torch.arange(hidden.shape[1])
        query, key, wide = attention.q_proj, attention.k_proj, group * width
        queries = F.linear(hidden[:, rows], query.weight[:wide], query.bias[:wide])
        keys = F.linear(hidden, key.weight[:width], key.bias[:width])
        queries = self._rotated(queries.view(*queries.shape[:2], group, width).transpose(1, 2), rows)
        scores = queries @ self._rotated(keys[:, None], columns).transpose(-1, -2) * attention.scaling
        scores = scores.masked_fill(columns > rows[:, None], float("-inf"))
        return F.cross_entropy(scores.flatten(0, 2), target.flatten()), (scores.argmax(-1) == target).float().mean()

    def _rotated(self, states: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self._language_model[0].rotary_emb(states, positions[None])
        rotated: Tensor = apply_rotary_pos_emb(states, states, cos, sin)[0]
        return rotated


@dataclass(frozen=True, slots=True)
class Optimizers:
    """Muon for the language model's matrices, AdamW for everything else."""

    muon: torch.optim.Muon
    adamw: torch.optim.AdamW

    @classmethod
    def of(cls, model: LlavaForConditionalGeneration, helpers: Helpers) -> Optimizers:
        """Optimizers whose learning rates are set at each step."""
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "language_model.layers" in name]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in chosen]
        return cls(
            torch.optim.Muon(matrices, weight_decay=0.1),
            torch.optim.AdamW([*others, *helpers.parameters()], betas=(0.9, 0.98), weight_decay=0.0),
        )

    def step(self, loss: Tensor, model: nn.Module, rates: tuple[float, float]) -> None:
        """One update of all parameters."""
        for optimizer, rate in zip((self.muon, self.adamw), rates, strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.muon.step()  # type: ignore[no-untyped-call]
        self.adamw.step()


def _share(hit: Tensor, chosen: Tensor) -> float:
    return hit[chosen].float().mean().item() if chosen.any() else float("nan")


def _answer_loss(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers and the accuracies of their kinds of token."""
    embed = model.get_input_embeddings()
    start = embed(torch.full((batch.tokens.shape[0], 1), TOKEN_ID[BOS]))
    features = cell_features(model, batch.patches, batch.cells)
    inputs = torch.cat([start, features, embed(batch.tokens)], dim=1)
    hidden = model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    target = batch.labels[:, 1:]
    chosen = target >= 0
    logits, target = model.lm_head(hidden[:, 1 + features.shape[1] : -1][chosen]), target[chosen]
    hit = logits.argmax(-1) == target
    kinds = {"digits": DIGITS, "place": (*ROWS, *COLUMNS), "colour": COLOURS}
    accuracy = {name: _share(hit, torch.isin(target, torch.tensor(encode(words)))) for name, words in kinds.items()}
    return F.cross_entropy(logits, target), accuracy


def _factor(stage: Stage, step: int) -> float:
    """Share of the full learning rate: a short warm-up in every stage, a linear end in the last."""
    warm = min(1.0, (step + 1) / 20)
    return warm * (min(1.0, max(0.02, 2 * (1 - step / stage.steps))) if stage.decay else 1.0)


def _line(row: Row) -> str:
    values = asdict(row)
    head, seconds = f"{values.pop('stage'):>5} {values.pop('step'):4d}", values.pop("cpu_seconds")
    numbers = [f"{key} {value:.3f}" for key, value in values.items() if value == value]
    return " ".join([head, *numbers, f"cpu {seconds:.0f} s"])


class Trainer:
    """A training run that can be stepped; `run()` does all of it."""

    def __init__(self, recipe: Recipe | None = None) -> None:
        """Fixes the seed and the thread count and builds the untrained model."""
        recipe = recipe or Recipe()
        torch.set_num_threads(1)  # on a shared machine more threads spin instead of working, and the result would vary
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.rng = np.random.default_rng([_TRAINING, recipe.seed])
        self.model = build_model().train()
        self.helpers = Helpers(self.model)
        self.optimizers = Optimizers.of(self.model, self.helpers)
        self.curve: list[Row] = []
        self._start = time.process_time()

    def align(self) -> Iterator[dict[str, float]]:
        """Steps of the alignment warm-up."""
        model, steps = self.model, self.recipe.alignment_steps
        vision = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
        optimizer = torch.optim.AdamW(vision)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps) + 1e-5
            loss = _alignment_loss(model, self.rng)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(vision, 1.0)
            optimizer.step()
            yield {"loss": loss.item()}

    def learn(self, stage: Stage) -> Iterator[dict[str, float]]:
        """Steps of one stage of the curriculum."""
        for step in range(stage.steps):
            factor = _factor(stage, step)
            batch = make_batch(self.rng, stage)
            loss, numbers = _answer_loss(self.model, batch)
            owner, owner_hit = self.helpers.owners(batch)
            pointer, pointer_hit = self.helpers.pointers(batch)
            total = loss + stage.auxiliary * (owner + pointer)
            self.optimizers.step(total, self.model, (factor * self.recipe.muon, factor * self.recipe.adamw))
            yield {"loss": loss.item(), **numbers, "owner": owner_hit.item(), "pointer": pointer_hit.item()}

    def run(self) -> LlavaForConditionalGeneration:
        """The trained model in evaluation mode; `curve` then holds the log."""
        self._follow("align", self.align(), self.recipe.alignment_steps, goal=None, every=200)
        for stage in self.recipe.stages:
            self._follow(f"{stage.size}x{stage.size}", self.learn(stage), stage.steps, stage.goal, _LOG_EVERY)
        return self.model.eval()

    def _follow(self, name: str, steps: Iterator[dict[str, float]], total: int, goal: float | None, every: int) -> None:
        """Runs `steps`, logs their means and stops early at the goal."""
        recent: list[dict[str, float]] = []
        with tqdm(total=total, desc=name, mininterval=5, unit="step", disable=None) as bar:
            for index, numbers in enumerate(steps, start=1):
                recent.append(numbers)
                bar.update()
                if index % every and index != total:
                    continue
                row = self._log(name, index, recent)
                bar.write(_line(row))
                recent = []
                if goal is not None and row.digits > goal:
                    break

    def _log(self, name: str, step: int, recent: list[dict[str, float]]) -> Row:
        def mean(key: str) -> float:
            values = [numbers[key] for numbers in recent if key in numbers and numbers[key] == numbers[key]]
            return round(sum(values) / len(values), 4) if values else float("nan")

        fields = ("loss", "digits", "place", "colour", "owner", "pointer")
        seconds = round(time.process_time() - self._start, 1)
        row = Row(stage=name, step=step, cpu_seconds=seconds, **{field: mean(field) for field in fields})
        self.curve.append(row)
        return row


def _report(trainer: Trainer) -> dict[str, Any]:
    """What was run, on what, and the curve; NaN (nothing of this kind in a stage) becomes null."""
    rows = [{k: None if v != v else v for k, v in asdict(row).items()} for row in trainer.curve]
    modules = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions = {"python": platform.python_version(), **modules}
    cpu_minutes = round(trainer.curve[-1].cpu_seconds / 60, 2)
    return {"recipe": asdict(trainer.recipe), "versions": versions, "cpu_minutes": cpu_minutes, "curve": rows}


def save(trainer: Trainer, out: Path) -> None:
    """Writes weights (bfloat16), processor and `training.json`; loading `out` needs nothing but transformers."""
    out.mkdir(parents=True, exist_ok=True)
    trainer.model.to(torch.bfloat16).save_pretrained(out)
    build_processor().save_pretrained(out)
    (out / "training.json").write_text(json.dumps(_report(trainer), indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m mmkv_testbed.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, processor and training.json")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    trainer = Trainer(Recipe(seed=arguments.seed))
    trainer.run()
    save(trainer, arguments.out)


if __name__ == "__main__":
    main()

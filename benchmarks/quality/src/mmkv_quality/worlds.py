"""The models and the questions of the testbed, with clear errors for what is missing."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from mmkv_testbed import Layout, Sample, batch_inputs, make_sample, model_path
from mmkv_testbed.load import model_names
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from .cells import Setting

TABLE: Final = "head_scores.json"
"""Visual-head scores beside the weights."""
PLAN: Final = "lazy_plan.json"
"""A plan of lazy layers beside the weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A model ready to answer.

    Attributes:
        model: float32, in evaluation mode.
        processor: Of the same folder.
        table: Visual-head scores, or None.
        plan: Of lazy layers, or None.
    """

    model: Any
    processor: Any
    table: Path | None
    plan: Path | None


def bundled() -> dict[str, Path]:
    """Name -> folder of every checkpoint that ships with mmkv-testbed."""
    return {name: model_path(name) for name in model_names()}


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def find(name: str) -> Path:
    """The folder of a bundled model, or of any other given by its path.

    Raises:
        FileNotFoundError: There is no such model, or it has no weights.
    """
    known = bundled()
    folder = known.get(name, Path(name))
    if not _is_checkpoint(folder):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise FileNotFoundError(f"no model {name!r}: {hint}known are {', '.join(known)}, or the path of a checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"the model {name!r} has no weights: there is no *.safetensors in {folder}")
    return folder


def plans(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Model -> plan of lazy layers, where there is one."""
    return {name: folder / PLAN for name, folder in folders.items() if (folder / PLAN).is_file()}


def weights_digest(folder: Path) -> str:
    """SHA-256 over the weights and the configuration."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        if path.name not in ("training.json", "accuracy.json", TABLE):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(folder: Path, table: Path | None = None) -> Checkpoint:
    """Model and processor of a folder.

    Args:
        folder: Of `from_pretrained`.
        table: Visual-head scores, or None.

    Raises:
        ValueError: It cannot be loaded, or the processor does not belong to the model.
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(folder)
    except Exception as error:  # whatever transformers and safetensors raise for files that are not what they should be
        raise ValueError(f"{folder} cannot be loaded: {error}") from error
    _check_processor(folder, model, processor)
    plan = folder / PLAN
    return Checkpoint(model, processor, table, plan if plan.is_file() else None)


def _check_processor(folder: Path, model: Any, processor: Any) -> None:
    tokenizer = getattr(processor, "tokenizer", None)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if tokenizer is None or not hasattr(processor, "image_processor"):
        raise ValueError(f"{folder}: {type(processor).__name__} has no tokenizer and image processor")
    placeholder = tokenizer.convert_tokens_to_ids(processor.image_token)
    if len(tokenizer) > vocabulary or placeholder != model.config.image_token_id:
        raise ValueError(
            f"{folder}: the processor does not belong to the model: {len(tokenizer)} words and image token "
            f"{placeholder} against {vocabulary} and {model.config.image_token_id}"
        )


def make_block(setting: Setting, seed: int, start: int, count: int) -> list[Sample]:
    """Samples `start` .. `start + count - 1` of a setting; those of two settings are paired wherever pages agree.

    Raises:
        ValueError: There is no such task, arrangement or ink.
    """
    layout = Layout(arrangement=setting.arrangement, ink=setting.ink)  # type: ignore[arg-type]
    return [make_sample(seed, index, setting.task, setting.suffix, layout) for index in range(start, start + count)]


def encode(checkpoint: Checkpoint, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs of a batch, and the wanted answers int64 `[B, words + 1]` with the end token.

    Raises:
        ValueError: The answers differ in length.
    """
    tokenizer = checkpoint.processor.tokenizer
    inputs = dict(batch_inputs(checkpoint.processor, samples))
    answers = [tokenizer(sample.answer, add_special_tokens=False)["input_ids"] for sample in samples]
    if len({len(answer) for answer in answers}) != 1:
        raise ValueError("the answers of one setting have to be of one length")
    wanted = torch.tensor([[*answer, tokenizer.eos_token_id] for answer in answers])
    return inputs, wanted


def image_part(checkpoint: Checkpoint, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompt up to its last image token, pixels included: all that is known before the question.

    Raises:
        ValueError: The rows' images end at different columns, so the question would not begin at the same place.
    """
    ids = inputs["input_ids"]
    columns = torch.arange(ids.shape[1]) * (ids == checkpoint.model.config.image_token_id)
    ends = columns.amax(1) + 1
    if bool((ends != ends[0]).any()):
        raise ValueError("questions of different lengths in one batch: their images end at different columns")
    end = int(ends[0])
    return {name: x[:, :end] if x.shape[:2] == ids.shape else x for name, x in inputs.items()}

"""The models that ship with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

DEFAULT: Final = "small-seed0"
"""The demo's model."""


def _models() -> Path:
    return Path(str(files(__package__) / "models"))


def model_names() -> tuple[str, ...]:
    """Names of the models that ship with the package, `<size>-seed<seed>`."""
    return tuple(sorted(path.parent.name for path in _models().glob("*/config.json")))


def model_path(name: str = DEFAULT) -> Path:
    """The folder with weights, configuration, tokenizer and processor, for any `from_pretrained`."""
    if name not in model_names():
        raise ValueError(f"no model {name!r}; there are {', '.join(model_names())}")
    return _models() / name


def load(name: str = DEFAULT, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A trained model, in evaluation mode on the CPU, and its processor; both of stock classes."""
    path = model_path(name)
    return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).eval(), AutoProcessor.from_pretrained(path)

"""The model that ships with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor


def model_path() -> Path:
    """The folder with weights, configuration, tokenizer and processor, for any `from_pretrained`."""
    return Path(str(files(__package__) / "model"))


def load(dtype: torch.dtype = torch.float32) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained model, in evaluation mode on the CPU, and its processor."""
    model = LlavaForConditionalGeneration.from_pretrained(model_path(), dtype=dtype).eval()
    return model, AutoProcessor.from_pretrained(model_path())

"""The vision-language models of the testbed: stock classes of transformers, small enough to train on a CPU."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from .architecture import Architecture, Dimensions
from .llava import LLAVA
from .qwen2vl import QWEN2VL


class Size(StrEnum):
    """Names of the models."""

    SMALL = "small"
    BASE = "base"
    QWEN2VL = "qwen2vl"
    LARGE = "large"


DIMENSIONS: Final = {
    Size.SMALL: Dimensions(layers=4),
    Size.BASE: Dimensions(layers=6),
    Size.QWEN2VL: Dimensions(layers=6, hidden=192, intermediate=384, query_heads=6, kv_heads=3, vision_hidden=64),
    Size.LARGE: Dimensions(layers=12, hidden=384, intermediate=1024, query_heads=12, vision_hidden=192),
}


def architecture_of(size: Size | str) -> Architecture:
    """The family a model belongs to."""
    return QWEN2VL if Size(size) is Size.QWEN2VL else LLAVA


def build_model(size: Size | str = Size.BASE) -> Any:
    """An untrained model, float32, initialised from torch's global generator."""
    return architecture_of(size).build(DIMENSIONS[Size(size)])

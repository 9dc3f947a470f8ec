"""Checks of shapes and dtypes shared by the rules; values on the device are not read here."""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def int_row(tensor: Tensor, name: str) -> Tensor:
    """`tensor` `[B]` as int64 without negative numbers (a negative count of tokens means none)."""
    if tensor.ndim != 1 or tensor.dtype not in _INTEGERS:
        raise ValueError(f"{name} must be a 1-D integer tensor [B], got {tensor.dtype} {list(tensor.shape)}")
    return tensor.long().clamp(min=0)


def row_pair(candidates: Tensor, mean_capacity: Tensor) -> tuple[Tensor, Tensor]:
    """Both `[B]` tensors as int64."""
    if candidates.shape != mean_capacity.shape:
        raise ValueError(
            "candidates and mean_capacity must both be [B], "
            f"got {list(candidates.shape)} and {list(mean_capacity.shape)}"
        )
    return int_row(candidates, "candidates"), int_row(mean_capacity, "mean_capacity")


def head_inputs(backbone: Tensor, is_candidate: Tensor, capacity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mask `[B, H, N]`, candidates per head `[B, H]` int64 and the capacity `[B]` int64."""
    if backbone.ndim != 3 or not backbone.is_floating_point():
        raise ValueError(f"backbone must be a floating tensor [B, H, N], got {backbone.dtype} {list(backbone.shape)}")
    batch, heads, length = backbone.shape
    if is_candidate.dtype != torch.bool or tuple(is_candidate.shape) not in {
        (batch, heads, length),
        (batch, 1, length),
    }:
        raise ValueError(
            f"is_candidate must be a bool tensor [{batch}, {heads} or 1, {length}] like backbone, "
            f"got {is_candidate.dtype} {list(is_candidate.shape)}"
        )
    if capacity.shape != (batch,):
        raise ValueError(f"capacity must be [{batch}], one number per row of backbone, got {list(capacity.shape)}")
    sizes = is_candidate.sum(-1).expand(batch, heads)
    return is_candidate.expand(batch, heads, length), sizes, int_row(capacity, "capacity")


def layer_index(layer: int, num_layers: int) -> None:
    """Refuses a layer that the model does not have."""
    if num_layers < 1 or not 0 <= layer < num_layers:
        raise ValueError(f"layer {layer} of {num_layers} layers: expected 0 <= layer < num_layers")


def number(value: float, name: str, low: float, high: float = math.inf) -> None:
    """Refuses anything but a finite number from low to high."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (low <= value <= high) or math.isinf(value):
        raise ValueError(
            f"{name} must be a finite number >= {low}"
            + ("" if math.isinf(high) else f" and <= {high}")
            + f", got {value}"
        )


def check_types(settings: Any) -> None:
    """Refuses a field of a dataclass annotated as int or bool that holds another type; a bool is no int."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.type in (int, bool) and type(value) is not field.type:
            name = f"{type(settings).__name__} {field.name}"
            raise TypeError(f"{name} must be {'bool' if field.type is bool else 'int'}, got {value!r}")

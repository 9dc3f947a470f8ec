"""The same capacity in every layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._checks import layer_index, row_pair
from .protocols import Capacities


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every layer keeps the mean capacity, or all candidates when there are fewer (SnapKV and most methods)."""

    capacities: ClassVar[Capacities] = "equal"

    def __call__(self, candidates: Tensor, mean_capacity: Tensor, layer: int, num_layers: int) -> Tensor:
        """Capacity `[B]` int64 of this layer; see `uniform_capacity`."""
        layer_index(layer, num_layers)
        return uniform_capacity(candidates, mean_capacity)


def uniform_capacity(candidates: Tensor, mean_capacity: Tensor) -> Tensor:
    """`min(mean_capacity, candidates)`, `[B]` int64."""
    candidates, mean_capacity = row_pair(candidates, mean_capacity)
    return torch.minimum(candidates, mean_capacity)

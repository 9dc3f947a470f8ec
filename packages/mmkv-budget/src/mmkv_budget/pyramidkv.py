"""PyramidKV: more in the early layers, less in the late ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._apportion import floor_divide, hand_out
from ._checks import check_types, layer_index, number, row_pair
from .protocols import Capacities


@dataclass(frozen=True, slots=True)
class PyramidKV:
    """Capacities that fall linearly with depth (PyramidKV, https://arxiv.org/abs/2406.02069).

    The arithmetic is that of the release, KVCache-Factory (`pyramidkv/pyramidkv_utils.py`, `PyramidKVCluster`). Every
    row gets its own schedule: nothing is remembered from an earlier prompt (the AdaKV, SparseMM and MixKV ports freeze
    the first one's).

    Attributes:
        beta: How steep: the last layer gets `C // beta`. The paper's 20; at least 1 (uniform), a float will do.
        exact: True: real-valued slope and whole tokens by largest remainder, so that the layers sum to `num_layers *
            min(C, candidates)`, exactly. False: the released rounding (floor of the slope: up to 11 % more than the
            budget) and its three regimes.
        window: Protected tokens, only read when `exact=False`: the release compares the whole prompt, window included,
            with 2 C. A layer rule is not told how many those are; mmkv-pipelines refuses another number than its own.
    """

    beta: float = 20
    exact: bool = True
    window: int = 32
    capacities: ClassVar[Capacities] = "static"

    def __post_init__(self) -> None:
        """Refuses a pyramid that stands on its head."""
        check_types(self)
        number(self.beta, "PyramidKV beta", 1)
        number(self.window, "PyramidKV window", 0)

    def __call__(self, candidates: Tensor, mean_capacity: Tensor, layer: int, num_layers: int) -> Tensor:
        """Capacity `[B]` int64 of this layer; see `pyramidkv_capacity`."""
        window = None if self.exact else self.window
        return pyramidkv_capacity(candidates, mean_capacity, layer, num_layers, beta=self.beta, released_window=window)


def pyramidkv_capacity(
    candidates: Tensor,
    mean_capacity: Tensor,
    layer: int,
    num_layers: int,
    *,
    beta: float = 20,
    released_window: int | None = None,
) -> Tensor:
    """Capacity of one layer, `[B]` int64.

    With C = `mean_capacity` and n = `candidates`: the last layer gets `lo = C // beta`, the first `hi = 2 C - lo`; if
    hi > n the pyramid is flattened to `hi = n`, `lo = 2 C - n`, which keeps the mean. Exact capacities never rise with
    depth and sum to `num_layers * min(C, n)`.

    Released (with N = n + window): n < C keeps everything; N < 2 C is uniform C; else `hi - layer * ((hi - lo) //
    (num_layers - 1))`. Deviation from the release: one layer works (it gets C).

    Args:
        candidates: `[B]` integer.
        mean_capacity: `[B]` integer.
        layer: This layer.
        num_layers: Layers that share the budget.
        beta: See `PyramidKV`.
        released_window: None: exact. Else the released formula with this window.
    """
    layer_index(layer, num_layers)
    candidates, mean_capacity = row_pair(candidates, mean_capacity)
    if num_layers == 1:
        return torch.minimum(candidates, mean_capacity)
    if released_window is not None:
        return _released(candidates, mean_capacity, layer, num_layers, beta, released_window)
    capacity = torch.minimum(candidates, mean_capacity)
    high, low = _ends(candidates, capacity, beta)
    # Integers throughout: layer l is due (high * (L - 1) - l * (high - low)) / (L - 1).
    depth = torch.arange(num_layers, device=candidates.device)
    due = (high * (num_layers - 1)).unsqueeze(-1) - depth * (high - low).unsqueeze(-1)
    whole, remainder = due // (num_layers - 1), due % (num_layers - 1)
    return hand_out(whole, remainder, capacity * num_layers)[:, layer]


def _ends(candidates: Tensor, capacity: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """First and last layer's capacity, `[B]` each, with mean `capacity`; the first at most `candidates`."""
    high = torch.minimum(2 * capacity - floor_divide(capacity, beta), candidates)
    return high, 2 * capacity - high


def _released(candidates: Tensor, capacity: Tensor, layer: int, num_layers: int, beta: float, window: int) -> Tensor:
    high, low = _ends(candidates, capacity, beta)
    pyramid = high - layer * ((high - low) // (num_layers - 1))
    flat = torch.where(candidates + window < 2 * capacity, capacity, pyramid)
    return torch.minimum(torch.where(candidates < capacity, candidates, flat), candidates)

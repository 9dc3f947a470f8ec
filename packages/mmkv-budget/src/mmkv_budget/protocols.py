"""What a pipeline expects of a layer, head or table rule. Rules need not inherit from these.

B batch, L layers, H KV heads, N cached length. *Candidates* are the entries that may be evicted: real ones that are not
protected. *Capacity* is how many of them a head of a layer keeps on average, *counts* how many one (row, head) keeps.
"""

from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

Counts = Literal["equal", "static", "dynamic"]
"""`equal`: every head of a layer keeps as many; `static`: known before the prompt is read; `dynamic`: depends on the
scores."""

Capacities = Literal["equal", "static"]
"""`equal`: every layer gets as much; `static`: layers differ."""


@runtime_checkable
class LayerRule(Protocol):
    """Spreads the mean capacity over layers; a plain function will do.

    At run time only the presence of `__call__` is checked, so every `HeadRule` also passes for a `LayerRule`: ask for
    `HeadRule` first. A rule whose layers all get the same may say so with an attribute `capacities = "equal"` (see
    `Capacities`), as `Uniform` does, so that adapters may lay the cache out uniformly; without it, "static" is assumed.
    """

    def __call__(self, candidates: Tensor, mean_capacity: Tensor, layer: int, num_layers: int) -> Tensor:
        """Capacity of one layer, `[B]` int64, from `candidates` `[B]` and `mean_capacity` `[B]` int64."""
        ...


@runtime_checkable
class HeadRule(Protocol):
    """Spreads the capacity of one layer over its KV heads."""

    counts: ClassVar[Counts]

    def __call__(self, backbone: Tensor, is_candidate: Tensor, capacity: Tensor) -> Tensor:
        """Counts `[B, H]` int64.

        Args:
            backbone: `[B, H, N]` float32, meaningful on candidates.
            is_candidate: `[B, H or 1, N]` bool.
            capacity: `[B]` int64, what a layer rule gave this layer.
        """
        ...


@runtime_checkable
class TableRule(Protocol):
    """Spreads the mean capacity over all layers and KV heads at once, before layer 0 has run."""

    counts: ClassVar[Counts]

    def plan(self, candidates: Tensor, mean_capacity: Tensor, num_layers: int, num_heads: int) -> Tensor:
        """Counts `[L, B, H]` int64.

        Args:
            candidates: `[B]` int64, per KV head.
            mean_capacity: `[B]` int64, per KV head and layer.
            num_layers: Layers that share the budget.
            num_heads: KV heads of each.
        """
        ...

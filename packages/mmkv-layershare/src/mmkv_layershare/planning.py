"""Which layers become lazy, from how differently neighbours attend."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .kinds import LayerKind, may_share
from .plan import LN2, LazyPlan, Mode


def plan_lazy_layers(
    divergences: Tensor | Sequence[float],
    *,
    epsilon: float | None = None,
    lazy_share: float | None = None,
    max_block: int = 5,
    kinds: Sequence[LayerKind] | None = None,
    mode: Mode = "visual",
    model: str = "unnamed",
) -> LazyPlan:
    """Blocks of neighbours whose divergence is below epsilon, cut from left to right into at most `max_block` layers.

    Lazy Attention (arXiv 2602.01901), eq. 4. The paper gives neither epsilon nor the cap: give epsilon, or let the
    share of lazy layers choose the smallest one that reaches it. The cap of 5 is inferred: with it the layers that the
    paper calls similar yield just the number of lazy layers its parameter counts imply.

    Args:
        divergences: [L - 1] S(l, l + 1) in nats; see `adjacent_divergences`.
        epsilon: neighbours strictly below it are alike; in (0, 1]. ln 2 is never reached by any pair but the most
            different ones.
        lazy_share: instead of epsilon, the least share of all L layers that become lazy, in (0, 1).
        max_block: most layers of a block, the anchor included; 2 or more.
        kinds: of all layers; neighbours of different kinds, or that do not attend to everything, never share.
        mode: of the plan.
        model: name of the model.

    Raises:
        ValueError: both or neither of epsilon and lazy_share, settings outside their range, divergences outside
            [0, ln 2], or a share that no epsilon reaches.
    """
    steps = [float(x) for x in divergences]
    if not steps or not all(0 <= x <= LN2 + 1e-9 for x in steps):
        raise ValueError("divergences are numbers in [0, ln 2], one for each pair of neighbouring layers")
    if (epsilon is None) == (lazy_share is None):
        raise ValueError("give either epsilon or lazy_share")
    if max_block < 2:
        raise ValueError(f"max_block counts the anchor too, so it starts at 2, got {max_block}")
    if kinds is not None and len(kinds) != len(steps) + 1:
        raise ValueError(f"{len(steps)} divergences are of {len(steps) + 1} layers, got {len(kinds)} kinds")
    steps = [x if kinds is None or may_share(kinds, layer) else math.inf for layer, x in enumerate(steps)]
    if epsilon is None:
        assert lazy_share is not None
        epsilon = _least_epsilon(steps, lazy_share, max_block)
    elif not 0 < epsilon <= 1:
        raise ValueError(f"epsilon must be in (0, 1], got {epsilon}")
    return LazyPlan(len(steps) + 1, tuple(_cut(steps, epsilon, max_block)), mode, model)


def _cut(steps: Sequence[float], epsilon: float, max_block: int) -> list[tuple[int, int]]:
    """(first, last) of the blocks."""
    blocks, first = [], 0
    for layer, step in enumerate([*steps, math.inf]):
        if step >= epsilon or layer + 1 - first == max_block:
            blocks.append((first, layer))
            first = layer + 1
    return [(a, b) for a, b in blocks if b > a]


def _least_epsilon(steps: Sequence[float], lazy_share: float, max_block: int) -> float:
    """The smallest epsilon with which the share is reached; more similar pairs never make fewer layers lazy."""
    if not 0 < lazy_share < 1:
        raise ValueError(f"lazy_share must be in (0, 1), got {lazy_share}")
    most = 0.0
    for step in sorted({x for x in steps if x < math.inf}):
        epsilon = math.nextafter(step, math.inf)
        share = sum(b - a for a, b in _cut(steps, epsilon, max_block)) / (len(steps) + 1)
        if share >= lazy_share:
            return epsilon
        most = max(most, share)
    raise ValueError(
        f"at most {most:.1%} of the layers can be lazy with blocks of {max_block}, so not {lazy_share:.1%}; "
        "raise max_block or lower the share"
    )

"""The one rule that every setting of every method follows; nothing is tuned for a cell.

* The observation window is the published one, scaled by the length of the prompt, to the next power of two. Published:
  32 queries on LLaVA-NeXT, whose image is up to 5 tiles of 576 vision tokens. One of our pages is one such tile.
* Budgets are counted in windows, which are part of them: 2, 4, 8 and 16, as the published 64, 128, 256 and 512 are of
  a window of 32.
* Every method protects the same latest tokens, as many as the window has, also those that look at no window.
* Everything else stays as published: pooling kernel 5 (average), MixKV's online r, BACON's release (kernel 5, m 4,
  gamma 0.5, rho 2, gate), PyramidKV's beta 20, AdaKV's floor 0.2 with normalisation, SparseMM's ratio 0.1.
* AdaKV compares shares of a head's score mass. KeyDiff and KNorm have negative scores, which make no shares: with these
  two, and only these, AdaKV does not normalise.
* Pruning methods drop tokens at the published layers of 32, scaled by the number of layers, rounded to the nearest,
  each at least one later than the one before; never at the first layer.
* The vision towers here have a single layer: VisionZip looks at it, and not at the last but one.
* Lazy layers: at least a third of the layers, in the blocks that calibration finds cheapest, training-free.
* SparseMM's head scores and the plans of lazy layers were calibrated once for all cells, on 96 pages of seed 40000 (no
  sample of which is measured): `value` in each arrangement, nothing after the question; `python -m mmkv_testbed.boxes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

PUBLISHED_WINDOW: Final = 32
PUBLISHED_VISION_TOKENS: Final = 5 * 576
PAGE_VISION_TOKENS: Final = 576
PUBLISHED_LAYERS: Final = 32
WINDOWS_PER_BUDGET: Final = (2, 4, 8, 16)


def scaled_window(vision_tokens: int = PAGE_VISION_TOKENS) -> int:
    """The published window for a prompt with that many vision tokens: the next power of two, in queries."""
    exact = PUBLISHED_WINDOW * vision_tokens / PUBLISHED_VISION_TOKENS
    window = 1
    while window < exact:
        window *= 2
    return window


def budgets(window: int) -> tuple[int, ...]:
    """KV pairs per KV head, window included, from aggressive to mild."""
    return tuple(factor * window for factor in WINDOWS_PER_BUDGET)


def scaled_layers(published: Sequence[int], layers: int) -> tuple[int, ...]:
    """Published layer numbers of a 32-layer model for one with so many layers, strictly ascending from 1 on."""
    found: list[int] = []
    for layer in published:
        nearest = int(layer * layers / PUBLISHED_LAYERS + 0.5)
        found.append(max(nearest, found[-1] + 1 if found else 1))
    return tuple(found)


WINDOW: Final = scaled_window()
BUDGETS: Final = budgets(WINDOW)

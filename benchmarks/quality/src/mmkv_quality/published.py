"""What the papers report, to be set beside what is measured here.

BACON: "Last But Not Least: Boundary Attention CalibratiON for Multimodal KV Cache Compression", arXiv 2606.14782.
MixKV: arXiv 2510.20707. Budgets are KV pairs per head, a window of 32 included; 64 is two windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Headline:
    """One published gain.

    Attributes:
        name: What for what.
        wrap: "bacon" or "mixkv".
        gain: Relative, in percent.
        of: "mean" over models and base methods, or "best" of them; of the mean over tasks, or of single tasks.
        shares: Base methods.
        tasks: Our tasks that stand for the published ones; empty: all.
        source: Where it stands.
    """

    name: str
    wrap: str
    gain: float
    of: str
    shares: tuple[str, ...]
    tasks: tuple[str, ...]
    source: str


EVERY_SHARE: Final = ("uniform", "pyramidkv", "adakv", "sparsemm")
HEADLINES: Final = (
    Headline(
        "BACON, mean",
        "bacon",
        7.5,
        "mean",
        EVERY_SHARE,
        (),
        "BACON, abstract and table 1: mean over 14 pairs of model and base method at budget 64",
    ),
    Headline(
        "BACON, best",
        "bacon",
        30.9,
        "best",
        EVERY_SHARE,
        (),
        "BACON, table 1: DocVQA, Qwen2-VL-7B, PyramidKV at budget 64, 60.5 to 79.2",
    ),
    Headline(
        "MixKV, mean",
        "mixkv",
        5.1,
        "mean",
        EVERY_SHARE,
        (),
        "MixKV, abstract: mean over five understanding benchmarks at budget 64",
    ),
    Headline(
        "MixKV on SnapKV, grounding", "mixkv", 8.0, "mean", ("uniform",), ("locate",), "MixKV, abstract: GUI grounding"
    ),
    Headline(
        "MixKV on AdaKV, grounding", "mixkv", 9.0, "mean", ("adakv",), ("locate",), "MixKV, abstract: GUI grounding"
    ),
)

DOCVQA_BASE: Final = {"uniform": 70.1, "adakv": 69.4}
"""BACON, table 8: Qwen2-VL-7B, DocVQA, budget 64, without BACON."""

DOCVQA_TERMS: Final = {
    "bacon": {"uniform": 85.5, "adakv": 86.2},
    "bacon(terms=et)": {"uniform": 84.0, "adakv": 85.6},
    "bacon(terms=el)": {"uniform": 83.5, "adakv": 84.3},
    "bacon(terms=lt)": {"uniform": 84.7, "adakv": 81.7},
}
"""The same with these terms. Presets other than the release's have no published figures."""

DOCVQA_SENSITIVITY_BASE: Final = 46.2
"""BACON, table 5: LLaVA-NeXT-Mistral-7B, DocVQA, SnapKV, budget 64, without BACON."""

DOCVQA_SENSITIVITY: Final = {
    "bacon": 53.9,
    "bacon(terms=el)": 51.7,
    "bacon(depth=2)": 53.4,
    "bacon(depth=6)": 53.9,
    "bacon(depth=8)": 53.5,
    "bacon(depth=10)": 52.0,
    "bacon(terms=et)": 52.1,
    "bacon(reach=3)": 53.7,
    "bacon(reach=7)": 53.7,
    "bacon(reach=9)": 53.7,
}
"""BACON, table 9, the same model: SnapKV with BACON of depth m (0: no T) or reach r (0: no L)."""

"""BACON: the window score calibrated with the last query."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mmkv_kernels import Calibration, bacon_calibrate
from mmkv_kernels.bacon import Neighbourhood
from torch import Tensor

from ._settings import check_kernel, check_types
from .snapkv import SnapKV
from .trace import Trace
from .types import Evidence, Observation, Scores, WindowScorer

Preset = Literal["release", "paper", "rel"]
_NEIGHBOURHOOD: dict[Preset, Neighbourhood] = {"release": "padded", "paper": "truncated", "rel": "supported"}


@dataclass(frozen=True, slots=True)
class BACON:
    """Adds to the window score what the last query alone saw: S = B + lambda (E + L + T).

    "Last But Not Least: Boundary Attention CalibratiON" (arXiv 2606.14782), equations 1 to 17, and the authors' release
    of August 2026. E = max(Q - B, 0) is the boundary residual (eq. 4), L its local mean (eqs. 5-7), T its mean over the
    previous `depth` layers at the same head and position (eqs. 8-9), lambda matches standard deviations (eqs. 14-15).
    Only the order within a head changes: the backbone stays the raw window score, and budgets come from that.

    Presets:
        release: local mean with kernel 5, zero-padded with constant divisor; the deviation of V over V's own top M;
            the content-presence gate when all three terms are on. The configuration the authors ran (its README).
        paper: the equations to the letter: radius 5, truncated neighbourhoods, deviation of V over the top M of B, no
            gate. Where V hardly varies there, lambda would explode (measured 3.6e5); then V's own top M is used. That
            guard is ours.
        rel: the release's alternative mode: L is damped where B is not locally supported, T = max(mean - std, 0) over
            the previous layers, no gate.

    The paper gives gamma no value; 0.5 is the release's. Trace layers count the layers that are compressed; a layer
    that can keep all of a row leaves nothing for later ones. With a window of one query Q is B, and B is returned.

    Attributes:
        base: a scorer with `evidence` (SnapKV, LastQuery); anything else has no B and Q to calibrate.
        preset: "release" (default), "paper" or "rel".
        terms: which of the terms E, L, T are added, e.g. "el" for the ablation without T; L and T are built from E even
            when the E term is off.
        reach: kernel (release, rel) or radius (paper) of the local mean; 5.
        depth: layers looked back, m; 4.
        gamma: 0.5.
        rho: the deviations are taken over the top rho * capacity; 2.
        gate: whether lambda is scaled by the content-presence gate; None: as the preset has it.
    """

    base: WindowScorer = field(default_factory=SnapKV)
    preset: Preset = "release"
    terms: str = "elt"
    reach: int = 5
    depth: int = 4
    gamma: float = 0.5
    rho: float = 2.0
    gate: bool | None = None

    is_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.base, WindowScorer):
            raise ValueError(
                f"BACON calibrates the window evidence of SnapKV or LastQuery; {type(self.base).__name__} has none. "
                "To combine with MixKV wrap the other way round: MixKV(BACON(...))"
            )
        check_types(self)
        if self.preset not in ("release", "paper", "rel"):
            raise ValueError(f"BACON: preset is 'release', 'paper' or 'rel', got {self.preset!r}")
        if not self.terms or len(set(self.terms)) != len(self.terms) or not set(self.terms) <= set("elt"):
            raise ValueError(f"BACON: terms is a selection of the letters e, l, t, got {self.terms!r}")
        if self.preset != "paper":
            check_kernel(self.reach, "BACON")
        if min(self.reach, self.depth, self.gamma) < 0 or self.rho <= 0:
            raise ValueError(f"BACON: reach, depth and gamma cannot be negative and rho must be positive, got {self}")
        if not math.isfinite(self.gamma) or not math.isfinite(self.rho):
            raise ValueError(f"BACON: gamma and rho must be finite, got {self}")

    @property
    def is_gated(self) -> bool:
        """`gate`, or what the preset says: the release gates when all three terms are on."""
        return self.preset == "release" and len(self.terms) == 3 if self.gate is None else self.gate

    @property
    def window(self) -> int:
        """Query rows of the base."""
        return self.base.window

    @property
    def needs(self) -> frozenset[str]:
        """What the base needs."""
        return self.base.needs

    def __call__(self, seen: Observation, capacity: Tensor, trace: Trace) -> Scores:
        """Scores of one layer; reads and extends `trace`."""
        evidence = self.base.evidence(seen)
        mean, std = trace.recall(self, seen.layer, seen.slots, self.depth, evidence.window)
        past = (mean - std).clamp(min=0) if self.preset == "rel" else mean
        calibrated = calibrate(self, evidence, past, seen.candidates, capacity)
        trace.push(self, seen.layer, _compressed(seen, capacity), calibrated.residual, self.depth)
        return Scores(rank=calibrated.score, backbone=evidence.window)


def calibrate(settings: BACON, evidence: Evidence, past: Tensor, candidates: Tensor, capacity: Tensor) -> Calibration:
    """S = B + lambda V over the candidates, what the preset says in the terms of `bacon_calibrate`.

    Args:
        settings: preset and constants.
        evidence: B and Q, [B, H, N] float32, pooled.
        past: [B, H, N] the term T.
        candidates: [B, H or 1, N] bool.
        capacity: [B] int64, K of eq. 12.
    """
    literal = settings.preset == "paper"
    return bacon_calibrate(
        *evidence,
        past,
        candidates,
        (settings.rho * capacity).long(),
        terms=settings.terms,
        radius=settings.reach if literal else settings.reach // 2,
        neighbourhood=_NEIGHBOURHOOD[settings.preset],
        deviation="window" if literal else "own",
        gamma=settings.gamma,
        gated=settings.is_gated,
    )


def _compressed(seen: Observation, capacity: Tensor) -> Tensor:
    """The slots of the rows that lose something in this layer, -1 for the others: alone, those would not be scored."""
    batch, heads = seen.keys.shape[:2]
    existing = seen.candidates.sum(-1).expand(batch, heads).sum(1)
    return seen.slots.masked_fill((capacity * heads >= existing)[:, None, None], -1)

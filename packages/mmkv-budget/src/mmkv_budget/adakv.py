"""AdaKV: the heads of a layer compete for its budget."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from mmkv_kernels import head_topk
from torch import Tensor

from ._apportion import floor_times
from ._checks import check_types, head_inputs, number
from .protocols import Counts


@dataclass(frozen=True, slots=True)
class AdaKV:
    """Counts by where the best scores of a layer lie (AdaKV, https://arxiv.org/abs/2407.11550).

    The paper's flat cut over heads and its safeguard, arithmetic as in the AdaKV repository (`snapkv_utils.py`).

    Attributes:
        floor: alpha: share of the capacity that every head is sure of, in [0, 1]. 0.2 as in all ports (the AdaKV
            repository also uses 0.5).
        mode: "floor" (default; a deviation, kvpress does the same): alpha is a true minimum and the total is exact.
            "blend" is the release: every head gets alpha C plus (1 - alpha) of what it won, rounded half to even, so
            totals drift.
        normalize: Scale each head by the share of its mass in its C best candidates before heads are compared, as the
            ports do by default (the AdaKV repository has it off). It needs scores >= 0: a base with negative ones
            (KeyDiff, KNorm) must say `normalize=False`.
    """

    floor: float = 0.2
    mode: Literal["floor", "blend"] = "floor"
    normalize: bool = True
    counts: ClassVar[Counts] = "dynamic"

    def __post_init__(self) -> None:
        """Refuses settings outside their range."""
        check_types(self)
        number(self.floor, "AdaKV floor", 0, 1)
        if self.mode not in ("floor", "blend"):
            raise ValueError(f"AdaKV mode must be 'floor' or 'blend', got {self.mode!r}")

    def __call__(self, backbone: Tensor, is_candidate: Tensor, capacity: Tensor) -> Tensor:
        """Counts `[B, H]` int64; see `adakv_counts`."""
        return adakv_counts(
            backbone, is_candidate, capacity, floor=self.floor, mode=self.mode, normalize=self.normalize
        )


def adakv_counts(
    backbone: Tensor,
    is_candidate: Tensor,
    capacity: Tensor,
    *,
    floor: float = 0.2,
    mode: Literal["floor", "blend"] = "floor",
    normalize: bool = True,
) -> Tensor:
    """Counts `[B, H]` int64.

    With C the capacity and F = int(floor * C). Floor: each head's F best candidates are safe, the rest of `min(C * H,
    candidates of all heads)` goes to the best of the others over all heads; the counts sum to exactly that, also when
    some heads hold few candidates. Blend: head h, with n_h of the C * H best over all heads, gets `round(n_h (1 -
    floor) + F)` in float32, half to even, at most its candidates; nothing is redistributed. Equal scores are taken by
    head, then slot.

    Deviations of "blend" from the release: a row whose heads all hold at most C candidates keeps everything (the
    release rounds some away when they hold exactly C); a row of zeros is not divided by zero.

    Args:
        backbone: `[B, H, N]` floating, finite on candidates, read as float32; what it holds elsewhere is ignored.
        is_candidate: `[B, H or 1, N]` bool.
        capacity: `[B]` integer.
        floor: See `AdaKV`.
        mode: See `AdaKV`.
        normalize: See `AdaKV`: `a_h * (sum of the C best of a_h) / (sum of a_h)`, sums in float64, product rounded to
            float32.

    Raises:
        ValueError: A candidate's score is not finite, or negative with `normalize=True`.
    """
    is_candidate, sizes, capacity = head_inputs(backbone, is_candidate, capacity)
    if backbone.numel() == 0:
        return torch.zeros_like(sizes)
    blocked = ~is_candidate
    mass = _mass(backbone.float().masked_fill(blocked, 0.0), normalize)
    scores = backbone.float().masked_fill(blocked, -math.inf)
    most = int(capacity.max())
    own = scores.topk(min(most, scores.shape[-1]), dim=-1)
    if normalize:
        scores = _normalized(scores, mass, own.values, torch.minimum(sizes, capacity.unsqueeze(-1)))
    total = torch.minimum(capacity * sizes.shape[1], sizes.sum(-1))
    minimum = floor_times(capacity, floor).unsqueeze(-1)
    if mode == "blend":
        return _blend(_won(scores, total), sizes, capacity, minimum, floor)
    safe = torch.minimum(sizes, minimum)
    open_scores = _without_best(scores, own.indices[..., : int(most * floor)], safe)
    return safe + _won(open_scores, total - safe.sum(-1))


def _mass(scores: Tensor, normalize: bool) -> Tensor:
    """Sum of each head's scores, `[B, H]` float64, of scores that are 0 where nothing may be evicted."""
    low, high = torch.stack(torch.aminmax(scores)).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("AdaKV needs finite backbone scores on all candidates, found NaN or infinity")
    if normalize and low < 0:
        raise ValueError(
            "AdaKV(normalize=True) compares shares of a head's score mass, which negative scores "
            f"(found {low:.4g}) do not have; use AdaKV(normalize=False) with this scorer"
        )
    return scores.sum(-1, dtype=torch.float64)


def _normalized(scores: Tensor, mass: Tensor, best: Tensor, kept: Tensor) -> Tensor:
    """`scores` times the share of a head's mass in the `kept` `[B, H]` first of `best` `[B, H, K]`; zeros stay."""
    place = torch.arange(best.shape[-1], device=best.device)
    top = torch.where(place < kept.unsqueeze(-1), best, 0.0).sum(-1, dtype=torch.float64)
    # A share of 0 (nothing to keep) would turn the -inf of the others into NaN.
    share = torch.where((mass > 0) & (top > 0), top / mass, 1.0)
    return (scores * share.unsqueeze(-1)).float()


def _without_best(scores: Tensor, best: Tensor, safe: Tensor) -> Tensor:
    """`scores` with the first `safe` `[B, H]` of each head's `best` `[B, H, K]` indices struck out.

    Which of several equal scores is struck out differs by device, how many does not, and only that is counted.
    """
    place = torch.arange(best.shape[-1], device=best.device)
    values = scores.gather(-1, best).masked_fill(place < safe.unsqueeze(-1), -math.inf)
    return scores.scatter(-1, best, values)


def _won(scores: Tensor, total: Tensor) -> Tensor:
    """How many of the `total` `[B]` best of `scores` `[B, H, N]` each head holds, `[B, H]`; ties by head, then slot."""
    return head_topk(scores, total).cu_seqlens.diff().view(scores.shape[:2])


def _blend(won: Tensor, sizes: Tensor, capacity: Tensor, minimum: Tensor, floor: float) -> Tensor:
    blended = torch.round(won.float() * (1 - floor) + minimum).long()
    fits = capacity >= sizes.amax(-1)
    return torch.where(fits.unsqueeze(-1), sizes, torch.minimum(blended, sizes))

"""Calibration of a window score in plain torch."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._kth import kth_largest
from ..masked import EPS, masked_mean, neighbourhood_mean, pool

DEGENERATE = 1e-6


class Calibration(NamedTuple):
    """A calibrated score and what it is made of, float32."""

    score: Tensor  # S [B, H, N]
    residual: Tensor  # E [B, H, N]
    local: Tensor  # L [B, H, N]
    factor: Tensor  # lambda [B, H, 1]


def bacon_calibrate_reference(
    window: Tensor,
    last: Tensor,
    past: Tensor,
    candidates: Tensor,
    sizes: Tensor,
    terms: str,
    radius: int,
    neighbourhood: str,
    deviation: str,
    gamma: float,
    gated: bool,
) -> Calibration:
    """See `bacon_calibrate`; arguments are taken as checked."""
    window, last, past = window.contiguous(), last.contiguous(), past.contiguous()
    residual = (last - window).clamp(min=0)
    local = _local(residual, window, candidates, radius, neighbourhood)
    added = {"e": residual, "l": local, "t": past.masked_fill(~candidates, 0.0)}
    support = torch.stack([added[name] for name in terms]).sum(0)
    existing = candidates.sum(-1).expand(window.shape[:2])
    size = sizes[:, None].minimum(existing).clamp(min=1)
    window_mean, window_std = _top_moments(window, candidates, size)
    own_mean, spread = _top_moments(support, candidates, size)
    if deviation == "window":
        literal = _std_at_top(support, window, candidates, size)
        spread = torch.where(literal > DEGENERATE * own_mean, literal, spread)
    factor = gamma * window_std / (spread + EPS)
    if gated:
        factor = factor * (own_mean / (window_mean + EPS)).clamp(0, 1)
    return Calibration(window + factor * support, residual, local, factor)


def _local(residual: Tensor, window: Tensor, candidates: Tensor, radius: int, neighbourhood: str) -> Tensor:
    if neighbourhood == "truncated":
        return neighbourhood_mean(residual, candidates, radius)
    kernel = 2 * radius + 1
    local = pool(residual, candidates, kernel)
    if neighbourhood == "supported":
        around = pool(window, candidates, kernel)
        local = local * around / (around + window + EPS)
    return local


def _top_moments(x: Tensor, candidates: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation [B, H, 1] of the `size` [B, H] largest candidates of each head.

    The order does not matter, so the value of the smallest one is enough: selecting it is far cheaper than sorting.
    """
    if not x.numel():
        return x.new_zeros(*size.shape, 1), x.new_zeros(*size.shape, 1)
    masked = x.masked_fill(~candidates, -torch.inf)
    cut = kth_largest(masked, size)
    cut = torch.where(cut > -torch.inf, cut, 0.0)
    above = masked > cut
    tied = size[..., None] - above.sum(-1, keepdim=True)
    mean = ((x * above).sum(-1, keepdim=True) + tied * cut) / size[..., None]
    squares = ((x - mean).square() * above).sum(-1, keepdim=True) + tied * (cut - mean).square()
    return mean, (squares / size[..., None]).sqrt()


def _std_at_top(x: Tensor, window: Tensor, candidates: Tensor, size: Tensor) -> Tensor:
    """Population standard deviation [B, H, 1] of x over the `size` candidates where the window is largest."""
    if not size.numel():
        return x.new_zeros(*size.shape, 1)
    order = window.masked_fill(~candidates, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    there = x.gather(-1, order[..., : int(size.max())])  # stable: ties in B go to the lower entry
    region = torch.arange(there.shape[-1], device=size.device) < size[..., None]
    return masked_mean((there - masked_mean(there, region)).square(), region).sqrt()

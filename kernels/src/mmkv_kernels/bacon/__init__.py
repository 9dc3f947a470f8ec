"""Calibration of a window score with what the last query alone saw (BACON, arXiv 2606.14782)."""

from typing import Literal

import torch
from torch import Tensor

from .. import _checks
from .._dispatch import Impl, operator, takes_triton
from .reference import Calibration, bacon_calibrate_reference

__all__ = ["Calibration", "Deviation", "Neighbourhood", "bacon_calibrate"]

Neighbourhood = Literal["padded", "truncated", "supported"]
Deviation = Literal["own", "window"]


@torch.no_grad()
def bacon_calibrate(
    window: Tensor,
    last: Tensor,
    past: Tensor,
    candidates: Tensor,
    sizes: Tensor,
    *,
    terms: str = "elt",
    radius: int = 2,
    neighbourhood: Neighbourhood = "padded",
    deviation: Deviation = "own",
    gamma: float = 0.5,
    gated: bool = True,
    impl: Impl = "auto",
) -> Calibration:
    """S = B + lambda V, V being the sum of the terms: E = max(Q - B, 0), its local mean L, and T.

    lambda is gamma times the standard deviation of B over its own top M candidates, over that of V (equations 4 to 17
    of the paper).

    Args:
        window: B, float32 [B, H, N].
        last: Q, float32 [B, H, N].
        past: T, float32 [B, H, N], taken on the candidates only.
        candidates: bool [B, 1 or H, N].
        sizes: M, int64 [B], at least 1 and at most a head's candidates are taken.
        terms: which terms V has, a selection of "e", "l" and "t".
        radius: of the neighbourhoods of L.
        neighbourhood: "padded" divides by 2 * radius + 1 everywhere, "truncated" by the candidates there are,
            "supported" is "padded", times l / (l + B + 1e-8) with l the same mean of B.
        deviation: V's is taken over its "own" top M, or over that of the "window", B's, ties going to the lower entry.
            Where V hardly varies there lambda would explode, and its own is taken. "window" needs a sort, and has no
            Triton kernel: "auto" takes the reference.
        gamma: factor of lambda.
        gated: whether lambda is multiplied by the mean of V's top M over that of B's, within [0, 1].
        impl: "auto", "reference" or "triton", see the package.

    Returns:
        `score` S, `residual` E and `local` L, [B, H, N], and `factor` lambda, [B, H, 1], float32.

    Raises:
        TypeError: B, Q or T not float32, candidates not bool, sizes not int64.
        ValueError: shapes that disagree, an option that is none, `impl="triton"` where there is no kernel.
    """
    dims = _checks.Dims()
    dims.bind("window", window, "B H N")
    dims.bind("last", last, "B H N")
    dims.bind("past", past, "B H N")
    dims.flags("candidates", candidates, "B 1|H N")
    dims.bind("sizes", sizes, "B")
    _checks.singles(window=window, last=last, past=past)
    _checks.integers("sizes", sizes)
    _checks.one_of("neighbourhood", neighbourhood, Neighbourhood)
    _checks.one_of("deviation", deviation, Deviation)
    if not terms or not set(terms) <= set("elt") or len(set(terms)) < len(terms):
        raise ValueError(f"terms is a selection of the letters e, l, t, got {terms!r}")
    if type(radius) is not int or radius < 0:
        raise ValueError(f"radius must be an int and not negative, got {radius!r}")
    options = "".join(sorted(terms)), radius, neighbourhood, deviation, float(gamma), gated
    return Calibration(*_bacon_calibrate(window, last, past, candidates, sizes, *options, impl))


Fields = tuple[Tensor, Tensor, Tensor, Tensor]


def _fake(window: Tensor, *others: object) -> Fields:
    score, residual, local = (torch.empty_like(window, memory_format=torch.contiguous_format) for _ in range(3))
    return score, residual, local, window.new_empty(*window.shape[:2], 1)


@operator(_fake)
def _bacon_calibrate(
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
    impl: str,
) -> Fields:
    if deviation == "window" and impl == "triton":
        raise ValueError("impl='triton' has no deviation='window', which needs a sort")
    if takes_triton(impl, window) and deviation == "own":
        from .triton import bacon_calibrate_triton

        return bacon_calibrate_triton(window, last, past, candidates, sizes, terms, radius, neighbourhood, gamma, gated)
    return bacon_calibrate_reference(
        window, last, past, candidates, sizes, terms, radius, neighbourhood, deviation, gamma, gated
    )

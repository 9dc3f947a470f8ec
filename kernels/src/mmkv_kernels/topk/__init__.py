"""The best entries of every head, or of all heads of a row together, as ascending columns."""

import torch
from torch import Tensor

from .. import _checks
from .._dispatch import Impl, operator, takes_triton
from .reference import HeadTopK, head_topk_reference

__all__ = ["HeadTopK", "head_topk"]


@torch.no_grad()
def head_topk(
    scores: Tensor,
    counts: Tensor,
    *,
    candidates: Tensor | None = None,
    always: Tensor | None = None,
    impl: Impl = "auto",
) -> HeadTopK:
    """The `counts` highest-scoring candidates of every head and what is kept always; ties go to the lower column.

    Totals are exact: counts below 0 are 0, and those beyond the candidates take all. Scores that are equal (0 and -0
    are) tie; what is no candidate may have any score, NaN included.

    Args:
        scores: [B, H, N]; float32, bfloat16, float16 or float64. -inf is a score as others, a candidate's NaN is none.
        counts: int64 [B, H], how many each head keeps; or [B], how many the heads of a row keep together, ties going to
            the lower head first.
        candidates: bool [B, 1 or H, N]; None: all entries.
        always: bool [B, 1 or H, N], kept besides the counted ones, and no candidates; None: none.
        impl: "auto", "reference" or "triton", see the package.

    Returns:
        `columns`, int64 [T], ascending within each head, and `cu_seqlens`, int64 [B * H + 1]: what `gather_kv` takes.

    Raises:
        TypeError: scores of another dtype, counts not int64, masks not bool.
        ValueError: shapes that disagree.
    """
    dims = _checks.Dims()
    dims.bind("scores", scores, "B H N")
    dims.bind("counts", counts, "B" if counts.dim() == 1 else "B H")
    dims.flags("candidates", candidates, "B 1|H N")
    dims.flags("always", always, "B 1|H N")
    _checks.floats(scores=scores)
    _checks.integers("counts", counts)
    return HeadTopK(*_head_topk(scores, counts, candidates, always, impl))


def _fake(scores: Tensor, counts: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    return counts.new_empty(kept), counts.new_empty(scores.shape[0] * scores.shape[1] + 1)


@operator(_fake)
def _head_topk(
    scores: Tensor, counts: Tensor, candidates: Tensor | None, always: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    if takes_triton(impl, scores):
        from .triton import head_topk_triton

        return head_topk_triton(scores, counts, candidates, always)
    return head_topk_reference(scores, counts, candidates, always)

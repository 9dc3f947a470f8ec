"""Checks of what parts return, third parties' above all: a wrong answer is named here and not where it would hurt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmkv_scores import Scores
from torch import Tensor


def checked_whole(part: object, what: str, answer: object, shape: Sequence[int]) -> Tensor:
    """`answer`, which a part gave as its `what`: int64 of that shape.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(answer, Tensor) or answer.dtype != torch.int64 or answer.shape != torch.Size(shape):
        raise ValueError(f"{_name(part)}: {what} must be int64 {list(shape)}, got {_found(answer)}")
    return answer


def checked_scores(scorer: object, scores: Scores, candidates: Tensor, shape: Sequence[int]) -> Scores:
    """`scores`, both floating [B, H, N] and finite on the candidates [B, H or 1, N].

    Raises:
        ValueError: they are not.
    """
    for what in ("rank", "backbone"):
        score = getattr(scores, what, None)
        if not isinstance(score, Tensor) or not score.is_floating_point() or score.shape != torch.Size(shape):
            raise ValueError(f"{_name(scorer)}: {what} must be float {list(shape)}, got {_found(score)}")
    if bool((scores.rank.sum() + scores.backbone.sum()).isfinite()):  # asked once: every answer waits for the device
        return scores
    for what in ("rank", "backbone"):
        if bool((~getattr(scores, what).isfinite() & candidates).any()):
            raise ValueError(
                f"{_name(scorer)}: a candidate's {what} is NaN or infinite; the model's keys or queries probably are "
                "too"
            )
    return scores


def checked_counts(rule: object, counts: object, existing: Tensor) -> Tensor:
    """`counts` [B, H], not negative; equal, where the rule says so and the `existing` candidates [B, H] allow it.

    Heads that hold different numbers of candidates may differ by a remainder of one, and a head that keeps all it has
    by any number.

    Raises:
        ValueError: they are not.
    """
    counts = checked_whole(rule, "counts", counts, existing.shape)
    if counts.numel() and 0 <= int(counts.min()) == int(counts.max()):
        return counts
    negative = wrong = counts < 0
    if getattr(rule, "counts", None) == "equal" and counts.numel():
        given = counts.minimum(existing)
        ragged = existing.amax(1, keepdim=True) > existing.amin(1, keepdim=True)
        wrong = negative | ((given.amax(1, keepdim=True) - given > ragged.long()) & (given < existing))
    if bool(wrong.any()):
        row = int(wrong.any(1).nonzero()[0])
        gave = f"gave row {row} {counts[row].tolist()}"
        if bool(negative.any()):
            raise ValueError(f"{_name(rule)}: counts cannot be negative, {gave}")
        raise ValueError(
            f"{_name(rule)} says counts = 'equal' and {gave}, of {existing[row].tolist()} candidates; "
            "it has to say 'static' or 'dynamic'"
        )
    return counts


def _name(part: object) -> str:
    return getattr(part, "__name__", type(part).__name__)  # a plain function is a layer rule too


def _found(answer: object) -> str:
    return f"{answer.dtype} {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__

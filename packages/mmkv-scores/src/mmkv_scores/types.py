"""The vocabulary of scoring: what a scorer sees, what it returns, what one request carries between layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from .trace import Trace


@dataclass(frozen=True, slots=True)
class Observation:
    """One attention layer at the moment a decision is due; keys and queries after RoPE and after q/k-norm.

    B batch rows, Hq query heads, H KV heads, W query rows looked at, N cached entries, D head dim. `valid`,
    `candidates` and `slots` may have 1 in place of H where all heads agree. Entries are ordered by slot within a row,
    the real ones next to each other; padding may stand on either side.

    Attributes:
        queries: [B, Hq, W, D] the last W real query rows of each row, rolled over chunk borders; W >= the scorer's
            `window` unless the prompt is shorter.
        keys: [B, H, N, D] any floating dtype.
        values: [B, H, N, Dv].
        valid: [B, H or 1, N] bool, real entries (False: padding, or not held by this head).
        candidates: [B, H or 1, N] bool, valid and not protected: what the decision is about. Normalisations,
            neighbourhoods and rankings run over these and nothing else.
        slots: [B, H or 1, N] int64, the logical column of each entry; -1 where not valid.
        mask: [B, H or 1, W, N] bool, what the model let the window rows see; a row that sees nothing is not a query
            (padding). None: causal, and the W rows are the last W entries.
        modality: [B, H or 1, N] int8, 0 text, 1 image, 2 video, or None when unknown.
        column_sums: [B, H, N] float32, attention each entry received from all queries so far, mean over the group.
            Only given to scorers whose `needs` names it.
        column_counts: [B, H or 1, N] number of queries that could see each entry; comes with `column_sums`.
        scaling: what q·k is multiplied with before the softmax.
        softcap: logits are softcap * tanh(logits / softcap), or None.
        layer: index among the layers that are being compressed, from 0.
        num_layers: how many layers are being compressed.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    valid: Tensor
    candidates: Tensor
    slots: Tensor
    scaling: float
    layer: int
    num_layers: int
    mask: Tensor | None = None
    modality: Tensor | None = None
    column_sums: Tensor | None = None
    column_counts: Tensor | None = None
    softcap: float | None = None


class Evidence(NamedTuple):
    """What a window scorer saw, pooled, per KV head, before any calibration; 0 outside the candidates.

    Attributes:
        window: [B, H, N] float32, mean over the W rows (BACON's B).
        last: [B, H, N] float32, the last row (BACON's Q).
    """

    window: Tensor
    last: Tensor


class Scores(NamedTuple):
    """What a scorer returns.

    Attributes:
        rank: [B, H, N] float32, orders entries within one head; finite everywhere, meaningful on candidates.
        backbone: [B, H, N] float32, the base method's own score, comparable across heads: budgets come from it.
    """

    rank: Tensor
    backbone: Tensor


@runtime_checkable
class Scorer(Protocol):
    """Says how much each cached entry matters.

    Attributes:
        window: query rows needed; 0 is allowed. Also the default number of recent tokens that are protected.
        needs: optional fields of `Observation` that must be filled, e.g. {"column_sums"}.
    """

    @property
    def window(self) -> int: ...
    @property
    def needs(self) -> frozenset[str]: ...
    def __call__(self, seen: Observation, capacity: Tensor, trace: Trace) -> Scores:
        """Scores of one layer.

        Args:
            seen: The layer.
            capacity: [B] int64, candidates a head of this layer keeps on average.
            trace: State of this request, shared by its layers.
        """
        ...


@runtime_checkable
class AttentionScorer(Scorer, Protocol):
    """A scorer whose rank is attention mass (>= 0), which MixKV can mix with key diversity and value norms."""

    @property
    def is_attention(self) -> bool: ...


@runtime_checkable
class WindowScorer(AttentionScorer, Protocol):
    """A scorer that can show the window mean and the last row it ranks by, which BACON calibrates."""

    def evidence(self, seen: Observation) -> Evidence: ...

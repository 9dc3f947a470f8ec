"""The vocabulary of pruning: what a method asks for, what it sees, what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from .prompt import Prompt

Positions = Literal["keep", "reindex"]
"""What survivors' position ids are: the original ones, or 0, 1, 2, ... anew from each stage on (`reindexed`)."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Whose attention a method looks at before it drops tokens at the input of layer K.

    Attributes:
        layer: "previous": layer K - 1, which has just run. "own": layer K, whose input norm and q/k projections are run
            ahead on the tokens about to enter it.
        embeddings: whether `rows` has to be given the embeddings that enter layer 0.
    """

    layer: Literal["previous", "own"]
    embeddings: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """What some query rows attend to, mean over all query heads.

    Attributes:
        weights: [B, R, N] floating, over the columns of the whole prompt; what dropped columns hold is ignored.
        real: [B, R] bool; rows of a batch may have different numbers of query rows.
    """

    weights: Tensor
    real: Tensor

    def mean(self) -> Tensor:
        """[B, N] float32, mean over the real query rows; 0 where there is none."""
        weights = self.weights.float().masked_fill(~self.real.unsqueeze(-1), 0.0)
        return weights.sum(1) / self.real.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True, slots=True)
class Seen:
    """The input of one layer at the moment tokens are dropped there.

    Attributes:
        prompt: the whole prompt; a row without vision tokens passes through untouched.
        alive: [B, N] bool, columns of the prompt that reached this layer.
        layer: K, from 0.
        attention: what `Evidence` asked for, or None.
    """

    prompt: Prompt
    alive: Tensor
    layer: int
    attention: Attention | None = None

    @property
    def survivors(self) -> Tensor:
        """[B, N] bool, vision tokens that reached this layer: all a method may drop."""
        return self.alive & self.prompt.vision

    @property
    def asked(self) -> Attention:
        """`attention`, for a method that cannot do without.

        Raises:
            ValueError: There is none.
        """
        if self.attention is None:
            raise ValueError("this method looks at attention: hand in what its `evidence` and `rows` ask for")
        return self.attention


@runtime_checkable
class Pruner(Protocol):
    """Says which vision tokens go no further.

    Attributes:
        layers: layers at whose *input* something is dropped, ascending, from 1.
        evidence: None for a method that looks at shapes only, which makes its survivors known before the prompt runs.
        positions: see `Positions`.
    """

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def evidence(self) -> Evidence | None: ...
    @property
    def positions(self) -> Positions: ...
    def __call__(self, seen: Seen) -> Tensor:
        """[B, N] bool, the columns that enter layer `seen.layer`, a subset of `seen.alive` with all of its text."""
        ...


@runtime_checkable
class AttentionPruner(Pruner, Protocol):
    """A method that looks at attention."""

    def rows(self, prompt: Prompt, embeddings: Tensor | None = None) -> Tensor:
        """[B, N] bool, the columns whose queries are asked, text or the last of the row: they reach every layer.

        Args:
            prompt: The prompt.
            embeddings: [B, N, D], what enters layer 0; only read where `Evidence.embeddings`.
        """
        ...

    def counts(self, prompt: Prompt) -> Tensor | None:
        """[S, B] int64, vision tokens left by each of the S layers, or None when that depends on the content."""
        ...

"""A method on a model with so many layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import last_rows
from .prompt import Prompt
from .types import Attention, AttentionPruner, Evidence, Positions, Pruner, Seen


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What an adapter follows; refused here, before anything runs, if the model has not got the layers.

    Before the prompt runs: `layers`, `evidence`, `positions`, and `rows` where there is evidence. At the input of each
    of the `layers`: `keep`. Everything is asked over the columns of the whole prompt; `kept_columns` turns an answer
    into indices to gather.

    Attributes:
        method: see `Pruner`.
        num_layers: decoder layers of the model.

    Raises:
        TypeError: not a method.
        ValueError: a layer the model does not have.
    """

    method: Pruner
    num_layers: int

    def __post_init__(self) -> None:
        name = type(self.method).__name__
        if isinstance(self.method, type) or not isinstance(self.method, Pruner):  # a class has all these too
            raise TypeError(
                "a method of pruning is an object with layers, evidence and positions that is called, such as ADSC(); "
                f"{self.method!r} is none"
            )
        if self.method.evidence is not None and not isinstance(self.method, AttentionPruner):
            raise TypeError(f"{name} asks for evidence, so it needs rows() and counts()")
        if self.layers[-1] >= self.num_layers:
            raise ValueError(
                f"{name} drops tokens at the input of layer {self.layers[-1]}; this model's last layer is "
                f"{self.num_layers - 1}"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers at whose input something is dropped."""
        return self.method.layers

    @property
    def evidence(self) -> Evidence | None:
        """What the method looks at; None: nothing, its survivors are known before the prompt runs."""
        return self.method.evidence

    @property
    def positions(self) -> Positions:
        """Whether survivors keep their position ids."""
        return self.method.positions

    def rows(self, prompt: Prompt, embeddings: Tensor | None = None) -> Tensor | None:
        """[B, N] bool, the columns whose queries `keep` wants the attention of, or None; see `AttentionPruner`."""
        return self.method.rows(prompt, embeddings) if isinstance(self.method, AttentionPruner) else None

    def keep(self, layer: int, prompt: Prompt, alive: Tensor, attention: Attention | None = None) -> Tensor:
        """[B, N] bool, the columns that enter `layer`.

        The last real column of a row stays whatever it is: generation goes on from there.

        Args:
            layer: One of `layers`.
            prompt: The prompt.
            alive: [B, N] bool, the columns that came this far; `prompt.valid` at first.
            attention: See `Evidence`; the rows in the order of their columns.

        Raises:
            ValueError: Nothing is dropped at this layer, missing or misshapen evidence, or a method that answers
                something other than a part of `alive` with all of its text.
        """
        if layer not in self.layers:
            raise ValueError(f"nothing is dropped at layer {layer}, only at {list(self.layers)}")
        _check_mask("alive", alive, prompt)
        if attention is not None:
            _check_attention(attention, prompt)
        kept = self.method(Seen(prompt, alive, layer, attention))
        _check_mask(f"what {type(self.method).__name__} keeps", kept, prompt)
        kept = kept | (alive & last_rows(prompt))
        if bool(((kept & ~alive) | (alive & ~kept & ~prompt.vision)).any()):
            raise ValueError(f"{type(self.method).__name__} may drop vision tokens and nothing else")
        return kept

    def survivors(self, prompt: Prompt) -> Tensor:
        """[L, B, N] bool, the columns each layer sees, of a method without evidence.

        Raises:
            ValueError: The method looks at attention.
        """
        if self.evidence is not None:
            raise ValueError(f"{type(self.method).__name__} looks at attention: its survivors are not known beforehand")
        alive, out = prompt.valid, []
        for layer in range(self.num_layers):
            alive = self.keep(layer, prompt, alive) if layer in self.layers else alive
            out.append(alive)
        return torch.stack(out)

    def counts(self, prompt: Prompt) -> Tensor | None:
        """[L, B] int64, vision tokens each layer sees, or None when that depends on more than shapes.

        Attention may leave one more in a row that ends with a vision token.
        """
        if not isinstance(self.method, AttentionPruner):
            return (self.survivors(prompt) & prompt.vision).sum(-1)
        stages = self.method.counts(prompt)
        if stages is None:
            return None
        stage = [sum(layer >= first for first in self.layers) for layer in range(self.num_layers)]
        return torch.cat((prompt.counts.unsqueeze(0), stages))[stage]


def _check_mask(what: str, mask: Tensor, prompt: Prompt) -> None:
    if mask.dtype != torch.bool or mask.shape != prompt.valid.shape:
        raise ValueError(f"{what} must be bool {list(prompt.valid.shape)}, got {mask.dtype} {list(mask.shape)}")


def _check_attention(attention: Attention, prompt: Prompt) -> None:
    batch, length = prompt.valid.shape
    weights, real = attention.weights, attention.real
    if weights.ndim != 3 or weights.shape[::2] != (batch, length) or real.shape != weights.shape[:2]:
        raise ValueError(
            f"attention must be weights [{batch}, R, {length}] and real [{batch}, R], got {list(weights.shape)} "
            f"and {list(real.shape)}"
        )

"""Losses and noise that exist in training only and tell the model what its layers are for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from .batches import IGNORED, Batch
from .pages import RECORD_LENGTH
from .prompts import Prompts
from .vocabulary import IMAGE_NAMES, LETTERS

_ATTENTION: Final = "mmkv_testbed_training"


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    before_questions: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in two parts, which spares half the work; leaves the rotated queries and keys for the pointer loss."""
    module.states = (query, key)
    group, cut = query.shape[1] // key.shape[1], before_questions
    keys, values = (states.repeat_interleave(group, 1) for states in (key, value))
    attend = partial(F.scaled_dot_product_attention, scale=scaling)
    images = attend(query[:, :, :cut], keys[:, :, :cut], values[:, :, :cut], is_causal=True)
    questions = attend(query[:, :, cut:], keys, values, attn_mask=mask[:, :, cut:])
    return torch.cat([images, questions], dim=2).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attention)


class Helpers(nn.Module):
    """Two losses and head dropout; thrown away after training.

    * Names: linear probes on the input of layer `NAMING_LAYER` say to which key a record's cell belongs, which of the
      record's glyphs it is, and in which image it stands. The same probes say of an answer token's row which key,
      glyph and image it asks for, so that question and evidence get one common code before they have to meet.
    * Pointers: in one of the layers from there to the last but one, chosen anew for each step, every KV head attends to
      the evidence: head `h` of layer `l` gives `SPREAD * ((h + l) % heads)` of its attention to the whole record, the
      rest to the cell that shows the next word.
    * Head dropout: in each layer from there on some KV heads say nothing to some prompts, so that retrieval spreads
      over heads and layers.
    """

    NAMING_LAYER: Final = 2
    SPREAD: Final = 0.25

    def __init__(self, model: Any, head_dropout: float) -> None:
        """Hooks the language model of `model`."""
        super().__init__()
        language_model, hidden = model.model.language_model, model.config.text_config.hidden_size
        model.set_attn_implementation({"text_config": _ATTENTION})
        self.head_dropout = head_dropout
        self._layers = list(language_model.layers)  # in a list: their parameters are not this module's
        self.probes = nn.ModuleList(
            nn.Linear(hidden, count) for count in (len(LETTERS), RECORD_LENGTH, len(IMAGE_NAMES))
        )
        self._named: Tensor | None = None
        self._layers[self.NAMING_LAYER].register_forward_pre_hook(self._record)
        for layer in self._layers[self.NAMING_LAYER :]:
            layer.self_attn.o_proj.register_forward_pre_hook(self._dropper(layer.self_attn))

    @property
    def pointing_layers(self) -> int:
        """How many layers the pointer loss may choose from."""
        return len(self._layers) - 1 - self.NAMING_LAYER

    def _record(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        self._named = layer.input_layernorm(inputs[0])

    def _dropper(self, attention: Any) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        heads = attention.config.num_key_value_heads

        def drop(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            (states,) = inputs
            if not module.training or not self.head_dropout:
                return inputs
            kept = torch.rand(len(states), 1, heads, 1) > self.head_dropout
            grouped = states.view(*states.shape[:2], heads, -1) * kept / (1 - self.head_dropout)
            return (grouped.flatten(-2),)

        return drop

    def forward(self, prompts: Prompts, batch: Batch, choice: int) -> tuple[Tensor, dict[str, float]]:
        """The two losses' sum and accuracies; call after the language model ran on `prompts`."""
        names, named, asked = self._names(prompts, batch)
        pointers, hit = self._pointers(prompts, batch, self.NAMING_LAYER + choice)
        return names + pointers, {"named": named, "asked": asked, "pointer": hit}

    def _names(self, prompts: Prompts, batch: Batch) -> tuple[Tensor, float, float]:
        assert self._named is not None
        per_image = batch.cells.shape[1] // batch.images
        homes = batch.homes.flatten(1)
        hidden = self._named.gather(1, prompts.cells[homes][..., None].expand(-1, -1, self._named.shape[-1]))
        keys = batch.keys.repeat_interleave(RECORD_LENGTH, 1)
        ranks = torch.arange(RECORD_LENGTH).repeat(batch.keys.shape[1]).expand_as(keys)
        cells, named = self._probe(hidden.flatten(0, 1), keys, ranks, homes // per_image)
        steps = (batch.owners[0, 1:] >= 0).nonzero()[:, 0]  # step t predicts token t + 1
        wanted = (field[:, 1 + steps] for field in (batch.owners, batch.ranks, batch.pointers // per_image))
        rows, asked = self._probe(self._named[:, prompts.start + steps].flatten(0, 1), *wanted)
        return cells + rows, named, asked

    def _probe(self, hidden: Tensor, *wanted: Tensor) -> tuple[Tensor, float]:
        """Sum of the probes' losses, and how often all of them are right."""
        logits = [probe(hidden) for probe in self.probes]
        loss = torch.stack([F.cross_entropy(x, y.flatten()) for x, y in zip(logits, wanted, strict=True)]).sum()
        hits = torch.stack([x.argmax(-1) == y.flatten() for x, y in zip(logits, wanted, strict=True)])
        return loss, hits.all(0).float().mean().item()

    def _pointers(self, prompts: Prompts, batch: Batch, index: int) -> tuple[Tensor, float]:
        """Cross-entropy of the attention in layer `index`, and how often its sharpest head is right."""
        attention = self._layers[index].self_attn
        query, key = attention.states
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        steps = (batch.pointers[0, 1:] != IGNORED).nonzero()[:, 0]
        rows = prompts.start + steps
        asking = query[:, :, rows].view(len(query), heads, group, len(rows), -1)
        scores = asking @ key[:, :, None].transpose(-1, -2) * attention.scaling
        scores = scores.masked_fill(~prompts.mask[0, 0, rows], float("-inf"))  # [B, heads, group, rows, S]
        wanted = torch.cat([batch.pointers[:, 1 + steps, None], batch.regions[:, 1 + steps]], -1)
        places = prompts.cells[wanted][:, None, None].expand(-1, heads, group, -1, -1)
        logs = scores.log_softmax(-1).gather(-1, places)
        turn = (torch.arange(heads) + index) % heads
        spread = self.SPREAD * turn[:, None, None]
        loss = -((1 - spread) * logs[..., 0] + spread * logs[..., 1:].mean(-1)).mean()
        sharpest = scores[:, int((turn == 0).nonzero())].argmax(-1)
        return loss, (sharpest == places[:, 0, ..., 0]).float().mean().item()

"""One prefill, any number of compressed caches.

Reading the prompt costs far more than compressing it and answering from what is left, and it is the same for every
pipeline: eviction happens after a layer's attention, so no layer sees what another one lost. A prompt is therefore
read once, with what every cache layer is given written down, and each pipeline gets the same calls again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from mmkv_hf import Budget, CompressedCache, Pipeline, set_attention
from mmkv_hf.layers import CompressedLayer
from torch import Tensor
from transformers import PreTrainedModel

_PIXELS = ("pixel_values", "pixel_values_videos")
_UNLIMITED = 2**40


@dataclass(frozen=True, slots=True)
class Seen:
    """What one cache layer is given while a prompt is read.

    Attributes:
        keys: `[B, H, N, D]` after RoPE.
        values: `[B, H, N, Dv]`.
        query: `[B, Hq, N, D]` after RoPE.
        mask: bool `[B, 1, N, N]` as the attention function got it, or None for causal.
        scaling: Of the logits.
        softcap: Of the logits, or None.
        sums: What each key got of all queries' attention, and from how many, as the product's layers add it up. It
            costs ten times as much as any score, and is the same for all that need it.
    """

    keys: Tensor
    values: Tensor
    query: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    sums: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Recording:
    """A prompt that has been read.

    Attributes:
        length: Tokens read, padding included.
        layers: What each cache layer was given.
        logits: `[B, vocabulary]` at the last token.
        modality: int8 `[B, length]`, 1 where an image token stands; None when the model names no image token.
    """

    length: int
    layers: tuple[Seen, ...]
    logits: Tensor
    modality: Tensor | None


class _Recorder(CompressedLayer):
    """Takes in a prompt like any compressed layer and writes down what it would have compressed from."""

    call: tuple[Tensor, Tensor | None, float, float | None] | None = None

    def observe(self, reader: int, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> None:
        if reader != self.layer_idx or self.call is not None:
            raise ValueError("only models whose layers read their own keys, once, can be replayed")
        self.call = (query, mask, scaling, softcap)
        self._observe_columns(query, self._dense_slots(), mask, scaling, softcap)

    def recorded(self) -> Seen:
        if self.call is None or self._sums is None:
            raise ValueError(f"the attention of layer {self.layer_idx} did not reach mmkv's attention function")
        query, mask, scaling, softcap = self.call
        return Seen(self.keys, self.values, query, mask, scaling, softcap, self._sums)


class _Replayed(CompressedLayer):
    """A compressed layer that is told the column sums instead of adding them up again."""

    sums: tuple[Tensor, Tensor]

    def _observe_columns(
        self, query: Tensor, positions: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> None:
        if "column_sums" in self.group.pipeline.score.needs:
            self._sums = self.sums


@contextmanager
def observed(model: PreTrainedModel) -> Iterator[None]:
    """The model with the attention function of mmkv, as inside a session; `generate` itself stays stock."""
    before = model.config.get_text_config(decoder=True)._attn_implementation
    set_attention(model, "mmkv")
    try:
        yield
    finally:
        set_attention(model, before)


@torch.no_grad()
def record(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Recording:
    """Reads a prompt once; call it inside `observed(model)`.

    Args:
        model: A decoder whose layers all have full attention over keys of their own.
        inputs: Of `model(**inputs)`, padded on the left.

    Raises:
        ValueError: The model has other cache layers, which would need more than replaying calls.
    """
    length = inputs["input_ids"].shape[1]
    cache = CompressedCache(model, Pipeline.parse("h2o"), _UNLIMITED, prompt_length=length)
    if any(type(layer) is not CompressedLayer for layer in cache.layers):
        raise ValueError(f"{type(model).__name__} has cache layers without full self-attention; it cannot be replayed")
    recorders = [_Recorder(x.group, x.ordinal, x.layer_idx, x.last_reader) for x in cache.layers]
    cache.layers = list(recorders)
    logits = first_logits(model, inputs, cache)
    token = getattr(model.config, "image_token_id", None)
    modality = None if token is None else (inputs["input_ids"] == token).to(torch.int8)
    return Recording(length, tuple(layer.recorded() for layer in recorders), logits, modality)


@torch.no_grad()
def first_logits(model: PreTrainedModel, inputs: Mapping[str, Tensor], cache: CompressedCache) -> Tensor:
    """Reads a prompt into a cache: logits `[B, vocabulary]` at its last token.

    By `generate` and not by a forward pass: it knows the positions of padded rows, and later tokens go on from those.
    """
    settings = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    logits: Tensor = model.generate(**inputs, past_key_values=cache, **settings).logits[0]
    return logits


def replay(
    model: PreTrainedModel, recording: Recording, pipeline: str | Pipeline, budget: int | float | Budget
) -> CompressedCache:
    """The cache that this pipeline leaves of a recorded prompt, by the product's own code.

    Args:
        model: What the prompt was read with.
        recording: The prompt; it is not changed.
        pipeline: The method.
        budget: KV pairs per KV head.
    """
    parsed = Pipeline.parse(pipeline)
    modality = recording.modality if parsed.select.protect else None
    cache = CompressedCache(model, parsed, budget, prompt_length=recording.length, modality=modality)
    layers = [_Replayed(x.group, x.ordinal, x.layer_idx, x.last_reader) for x in cache.compressed_layers]
    cache.layers = list(layers)
    for layer, seen in zip(layers, recording.layers, strict=True):
        layer.sums = seen.sums
        layer.update(seen.keys, seen.values)
        cache.request.pending = None  # what the attention function says when the keys have reached it
        layer.observe(layer.layer_idx, seen.query, seen.mask, seen.scaling, seen.softcap)
    return cache


@torch.no_grad()
def answer(model: PreTrainedModel, inputs: Mapping[str, Tensor], cache: CompressedCache, new_tokens: int) -> Tensor:
    """Greedy tokens int64 `[B, <= new_tokens]`, every one of them, the first included, from the compressed cache.

    Stock `generate` runs what the cache has not seen of the prompt. A cache that has read all of it is cropped to its
    last token but one: the last prompt token is run again, on what is left.

    Args:
        model: The model, inside `observed(model)`.
        inputs: The whole prompt, also where the cache holds the first part of it.
        cache: From `replay`, or one that has answered before.
        new_tokens: Most tokens.
    """
    length = inputs["input_ids"].shape[1]
    cache.crop(-max(0, cache.get_seq_length() - (length - 1)))
    text = {name: value for name, value in inputs.items() if name not in _PIXELS}
    out: Tensor = model.generate(**text, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False)
    return out[:, length:]


def answer_after(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], cache: CompressedCache, first: Tensor, new_tokens: int
) -> Tensor:
    """Greedy tokens whose first one is given, as when it is read off the dense prefill: the usual protocol.

    Args:
        model: The model, inside `observed(model)`.
        inputs: The whole prompt.
        cache: From `replay`, with the whole prompt read and nothing answered yet.
        first: int64 `[B]`.
        new_tokens: Most tokens, the given one included; at least 2.

    Returns:
        int64 `[B, <= new_tokens]`.
    """
    length = inputs["input_ids"].shape[1]
    begun = dict(inputs)
    for name, fill in (("input_ids", first), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            column = torch.as_tensor(fill).to(inputs[name]).expand(len(first))[:, None]
            begun[name] = torch.cat([inputs[name], column], dim=1)
    text = {name: value for name, value in begun.items() if name not in _PIXELS}
    with torch.no_grad():
        out: Tensor = model.generate(**text, past_key_values=cache, max_new_tokens=new_tokens - 1, do_sample=False)
    return out[:, length:]

"""Everything that depends on the version of transformers, and what is read off a model or its config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

ATTENTION = "mmkv"
CHUNKS_LATER_TURNS = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23)
"""Whether `prefill_chunk_size` skips what the cache holds; before, the whole prompt was fed to it once more."""


def text_config(model_or_config: Any) -> Any:
    """The config of the language model that generates.

    Raises:
        ValueError: there is no decoder whose cache could be compressed.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "get_text_config"):
        raise ValueError(f"{type(model_or_config).__name__} is not a transformers model with a config")
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder model; mmkv compresses decoder-only caches")
    if not getattr(text, "num_attention_heads", None) or not getattr(text, "num_hidden_layers", None):
        raise ValueError(f"{config.model_type}: found no text decoder with attention layers to compress")
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"{text.model_type} caches one latent head (MLA); per-head eviction does not apply to it and is refused"
        )
    return text


def text_key(model: PreTrainedModel) -> str:
    """Name of the sub-config that holds the language model; "" when the model's own config does."""
    text = model.config.get_text_config(decoder=True)
    for key in model.config.sub_configs:
        if getattr(model.config, key, None) is text:
            return str(key)
    return ""


def attention_setting(model: PreTrainedModel) -> str:
    """The attention implementation of the language model."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Sets the attention implementation of the language model only; the vision tower keeps its own."""
    model.set_attn_implementation({text_key(model): name})
    if attention_setting(model) != name:
        raise ValueError(
            f"{type(model).__name__} does not let its attention implementation be set, so mmkv cannot see its keys"
        )


def arguments(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a forward pass was given, by name; a hook gets what stands by place without."""
    return {**dict(zip(signature(model.forward).parameters, args, strict=False)), **kwargs}


def modalities(config: Any, input_ids: Tensor | None, token_types: Tensor | None) -> Tensor | None:
    """[B, N] int8: 0 text, 1 image, 2 video; None when it cannot be told."""
    if input_ids is None:
        return None if token_types is None else token_types.to(torch.int8)
    found = torch.zeros_like(input_ids, dtype=torch.int8)
    for value, name in ((1, "image_token_id"), (2, "video_token_id")):
        token = getattr(config, name, None)
        if token is not None:
            found[input_ids == token] = value
    return found


def recomputes(model: PreTrainedModel) -> bool:
    """Whether layers run anew in the backward pass; 5.23 gave the setting a new name, and warns of the old one."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return bool(getattr(model, next(name for name in names if hasattr(type(model), name))))


@contextmanager
def attention_set(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The attention implementation of the language model, for as long as the context is open."""
    before = attention_setting(model)
    set_attention(model, name)
    try:
        yield
    finally:
        set_attention(model, before)


@contextmanager
def attributes_set(model: PreTrainedModel, **values: Any) -> Iterator[None]:
    """Attributes of this one instance, for as long as the context is open."""
    own = {name: vars(model)[name] for name in values if name in vars(model)}
    vars(model).update(values)
    try:
        yield
    finally:
        for name in values:
            vars(model).pop(name, None)
        vars(model).update(own)


def template_layers(config: Any) -> list[CacheLayerMixin]:
    """The cache layers transformers itself would use, one per layer of the decoder."""
    return list(DynamicCache(config=config).layers)


def is_full_attention(layer: CacheLayerMixin) -> bool:
    """True for a plain growing layer; sliding, linear and reading layers have classes of their own."""
    return type(layer) is DynamicLayer


def last_readers(config: Any) -> dict[int, int]:
    """Storing layer -> the last layer that reads its keys, for decoders that share KV between layers (Gemma 3n, 4)."""
    modes, types = _sharing_modes(config), getattr(config, "layer_types", None) or []
    stores = [i for i, mode in enumerate(modes) if mode == "store"]
    return {i: max([i, *(j for j, m in enumerate(modes) if m == "reuse" and types[j] == types[i])]) for i in stores}


def _sharing_modes(config: Any) -> list[str | None]:
    """What each layer does with its keys: "store" them for others, "reuse" another's, or None.

    Before 5.23 configs only say how many layers, the last ones, reuse what the last layer of their type stored.
    """
    if hasattr(config, "kv_sharing_modes"):
        return list(config.kv_sharing_modes)
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if not shared:
        return []
    own = list(config.layer_types[:-shared])
    stores = {len(own) - 1 - own[::-1].index(kind) for kind in own}
    return ["store" if i in stores else None for i in range(len(own))] + ["reuse"] * shared


def cross_layers(config: Any) -> frozenset[int]:
    """Layers that attend to the image instead of the text (Mllama)."""
    return frozenset(getattr(config, "cross_attention_layers", None) or ())

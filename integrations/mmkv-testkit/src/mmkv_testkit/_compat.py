"""What differs between models and versions of transformers (5.17 and newer), in one place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def register_attention(name: str, attention: Any) -> None:
    """Register an attention function whose masks are always materialised, as bool [B, 1, q, kv]."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _explicit_mask)


def _explicit_mask(*args: Any, **settings: Any) -> Tensor | None:
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(*args, **{**settings, **skips})
    return mask


def text_attention(model: Any) -> str:
    """Name of the attention function that the language model uses."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def set_text_attention(model: Any, name: str) -> None:
    """Make the language model, and only it, use the attention function `name`."""
    text = model.config.get_text_config(decoder=True)
    keys = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
    model.set_attn_implementation({keys[0]: name} if keys else name)


def shared_from(text: Any) -> dict[int, int]:
    """Layer whose keys and values each borrowing layer reads (Gemma 3n and 4), read off the configuration."""
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    first = text.num_hidden_layers - shared
    if not shared:
        return {}
    types = text.layer_types
    return {i: max(j for j in range(first) if types[j] == types[i]) for i in range(first, len(types))}


def cross_layers(text: Any) -> frozenset[int]:
    """Layers that attend to the image instead of the text (Mllama)."""
    return frozenset(getattr(text, "cross_attention_layers", None) or ())


def evictable_layers(text: Any) -> tuple[int, ...]:
    """Layers with a full cache of their own: no sliding window, no linear attention, nothing borrowed."""
    types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    borrowing = shared_from(text)
    return tuple(i for i, kind in enumerate(types) if kind == "full_attention" and i not in borrowing)

"""What a cache stores when lazy layers borrow their anchors' keys."""

from __future__ import annotations

from typing import Any

import torch
from mmkv_layershare import LazyPlan
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ._compat import template_layers, text_config
from .vision import Vision, VisionCache


class LazyLayer(CacheLayerMixin):  # type: ignore[misc]
    """A cache layer of a lazy attention layer: all values, and in visual mode the keys of text tokens.

    Attributes:
        vision: shared by the layers of a cache; None in global mode.
        values: [B, H, S, D].
        text_keys: [B, H, T, D], of each row's text tokens, right-aligned; T is the most that any row has.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, vision: Vision | None) -> None:
        super().__init__()
        self.vision = vision

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype, device and shapes from the first values."""
        self.dtype, self.device = value_states.dtype, value_states.device
        self.values, self.text_keys = value_states[:, :, :0].clone(), key_states[:, :, :0].clone()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends. The keys handed out are those of text tokens at their columns; the others mean nothing."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.values = torch.cat([self.values, value_states], dim=2)
        if self.vision is None:
            return key_states, self.values
        assert self.vision.seen is not None
        is_text, count = ~self.vision.seen, key_states.shape[2]
        if bool(is_text[:, -count:].all()):
            self.text_keys = torch.cat([self.text_keys, key_states], dim=2)
        else:
            before = spread(self.text_keys, is_text[:, :-count])
            self.text_keys = pack(torch.cat([before, key_states], dim=2), is_text)
        return spread(self.text_keys, is_text), self.values

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return int(self.values.shape[2]) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns a mask needs, and the first one."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the latest tokens, which are text."""
        count = abs(int(tokens_to_remove))
        if count and self.is_initialized:
            self.values = self.values[:, :, :-count].clone()
            self.text_keys = self.text_keys[:, :, :-count].clone()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given batch rows."""
        if self.is_initialized:
            self.values, self.text_keys = self.values[indices], self.text_keys[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues what row beam_idx[i] was."""
        if self.is_initialized:
            self.batch_select_indices(beam_idx.to(self.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch row."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.values), device=self.device).repeat_interleave(repeats))


def pack(keys: Tensor, is_text: Tensor) -> Tensor:
    """The entries of keys [B, H, S, D] where is_text [B, S], right-aligned: [B, H, T, D], T the most of any row."""
    most = int(is_text.sum(-1).max()) if is_text.numel() else 0
    order = is_text.to(torch.int8).argsort(dim=1, stable=True)[:, is_text.shape[1] - most :]
    return keys.gather(2, order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]))


def spread(packed: Tensor, is_text: Tensor) -> Tensor:
    """What `pack` gave, back at its columns: [B, H, S, D]; columns that are no text hold anything finite."""
    if not packed.shape[2]:
        return packed.new_zeros(*packed.shape[:2], is_text.shape[1], packed.shape[3])
    place = is_text.cumsum(-1) - 1 + packed.shape[2] - is_text.sum(-1, keepdim=True)
    index = place.clamp(min=0)[:, None, :, None].expand(-1, packed.shape[1], -1, packed.shape[3])
    return packed.gather(2, index)


class LazyCache(VisionCache):
    """A `past_key_values` that stores for lazy layers only what they cannot borrow. Works inside `share` alone.

    Args:
        model: the model, or its config.
        plan: which layers are lazy.
    """

    def __init__(self, model: Any, plan: LazyPlan) -> None:
        self.plan, self.vision = plan, Vision()
        layers = template_layers(text_config(model))
        for layer in plan.lazy:
            layers[layer] = LazyLayer(self.vision if plan.mode == "visual" else None)
        super().__init__(layers=layers)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the layers."""
        return [x for layer in self.layers for x in vars(layer).values() if isinstance(x, Tensor)]

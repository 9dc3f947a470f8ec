"""What a cache stores when lazy layers borrow their anchors' keys."""

from __future__ import annotations

from typing import Any

import torch
from mmkv_layershare import LazyPlan
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ._compat import template_layers, text_config

_TEXT, _VISION, _PADDING = range(3)
_FEW = 32
"""New tokens of a pass up to which vision and text are attended to apart; with more, joining them costs little."""


class Vision:
    """Which tokens of a conversation are vision tokens, and how the layers of a visual plan attend in this pass.

    Attributes:
        kinds: [B, S] int8, text, vision, or padding that is not stored; tokens of the pass under way included.
        is_plain: no vision token yet; everything is stored as text, padding too.
        only_text: the pass brings nothing but text.
        is_split: only text after vision, and little of it: vision and text are attended to apart.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.kinds: Tensor | None = None
        self.is_plain, self.only_text, self.is_split = True, True, False

    @property
    def seen(self) -> Tensor | None:
        """[B, S] bool, vision tokens."""
        return None if self.kinds is None else self.kinds == _VISION

    def extend(self, new: Tensor, padding: Tensor | None = None, *, may_split: bool = True) -> None:
        """A forward pass begins.

        Args:
            new: [B, n] bool, which of its tokens are vision tokens.
            padding: [B, n] bool, which nothing will ever attend to.
            may_split: whether vision and text may be attended to apart, which records no gradients.
        """
        kinds = new.to(torch.int8) * _VISION
        self.is_plain = self.is_plain and not bool(new.any())
        if padding is not None and not self.is_plain:
            kinds.masked_fill_(padding, _PADDING)
        self.only_text = not bool(kinds.any())
        self.is_split = may_split and self.only_text and not self.is_plain and new.shape[1] <= _FEW
        self.kinds = kinds if self.kinds is None else torch.cat([self.kinds, kinds], dim=1)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Vision tokens and stored text, [B, S] bool each."""
        assert self.kinds is not None
        return self.kinds == _VISION, self.kinds == _TEXT

    def rows(self, index: Tensor) -> None:
        """Keeps the given batch rows."""
        self.kinds = None if self.kinds is None else self.kinds[index.to(self.kinds.device)]


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """What the cache layers of a block have in common; `length` counts the tokens that reached the layer."""

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns a mask needs, and the first one."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.is_initialized, self.length = False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues what row beam_idx[i] was."""
        if self.is_initialized:
            self.batch_select_indices(beam_idx.to(self.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch row."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self._rows(), device=self.device).repeat_interleave(repeats))


class LazyLayer(_Layer):
    """A cache layer of a lazy layer in global mode: values [B, H, S, D] and no keys."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype, device and shapes from the first values."""
        self.dtype, self.device = value_states.dtype, value_states.device
        self.values, self.is_initialized = value_states[:, :, :0], True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends the values. The keys handed out are the new tokens' own, which nobody uses."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.length += value_states.shape[2]
        return key_states, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the latest tokens."""
        count = abs(int(tokens_to_remove))
        if count and self.is_initialized:
            self.values, self.length = self.values[:, :, :-count].clone(), self.length - count

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given batch rows."""
        if self.is_initialized:
            self.values = self.values[indices]

    def _rows(self) -> int:
        return len(self.values)


class BlockLayer(_Layer):
    """A cache layer of a visual block: vision tokens, which stay where they are until the next image, and text apart.

    Attributes:
        vision: shared by the layers of a cache.
        is_anchor: whether vision keys are stored; a lazy layer has only their values.
        vision_keys: [P, D], each row's vision tokens, row-major by (batch row, KV head); empty for lazy layers.
        vision_values: [P, Dv].
        text_keys: [B, H, T, D], each row's text tokens, right-aligned; T is the most that any row has.
        text_values: [B, H, T, Dv].
    """

    def __init__(self, vision: Vision, *, is_anchor: bool) -> None:
        super().__init__()
        self.vision, self.is_anchor = vision, is_anchor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype, device and shapes from the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.text_keys, self.text_values = key_states[:, :, :0], value_states[:, :, :0]
        self.vision_keys, self.vision_values = (x.new_empty(0, x.shape[-1]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends, and hands out keys and values of all tokens, or of text alone where the pass is split.

        Of a lazy layer's keys those of vision tokens mean nothing.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        vision, count = self.vision, key_states.shape[2]
        assert vision.kinds is not None
        self.length += count
        if vision.only_text:
            self.text_keys = torch.cat([self.text_keys, key_states], dim=2)
            self.text_values = torch.cat([self.text_values, value_states], dim=2)
            apart = vision.is_plain or vision.is_split
            return (self.text_keys, self.text_values) if apart else self._joined(vision.kinds)
        keys, values = self._joined(vision.kinds[:, :-count])
        keys, values = torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)
        self._store(keys, values, vision.kinds)
        return keys, values

    def _joined(self, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] of what is held, at their columns; kinds [B, S] are those of the same tokens."""
        keys, values = (spread(held, kinds == _TEXT) for held in (self.text_keys, self.text_values))
        columns = self._vision_of(kinds)
        values[columns] = self.vision_values
        if self.is_anchor:
            keys[columns] = self.vision_keys
        return keys, values

    def _store(self, keys: Tensor, values: Tensor, kinds: Tensor) -> None:
        """Takes keys and values [B, H, S, D] apart."""
        self.text_keys, self.text_values = (pack(x, kinds == _TEXT) for x in (keys, values))
        columns = self._vision_of(kinds)
        self.vision_values = values[columns]
        if self.is_anchor:
            self.vision_keys = keys[columns]

    def _vision_of(self, kinds: Tensor) -> Tensor:
        """[B, H, S] bool."""
        return (kinds == _VISION)[:, None].expand(-1, self.text_keys.shape[1], -1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the latest tokens, none of which is a vision token; `vision` still knows them."""
        count = abs(int(tokens_to_remove))
        if not count or not self.is_initialized:
            return
        self.length -= count
        assert self.vision.kinds is not None
        text = self.vision.kinds == _TEXT
        if not bool(text[:, -count:].all()):
            held = (spread(x, text)[:, :, :-count] for x in (self.text_keys, self.text_values))
            self.text_keys, self.text_values = (pack(x, text[:, :-count]) for x in held)
            return
        self.text_keys, self.text_values = (x[:, :, :-count].clone() for x in (self.text_keys, self.text_values))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given batch rows; `vision` still knows the rows as they were."""
        if not self.is_initialized:
            return
        assert self.vision.kinds is not None
        sizes = ((self.vision.kinds == _VISION).sum(1) * self.text_keys.shape[1]).tolist()
        order = torch.arange(len(sizes), device=indices.device)[indices].tolist()
        self.vision_values = _chosen(self.vision_values, sizes, order)
        if self.is_anchor:
            self.vision_keys = _chosen(self.vision_keys, sizes, order)
        self.text_keys, self.text_values = self.text_keys[indices], self.text_values[indices]

    def _rows(self) -> int:
        return len(self.text_keys)


def _chosen(held: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    """Chunks of held [P, D], of these sizes, in this order."""
    chunks = held.split_with_sizes(sizes)
    return torch.cat([chunks[i] for i in order])


def pack(keys: Tensor, is_text: Tensor) -> Tensor:
    """The entries of keys [B, H, S, D] where is_text [B, S], right-aligned: [B, H, T, D], T the most of any row."""
    columns = packed_columns(is_text)
    return keys.gather(2, columns[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]))


def packed_columns(is_text: Tensor) -> Tensor:
    """The columns [B, T] that `pack` takes; a row with fewer than T text tokens has columns of others before them."""
    most = int(is_text.sum(-1).max()) if is_text.numel() else 0
    return is_text.to(torch.int8).argsort(dim=1, stable=True)[:, is_text.shape[1] - most :]


def spread(packed: Tensor, is_text: Tensor) -> Tensor:
    """What `pack` gave, back at its columns: [B, H, S, D]; columns that are no text hold anything finite."""
    if not packed.shape[2]:
        return packed.new_zeros(*packed.shape[:2], is_text.shape[1], packed.shape[3])
    place = is_text.cumsum(-1) - 1 + packed.shape[2] - is_text.sum(-1, keepdim=True)
    index = place.clamp(min=0)[:, None, :, None].expand(-1, packed.shape[1], -1, packed.shape[3])
    return packed.gather(2, index)


class LazyCache(Cache):  # type: ignore[misc]
    """A `past_key_values` that stores for lazy layers only what they cannot borrow. Works inside `share` alone.

    Args:
        model: the model, or its config.
        plan: which layers are lazy.
    """

    def __init__(self, model: Any, plan: LazyPlan) -> None:
        self.plan, self.vision = plan, Vision()
        layers = template_layers(text_config(model))
        for layer in plan.lazy if plan.mode == "global" else ():
            layers[layer] = LazyLayer()
        for first, last in plan.blocks if plan.mode == "visual" else ():
            for layer in range(first, last + 1):
                layers[layer] = BlockLayer(self.vision, is_anchor=layer == first)
        super().__init__(layers=layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the latest tokens.

        Raises:
            ValueError: one of them is a vision token.
        """
        count, seen = abs(int(tokens_to_remove)), self.vision.seen
        if count and seen is not None and bool(seen[:, -count:].any()):
            raise ValueError(f"cannot remove {count} tokens: there are vision tokens among them")
        super().crop(tokens_to_remove)
        if count and self.vision.kinds is not None:
            self.vision.kinds = self.vision.kinds[:, :-count]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given batch rows."""
        super().batch_select_indices(indices)
        self.vision.rows(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search."""
        super().reorder_cache(beam_idx)
        self.vision.rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch row."""
        super().batch_repeat_interleave(repeats)
        if self.vision.kinds is not None:
            self.vision.kinds = self.vision.kinds.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        """Forgets everything."""
        self.vision.clear()
        super().reset()

    def tensors(self) -> list[Tensor]:
        """Every tensor of the layers."""
        return [x for layer in self.layers for x in vars(layer).values() if isinstance(x, Tensor)]

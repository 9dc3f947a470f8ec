"""What a cache stores when lazy layers borrow their anchors' keys."""

from __future__ import annotations

from typing import Any, Literal

import torch
from mmkv_layershare import LazyPlan
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ._compat import template_layers, text_config

_TAIL, _PREFIX, _PADDING = range(3)
_FEW = 32
"""New tokens of a pass up to which prefix and tail are attended to apart; with more, joining them costs little."""


class Layout:
    """How the layers of blocks lay out a conversation: a prefix that stays where it is, and a tail that grows.

    Visual mode: the prefix is the vision tokens, the tail the text, wherever each of them stands. Global mode: the
    prefix is what came with passes of many tokens, the tail what was generated.

    Attributes:
        kinds: [B, S] int8, tail, prefix, or padding that is not stored; tokens of the pass under way included.
        is_plain: no prefix yet; everything is stored in the tail, padding too.
        only_tail: the pass adds to the tail alone.
        is_split: and to few tokens of it, after a prefix: prefix and tail are attended to apart.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.kinds: Tensor | None = None
        self.is_plain, self.only_tail, self.is_split = True, True, False

    @property
    def prefix(self) -> Tensor | None:
        """[B, S] bool."""
        return None if self.kinds is None else self.kinds == _PREFIX

    def extend(self, new: Tensor, padding: Tensor | None = None, *, may_split: bool = True) -> None:
        """A forward pass begins.

        Args:
            new: [B, n] bool, which of its tokens go to the prefix.
            padding: [B, n] bool, which nothing will ever attend to.
            may_split: whether prefix and tail may be attended to apart, which records no gradients.
        """
        kinds = new.to(torch.int8) * _PREFIX
        self.is_plain = self.is_plain and not bool(new.any())
        if padding is not None and not self.is_plain:
            kinds.masked_fill_(padding.to(kinds.device), _PADDING)
        self.only_tail = not bool(kinds.any())
        self.is_split = may_split and self.only_tail and not self.is_plain and new.shape[1] <= _FEW
        self.kinds = kinds if self.kinds is None else torch.cat([self.kinds, kinds], dim=1)

    def hidden(self, mask: Any, count: int) -> Tensor | None:
        """[B, n] bool, which of `count` new tokens a mask [B, S] over all tokens hides; None where it is none.

        Raises:
            ValueError: it shows what an earlier one hid, which is not stored.
        """
        length = count + (0 if self.kinds is None else self.kinds.shape[1])
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != length:
            return None
        if self.kinds is not None:
            shown = mask[:, :-count].to(self.kinds.device) != 0
            if bool((shown & (self.kinds == _PADDING)).any()):
                raise ValueError("the attention mask shows tokens that it hid when they were read; they are not stored")
        return mask[:, -count:] == 0

    def parts(self) -> tuple[Tensor, Tensor]:
        """Prefix and tail, [B, S] bool each."""
        assert self.kinds is not None
        return self.kinds == _PREFIX, self.kinds == _TAIL

    def rows(self, index: Tensor) -> None:
        """Keeps the given batch rows."""
        self.kinds = None if self.kinds is None else self.kinds[index.to(self.kinds.device)]


def arrives_at_once(tokens: Tensor) -> Tensor:
    """[B, n] bool, for the prefix of global mode: whether these tokens [B, n, ...] of a pass are many."""
    return torch.full(tokens.shape[:2], tokens.shape[1] > _FEW, device=tokens.device)


Keys = Literal["all", "tail", "none"]
"""The keys a layer stores: an anchor all, a lazy layer those of text (visual mode) or none (global mode)."""


class BlockLayer(CacheLayerMixin):  # type: ignore[misc]
    """A cache layer of a block: prefix and tail apart, all values, and the keys it cannot borrow.

    Attributes:
        layout: shared by the layers of a cache.
        stores: which keys are stored.
        prefix_keys: [P, D], of each row's prefix, row-major by (batch row, KV head); empty unless all are stored.
        prefix_values: [P, Dv].
        tail_keys: [B, H, T, D], each row's tail, right-aligned; T is the most that any row has; or no entries.
        tail_values: [B, H, T, Dv].
        length: tokens that reached the layer.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, layout: Layout, stores: Keys) -> None:
        super().__init__()
        self.layout, self.stores, self.length = layout, stores, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype, device and shapes from the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        new = key_states, value_states
        self.tail_keys, self.tail_values = (x.new_empty(*x.shape[:2], 0, x.shape[-1]) for x in new)
        self.prefix_keys, self.prefix_values = (x.new_empty(0, x.shape[-1]) for x in new)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends, and hands out keys and values of all tokens, or of the tail where the pass is split.

        What is handed out in place of keys that are not stored means nothing.

        Raises:
            RuntimeError: the session did not see this pass, or an earlier one.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        layout, count = self.layout, key_states.shape[2]
        self.length += count
        kinds = self._checked(layout.kinds)
        if layout.only_tail:
            self.tail_values = torch.cat([self.tail_values, value_states], dim=2)
            if self.stores != "none":
                self.tail_keys = torch.cat([self.tail_keys, key_states], dim=2)
            if layout.is_plain or layout.is_split:
                return self.tail_keys, self.tail_values
            assert kinds is not None
            return self._joined(kinds)
        assert kinds is not None
        keys, values = self._joined(kinds[:, :-count])
        values = torch.cat([values, value_states], dim=2)
        if self.stores != "none":
            keys = torch.cat([keys, key_states], dim=2)
        self._store(keys, values, kinds)
        return keys, values

    def _checked(self, kinds: Tensor | None) -> Tensor | None:
        """What is known of the tokens that reached the layer; None in global mode before anything is."""
        if (kinds is None and self.stores == "tail") or (kinds is not None and kinds.shape[1] != self.length):
            raise RuntimeError("a LazyCache works inside `share` alone, given to the model and not to parts of it")
        return kinds

    def _joined(self, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] of what is held, at their columns; kinds [B, S] are those of the same tokens."""
        columns = self._prefix_of(kinds)
        values = spread(self.tail_values, kinds == _TAIL)
        values[columns] = self.prefix_values
        if self.stores == "none":
            return self.tail_keys, values
        keys = spread(self.tail_keys, kinds == _TAIL)
        if self.stores == "all":
            keys[columns] = self.prefix_keys
        return keys, values

    def _store(self, keys: Tensor, values: Tensor, kinds: Tensor) -> None:
        """Takes keys and values [B, H, S, D] apart."""
        columns = self._prefix_of(kinds)
        self.tail_values, self.prefix_values = pack(values, kinds == _TAIL), values[columns]
        if self.stores != "none":
            self.tail_keys = pack(keys, kinds == _TAIL)
        if self.stores == "all":
            self.prefix_keys = keys[columns]

    def _prefix_of(self, kinds: Tensor) -> Tensor:
        """[B, H, S] bool."""
        return (kinds == _PREFIX)[:, None].expand(-1, self.tail_values.shape[1], -1)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns a mask needs, and the first one."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the latest tokens; `layout` still knows them."""
        count = abs(int(tokens_to_remove))
        if not count or not self.is_initialized:
            return
        self.length -= count
        kinds = self.layout.kinds
        if kinds is not None and bool((kinds[:, -count:] != _TAIL).any()):
            keys, values = (x[:, :, :-count] for x in self._joined(kinds))
            self._store(keys, values, kinds[:, :-count])
        else:
            self.tail_keys, self.tail_values = (x[:, :, :-count].clone() for x in (self.tail_keys, self.tail_values))

    def reset(self) -> None:
        """Forgets everything."""
        self.is_initialized, self.length = False, 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given batch rows; `layout` still knows the rows as they were."""
        if not self.is_initialized:
            return
        rows = torch.arange(len(self.tail_values), device=indices.device)[indices].tolist()
        if self.layout.kinds is not None:
            sizes = ((self.layout.kinds == _PREFIX).sum(1) * self.tail_values.shape[1]).tolist()
            self.prefix_values = _chosen(self.prefix_values, sizes, rows)
            if self.stores == "all":
                self.prefix_keys = _chosen(self.prefix_keys, sizes, rows)
        self.tail_keys, self.tail_values = self.tail_keys[rows], self.tail_values[rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch row."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.tail_values)).repeat_interleave(repeats))


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
        self.plan, self.layout = plan, Layout()
        layers = template_layers(text_config(model))
        lazy: Keys = "none" if plan.mode == "global" else "tail"
        for first, last in plan.blocks:
            for layer in range(first, last + 1):
                layers[layer] = BlockLayer(self.layout, "all" if layer == first else lazy)
        super().__init__(layers=layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the latest tokens.

        Raises:
            ValueError: one of them is a vision token, in visual mode.
        """
        count, prefix = abs(int(tokens_to_remove)), self.layout.prefix
        if self.plan.mode == "visual" and count and prefix is not None and bool(prefix[:, -count:].any()):
            raise ValueError(f"cannot remove {count} tokens: there are vision tokens among them")
        super().crop(tokens_to_remove)
        if count and self.layout.kinds is not None:
            self.layout.kinds = self.layout.kinds[:, :-count]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given batch rows."""
        super().batch_select_indices(indices)
        self.layout.rows(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search."""
        super().reorder_cache(beam_idx)
        self.layout.rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch row."""
        super().batch_repeat_interleave(repeats)
        if self.layout.kinds is not None:
            self.layout.kinds = self.layout.kinds.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        """Forgets everything."""
        self.layout.clear()
        super().reset()

    def tensors(self) -> list[Tensor]:
        """Every tensor of the layers."""
        return [x for layer in self.layers for x in vars(layer).values() if isinstance(x, Tensor)]

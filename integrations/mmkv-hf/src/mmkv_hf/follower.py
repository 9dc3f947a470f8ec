"""Lazy layers of a cache that evicts: they keep what their anchor keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from mmkv_select import Kept, RaggedKV, compact
from torch import Tensor

from .layers import CompressedLayer
from .vision import Vision
from .weak import Owner

_NOT_FIRST = -1


class FollowerLayer(CompressedLayer):
    """A lazy layer of a `CompressedCache`: its own values at its anchor's slots, and in visual mode its own text keys.

    The anchor decides once for the whole block, after its last reader. In visual mode this layer keeps its own keys of
    those text tokens that the anchor keeps; vision tokens are read from the anchor's keys.

    Args:
        anchor: whose attention is borrowed.
        layer_idx: index in the model.
        vision: which tokens are vision tokens; None in global mode, where no keys are stored.
    """

    def __init__(self, anchor: CompressedLayer, layer_idx: int, vision: Vision | None) -> None:
        super().__init__(anchor.group, _NOT_FIRST, layer_idx, anchor.last_reader)
        self._leader = Owner(anchor)
        self.vision = vision
        anchor.followers.append(self)

    def _empty(self) -> None:
        super()._empty()
        self._text: RaggedKV | None = None
        self._width = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends the values, and in visual mode the keys, of which those of vision tokens go once a prompt is read.

        Raises:
            RuntimeError: see `CompressedLayer.update`.
            ValueError: likewise.
        """
        self._width = key_states.shape[-1]
        return super().update(key_states if self.vision is not None else key_states[..., :0], value_states)

    @property
    def reading(self) -> bool:
        """Whether the anchor is being observed."""
        return self._leader().reading

    def observe(self, reader: int, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> None:
        """The anchor learns that one more of its readers has run."""
        self._leader().observe(reader, query, mask, scaling, softcap)

    def follow(self, kept: Kept) -> None:
        """Keeps what the anchor keeps.

        Args:
            kept: of the entries of the prompt, without its last token.
        """
        keys, values, slots = self._prompt_entries(self.group.request.prompt_end)
        start = self._tail_start
        prefix = compact(keys, values, slots, kept)
        self._text = None if self.vision is None else _only(prefix, self._is_text(prefix))
        self.prefix, self.columns = replace(prefix, keys=prefix.keys[:, :0].clone()), None
        self.keys, self.values = self.keys[:, :, start:].clone(), self.values[:, :, start:].clone()

    @property
    def attended(self) -> RaggedKV | None:
        """The prefix with keys: the anchor's, in visual mode those of vision tokens only."""
        if self.prefix is None:
            return None
        lent = self._leader().prefix
        assert lent is not None
        keys = lent.keys
        if self._text is not None:
            keys = keys.clone()
            keys[self._is_text(lent)] = self._text.keys
        return replace(self.prefix, keys=keys)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `CompressedLayer.entries`; without keys in global mode."""
        prefix = self.attended
        if prefix is None:
            return super().entries()
        keys, values, slots = prefix.padded()
        slots = torch.cat([slots, self._dense_slots()[:, None].expand(*slots.shape[:2], -1)], dim=-1)
        keys = keys if self.vision is not None else keys[..., :0]
        return torch.cat([keys, self.keys], dim=2), torch.cat([values, self.values], dim=2), slots

    def tensors(self) -> list[Tensor]:
        """Every tensor this layer holds."""
        return super().tensors() + ([] if self._text is None else list(self._text.tensors()))

    @property
    def bytes_full(self) -> int:
        """Bytes a stock layer would hold after the same tokens."""
        return self._leader().bytes_full

    def _apply(self, dense: Any, ragged: Any) -> None:
        super()._apply(dense, ragged)
        self._text = None if self._text is None else ragged(self._text)

    def _is_text(self, held: RaggedKV) -> Tensor:
        """[T] bool: which entries are text."""
        assert self.vision is not None
        assert self.vision.seen is not None
        rows = torch.arange(held.shape[0], device=held.slots.device).repeat_interleave(held.lengths.sum(-1))
        return ~self.vision.seen[rows, held.slots.long()]


def _only(held: RaggedKV, chosen: Tensor) -> RaggedKV:
    """The keys of the chosen entries [T] bool, without values."""
    owners = torch.arange(held.lengths.numel(), device=chosen.device).repeat_interleave(held.lengths.flatten())
    lengths = owners[chosen].bincount(minlength=held.lengths.numel())
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    keys = held.keys[chosen]
    return RaggedKV(keys, keys.new_empty(len(keys), 0), held.slots[chosen], cu_seqlens, held.shape)

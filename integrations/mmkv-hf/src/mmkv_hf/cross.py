"""Cross-attention layers of Mllama, whose entries are image tokens."""

from __future__ import annotations

from typing import Any

import torch
from mmkv_select import Kept, compact
from torch import Tensor

from .handle import marked
from .layers import CompressedLayer
from .window import WindowRows


class CrossLayer(CompressedLayer):
    """A cross-attention layer of Mllama: filled once from the image, then read as `.keys` without an `update`.

    Its entries are image tokens, so nothing is recent: no entry is protected and there is no tail.
    """

    _dense = ("_keys", "_values")

    def _empty(self) -> None:
        super()._empty()
        self._full = self._images = 0

    @property  # type: ignore[override]
    def keys(self) -> Tensor | None:
        """What is held, marked so that attention finds this layer; never empty, as Mllama asks for its size."""
        held = self._keys if self.prefix is None else self.prefix.keys[None, None]
        return None if held is None else marked(held, self)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._keys = value

    @property  # type: ignore[override]
    def values(self) -> Tensor | None:
        """See `keys`."""
        return self._values if self.prefix is None else self.prefix.values[None, None]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._values = value

    @property
    def reading(self) -> bool:
        """Whether the prompt that brought the image is still being read."""
        return self.is_initialized and not self._done_at

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes the keys and values of the image."""
        if self.is_initialized:
            raise RuntimeError(
                "a CompressedCache takes the images of a cross-attention model once, with the first prompt"
            )
        self._keys, self._values, self.is_initialized = key_states, value_states, True
        self._full, self._images = key_states.nbytes + value_states.nbytes, key_states.shape[2]
        self.dtype, self.device = key_states.dtype, key_states.device
        return self.keys, self.values  # type: ignore[return-value]

    def get_seq_length(self) -> int:
        """Text tokens that have read this layer."""
        return self.group.request.seen if self.is_initialized else 0

    @property
    def bytes_full(self) -> int:
        """Bytes a stock layer would hold for the images."""
        return self._full

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: text tokens are not in here."""

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image keys, values and their columns; see `CompressedLayer.entries`."""
        if self.prefix is not None:
            return self.prefix.padded()
        assert self._keys is not None
        assert self._values is not None
        columns = torch.arange(self._keys.shape[2], device=self._keys.device)
        return self._keys, self._values, columns[None, None].expand(self._keys.shape[0], -1, -1)

    def observe(self, reader: int, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> None:
        """Takes in text queries; compresses once the prompt has been read. mask [B, 1, n, images' tokens] or None."""
        if mask is None:
            mask = query.new_ones(query.shape[0], 1, query.shape[2], self._images, dtype=torch.bool)
        request = self.group.request
        positions = mask[:, 0].any(-1).long() - 1
        if request.padding is not None:  # Mllama lets padding see every image
            positions = positions.masked_fill(request.padding, -1)
        rows = WindowRows(query.detach(), positions, mask)
        self._rows = (rows if self._rows is None else self._rows.then(rows, self._size)).last(self._size)
        if self.layer_idx == request.last_layer:
            request.padding = None
        if request.seen >= request.prompt_end:
            self._compress(mask[:, 0].any(1), scaling, softcap)

    @property
    def kept(self) -> Tensor | None:
        """[B, H] int64, image entries that are held; None while all are."""
        return None if self.prefix is None else self.prefix.lengths

    @property
    def _size(self) -> int:
        return max(1, self.group.pipeline.window)

    def _prompt_entries(self, seen: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.entries()

    def _columns(self, slots: Tensor) -> int:
        return self._images

    def _protect(self, slots: Tensor) -> Tensor | None:
        return None

    def _store(self, keys: Tensor, values: Tensor, slots: Tensor, kept: Kept, padding: Tensor) -> None:
        self.prefix = compact(keys, values, slots, kept)
        self._keys = self._values = None

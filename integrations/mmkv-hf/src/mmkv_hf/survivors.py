"""What layers that hold a part of the prompt need beside it: numbers, windows, and features added on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from ._compat import template_layers, text_config
from .weak import Owner


class Held(NamedTuple):
    """Columns of the prompt that a layer holds.

    Attributes:
        columns: [B, K] int64.
        real: [B, K] bool; False: a filler, in rows that hold fewer.
        length: N, columns of the prompt.
        moved: [B] int64, how far positions after the prompt are from the model's; None: positions are kept.
    """

    columns: Tensor
    real: Tensor
    length: int
    moved: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing, so that all columns stand at their places."""
        return self.columns.shape[1] == self.length and bool(self.real.all())

    def without_last(self, count: int) -> Held:
        """The same without the last `count` columns, which the cache has been made to forget (assisted decoding)."""
        if count <= 0:
            return self
        return self._replace(columns=self.columns[:, :-count], real=self.real[:, :-count], length=self.length - count)

    def chosen(self, rows: Tensor | int) -> Held:
        """The same for the given batch rows, or for each row so many times."""
        every = torch.arange(len(self.columns), device=self.columns.device)
        index = every.repeat_interleave(rows) if isinstance(rows, int) else every[rows.to(every.device)]
        moved = None if self.moved is None else self.moved[index]
        return self._replace(columns=self.columns[index], real=self.real[index], moved=moved)


HELD = "_mmkv_held"
"""Where a cache has what its layers hold: on itself, so that copies of it know as well."""
_ROWS = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")


def follow(cache: Any, held: dict[int, Held]) -> None:
    """Notes what the layers of a cache hold, whichever rows it is made to keep."""
    vars(cache)[HELD] = held
    for name in _ROWS:
        vars(cache)[name] = _Followed(cache, name)


class _Followed:
    """A cache's operation on rows, which what is known of them follows."""

    def __init__(self, cache: Any, name: str) -> None:
        self._cache, self._name = Owner(cache), name

    def __call__(self, rows: Any) -> None:
        cache = self._cache()
        getattr(type(cache), self._name)(cache, rows)
        vars(cache)[HELD] = {layer: held.chosen(rows) for layer, held in vars(cache)[HELD].items()}


def check_numbering(model: PreTrainedModel) -> None:
    """Refuses a model whose survivors have no one way to be numbered anew.

    Raises:
        ValueError: see above.
    """
    rope = getattr(text_config(model), "rope_parameters", None) or {}
    name = type(model).__name__
    if "mrope_section" in rope:
        raise ValueError(
            f"positions='reindex': {name} has positions in time, height and width (M-RoPE), which have no order to be "
            "numbered in; use positions='keep'"
        )
    if any(isinstance(value, dict) for value in rope.values()) or not hasattr(model.get_decoder(), "rotary_emb"):
        raise ValueError(
            f"positions='reindex': {name} has no one rotary embedding for all layers; use positions='keep'"
        )


def numbered_prompt(
    rotary: nn.Module, held: Held, first: Tensor, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A layer's arguments for what it holds of the prompt, numbered anew from each row's `first` [B, 1] position on."""
    ids = first + (held.real.cumsum(-1) - 1).clamp(min=0)
    return {**kwargs, "position_ids": ids, "position_embeddings": rotary(hidden, ids)}


def numbered_later(rotary: nn.Module, held: Held, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A layer's arguments after the prompt, with positions that go on from its own."""
    assert held.moved is not None
    ids = positions(kwargs) - held.moved[:, None]
    return {**kwargs, "position_ids": ids, "position_embeddings": rotary(hidden, ids)}


def numbering(held: Held, ids: Tensor, valid: Tensor) -> tuple[Tensor, Held]:
    """The first position [B, 1] of each row, and `held` with what positions after the prompt are to be moved by.

    Args:
        held: what is to be numbered anew.
        ids: [1 or B, N] positions of the whole prompt.
        valid: [B, N] bool, real tokens.
    """
    ids = ids.expand(valid.shape)
    first = ids.masked_fill(~valid, torch.iinfo(ids.dtype).max).amin(1, keepdim=True)
    last = ids.gather(1, held.columns[:, -1:])
    return first, held._replace(moved=(last - first)[:, 0] + 1 - held.real.sum(-1))


def positions(kwargs: dict[str, Any]) -> Tensor:
    """The positions [1 or B, n] that a layer is told.

    Raises:
        ValueError: it is not told any.
    """
    ids = kwargs.get("position_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError("positions='reindex': this model does not tell its layers the positions; use positions='keep'")
    return ids


def windows_of(model: PreTrainedModel) -> list[int | None]:
    """The sliding window of each layer; None: the layer sees everything before, or is of another kind."""
    config = text_config(model)
    kinds = getattr(config, "layer_types", None)
    return [
        layer.sliding_window if _slides(layer) and (kinds is None or kinds[i] == "sliding_attention") else None
        for i, layer in enumerate(template_layers(config))
    ]


def _slides(layer: CacheLayerMixin) -> bool:
    return type(layer) is DynamicSlidingWindowLayer


def later_mask(
    held: Held, layer: CacheLayerMixin, new: int, window: int | None, valid: Tensor | None, *, device: torch.device
) -> Tensor:
    """What `new` tokens after the prompt see of a layer's keys, [B, 1, new, keys] bool, by their columns.

    The masks that models make count what the first layer of a kind holds. A layer that slides holds the last
    `window - 1` of what came this far, which lie further apart than columns do.

    Args:
        held: what it held of the prompt.
        layer: its cache, before the new tokens are added.
        new: number of new tokens.
        window: how far it sees; None: everything.
        valid: [B, columns so far] bool, which columns are no padding, of a prompt before its images were reduced; None:
            all after the prompt.
        device: of the mask.
    """
    cached = layer.get_seq_length()
    end = held.length + cached - held.columns.shape[1]
    after = torch.arange(held.length, end + new, device=device).expand(len(held.columns), -1)
    real = torch.ones_like(after, dtype=torch.bool) if valid is None else valid[:, -after.shape[1] :]
    columns, real = torch.cat([held.columns, after], 1), torch.cat([held.real, real], 1)
    asking = torch.arange(end, end + new, device=device)[:, None]
    if window is None:
        return ((columns[:, None] <= asking) & real[:, None])[:, None]
    keys = window - 1 + new
    columns, real = columns[:, None, -keys:], real[:, None, -keys:]
    return ((columns <= asking) & (columns > asking - window) & real)[:, None]


class Deepstack:
    """Vision features that a model adds after its first layers, where layers in between drop tokens.

    Attributes:
        added: [B, N, D] for each of those layers, 0 for text.
    """

    def __init__(self, like: Tensor, places: Tensor, features: list[Tensor]) -> None:
        self.added = [like.new_zeros(like.shape).masked_scatter(places[..., None], x.to(like)) for x in features]

    def add(self, index: int, held: Held, hidden: Tensor) -> Tensor:
        """What layer `index` puts out [B, K, D], with the features of the columns it holds."""
        if index >= len(self.added):
            return hidden
        return hidden + self.added[index].gather(1, held.columns[..., None].expand(hidden.shape))

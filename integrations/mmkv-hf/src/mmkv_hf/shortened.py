"""Prompts of which the language model is given some columns only, and the conversations that begin with them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from mmkv_prune import kept_columns
from torch import Tensor

from .weak import Owner


class Shortened(NamedTuple):
    """Columns of the prompt that the language model was given.

    Attributes:
        columns: [B, K] int64.
        real: [B, K] bool; False: a filler, on the left of rows that were given fewer.
        length: N, columns of the prompt.
        moved: [B] int64, how many real tokens of each row were left out.
    """

    columns: Tensor
    real: Tensor
    length: int
    moved: Tensor

    @classmethod
    def without(cls, free: Tensor, mask: Any) -> Shortened:
        """A prompt without the columns `free` [B, N] bool, and without its padding where no row needs the place.

        Args:
            free: columns where no token stands.
            mask: [B, N] of the prompt, 0 for padding; None: there is none.

        Raises:
            ValueError: a mask of another kind.
        """
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != free.shape):
            raise ValueError(
                f"reducing images needs an attention mask [B, N], not {getattr(mask, 'shape', type(mask).__name__)}; "
                "leave cache_implementation and masks of your own out"
            )
        valid = torch.ones_like(free) if mask is None else mask.bool()
        columns, real = kept_columns(valid & ~free)
        # Cloned: what is a part of all columns in order would keep them all as long as the cache.
        return cls(columns.clone(), real, free.shape[1], (valid & free).sum(-1))

    @property
    def missing(self) -> int:
        """N - K, by how much the conversation is shorter from here on."""
        return self.length - self.columns.shape[1]

    def rows(self, index: Tensor) -> Shortened:
        """The same for the given batch rows."""
        columns, real, moved = (x[index.to(x.device)] for x in (self.columns, self.real, self.moved))
        return Shortened(columns, real, self.length, moved)

    def repeated(self, batch: int) -> Shortened:
        """The same for a batch in which every row stands several times."""
        rows = torch.arange(len(self.columns), device=self.columns.device)
        return self.rows(rows.repeat_interleave(batch // len(self.columns)))

    def of(self, x: Tensor) -> Tensor:
        """What x [P, W] says of a conversation's columns, for those that were given: [B, W - N + K], 0 for fillers.

        P divides B: `generate` repeats every prompt for its beams or samples. What follows the prompt stays; where W is
        less than N, the last N - W columns of the prompt were drafts that x does not know of.

        Raises:
            ValueError: P does not divide B.
        """
        times, rest = divmod(len(self.columns), len(x))
        if rest:
            raise ValueError(f"modality, mask or protect have {len(x)} rows, the batch has {len(self.columns)}")
        x = x.repeat_interleave(times, 0)
        count = self.columns.shape[1] - max(0, self.length - x.shape[1])
        given = x.gather(1, self.columns[:, :count]).masked_fill(~self.real[:, :count], 0)
        return torch.cat([given, x[:, self.length :]], 1)

    def first(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The language model's arguments for the prompt, cut to what it is given.

        Raises:
            ValueError: there is something among them that nobody knows how to cut.
        """
        embeds, ids = kwargs["inputs_embeds"], kwargs.get("position_ids")
        changed = {
            "inputs_embeds": embeds.gather(1, self._rows_of(embeds)).masked_fill(~self.real[..., None], 0.0),
            "attention_mask": None if bool(self.real.all()) else self.real.long(),
            "position_ids": None if ids is None else self._positions(ids),
        }
        for name, value in kwargs.items():
            if name not in changed and isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == self.length:
                raise ValueError(f"this model's language model takes {name}, which cannot be cut yet")
        return {**kwargs, **changed}

    def later(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments after the prompt, as for a conversation of what was given.

        Raises:
            ValueError: a mask that is not [B, columns so far].
        """
        new = kwargs["inputs_embeds"]
        given = self.repeated(len(new))
        changed: dict[str, Any] = {}
        mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is None and not bool(given.real.all()):
            past = kwargs["past_key_values"].get_seq_length() + given.missing
            mask = new.new_ones(len(new), past + new.shape[1], dtype=torch.long)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise ValueError("reducing images needs an attention mask [B, N]; leave cache_implementation out")
            changed["attention_mask"] = given.of(mask)
        if ids is not None and ids.ndim == 2:
            changed["position_ids"] = ids - given.moved[:, None]
        elif ids is not None and len(ids) == 4:
            changed["position_ids"] = torch.cat([ids[:1] - given.moved[:, None], ids[1:]])
        return {**kwargs, **changed}

    def restored(self, hidden: Tensor) -> Tensor:
        """The language model's output [B, K, D] with a row for every column, zeros for those left out."""
        whole = hidden.new_zeros(len(hidden), self.length, hidden.shape[-1])
        return whole.scatter(1, self._rows_of(hidden), hidden.masked_fill(~self.real[..., None], 0.0))

    def _rows_of(self, x: Tensor) -> Tensor:
        """The index [B, K, D] of rows of x [B, N, D]."""
        return self.columns[..., None].expand(-1, -1, x.shape[-1])

    def _positions(self, ids: Tensor) -> Tensor:
        """Position ids of what is given: counted anew, or with M-RoPE [3, B, N] or [4, B, N] kept."""
        anew = (self.real.cumsum(-1) - 1).clamp(min=0)
        if ids.ndim == 2:
            return anew
        kept = ids.expand(-1, len(self.columns), -1).gather(-1, self.columns.expand(len(ids), -1, -1))
        return torch.cat([anew[None], kept[1:]]) if len(ids) == 4 else kept  # the first of four numbers the columns


@runtime_checkable
class Stage(Protocol):
    """What works on a prompt that the language model was given fewer columns of, and noted all of them before."""

    def shorten(self, given: Shortened, cache: Any) -> None:
        """The language model begins to read a prompt, of which it is `given` these columns, into this cache or none."""
        ...


class Length:
    """`get_seq_length` of a cache that holds fewer columns than its prompt had.

    `generate` cuts what is new off a conversation by it, and Qwen2-VL counts positions; the language model has to know
    what is really there.

    Attributes:
        shortened: what the language model was given of the prompt.
        inside: whether the language model is running.
    """

    def __init__(self, cache: Any, shortened: Shortened) -> None:
        self._cache = Owner(cache)
        self.shortened, self.inside = shortened, False

    def __call__(self, layer_idx: int = 0) -> int:
        cache = self._cache()
        held: int = type(cache).get_seq_length(cache, layer_idx)
        return held if self.inside or not held else held + self.shortened.missing

    def put(self) -> None:
        """The cache counts so from here on."""
        vars(self._cache())["get_seq_length"] = self


def length_of(cache: Any) -> Length | None:
    """How a cache counts, where it holds fewer columns than its prompt had."""
    found = None if cache is None else vars(cache).get("get_seq_length")
    return found if isinstance(found, Length) else None


def shortened_of(cache: Any) -> Shortened | None:
    """What the language model was given of the prompt in this cache; None: all of it, or the cache is empty."""
    length = length_of(cache)
    return length.shortened if length is not None and cache.get_seq_length() else None


def forget(cache: Any) -> None:
    """An empty cache counts as it did before it was ever filled."""
    if length_of(cache) is not None:
        del vars(cache)["get_seq_length"]

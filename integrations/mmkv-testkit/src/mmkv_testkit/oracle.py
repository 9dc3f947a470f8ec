"""The independent truth: a model with its full stock cache whose KV heads are forbidden to see evicted columns.

Nothing is removed here and nothing is fast. What a compressed cache computes must equal what this computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmkv_testkit._compat import (
    cross_layers,
    evictable_layers,
    register_attention,
    set_text_attention,
    shared_from,
    text_attention,
)

__all__ = [
    "NAME",
    "Attend",
    "MaskedDense",
    "Round",
    "attending",
    "dense_attention",
    "random_keep",
    "visible_to",
    "weighed",
    "weights",
]

NAME = "mmkv_by_hand"

Keep = Mapping[int, Tensor]
Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor | None, float, float | None], Tensor]
"""`attend(layer, query, key, value, mask, scaling, softcap)` -> [B, Hq, q, Dv]; see `weights` for the shapes."""
_ACTIVE: dict[int, Attend] = {}


@dataclass(frozen=True, slots=True)
class Round:
    """One eviction: queries at logical columns >= `from_query` see of `keep[layer]`'s columns only the kept ones.

    `keep[layer]` is bool [B, H, N], N the columns the layer held then (for Mllama's cross-attention layers: image
    columns). Columns from N on and layers not named stay visible. Columns count padding.
    """

    keep: Keep
    from_query: int


class MaskedDense:
    """Context in which `model` attends as if each KV head had lost what it did not keep.

    Run the model inside with its stock cache (or none given to `generate`). Several rounds may be given, as for a
    second turn; what one of them evicted stays evicted. Grouped rows (beams, `num_return_sequences`) use their
    prompt's `keep`. Layers that borrow keys (Gemma 3n and 4) use the lending layer's. Attention runs in float32, or
    float64 for a model in float64, where rounding cannot hide a difference.

    Example:
        >>> with MaskedDense(model, keep, from_query=prompt_length):
        ...     expected = greedy(model, inputs)

    Args:
        model: A model of transformers.
        keep: Kept columns per layer, bool [B, H, N]; or a list of rounds.
        from_query: First logical column whose query sees less, by default the first after `keep`'s N columns;
            refused with rounds, which have their own.
    """

    def __init__(self, model: Any, keep: Keep | Sequence[Round], *, from_query: int | None = None) -> None:
        self.model = model
        self.text = model.config.get_text_config(decoder=True)
        self.masked_calls = 0
        """Attention calls so far in which some query saw less."""
        self._cross = cross_layers(self.text)
        self._shared_from = shared_from(self.text)
        self.rounds = _as_rounds(keep, from_query, self._cross)
        self._end = 0
        for round_ in self.rounds:
            self._check(round_.keep)

    def __enter__(self) -> MaskedDense:
        self._context = attending(self.model, self._attend)
        self._context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, error, trace)

    def _attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        return dense_attention(query, key, value, self.visible(layer, query, key, mask), scaling, softcap)

    def _check(self, keep: Keep) -> None:
        allowed, heads = evictable_layers(self.text), self.text.num_key_value_heads
        for layer, kept in keep.items():
            if layer not in allowed:
                raise ValueError(f"layer {layer} holds no full cache of its own; layers that do: {allowed}")
            if kept.dtype != torch.bool or kept.ndim != 3:
                raise ValueError(f"keep[{layer}] must be bool [B, H, N], is {kept.dtype} {tuple(kept.shape)}")
            if heads != kept.shape[1] and not hasattr(self.text, "num_global_key_value_heads"):
                raise ValueError(f"keep[{layer}] has {kept.shape[1]} heads, the model {heads} KV heads")

    def visible(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """What each query of one layer may see, bool [B or 1, H or 1, q, k]; `mask` is the model's own rule."""
        queries, columns = query.shape[-2], key.shape[-2]
        if layer not in self._cross:  # cross layers hold image columns: their queries stand where the last layer's did
            self._end = columns
        rows = torch.arange(self._end - queries, self._end, device=query.device)
        visible = visible_to(rows, columns, mask, everything=layer in self._cross)
        for round_ in self.rounds:
            kept = round_.keep.get(self._shared_from.get(layer, layer))
            late = rows >= round_.from_query
            if kept is not None and bool(late.any()):
                self.masked_calls += 1
                visible = visible & (_fit(kept, len(query), columns).to(query.device) | ~late[:, None])
        return visible


def random_keep(
    model: Any, inputs: Mapping[str, Tensor], share: float = 0.5, *, recent: int = 4, seed: int = 0
) -> dict[int, Tensor]:
    """A random ragged keep [B, H, N] for every evictable self-attention layer: `share` of the tokens on average.

    Padding is never kept, the last `recent` tokens always are. Mllama's image layers are left whole.
    """
    text = model.config.get_text_config(decoder=True)
    valid = inputs["attention_mask"].bool()[:, None]
    to_come = valid.flip(-1).cumsum(-1).flip(-1)
    protected = valid & (to_come <= recent)
    generator = torch.Generator().manual_seed(seed)
    shape = (valid.shape[0], text.num_key_value_heads, valid.shape[-1])
    layers = [i for i in evictable_layers(text) if i not in cross_layers(text)]
    return {i: protected | (valid & (torch.rand(shape, generator=generator) < share)) for i in layers}


@contextmanager
def attending(model: Any, attend: Attend) -> Iterator[None]:
    """A context in which the layers of the language model attend by a function of yours.

    Raises:
        RuntimeError: the model is inside another one.
    """
    text = model.config.get_text_config(decoder=True)
    if id(text) in _ACTIVE:
        raise RuntimeError("the attention of this model is another function's already")
    before = text_attention(model)
    set_text_attention(model, NAME)
    _ACTIVE[id(text)] = attend
    try:
        yield
    finally:
        del _ACTIVE[id(text)]
        set_text_attention(model, before)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float, cap: float | None
) -> Tensor:
    """Attention [B, Hq, q, Dv]; see `weights`."""
    return weighed(weights(query, key, visible, scaling, cap), value).to(query.dtype)


def weights(query: Tensor, key: Tensor, visible: Tensor, scaling: float, cap: float | None) -> Tensor:
    """Probabilities [B, Hq, q, k] in float32 (float64 for float64); zeros for a query that sees nothing.

    Args:
        query: [B, Hq, q, D].
        key: [B, H, k, D].
        visible: bool, broadcastable to [B, H, q, k].
        scaling: Factor of the logits.
        cap: Logits are bent to (-cap, cap) before masking, or None.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).reshape(*key.shape[:2], -1, *query.shape[-2:])
    logits = torch.einsum("bhgqd,bhkd->bhgqk", grouped, key.to(dtype)) * scaling
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.masked_fill(~visible[:, :, None], float("-inf")).softmax(-1).nan_to_num(0.0).flatten(1, 2)


def weighed(probabilities: Tensor, value: Tensor) -> Tensor:
    """Sums [B, Hq, q, Dv] of values [B, H, k, Dv] in the dtype of the probabilities [B, Hq, q, k]."""
    grouped = probabilities.reshape(*value.shape[:2], -1, *probabilities.shape[-2:])
    return torch.einsum("bhgqk,bhkd->bhgqd", grouped, value.to(grouped.dtype)).flatten(1, 2)


def visible_to(rows: Tensor, columns: int, mask: Tensor | None, *, everything: bool = False) -> Tensor:
    """What the model itself lets queries at logical columns `rows` [q] see: bool [B or 1, 1, q, columns].

    Args:
        rows: Of the queries.
        columns: How many there are.
        mask: The model's, bool or added to logits; None: causal, or
        everything: all columns.
    """
    if mask is None:
        whole = torch.ones(len(rows), columns, dtype=torch.bool, device=rows.device)
        causal = torch.arange(columns, device=rows.device) <= rows[:, None]
        return (whole if everything else causal)[None, None]
    mask = mask[..., :columns]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    attend = _ACTIVE.get(id(module.config))
    if attend is None:
        raise RuntimeError(f"attention {NAME!r} works only inside `with attending(model, ...)`")
    unknown = [name for name in ("s_aux", "position_bias") if settings.get(name) is not None]
    if unknown or dropout:
        raise NotImplementedError(f"the reference knows no {unknown or 'dropout'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(module.layer_idx, query, key, value, attention_mask, scaling, softcap)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


register_attention(NAME, _attention)


def _as_rounds(keep: Keep | Sequence[Round], from_query: int | None, cross: Iterable[int]) -> list[Round]:
    if not isinstance(keep, Mapping):
        if from_query is not None:
            raise ValueError("rounds have their own from_query")
        return list(keep)
    lengths = {kept.shape[-1] for layer, kept in keep.items() if layer not in cross}
    if from_query is None and keep and len(lengths) != 1:
        raise ValueError(f"from_query is needed: the layers' own columns are {sorted(lengths) or 'not given'}")
    return [Round(keep, min(lengths, default=0) if from_query is None else from_query)]


def _fit(kept: Tensor, rows: int, columns: int) -> Tensor:
    """`kept` [B, H, N] as [rows, H, 1, columns]: later columns visible, rows repeated within their group."""
    if kept.shape[-1] > columns or rows % len(kept):
        raise ValueError(f"keep {tuple(kept.shape)} does not fit a cache of {rows} rows and {columns} columns")
    wide = F.pad(kept, (0, columns - kept.shape[-1]), value=True)
    return wide.repeat_interleave(rows // len(kept), 0)[:, :, None]

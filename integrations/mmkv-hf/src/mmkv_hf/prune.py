"""Vision tokens that never reach deeper layers, on stock models (mmkv-prune's methods).

Hooks on the decoder's layers gather what a method keeps while the prompt is read; layers from there on compute and
cache the survivors alone, with the positions they had or numbered anew. What the decoder returns has a row for every
token again, zeros where one was dropped, so losses and hand-written loops work as before.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from mmkv_pipelines.stages import check_blocks
from mmkv_prune import Attention, Prompt, PrunePlan, Pruner, attention_rows, kept_columns, spread
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._compat import (
    arguments,
    attributes_set,
    cross_layers,
    is_full_attention,
    last_readers,
    modalities,
    recomputes,
    template_layers,
    text_config,
)
from .asked import Asked
from .cache import CompressedCache
from .grids import Grid, known_grids
from .layers import CompressedLayer
from .lazy_cache import LazyCache
from .opened import Opened, at_work
from .shortened import Shortened
from .survivors import (
    HELD,
    Deepstack,
    Held,
    check_numbering,
    follow,
    later_mask,
    numbered_later,
    numbered_prompt,
    numbering,
    positions,
    windows_of,
)

_IN_PARTS = (
    "vision tokens are pruned in a prompt that is read at once: leave prefill_chunk_size out, and give images in the "
    "first turn"
)


def prune(model: PreTrainedModel, method: Pruner) -> PruneSession:
    """A session in which vision tokens are dropped between the layers of the language model.

    Example:
        >>> with prune(model, ADSC(layers=(4, 20), stride=3)):
        ...     out = model.generate(**inputs)

    Args:
        model: a vision-language model with full or sliding attention in all layers from the first that drops something.
        method: of mmkv-prune, or your own.

    Raises:
        ValueError: a layer the model does not have, layers that borrow keys, recur or see images alone, or positions
            numbered anew in a model where that means nothing.
    """
    return PruneSession(model, method)


class PruneSession(Opened):
    """What `prune` returns; enter it with `with`. Puts hooks on this one instance, and takes them off again.

    Attributes:
        model: the model.
        plan: the method on this model.
        held: what every layer from the first that drops something held after the latest prompt.
    """

    def __init__(self, model: PreTrainedModel, method: Pruner) -> None:
        self.model = model
        self.plan = PrunePlan(method, text_config(model).num_hidden_layers)
        _check_layers(model, self.plan)
        self.held: dict[int, Held] = {}
        self._asked: Asked | None = None
        self._reading: _Reading | None = None
        self._begun = False
        self._windows = windows_of(model)
        self._rotary: Any = getattr(model.get_decoder(), "rotary_emb", None)
        self._mask: Tensor | None = None

    def _enter(self, stack: ExitStack) -> None:
        base, decoder = self.model.base_model, self.model.get_decoder()
        if any(isinstance(other, PruneSession) for other in at_work(base)):
            raise RuntimeError("this model is pruned already; sessions of pruning cannot be nested")
        hooks = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_pre_hook(self._take_features, with_kwargs=True),
            decoder.register_forward_hook(self._restore),
            base.register_forward_hook(self._end, always_call=True),
        ]
        for index, layer in enumerate(decoder.layers):
            if index == 0 or index >= self.plan.layers[0] - 1:
                hooks.append(layer.register_forward_pre_hook(_Step(self, index), with_kwargs=True))
            hooks.append(layer.register_forward_hook(_Deep(self, index)))
        for hook in hooks:
            stack.callback(hook.remove)
        generate = self.model.generate
        stack.enter_context(attributes_set(self.model, generate=lambda *a, **k: self._generate(generate, *a, **k)))

    def _generate(
        self, generate: Any, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any
    ) -> Any:
        settings = vars(generation_config or self.model.generation_config) | kwargs
        given = kwargs if inputs is None else {**kwargs, "input_ids": inputs}
        self._asked = Asked.of(self.model.config, given)
        if "mm_token_type_ids" not in inspect.signature(self.model.forward).parameters:
            kwargs.pop("mm_token_type_ids", None)
        try:
            if self._asked is not None and self._asked.has_images and settings.get("prefill_chunk_size") is not None:
                raise ValueError(_IN_PARTS)
            return generate(inputs, generation_config, **kwargs)
        finally:
            self._asked = None

    # -- hooks, in the order of a forward pass

    def _begin(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._reading, self._begun, kwargs = None, True, arguments(base, args, kwargs)
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        self._check_pass(cache, mask)
        self._mask = None if mask is None else mask.bool()
        kinds = self._kinds(kwargs)
        if "mm_token_type_ids" not in inspect.signature(base.forward).parameters:
            kwargs = {name: value for name, value in kwargs.items() if name != "mm_token_type_ids"}
        past = 0 if cache is None else cache.get_seq_length()
        if self._asked is not None:
            kinds = self._asked.of_prompt(kinds, past)
        self.held = vars(cache).get(HELD, {}) if past else {}
        if bool((kinds > 0).any()):
            if past:
                raise ValueError(_IN_PARTS)
            self._read(kinds, cache, kwargs)
        return (), kwargs

    def _check_pass(self, cache: Any, mask: Any) -> None:
        """Refuses what pruned layers cannot work with."""
        if isinstance(cache, LazyCache):
            raise ValueError(
                "a LazyCache does not know of pruning; compress(model, 'adsc | lazy(plan.json) | snapkv', budget=1.0) "
                "does both, and at that budget evicts nothing"
            )
        if any(getattr(layer, "is_compileable", False) for layer in getattr(cache, "layers", ())):
            raise ValueError(
                "pruned layers hold fewer tokens than a static cache has room for: leave cache_implementation out"
            )
        if self.model.training and recomputes(self.model):
            raise RuntimeError("gradient checkpointing runs layers anew, when what they are given is known no more")
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"pruning reads an attention mask [B, N], not a {type(mask).__name__}")

    def _kinds(self, inputs: dict[str, Any]) -> Tensor:
        """[B, n] int8, what the tokens of this pass are."""
        kinds = modalities(self.model.config, inputs.get("input_ids"), inputs.get("mm_token_type_ids"))
        if kinds is None and self._asked is not None:
            kinds = self._asked.kinds_for(inputs["inputs_embeds"])
        if kinds is None:
            raise ValueError(
                "pruning has to know the vision tokens: pass input_ids, or mm_token_type_ids beside embeddings"
            )
        return kinds

    def _read(self, kinds: Tensor, cache: Any, inputs: dict[str, Any]) -> None:
        """A prompt begins, of which tokens [B, n] are of these kinds; drafts may follow it."""
        valid, length = self._mask, kinds.shape[1]
        if valid is not None and valid.shape != kinds.shape:
            raise ValueError(f"pruning reads an attention mask [B, N], not {list(valid.shape)}")
        if isinstance(cache, CompressedCache):
            cache.request.uneven = True
            if length < cache.request.prompt_end:
                raise ValueError(_IN_PARTS)
        if self._asked is None:
            end, grids = length, known_grids(self.model.config, kinds, inputs)
        else:
            end, grids = self._asked.length, self._asked.grids_for(len(kinds))
        valid = None if valid is None else valid[:, :end]
        prompt = Prompt.of(kinds[:, :end] > 0, valid=valid, shapes=_shapes(grids))
        self._reading = _Reading(self.plan, prompt, self._rotary, drafts=length - end)

    def shorten(self, given: Shortened, cache: Any) -> None:
        """Goes on with the columns that the language model is given, of images whose grids nobody knows any more."""
        if self._reading is not None:
            before = self._reading.prompt
            image = given.of(before.image + 1) - 1
            prompt = Prompt(given.real[:, : image.shape[1]], image, image.new_full((*image.shape, 3), -1))
            self._reading = _Reading(self.plan, prompt, self._rotary, drafts=self._reading.drafts)

    def _take_features(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._begun:
            raise RuntimeError("pruning has to know the vision tokens: call the model, not its decoder")
        deep = kwargs.get("deepstack_visual_embeds")
        if self._reading is None or deep is None or self.plan.layers[0] >= len(deep):
            return None
        self._reading.deep = Deepstack(kwargs["inputs_embeds"], kwargs["visual_pos_masks"], deep)
        return args, {**kwargs, "deepstack_visual_embeds": None, "visual_pos_masks": None}

    def step(
        self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """What layer `index` is given instead."""
        reading = self._reading
        if reading is None:
            return hidden, self._after(index, hidden, kwargs) if index in self.held else kwargs
        if index == 0 and self.plan.evidence is not None and self.plan.evidence.embeddings:
            reading.embeddings = hidden
        full = kwargs
        kwargs = reading.gathered(full, hidden)
        if index in self.plan.layers:
            if kwargs.get("mmkv_lending") is not None:
                check_blocks(self.plan.method, kwargs["mmkv_lending"].plan)
            if self.plan.evidence is not None and self.plan.evidence.layer == "own":
                reading.look_ahead(layer, hidden, kwargs)
            hidden = reading.drop(index, hidden)
            if self.plan.positions == "reindex":
                reading.number(full)
            kwargs = reading.gathered(full, hidden)
        if index >= self.plan.layers[0]:
            self.held[index] = reading.held
            if kwargs.get("mmkv_lending") is not None:
                kwargs["mmkv_lending"].held[index] = reading.held
            cached = _compressed(kwargs, index)
            if cached is not None:
                cached.hold(*reading.held[:3])
        is_asked = self.plan.evidence is not None and self.plan.evidence.layer == "previous"
        if is_asked and index + 1 in self.plan.layers:
            kwargs = {**kwargs, "mmkv_watch": reading.watch}
        return hidden, kwargs

    def _after(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of layer `index` after the prompt."""
        cache, cached, held = kwargs["past_key_values"], _compressed(kwargs, index), self.held[index]
        whole = held.columns.shape[1] if cached is None else held.length
        held = held.without_last(whole - cache.get_seq_length(index))
        if held.moved is not None:
            kwargs = numbered_later(self._rotary, held, hidden, kwargs)
        if cached is not None or not any(self._windows):
            return _later(held, index, kwargs)
        mask = later_mask(
            held, cache.layers[index], hidden.shape[1], self._windows[index], self._mask, device=hidden.device
        )
        return {**kwargs, "attention_mask": mask}

    def _restore(self, decoder: Any, args: tuple[Any, ...], output: Any) -> Any:
        if self._reading is not None:
            output.last_hidden_state = self._reading.restored(output.last_hidden_state)
        return output

    def _end(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            follow(cache, self.held)
        self._reading, self._begun = None, False


class _Step:
    """The pre-hook of one layer."""

    def __init__(self, session: PruneSession, index: int) -> None:
        self.session, self.index = session, index

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        hidden, kwargs = self.session.step(self.index, layer, hidden, kwargs)
        return (hidden, *rest), kwargs


class _Deep:
    """The hook of one layer that adds what a model adds after it."""

    def __init__(self, session: PruneSession, index: int) -> None:
        self.session, self.index = session, index

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        reading = self.session._reading
        return None if reading is None or reading.deep is None else reading.deep.add(self.index, reading.held, output)


class _Reading:
    """One prompt on its way through the layers.

    Attributes:
        prompt: where the vision tokens are.
        drafts: columns after the prompt, which nobody looks at and nothing drops.
        held: the columns that the hidden states under way stand for.
        embeddings: [B, N, D], what entered layer 0, where the method asks for it.
        deep: features added after the first layers, where tokens are dropped between them.
    """

    def __init__(self, plan: PrunePlan, prompt: Prompt, rotary: Any, *, drafts: int = 0) -> None:
        self.plan, self.prompt, self.rotary, self.drafts = plan, prompt, rotary, drafts
        self.deep: Deepstack | None = None
        batch, length = prompt.valid.shape[0], prompt.valid.shape[1] + drafts
        everything = torch.arange(length, device=prompt.valid.device).expand(batch, -1)
        self.held = Held(everything, torch.ones_like(everything, dtype=torch.bool), length)
        self.embeddings: Tensor | None = None
        self._alive = prompt.valid
        self._attention: Attention | None = None
        self._first: Tensor

    def drop(self, index: int, hidden: Tensor) -> Tensor:
        """Hidden states [B, K', D] that enter layer `index`."""
        before = self.held
        self._alive = self.plan.keep(index, self.prompt, self._alive, self._attention)
        places = kept_columns(self._wider(self._alive, True).gather(1, before.columns) & before.real)
        self.held = Held(before.columns.gather(1, places.columns), places.real, before.length)
        return hidden.gather(1, places.columns[..., None].expand(-1, -1, hidden.shape[-1]))

    def gathered(self, kwargs: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        """A layer's arguments for all columns, cut to those held."""
        columns = self.held.columns
        if self.held.is_whole:
            return kwargs
        changed: dict[str, Any] = {"attention_mask": _square(kwargs.get("attention_mask"), self.held)}
        if kwargs.get("position_embeddings") is not None:
            changed["position_embeddings"] = tuple(_rows(x, columns) for x in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            ids = kwargs["position_ids"]
            changed["position_ids"] = ids.expand(*ids.shape[:-2], *columns.shape[:1], -1).gather(
                -1, columns.expand(*ids.shape[:-2], *columns.shape)
            )
        for name, value in kwargs.items():
            is_whole = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == self.held.length
            if is_whole and name not in _GATHERED:
                raise ValueError(f"this model's layers take {name}, which cannot be pruned yet")
        kwargs = {**kwargs, **changed}
        if self.held.moved is None:
            return kwargs
        return numbered_prompt(self.rotary, self.held, self._first, hidden, kwargs)

    def number(self, kwargs: dict[str, Any]) -> None:
        """From here on, what is held has positions of its own; `kwargs` are a layer's for all columns."""
        self._first, self.held = numbering(self.held, positions(kwargs), self._wider(self.prompt.valid, True))

    def watch(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> None:
        """Notes the attention of the rows that the method asks for."""
        end = self.prompt.valid.shape[1]
        asked = self.plan.rows(self.prompt, None if self.embeddings is None else self.embeddings[:, :end])
        assert asked is not None
        places = kept_columns(self._wider(asked, False).gather(1, self.held.columns) & self.held.real)
        visible = _square(mask, self.held) if mask is None or mask.shape[-1] != key.shape[2] else mask
        assert visible is not None or bool(self.held.real.all())
        if visible is None:
            count = key.shape[2]
            visible = torch.ones(1, 1, count, count, dtype=torch.bool, device=key.device).tril()
        rows = visible.expand(len(query), 1, -1, -1)[:, 0]
        rows = rows.gather(1, places.columns[..., None].expand(-1, -1, rows.shape[-1])) & self.held.real[:, None]
        chosen = query.gather(2, places.columns[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        weights = attention_rows(chosen, key, rows, scaling=scaling, softcap=softcap)
        self._attention = Attention(spread(weights, *self.held[:3])[..., :end], places.real)

    def _wider(self, mask: Tensor, drafts: bool) -> Tensor:
        """mask [B, N] with what is said of the drafts after them."""
        return F.pad(mask, (0, self.drafts), value=drafts)

    @torch.no_grad()
    def look_ahead(self, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Runs the attention of the layer about to come on everything that enters it, for its queries and keys."""
        names = ("attention_mask", "position_embeddings", "position_ids")
        given = {"attention_mask": None} | {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        norm, attend = getattr(layer, "input_layernorm", None), getattr(layer, "self_attn", None)
        if norm is None or attend is None:
            raise ValueError(f"{type(layer).__name__} has no input_layernorm and self_attn to look ahead with")
        attend(norm(hidden), **given, past_key_values=None, mmkv_watch=self.watch)

    def restored(self, hidden: Tensor) -> Tensor:
        """The decoder's output with a row for every token, zeros for those dropped."""
        columns, real, length, _ = self.held
        if self.held.is_whole:
            return hidden
        whole = hidden.new_zeros(len(hidden), length, hidden.shape[-1])
        return whole.scatter(1, columns[..., None].expand(hidden.shape), hidden * real[..., None])


_GATHERED = ("attention_mask", "position_embeddings", "position_ids")


def _rows(x: Tensor, columns: Tensor) -> Tensor:
    """x [B or 1, N, D] at columns [B, K]."""
    return x.expand(len(columns), -1, -1).gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))


def _square(mask: Tensor | None, held: Held) -> Tensor | None:
    """What held columns may see of each other, [B, 1, K, K] bool, from a mask over all columns; None: causal.

    A filler sees itself alone, so that no row of attention is empty.
    """
    columns, real, *_ = held
    if mask is None and bool(real.all()):
        return None
    if mask is None:
        among = (columns[:, None] <= columns[..., None])[:, None]
    else:
        _check_mask(mask)
        mask = mask.expand(len(columns), -1, -1, -1)
        rows = mask.gather(2, columns[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
        among = rows.gather(3, columns[:, None, None].expand(-1, 1, columns.shape[1], -1))
    itself = torch.eye(columns.shape[1], dtype=torch.bool, device=columns.device)
    return (among & real[:, None, None] & real[:, None, :, None]) | (itself & ~real[:, None, :, None])


def _later(held: Held, index: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of layer `index` after the prompt: new tokens see what it holds of the prompt, and what followed."""
    columns, real, length, _ = held
    mask, cached = kwargs.get("attention_mask"), _compressed(kwargs, index)
    is_compressed = cached is not None and cached.columns is None  # then it reads logical masks by itself
    if is_compressed or (mask is None and bool(real.all())):
        return kwargs
    if mask is None:  # one new token, which sees everything
        before = kwargs["past_key_values"].get_seq_length(index) - (columns.shape[1] if cached is None else length)
        followed = before + 1
        mask = torch.ones(1, 1, 1, length + followed, dtype=torch.bool, device=columns.device)
    _check_mask(mask)
    after = torch.arange(length, mask.shape[-1], device=mask.device).expand(len(columns), -1)
    chosen = torch.cat([columns, after], dim=1)[:, None, None].expand(-1, 1, mask.shape[2], -1)
    is_real = torch.cat([real, torch.ones_like(after, dtype=torch.bool)], dim=1)
    cut = mask.expand(len(columns), -1, -1, -1).gather(3, chosen)
    return {**kwargs, "attention_mask": cut & is_real[:, None, None]}


def _shapes(grids: list[list[Grid]] | None) -> list[list[Any]] | None:
    if grids is None or not all(grids):
        return None
    return [[(1, rows, columns) for rows, columns in row] for row in grids]


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(f"pruning reads boolean masks, not {getattr(mask, 'dtype', type(mask).__name__)}")


def _compressed(kwargs: dict[str, Any], index: int) -> CompressedLayer | None:
    """The cache layer of layer `index`, if it is one that compresses itself."""
    cache = kwargs.get("past_key_values")
    layer = cache.layers[index] if isinstance(cache, CompressedCache) else None
    return layer if isinstance(layer, CompressedLayer) else None


def _check_layers(model: PreTrainedModel, plan: PrunePlan) -> None:
    config = text_config(model)
    readers, windows = last_readers(config), windows_of(model)
    for index, layer in enumerate(template_layers(config)):
        plain = is_full_attention(layer) or windows[index] is not None
        plain = plain and index not in cross_layers(config) and readers.get(index, index) == index
        if index >= plan.layers[0] and not plain:
            raise ValueError(
                f"layer {index} of {type(model).__name__} does not attend to the tokens before it with keys of its "
                "own; prune in models without such layers"
            )
    if plan.positions == "reindex":
        check_numbering(model)

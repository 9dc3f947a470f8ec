"""A transformers cache that compresses itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from mmkv_budget import Equal, TableRule
from mmkv_layershare import LazyPlan
from mmkv_pipelines import Budget, Pipeline
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ._compat import cross_layers, is_full_attention, last_readers, template_layers, text_config
from .cross import CrossLayer
from .follower import FollowerLayer
from .kinds import check_plan
from .layers import CompressedLayer
from .request import Group, Request
from .shortened import Shortened, shortened_of
from .vision import Vision, VisionCache


class CompressedCache(VisionCache):
    """A `past_key_values` whose full-attention layers evict once the prompt has been read.

    Sliding-window, linear-attention and KV-reading layers keep the classes transformers gives them. The model's
    attention setting has to be "mmkv" while the prompt is read: use it inside `with compress(model, ...)`, or after
    `mmkv_hf.set_attention(model, "mmkv")`.

    Args:
        model: the model, or its config.
        pipeline: a `Pipeline` or its text form.
        budget: KV pairs kept per KV head: an int is tokens, a float in (0, 1] the share of the prompt, or a `Budget`.
        prompt_length: tokens of the prompt, padding included; must be right, because chunked prefill and assisted
            decoding make it impossible to see from the cache where the prompt ends.
        modality: [B, prompt_length] int8 (0 text, 1 image, 2 video), for pipelines that protect a modality.
        protect: [B, prompt_length] bool, tokens that must stay.
        plan: of lazy layers, which keep what their anchors keep; such a cache works inside a session with this plan.

    Raises:
        ValueError: the model has no decoder that can be compressed, or the settings do not fit it.
    """

    def __init__(
        self,
        model: Any,
        pipeline: str | Pipeline,
        budget: int | float | Budget,
        *,
        prompt_length: int,
        modality: Tensor | None = None,
        protect: Tensor | None = None,
        plan: LazyPlan | None = None,
    ) -> None:
        config = text_config(model)
        parsed = Pipeline.parse(pipeline)
        self.request, self.vision = Request(parsed, checked_budget(parsed, budget)), Vision()
        super().__init__(layers=make_layers(config, self.request, plan=plan, vision=self.vision))
        self.expect(prompt_length, modality=modality, protect=protect)

    def expect(self, prompt_length: int, *, modality: Tensor | None = None, protect: Tensor | None = None) -> None:
        """Announces the next prompt of the conversation; when it has been read the budget is enforced again.

        Args:
            prompt_length: logical length at which it is complete: everything so far plus the new tokens, those of
                images that the language model was not given included.
            modality: [B, prompt_length] int8.
            protect: [B, prompt_length] bool.

        Raises:
            ValueError: nothing new to read, or shapes that do not fit.
        """
        if prompt_length <= self.get_seq_length():
            raise ValueError(
                f"the prompt is empty: {prompt_length} tokens in all, {self.get_seq_length()} of them cached already"
            )
        for name, given in (("modality", modality), ("protect", protect)):
            if given is not None and not isinstance(given, Tensor):
                raise TypeError(f"{name} is a tensor [B, {prompt_length}], got a {type(given).__name__}")
            if given is not None and (given.ndim != 2 or given.shape[1] != prompt_length):
                raise ValueError(f"{name} is [B, {prompt_length}], got {tuple(given.shape)}")
        if self.pipeline.select.protect and modality is None:
            raise ValueError(
                f"{self.pipeline} has to know the modality of each token; pass the whole prompt's input_ids"
            )
        if protect is not None and protect.dtype != torch.bool:
            raise ValueError(f"protect is bool, got {protect.dtype}")
        self._check_whole()
        self.request.prompt_end = prompt_length
        for layer in self.compressed_layers:
            layer.expect()
        self._text.modality, self._text.protect = modality, protect
        before = shortened_of(self)
        if before is not None:
            self.shorten(before)

    def shorten(self, given: Shortened) -> None:
        """Of the prompt announced, the language model reads what it is given of the first one, and what follows that.

        Raises:
            ValueError: `modality` or `protect` have a number of rows that does not fit.
        """
        group = self._text
        group.modality, group.protect = (None if x is None else given.of(x) for x in (group.modality, group.protect))
        self.request.prompt_end -= given.missing

    @property
    def pipeline(self) -> Pipeline:
        """The method."""
        return self.request.pipeline

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that mmkv compresses."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def kept_masks(self) -> dict[int, Tensor]:
        """Model layer -> [B, H, prompt] bool: the logical columns of the prompt that are held.

        Columns of a prompt whose images were reduced are those that the language model was given. For cross-attention
        layers the columns are image tokens, and they are missing where there was no image. A layer
        that evicted nothing holds its padding too.
        """
        return {layer.layer_idx: layer.kept_mask() for layer in self.compressed_layers if layer.is_initialized}

    def tensors(self) -> list[Tensor]:
        """Every tensor alive in this cache, stock layers and scorers' state included."""
        held = [t for layer in self.compressed_layers for t in layer.tensors()]
        for layer in self.compressed_layers:
            held += layer.group.round.trace.tensors() if layer.group.round is not None else []
        held += [t for t in (self._text.modality, self._text.protect, self.request.padding) if t is not None]
        given = shortened_of(self)
        held += [] if given is None else [given.columns, given.real, given.moved]
        return held + [t for layer in self._stock_layers() for t in _stock(layer)]

    @property
    def bytes_held(self) -> int:
        """Bytes of the storages behind all live tensors, each counted once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}
        return sum(storages.values())

    @property
    def bytes_full(self) -> int:
        """Bytes the keys and values of a stock cache would take after the same tokens."""
        stock = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for x in self._stock_layers()
            for t in _stock(x)
        }
        return sum(layer.bytes_full for layer in self.compressed_layers) + sum(stock.values())

    @property
    def _text(self) -> Group:
        """The group of the self-attention layers, which every cache has."""
        return next(layer.group for layer in self.compressed_layers if not isinstance(layer, CrossLayer))

    def _check_whole(self) -> None:
        self.request.check()
        for layer in self.compressed_layers:
            if not isinstance(layer, CrossLayer):
                self.request.advance(layer.ordinal, layer.seen)

    def _stock_layers(self) -> list[CacheLayerMixin]:
        return [layer for layer in self.layers if not isinstance(layer, CompressedLayer)]


def checked_budget(pipeline: Pipeline, budget: int | float | Budget) -> Budget:
    """The budget as an object.

    Raises:
        ValueError: not a budget, or so small that no prompt could ever be compressed to it.
    """
    made = Budget.of(budget)
    if made.tokens is not None and made.tokens < pipeline.least_budget:
        raise ValueError(
            f"budget {made.tokens} does not exceed the tokens that {pipeline} always keeps; "
            f"the least that works is {pipeline.least_budget}"
        )
    return made


def make_layers(
    config: Any,
    request: Request,
    kind: type[CompressedLayer] = CompressedLayer,
    *,
    plan: LazyPlan | None = None,
    vision: Vision | None = None,
) -> list[CacheLayerMixin]:
    """One layer per layer of the decoder, those with full self-attention of the given kind.

    Args:
        config: of the decoder.
        request: the conversation.
        kind: of layers that decide for themselves.
        plan: of lazy layers, which follow others.
        vision: which tokens are vision tokens, for lazy layers in visual mode.

    Raises:
        ValueError: there is none that can be compressed, a table was made for another model, or the plan was.
    """
    if plan is not None:
        check_plan(plan, config)
    lazy = () if plan is None else plan.lazy
    template, cross, readers = template_layers(config), cross_layers(config), last_readers(config)
    own = [i for i, layer in enumerate(template) if is_full_attention(layer) and i not in cross and i not in lazy]
    image = [i for i, layer in enumerate(template) if is_full_attention(layer) and i in cross]
    if not own:
        raise ValueError(f"{config.model_type} has no full-attention layer whose cache could be compressed")
    for group, made, indices in _groups(request, kind, own, image):
        _check_table(config, group)
        request.last_layer = max(request.last_layer, *indices)
        for ordinal, i in enumerate(indices):
            last_reader = readers.get(i, i) if plan is None else max(readers.get(i, i), plan.last_reader(i))
            template[i] = layer = made(group, ordinal, i, last_reader)
            if made is kind and plan is not None:
                _follow(template, layer, plan, vision)
    return template


def _follow(template: list[CacheLayerMixin], anchor: CompressedLayer, plan: LazyPlan, vision: Vision | None) -> None:
    """Puts the lazy layers of a block in their places."""
    group = anchor.group
    for i in range(anchor.layer_idx + 1, plan.last_reader(anchor.layer_idx) + 1):
        template[i] = FollowerLayer(anchor, i, vision if plan.mode == "visual" else None)
        group.followers, group.is_visual, group.request.uneven = group.followers + 1, plan.mode == "visual", True
        group.request.last_layer = max(group.request.last_layer, i)


def _groups(
    request: Request, kind: type[CompressedLayer], own: list[int], image: list[int]
) -> list[tuple[Group, type[CompressedLayer], list[int]]]:
    total = len(own) + len(image)
    heads = Equal() if isinstance(request.pipeline.heads, TableRule) else request.pipeline.heads
    select = replace(request.pipeline.select, recent=0, sinks=0, protect=None)
    free = replace(request.pipeline, heads=heads, select=select)
    groups: list[tuple[Group, type[CompressedLayer], list[int]]] = [
        (Group(request, request.pipeline, len(own), total), kind, own)
    ]
    if image:
        groups.append((Group(request, free, len(image), total), CrossLayer, image))
    return groups


def _check_table(config: Any, group: Group) -> None:
    """A table made for another model is refused before anything runs."""
    if isinstance(group.pipeline.heads, TableRule):
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        group.pipeline.heads.plan(
            torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64), group.num_layers, heads
        )


def _stock(layer: Any) -> list[Tensor]:
    held = [part for x in vars(layer).values() for part in (x.values() if isinstance(x, dict) else [x])]
    return [t for t in held if isinstance(t, Tensor)]

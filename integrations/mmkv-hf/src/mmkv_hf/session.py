"""`compress(model, ...)`: stock `generate` on a compressed cache, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import torch
import torch.nn.functional as F
from mmkv_pipelines import Budget, Pipeline, Stages
from torch import Tensor
from transformers import PreTrainedModel

from ._compat import CHUNKS_LATER_TURNS, attributes_set, modalities, text_config
from .cache import CompressedCache, checked_budget, make_layers
from .encoder import ReduceSession
from .grids import Grid, known_grids
from .lazy import Borrowing
from .opened import Opened
from .prune import PruneSession
from .report import Report, make_report
from .request import Request
from .shortened import Shortened, shortened_of

_WRAPPED = ("generate", "generate_batch")
_LOOKED_AT = ("inputs_embeds", "mm_token_type_ids", "attention_mask", "image_grid_thw", "pixel_values", "image_sizes")
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens")
_REFUSED = {
    "cache_implementation": "the session brings its own cache; leave it out",
    "custom_generate": "custom loops bring their own cache; use session.cache(**inputs) and a hand-written loop",
    "assistant_early_exit": "its drafts would share the cache; give an assistant_model or prompt_lookup_num_tokens",
}


def compress(
    model: PreTrainedModel,
    pipeline: str | Pipeline | Stages,
    budget: int | float | Budget,
    *,
    protect: Tensor | None = None,
) -> Session:
    """A session in which `model.generate` reads prompts into a compressed cache.

    Example:
        >>> with compress(model, "adakv+mixkv+bacon", budget=64) as session:
        ...     out = model.generate(**inputs)
        >>> print(session.report())

    Args:
        model: any decoder-only transformers model, text or vision-language.
        pipeline: a `Pipeline`, or `Stages` of which one evicts; or the text form of either, such as
            "visionzip | adsc(layers=[4,20],stride=3) | lazy(plan.json) | adakv+bacon".
        budget: KV pairs kept per KV head, protected ones included: an int is tokens, a float in (0, 1] the share of the
            prompt that the language model is given, or a `Budget`. Larger than that: nothing is evicted.
        protect: [B, prompt] bool, tokens that must stay. A column of an image that is reduced stands for what takes its
            place.

    Raises:
        ValueError: before anything runs, for a pipeline, budget or model that cannot work. What depends on the prompt
            (a share of it that does not exceed the protected tokens) or on tensors (a redundancy table of MixKV for
            another model) is said when the first layer decides, before any layer has evicted.
    """
    return Session(model, pipeline, budget, protect=protect)


class Session(Opened):
    """What `compress` returns; enter it with `with`. Wraps `generate` on this one instance, nothing of transformers.

    Attributes:
        model: the model.
        stages: what happens to a prompt.
        pipeline: the stage that evicts.
        budget: the budget.
        last: the cache of the latest prompt, kept for `report` until the session is dropped.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pipeline: str | Pipeline | Stages,
        budget: int | float | Budget,
        *,
        protect: Tensor | None = None,
    ) -> None:
        self.model = model
        self.stages = Stages.parse(pipeline)
        self.pipeline = evicting(self.stages)
        self.budget = checked_budget(self.pipeline, budget)
        self.protect = protect
        self.last: CompressedCache | None = None
        self._modality: Tensor | None = None
        self._valid: Tensor | None = None  # [B, N] bool of the latest prompt
        self._grids: list[list[Grid]] | None = None  # of its images
        self._stock_generate: Callable[..., Any]
        plan, method, reducer = self.stages.share, self.stages.prune, self.stages.reduce
        # What would fail later is said now.
        make_layers(text_config(model), Request(self.pipeline, self.budget), plan=plan)
        self._borrowing = None if plan is None else Borrowing(model, plan)
        self._pruning = None if method is None else PruneSession(model, method)
        told = [self, *(stage for stage in (self._borrowing, self._pruning) if stage is not None)]
        self._reducing = None if reducer is None else ReduceSession(model, reducer, stages=told)
        if not model.can_generate():
            raise ValueError(f"{type(model).__name__} cannot generate; give the model with its language model head")

    def __enter__(self) -> Self:
        wrapped = (getattr(vars(self.model).get(name), "__self__", None) for name in _WRAPPED)
        if any(isinstance(owner, Session) for owner in wrapped):
            raise RuntimeError("a session is open on this model already; sessions cannot be nested")
        return super().__enter__()

    def _enter(self, stack: ExitStack) -> None:
        if self._borrowing is not None:
            self._borrowing.open(stack)
        if self._pruning is not None:
            stack.enter_context(self._pruning)
        self._stock_generate = self.model.generate
        stack.callback(delattr, self, "_stock_generate")
        ours = {"generate": self._generate, "generate_batch": self._generate_batch}
        stack.enter_context(attributes_set(self.model, **ours))
        if self._reducing is not None:  # the last: its hook on what the decoder puts out has to run after the others
            stack.enter_context(self._reducing)

    def cache(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **inputs: Any
    ) -> CompressedCache:
        """An empty cache for these inputs, for hand-written forward loops.

        Args:
            input_ids: [B, N] the prompt.
            inputs_embeds: [B, N, hidden] instead of it.
            **inputs: whatever else the model takes; `mm_token_type_ids` [B, N] says what is an image and, for the
                report, `attention_mask` [B, N] what is padding, `image_grid_thw` or `pixel_values` the images' shape.

        Raises:
            ValueError: an empty prompt.
        """
        prompt = input_ids if inputs_embeds is None else inputs_embeds
        if prompt is None or prompt.shape[1] == 0:
            raise ValueError("the prompt is empty; pass input_ids or inputs_embeds with at least one token")
        self._modality = modalities(self.model.config, input_ids, inputs.get("mm_token_type_ids"))
        self._look_at(inputs, prompt.shape[1])
        self.last = CompressedCache(
            self.model,
            self.pipeline,
            self.budget,
            prompt_length=prompt.shape[1],
            modality=self._protected_modality,
            protect=self.protect,
            plan=self.stages.share,
        )
        return self.last

    def report(self) -> Report:
        """What the latest prompt left in the cache.

        Raises:
            RuntimeError: nothing has been read yet.
        """
        if self.last is None or self.last.get_seq_length() == 0:
            raise RuntimeError("nothing to report yet: generate something inside the session first")
        given = shortened_of(self.last)
        if given is None:
            return make_report(self.last, str(self.stages), self._modality, self._valid, self._grids)
        valid, modality = self._valid, None if self._modality is None else given.of(self._modality)
        if valid is None:
            shape = (1, self.last.request.prompt_end + given.missing)
            valid = torch.ones(shape, dtype=torch.bool, device=given.columns.device)
        grids: list[list[Grid]] | None = None if modality is None else [[] for _ in modality]
        return make_report(self.last, str(self.stages), modality, given.of(valid), grids)

    def shorten(self, given: Shortened, cache: Any) -> None:
        """The cache learns what the language model is given; see `Stage`."""
        if isinstance(cache, CompressedCache):
            cache.shorten(given)

    def _generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        settings = vars(generation_config or self.model.generation_config) | kwargs
        for name, reason in _REFUSED.items():
            if settings.get(name) is not None:
                raise ValueError(f"{name} does not work in a compress session: {reason}")
        if settings.get("use_cache") is False:
            raise ValueError("use_cache=False leaves nothing to compress")
        prompt = {"input_ids": inputs if inputs is not None else kwargs.get("input_ids")}
        prompt |= {name: kwargs.get(name) for name in _LOOKED_AT}
        cache = kwargs.pop("past_key_values", None)
        if isinstance(cache, CompressedCache) and cache.get_seq_length():
            _check_later_turn(settings)
        cache = self.cache(**prompt) if cache is None else self._continued(cache, prompt)
        try:
            out = self._stock_generate(inputs, generation_config, past_key_values=cache, **kwargs)
        except BaseException:
            self.last = None
            raise
        self._check_compressed(cache)
        return out

    def _continued(self, cache: Any, prompt: dict[str, Any]) -> CompressedCache:
        if not isinstance(cache, CompressedCache):
            raise ValueError(f"a compress session continues a CompressedCache, not a {type(cache).__name__}")
        if self._reducing is None and shortened_of(cache) is not None:
            raise ValueError(
                "the images of this conversation were reduced, so its columns are counted anew in every turn; go on "
                "inside a session whose pipeline names a method that reduces, such as 'visionzip | adakv'"
            )
        tokens = prompt["input_ids"] if prompt["inputs_embeds"] is None else prompt["inputs_embeds"]
        if tokens is None:
            raise ValueError("the prompt is empty; pass the whole conversation as input_ids or inputs_embeds")
        # As in stock generate: only the new tokens may be given where the attention mask shows that there are more.
        length = tokens.shape[1] if prompt["attention_mask"] is None else prompt["attention_mask"].shape[-1]
        modality = modalities(self.model.config, prompt["input_ids"], prompt["mm_token_type_ids"])
        self._modality = modality if modality is not None and modality.shape[1] == length else None
        self._look_at(prompt, length)
        protect = self.protect
        if protect is not None:  # made for the first prompt; nothing after it is protected
            protect = F.pad(protect, (0, max(0, length - protect.shape[-1])))
        cache.expect(length, modality=self._protected_modality, protect=protect)
        self.last = cache
        return cache

    def _look_at(self, inputs: dict[str, Any], length: int) -> None:
        """What only the report needs to know of a prompt."""
        mask = inputs.get("attention_mask")
        self._valid = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == length else None
        self._grids = known_grids(self.model.config, self._modality, inputs)

    @property
    def _protected_modality(self) -> Tensor | None:
        return self._modality if self.pipeline.select.protect else None

    def _generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "continuous batching (generate_batch) has a paged cache of its own that mmkv cannot compress; use generate"
        )

    def _check_compressed(self, cache: CompressedCache) -> None:
        waiting = [layer.layer_idx for layer in cache.compressed_layers if layer.is_initialized and layer.reading]
        if waiting and cache.request.seen >= cache.request.prompt_end:
            raise RuntimeError(
                f"the attention of layers {waiting} never went through mmkv; this model cannot be compressed"
            )


def evicting(stages: Stages) -> Pipeline:
    """The stage that evicts.

    Raises:
        ValueError: there is none.
    """
    if stages.evict is None:
        raise ValueError(f"nothing in {str(stages)!r} evicts: add a stage, as in '... | adakv', or use prune or share")
    return stages.evict


def _check_later_turn(settings: dict[str, Any]) -> None:
    """Refuses what makes transformers feed the whole prompt to a cache that holds most of it already."""
    if any(settings.get(name) is not None for name in _ASSISTED):
        raise ValueError(
            "assisted decoding cannot start from a cache that holds tokens: transformers would feed it the whole "
            "prompt again; leave assistant_model and prompt_lookup_num_tokens out of later turns"
        )
    if settings.get("prefill_chunk_size") is not None and not CHUNKS_LATER_TURNS:
        raise ValueError(
            "prefill_chunk_size cannot be used with a cache that holds tokens: transformers before 5.23 would feed it "
            "the whole prompt again; leave it out of later turns"
        )

"""`compress(model, ...)`: stock `generate` on a compressed cache, and the model as it was afterwards."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from mmkv_pipelines import Budget, Pipeline
from torch import Tensor
from transformers import PreTrainedModel

from . import attention  # noqa: F401  registers the attention function
from ._compat import ATTENTION, attention_setting, set_attention, text_config
from .cache import CompressedCache, checked_budget
from .report import Report, make_report

_REFUSED = {
    "cache_implementation": "the session brings its own cache; leave cache_implementation out",
    "custom_generate": "custom generation loops bring their own cache; use session.cache(**inputs) and a hand-written loop",
}


def compress(
    model: PreTrainedModel,
    pipeline: str | Pipeline,
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
        pipeline: a `Pipeline` or its text form.
        budget: KV pairs kept per KV head, protected ones included: an int is tokens, a float in (0, 1] the share of the
            prompt, or a `Budget`. Larger than the prompt: nothing is evicted.
        protect: [B, prompt] bool, tokens that must stay.

    Raises:
        ValueError: before anything runs, for a pipeline, budget or model that cannot work.
    """
    return Session(model, pipeline, budget, protect=protect)


class Session:
    """What `compress` returns; enter it with `with`. Wraps `generate` on this one instance, nothing of transformers.

    Attributes:
        model: the model.
        pipeline: the method.
        budget: the budget.
        last: the cache of the latest prompt, kept for `report` until the session is dropped.
    """

    def __init__(
        self, model: PreTrainedModel, pipeline: str | Pipeline, budget: int | float | Budget, *, protect: Tensor | None = None
    ) -> None:
        self.model = model
        self.pipeline = Pipeline.parse(pipeline)
        self.budget = checked_budget(self.pipeline, budget)
        self.protect = protect
        self.last: CompressedCache | None = None
        self._modality: Tensor | None = None
        self._before: dict[str, Any] | None = None
        text_config(model)
        CompressedCache(model, self.pipeline, self.budget, prompt_length=1)  # says now what would fail later

    def __enter__(self) -> Self:
        if attention_setting(self.model) == ATTENTION or self._before is not None:
            raise RuntimeError("a session is open on this model already; sessions cannot be nested")
        before = {"attention": attention_setting(self.model), **{n: vars(self.model).get(n) for n in _WRAPPED}}
        set_attention(self.model, ATTENTION)
        self._before = before
        self.model.generate = self._generate  # type: ignore[method-assign]
        self.model.generate_batch = self._generate_batch  # type: ignore[method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before, self._before = self._before, None
        assert before is not None
        for name in _WRAPPED:
            delattr(self.model, name)
            if before[name] is not None:
                setattr(self.model, name, before[name])
        set_attention(self.model, before["attention"])

    def cache(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **inputs: Any
    ) -> CompressedCache:
        """An empty cache for these inputs, for hand-written forward loops.

        Args:
            input_ids: [B, N] the prompt.
            inputs_embeds: [B, N, hidden] instead of it.
            **inputs: whatever else the model takes; only `mm_token_type_ids` [B, N] is looked at.

        Raises:
            ValueError: an empty prompt.
        """
        prompt = inputs_embeds if input_ids is None else input_ids
        if prompt is None or prompt.shape[1] == 0:
            raise ValueError("the prompt is empty; pass input_ids or inputs_embeds with at least one token")
        self._modality = self._modalities(input_ids, inputs.get("mm_token_type_ids"))
        self.last = CompressedCache(
            self.model,
            self.pipeline,
            self.budget,
            prompt_length=prompt.shape[1],
            modality=self._modality if self.pipeline.select.protect else None,
            protect=self.protect,
        )
        return self.last

    def report(self) -> Report:
        """What the latest prompt left in the cache.

        Raises:
            RuntimeError: nothing has been read yet.
        """
        if self.last is None or self.last.get_seq_length() == 0:
            raise RuntimeError("nothing to report yet: generate something inside the session first")
        return make_report(self.last, self._modality)

    def _generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        for name, reason in _REFUSED.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} does not work in a compress session: {reason}")
        if kwargs.get("use_cache") is False:
            raise ValueError("use_cache=False leaves nothing to compress")
        prompt = {"input_ids": inputs if inputs is not None else kwargs.get("input_ids")}
        prompt |= {name: kwargs.get(name) for name in ("inputs_embeds", "mm_token_type_ids")}
        cache = kwargs.pop("past_key_values", None)
        cache = self.cache(**prompt) if cache is None else self._continued(cache, prompt)
        try:
            out = type(self.model).generate(self.model, inputs, past_key_values=cache, **kwargs)
        except BaseException:
            self.last = None
            raise
        self._check_compressed(cache)
        return out

    def _continued(self, cache: Any, prompt: dict[str, Any]) -> CompressedCache:
        if not isinstance(cache, CompressedCache):
            raise ValueError(f"a compress session continues a CompressedCache, not a {type(cache).__name__}")
        tokens = prompt["input_ids"] if prompt["input_ids"] is not None else prompt["inputs_embeds"]
        if tokens is None:
            raise ValueError("pass the whole conversation as input_ids, or its new part as inputs_embeds")
        length = tokens.shape[1]
        if prompt["input_ids"] is None:
            length += cache.get_seq_length()
        self._modality = self._modalities(prompt["input_ids"], prompt["mm_token_type_ids"])
        cache.expect(length, modality=self._modality if self.pipeline.select.protect else None, protect=self.protect)
        self.last = cache
        return cache

    def _generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("continuous batching (generate_batch) has a paged cache of its own that mmkv cannot compress; use generate")

    def _check_compressed(self, cache: CompressedCache) -> None:
        waiting = [layer.layer_idx for layer in cache.compressed_layers if layer.reading]
        if waiting and cache.get_seq_length() >= cache.request.prompt_end:
            raise RuntimeError(f"the attention of layers {waiting} never went through mmkv; this model cannot be compressed")

    def _modalities(self, input_ids: Tensor | None, token_types: Tensor | None) -> Tensor | None:
        """[B, N] int8: 0 text, 1 image, 2 video; None when it cannot be told."""
        if input_ids is None:
            return None if token_types is None else token_types.to(torch.int8)
        found = torch.zeros_like(input_ids, dtype=torch.int8)
        for value, name in ((1, "image_token_id"), (2, "video_token_id")):
            token = getattr(self.model.config, name, None)
            if token is not None:
                found[input_ids == token] = value
        return found


_WRAPPED = ("generate", "generate_batch")

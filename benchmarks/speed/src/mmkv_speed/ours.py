"""mmkv's side: what it does while a prompt is read happens in the session and in `CompressedLayer.observe`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from mmkv_hf import compress
from mmkv_hf.layers import CompressedLayer
from mmkv_pipelines import Pipeline
from mmkv_scores import Observation
from mmkv_select import RaggedKV, compact
from torch import Tensor
from transformers import DynamicCache

from .held import stock_entries, stock_tensors
from .meter import Meter
from .methods import BY_NAME, kept
from .model import Layer

PACKAGES: Final = ("mmkv-hf", "mmkv-pipelines", "mmkv-scores", "mmkv-budget", "mmkv-select", "mmkv-kernels")


class Ours:
    """See `sides.Side`."""

    packages: tuple[str, ...] = PACKAGES

    def __init__(self, model: Any) -> None:
        self.model, self.meter = model, Meter()
        setattr(CompressedLayer, "observe", self.meter.wrap(CompressedLayer.observe))  # noqa: B010

    def around_request(self, method: str, ratio: float, length: int) -> AbstractContextManager[Any]:
        """Open from before the prefill until after the last step: compressed caches need mmkv's attention to decode."""
        return compress(self.model, BY_NAME[method].text, budget=kept(ratio, length))

    def around_prefill(self, session: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def cache(self, session: Any, ids: Tensor) -> Any:
        return session.cache(ids)

    def entries(self, cache: Any) -> tuple[int, int]:
        stock = isinstance(cache, DynamicCache)
        held = stock_entries(cache) if stock else sum(_pairs(layer) for layer in cache.compressed_layers)
        return held, held

    def tensors(self, cache: Any) -> list[Tensor]:
        return stock_tensors(cache) if isinstance(cache, DynamicCache) else cache.tensors()

    def forget(self) -> None:
        """Nothing stays behind on the model."""

    def compress_layer(self, method: str, ratio: float, layer: Layer) -> tuple[Tensor, int]:
        """The keys that stay and how many, through the public parts: observe, decide, compact."""
        cache = compress_layer(Pipeline.parse(BY_NAME[method].text), kept(ratio, layer.keys.shape[2]), layer)
        return cache.keys, cache.keys.shape[0]


def compress_layer(pipeline: Pipeline, budget: int, layer: Layer) -> RaggedKV:
    """One layer's kept entries, the last token protected as adapters do."""
    length = layer.keys.shape[2]
    slots, valid = torch.arange(length)[None, None], torch.ones(1, 1, length, dtype=torch.bool)
    seen = Observation(
        queries=layer.queries[:, :, layer.queries.shape[2] - pipeline.window :].clone(),
        keys=layer.keys,
        values=layer.values,
        valid=valid,
        candidates=valid,
        slots=slots,
        scaling=layer.keys.shape[3] ** -0.5,
        layer=0,
        num_layers=1,
    )
    round_ = pipeline.start(torch.tensor([budget]), 1, torch.tensor([length]))
    kept_ = round_.decide(seen, slots == length - 1)
    if kept_ is None:
        raise ValueError(f"{pipeline} removed nothing: budget {budget} of {length}")
    return compact(layer.keys, layer.values, slots, kept_)


def _pairs(layer: CompressedLayer) -> int:
    assert layer.kept is not None  # a prompt has been read
    return int(layer.kept.sum())

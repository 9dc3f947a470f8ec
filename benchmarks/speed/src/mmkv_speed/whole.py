"""A whole language model with random weights on a device: prefill, compression, decoding from three caches."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from mmkv_hf import compress
from mmkv_hf.layers import CompressedLayer
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache

from .deadline import Deadline
from .device import between, mark, synchronize
from .geometry import Geometry
from .held import live_bytes, stock_tensors
from .methods import kept

PADDED: Final = "mmkv_speed_padded"
PIPELINE: Final = "adakv+mixkv+bacon"


@dataclass(frozen=True, slots=True)
class Size:
    """How much: tokens of the prompt, the share removed, decode steps, repeats of the prefill."""

    prompt: int = 32768
    removed: float = 0.9
    steps: int = 24
    repeats: int = 3


SMALL: Final = Size(96, 0.5, 3, 1)


@dataclass(slots=True)
class Watch:
    """Seconds within `CompressedLayer.observe` on the device, and the most that the cache held."""

    device: str
    cache: Any = None
    peak: int = 0
    spans: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Sum over all calls."""
        return between(self.spans, self.device)

    def look(self) -> None:
        """Takes the bytes held now into account."""
        if self.cache is not None:
            self.peak = max(self.peak, live_bytes(self.cache.tensors()))


@contextmanager
def watched(device: str) -> Iterator[Watch]:
    """Every call of `observe` is timed; where the watch is given a cache, its bytes are looked at instead."""
    watch, stock = Watch(device), CompressedLayer.observe

    def observe(layer: Any, *args: Any, **kwargs: Any) -> None:
        watch.look()
        start = mark(device)
        stock(layer, *args, **kwargs)
        watch.spans.append((start, mark(device)))
        watch.look()

    setattr(CompressedLayer, "observe", observe)  # noqa: B010
    try:
        yield watch
    finally:
        setattr(CompressedLayer, "observe", stock)  # noqa: B010


def padded_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, mmkv_padded: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA over a dense cache in which every head is padded to the longest; `mmkv_padded` says what is real."""
    visible = mmkv_padded[module.layer_idx][..., : key.shape[2]]
    scale = kwargs.get("scaling")
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(PADDED, padded_attention)


def pad(cache: Any, steps: int, group: int) -> tuple[DynamicCache, list[Tensor]]:
    """What a compressed cache holds as a stock one, and per layer what of it is real, [B, Hq, 1, M + steps] bool."""
    stock, masks = DynamicCache(), []
    for index, layer in enumerate(cache.compressed_layers):
        keys, values, slots = layer.entries()
        stock.update(keys, values, index)
        real = (slots >= 0).expand(keys.shape[:3])
        masks.append(F.pad(real, (0, steps), value=True).repeat_interleave(group, 1)[:, :, None])
    return stock, masks


def run(geometry: Geometry, size: Size, dtype: torch.dtype, device: str, deadline: Deadline) -> dict[str, Any]:
    """Everything about one model, or why it was left out."""
    found: dict[str, Any] = {"geometry": geometry.name, "why": ""}
    if deadline.over:
        return found | {"why": "no time left"}
    try:
        return found | _measure(geometry, size, dtype, device, deadline)
    except torch.cuda.OutOfMemoryError:
        return found | {"why": "does not fit"}
    except Exception as failure:  # said on the page; what else was measured stays
        return found | {"why": f"fails: {failure}"}
    finally:
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def _measure(geometry: Geometry, size: Size, dtype: torch.dtype, device: str, deadline: Deadline) -> dict[str, Any]:
    torch.manual_seed(0)
    model = geometry.model(dtype, device, size.prompt + size.steps + 1)
    weights = _allocated(device)
    ids = torch.randint(3, geometry.vocabulary, (1, size.prompt), device=device)
    budget = kept(size.removed, size.prompt)
    plain = _plain(model, ids, size, device, weights, deadline)
    ours = _compressed(model, ids, size, device, weights, budget, deadline)
    pair = 2 * geometry.size * dtype.itemsize
    layer, all_kept = geometry.heads * size.prompt * pair, geometry.layers * geometry.heads * budget * (pair + 4)
    return {
        "prompt": size.prompt, "budget": budget, "removed": size.removed, "pipeline": PIPELINE,
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "allowed": layer + all_kept + geometry.layers * 8 * (geometry.heads + 1), **plain, **ours,
    }  # fmt: skip


def _plain(model: Any, ids: Tensor, size: Size, device: str, weights: int, deadline: Deadline) -> dict[str, Any]:
    """The stock model with its full cache."""
    times = []
    for number in range(size.repeats + 1):
        if number > 1 and deadline.over:
            break
        cache = DynamicCache()
        _reset_peak(device)
        times.append(_timed(partial(_read, model, ids, cache), device))
    found = {"plain_prefill": times[1:], "plain_peak": _peak(device) - weights}
    found["plain_bytes"] = live_bytes(stock_tensors(cache))
    found["plain_step"] = _decode(model, cache, ids, size.steps, device)
    return found


def _compressed(
    model: Any, ids: Tensor, size: Size, device: str, weights: int, budget: int, deadline: Deadline
) -> dict[str, Any]:
    """The compressed cache, read three ways: as it is held, and padded."""
    found: dict[str, Any] = {"prefill": [], "inside": []}
    config = model.config
    for number in range(size.repeats + 1):
        if number > 1 and deadline.over:
            break
        with watched(device) as watch, compress(model, PIPELINE, budget=budget) as session:
            cache = session.cache(ids)
            watch.cache = cache if number == 0 else None  # the first run warms up, and is not timed
            _reset_peak(device)
            seconds = _timed(partial(_read, model, ids, cache), device)
            found["peak"] = _peak(device) - weights
            if number == 0:
                found["cache_peak"] = watch.peak
            else:
                found["prefill"].append(seconds)
                found["inside"].append(watch.seconds)
            if number == 0:
                padded = pad(cache, size.steps + 1, config.num_attention_heads // config.num_key_value_heads)
                found["bytes"] = live_bytes(cache.tensors())
                found["step"] = _decode(model, cache, ids, size.steps, device)
    found["padded_bytes"] = live_bytes(stock_tensors(padded[0]))
    found["padded_step"] = _decode_padded(model, *padded, ids, size.steps, device)
    return found


def _read(model: Any, ids: Tensor, cache: Any) -> None:
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _decode(model: Any, cache: Any, ids: Tensor, steps: int, device: str, **given: Any) -> list[float]:
    """Seconds of every step after the first."""
    times = []
    for step in range(steps):
        place = torch.tensor([[ids.shape[1] + step]], device=ids.device)
        inputs = {"input_ids": ids[:, :1], "position_ids": place, "past_key_values": cache, **given}
        times.append(_timed(partial(model, **inputs), device))
    return times[1:]


def _decode_padded(
    model: Any, cache: DynamicCache, masks: list[Tensor], ids: Tensor, steps: int, device: str
) -> list[float]:
    stock = model.config._attn_implementation
    model.set_attn_implementation(PADDED)
    try:
        return _decode(model, cache, ids, steps, device, mmkv_padded=masks)
    finally:
        model.set_attn_implementation(stock)


def _timed(call: Callable[[], Any], device: str) -> float:
    """Wall seconds, the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device.startswith("cuda") else 0


def _reset_peak(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0


def share(found: dict[str, Any]) -> float:
    """Of the prefill, spent inside the compression."""
    inside, prefill = (statistics.median(found[name]) for name in ("inside", "plain_prefill"))
    return float(inside / prefill)

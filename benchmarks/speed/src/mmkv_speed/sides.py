"""What a worker needs of either library, and one request and one layer measured with it."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from .held import live_bytes
from .meter import Meter, clock, took
from .model import Layer, make_layer

NONE = "none"


class Side(Protocol):
    """One library: how it is opened, what its caches hold, and its compression of one layer."""

    packages: tuple[str, ...]
    model: Any
    meter: Meter

    def around_request(self, method: str, ratio: float, length: int) -> AbstractContextManager[Any]: ...
    def around_prefill(self, handle: Any) -> AbstractContextManager[Any]: ...
    def cache(self, handle: Any, ids: Tensor) -> Any: ...
    def entries(self, cache: Any) -> tuple[int, int]:
        """KV pairs that attention reads, and those that take memory, over all layers and heads."""
        ...

    def tensors(self, cache: Any) -> list[Tensor]: ...
    def forget(self) -> None: ...
    def compress_layer(self, method: str, ratio: float, layer: Layer) -> tuple[Tensor, int]: ...


def measure_request(side: Side, job: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """Opens the method, reads `length` tokens of the prompt (all), decodes `steps`, closes the method."""
    ids = ids[:, : job.get("length", ids.shape[1])]
    method, length, plain = job["method"], ids.shape[1], job["method"] == NONE
    side.meter.seconds = 0.0
    all_threads, start = time.process_time(), clock()
    with side.meter.running():
        request = nullcontext() if plain else side.around_request(method, job["ratio"], length)
        handle = request.__enter__()
        cache = DynamicCache() if plain else side.cache(handle, ids)
    with nullcontext() if plain else side.around_prefill(handle):
        logits = side.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token, prefill = logits[:, -1:].argmax(-1), clock() - start
    attended, stored = side.entries(cache)
    times, held = decode(side, cache, token, length, job["steps"])
    start = clock()
    with side.meter.running():
        request.__exit__(None, None, None)
    prefill += clock() - start  # leaving costs too; it is counted as if it came before the first token
    elsewhere = time.process_time() - all_threads - prefill - sum(times)
    side.forget()
    return {
        "prefill": prefill, "inside": 0.0 if plain else side.meter.seconds, "first": times[0], "steps": times[1:],
        "elsewhere": elsewhere, "bytes": held, "attended": attended, "stored": stored,
        "logits": logits[0, -1, :8].tolist(),
    }  # fmt: skip


def decode(side: Side, cache: Any, token: Tensor, length: int, steps: int) -> tuple[list[float], int]:
    """Seconds of every step, and the bytes that are live after the first."""
    times, held = [], 0
    for step in range(steps):
        inputs = {"input_ids": token, "position_ids": torch.tensor([[length + step]])}
        start = clock()
        token = side.model(**inputs, past_key_values=cache, use_cache=True).logits.argmax(-1)
        times.append(clock() - start)
        if step == 0:
            held = live_bytes(side.tensors(cache))
    return times, held


def measure_layer(side: Side, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every method's compression of one layer, each `repeats` times, with what it kept."""
    layer, ratio = make_layer(job["seed"], job["heads"], job["length"]), job["ratio"]
    found: dict[str, Any] = {}
    for method in job["methods"]:
        side.compress_layer(method, ratio, layer)  # first touch of memory is nobody's cost
        call = partial(side.compress_layer, method, ratio, layer)
        runs = [took(call) for _ in range(job["repeats"])]
        keys, count = runs[0][1]
        found[method] = {"seconds": [seconds for seconds, _ in runs], "kept": count, "norm": float(keys.norm())}
    return found

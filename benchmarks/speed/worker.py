"""One side of the comparison: prefills and decodes on request, in whichever environment it is started with.

Reads one JSON job per line from stdin, {"method": ..., "ratio": share removed, "steps": decode steps}, and answers each
with one JSON line; the first line says hello. All times are CPU seconds of the one thread that computes.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

VOCABULARY, WINDOW = 1000, 64
TEXT = {
    "snapkv": f"snapkv(window={WINDOW})",
    "adakv": f"adakv+snapkv(window={WINDOW})",
    "adakv+mixkv+bacon": f"adakv+mixkv+bacon+snapkv(window={WINDOW})",
}
clock = time.thread_time


class Meter:
    """CPU time spent in wrapped functions; calls inside a wrapped call are not counted twice."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    @contextmanager
    def running(self) -> Iterator[None]:
        self._depth += 1
        start = clock()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.seconds += clock() - start

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return function(*args, **kwargs)

        return timed


class Ours:
    """mmkv: everything it does while reading a prompt happens in the session and in `CompressedLayer.observe`."""

    packages = ("mmkv-hf", "mmkv-pipelines", "mmkv-scores", "mmkv-budget", "mmkv-select", "mmkv-kernels")

    def __init__(self, model: LlamaForCausalLM) -> None:
        from mmkv_hf.layers import CompressedLayer

        self.model, self.meter = model, Meter()
        setattr(CompressedLayer, "observe", self.meter.wrap(CompressedLayer.observe))  # noqa: B010

    def around_request(self, method: str, ratio: float, length: int) -> AbstractContextManager[Any]:
        """Open from before the prefill until after the last step: compressed caches need mmkv's attention to decode."""
        from mmkv_hf import compress

        return compress(self.model, TEXT[method], budget=kept(ratio, length))

    def around_prefill(self, session: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def cache(self, session: Any, ids: Tensor) -> Any:
        return session.cache(ids)

    def entries(self, cache: Any) -> tuple[int, int]:
        """KV pairs that attention reads, and those that take memory, over all layers and heads."""
        stock = isinstance(cache, DynamicCache)
        held = stock_entries(cache) if stock else sum(int(layer.kept.sum()) for layer in cache.compressed_layers)
        return held, held

    def tensors(self, cache: Any) -> list[Tensor]:
        return stock_tensors(cache) if isinstance(cache, DynamicCache) else cache.tensors()

    def forget(self) -> None:
        """Nothing stays behind on the model."""


class Peer:
    """kvpress: a forward hook on every attention layer while the prompt is read."""

    packages = ("kvpress",)

    def __init__(self, model: LlamaForCausalLM) -> None:
        import kvpress

        self.model, self.kvpress, self.meter = model, kvpress, Meter()

    def around_request(self, method: str, ratio: float, length: int) -> AbstractContextManager[Any]:
        base = self.kvpress.SnapKVPress(compression_ratio=ratio, window_size=WINDOW, kernel_size=5)
        press = {"snapkv": lambda: base, "adakv": lambda: self.kvpress.AdaKVPress(base)}[method]()
        press.forward_hook = self.meter.wrap(press.forward_hook)
        return nullcontext(press)

    def around_prefill(self, press: Any) -> AbstractContextManager[Any]:
        opened: AbstractContextManager[Any] = press(self.model)
        return opened

    def cache(self, press: Any, ids: Tensor) -> Any:
        return DynamicCache()

    def entries(self, cache: Any) -> tuple[int, int]:
        """See `Ours.entries`; AdaKV masks keys and holds them all."""
        held = stock_entries(cache)
        masked = (getattr(layer.self_attn, "masked_key_indices", None) for layer in self.model.model.layers)
        return held - sum(len(found[0]) for found in masked if found is not None), held

    def tensors(self, cache: Any) -> list[Tensor]:
        return stock_tensors(cache)

    def forget(self) -> None:
        """Masks stay on the modules when a press is closed."""
        for layer in self.model.model.layers:
            layer.self_attn.masked_key_indices = None


def kept(ratio: float, length: int) -> int:
    """Tokens that stay when `ratio` of them go, rounded as kvpress does."""
    return int(length * (1 - ratio))


def stock_tensors(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def stock_entries(cache: Any) -> int:
    return sum(layer.keys[..., 0].numel() for layer in cache.layers)


def live_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def make_model(seed: int) -> LlamaForCausalLM:
    """The text model; weights are drawn by name, so that both releases of transformers get the same."""
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=32768, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.fill_(1.0)
    return model


def fingerprint(model: LlamaForCausalLM, ids: Tensor) -> str:
    """Digest of weights and prompt."""
    digest = hashlib.sha256(ids.numpy().tobytes())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.numpy().tobytes())
    return digest.hexdigest()[:16]


def measure(side: Ours | Peer, job: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """Runs one job: opens the method, prefills, decodes, closes it."""
    method, length = job["method"], ids.shape[1]
    plain = method == "none"
    side.meter.seconds = 0.0
    all_threads = time.process_time()
    start = clock()
    with side.meter.running():
        request = nullcontext() if plain else side.around_request(method, job["ratio"], length)
        handle = request.__enter__()
        cache = DynamicCache() if plain else side.cache(handle, ids)
    with nullcontext() if plain else side.around_prefill(handle):
        logits = side.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token, prefill = logits[:, -1:].argmax(-1), clock() - start
    attended, stored = side.entries(cache)
    tokens, times = [int(token)], []
    for step in range(job["steps"]):
        inputs = {"input_ids": token, "position_ids": torch.tensor([[length + step]])}
        start = clock()
        token = side.model(**inputs, past_key_values=cache, use_cache=True).logits.argmax(-1)
        times.append(clock() - start)
        tokens.append(int(token))
        if step == 0:
            held = live_bytes(side.tensors(cache))
    start = clock()
    with side.meter.running():
        request.__exit__(None, None, None)
    prefill += clock() - start  # leaving costs too; it is counted as if it came before the first token
    elsewhere = time.process_time() - all_threads - prefill - sum(times)
    side.forget()
    return {
        "prefill": prefill, "inside": 0.0 if plain else side.meter.seconds, "first": times[0], "steps": times[1:],
        "elsewhere": elsewhere, "bytes": held, "attended": attended, "stored": stored, "tokens": tokens[:4],
        "logits": logits[0, -1, :8].tolist(),
    }  # fmt: skip


def serve(side: Ours | Peer, ids: Tensor, answers: TextIO, hello: dict[str, Any]) -> None:
    """Answers jobs until stdin ends, after a prefill and a short compressed run that nobody measures."""
    print(json.dumps(hello), file=answers, flush=True)
    side.model(input_ids=ids, past_key_values=DynamicCache(), logits_to_keep=1)
    measure(side, {"method": "adakv", "ratio": 0.5, "steps": 2}, ids[:, :512])
    for line in sys.stdin:
        gc.collect()
        print(json.dumps(measure(side, json.loads(line), ids)), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "peer"])
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    transformers_logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    model = make_model(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed + 1)
    ids = torch.randint(3, VOCABULARY, (1, arguments.prompt), generator=generator)
    side = Ours(model) if arguments.side == "ours" else Peer(model)
    versions = {name: version(name) for name in ("torch", "transformers", *side.packages)}
    hello = {"side": arguments.side, "versions": versions, "fingerprint": fingerprint(model, ids)}
    serve(side, ids, answers, hello)


if __name__ == "__main__":
    main()

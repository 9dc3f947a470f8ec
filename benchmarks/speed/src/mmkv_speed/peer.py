"""kvpress's side: a forward hook on every attention layer while the prompt is read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import kvpress
from torch import Tensor
from transformers import DynamicCache

from .held import stock_entries, stock_tensors
from .meter import Meter
from .methods import KERNEL, WINDOW
from .model import Layer


class Peer:
    """See `sides.Side`."""

    packages: tuple[str, ...] = ("kvpress",)

    def __init__(self, model: Any) -> None:
        self.model, self.meter = model, Meter()

    def around_request(self, method: str, ratio: float, length: int) -> AbstractContextManager[Any]:
        press = make_press(method, ratio)
        press.forward_hook = self.meter.wrap(press.forward_hook)
        return nullcontext(press)

    def around_prefill(self, press: Any) -> AbstractContextManager[Any]:
        opened: AbstractContextManager[Any] = press(self.model)
        return opened

    def cache(self, press: Any, ids: Tensor) -> Any:
        return DynamicCache()

    def entries(self, cache: Any) -> tuple[int, int]:
        """AdaKV masks keys and holds them all."""
        held = stock_entries(cache)
        masked = (getattr(layer.self_attn, "masked_key_indices", None) for layer in self.model.model.layers)
        return held - sum(len(found[0]) for found in masked if found is not None), held

    def tensors(self, cache: Any) -> list[Tensor]:
        return stock_tensors(cache)

    def forget(self) -> None:
        """Masks stay on the modules when a press is closed."""
        for layer in self.model.model.layers:
            layer.self_attn.masked_key_indices = None

    def compress_layer(self, method: str, ratio: float, layer: Layer) -> tuple[Tensor, int]:
        """The keys that stay and how many; AdaKV's are all still there."""
        attention = layer.attention
        attention.masked_key_indices = None
        given = {"position_embeddings": layer.rotations}
        keys, _ = make_press(method, ratio).compress(attention, layer.hidden, layer.keys, layer.values, None, given)
        masked = attention.masked_key_indices
        return keys, keys[..., 0].numel() - (0 if masked is None else len(masked[0]))


def make_press(method: str, ratio: float) -> Any:
    """The press that goes by our method's name, with the settings that make both do the same."""
    window = {"window_size": WINDOW, "kernel_size": KERNEL}
    make = {
        "snapkv": lambda: kvpress.SnapKVPress(ratio, **window),
        "adakv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio, **window)),
        "pyramidkv": lambda: kvpress.PyramidKVPress(ratio, **window),
        "tova": lambda: kvpress.TOVAPress(ratio),
        "keydiff": lambda: kvpress.KeyDiffPress(ratio),
        "knorm": lambda: kvpress.KnormPress(ratio),
        "streamingllm": lambda: kvpress.StreamingLLMPress(ratio, n_sink=4),
        "random": lambda: kvpress.RandomPress(ratio, seed=0),
    }
    return make[method]()

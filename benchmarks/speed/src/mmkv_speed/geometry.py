"""Sizes of the language models that operators and whole models are measured with on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from .operators import Shape


@dataclass(frozen=True, slots=True)
class Geometry:
    """A published language model without its weights.

    Attributes:
        name: on the page.
        layers: L.
        query_heads: Hq.
        heads: KV heads.
        size: of a head.
        hidden: width between layers.
        inner: width of the feed-forward part.
        vocabulary: tokens.
        qwen: whether it is a Qwen2, else a Mistral.
    """

    name: str
    layers: int
    query_heads: int
    heads: int
    size: int
    hidden: int
    inner: int
    vocabulary: int
    qwen: bool

    def shape(self, batch: int, entries: int, dtype: torch.dtype, device: str, skew: int = 1) -> Shape:
        """One layer's cache."""
        return Shape(batch, self.query_heads, self.heads, self.size, entries, dtype, device, skew=skew)

    def model(self, dtype: torch.dtype, device: str, longest: int) -> Any:
        """The whole language model with random weights, made on the device."""
        config_class, model_class = (
            (Qwen2Config, Qwen2ForCausalLM) if self.qwen else (MistralConfig, MistralForCausalLM)
        )
        given = {} if self.qwen else {"sliding_window": None, "head_dim": self.size}
        config = config_class(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.query_heads, num_key_value_heads=self.heads,
            max_position_embeddings=longest, tie_word_embeddings=False, attn_implementation="sdpa",
            bos_token_id=1, eos_token_id=2, pad_token_id=0, **given,
        )  # fmt: skip
        with torch.device("meta"):
            model = model_class(config)
        model = model.to(dtype).to_empty(device=device).eval()
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffer was empty too
        return model


QWEN: Final = Geometry("Qwen2-VL-7B", 28, 28, 4, 128, 3584, 18944, 152064, True)
MISTRAL: Final = Geometry("LLaVA-NeXT-Mistral", 32, 32, 8, 128, 4096, 14336, 32064, False)
WHOLE: Final = (QWEN, MISTRAL)
TINY: Final = (
    Geometry("tiny Qwen2", 2, 4, 2, 16, 64, 96, 128, True),
    Geometry("tiny Mistral", 2, 4, 2, 16, 64, 96, 128, False),
)

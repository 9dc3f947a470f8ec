"""The small text model that both environments build alike, its prompt, and one attention layer."""

from __future__ import annotations

import hashlib
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb

from .methods import WINDOW

VOCABULARY: Final = 1000
SIZE: Final = 64
HIDDEN: Final = 512


def make_model(seed: int) -> LlamaForCausalLM:
    """The text model; weights are drawn by name, so that both releases of transformers get the same."""
    model = LlamaForCausalLM(_config(layers=8, heads=4)).float().eval()
    _draw(model, torch.Generator().manual_seed(seed))
    return model


def make_prompt(seed: int, length: int) -> Tensor:
    """[1, N] token ids."""
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed + 1))


def fingerprint(model: LlamaForCausalLM, ids: Tensor) -> str:
    """Digest of weights and prompt."""
    digest = hashlib.sha256(ids.numpy().tobytes())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.numpy().tobytes())
    return digest.hexdigest()[:16]


class Layer(NamedTuple):
    """What one attention layer leaves when a prompt has been read: either side's compression takes what it needs."""

    attention: Any
    hidden: Tensor  # [1, N, hidden]
    rotations: tuple[Tensor, Tensor]
    queries: Tensor  # [1, Hq, W, D], of the last rows, after RoPE
    keys: Tensor  # [1, H, N, D]
    values: Tensor


def make_layer(seed: int, heads: int, length: int) -> Layer:
    """A layer with two query heads per KV head, the same in both environments."""
    generator = torch.Generator().manual_seed(seed)
    config = _config(layers=1, heads=heads)
    attention = LlamaAttention(config, 0).float().eval()
    _draw(attention, generator)
    hidden = torch.randn(1, length, HIDDEN, generator=generator)
    keys, values = (torch.randn(1, heads, length, SIZE, generator=generator) for _ in range(2))
    cos, sin = LlamaRotaryEmbedding(config)(hidden, torch.arange(length)[None])
    last = attention.q_proj(hidden[:, -WINDOW:])
    rows = last.view(1, last.shape[1], -1, SIZE).transpose(1, 2)
    queries, _ = apply_rotary_pos_emb(rows, rows, cos[:, -WINDOW:], sin[:, -WINDOW:])
    return Layer(attention, hidden, (cos, sin), queries, keys, values)


def _config(layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=layers, num_attention_heads=2 * heads,
        num_key_value_heads=heads, head_dim=SIZE, vocab_size=VOCABULARY, max_position_embeddings=131072,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, attn_implementation="sdpa",
    )  # fmt: skip


def _draw(module: torch.nn.Module, generator: torch.Generator) -> None:
    for _, parameter in sorted(module.named_parameters()):
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.fill_(1.0)

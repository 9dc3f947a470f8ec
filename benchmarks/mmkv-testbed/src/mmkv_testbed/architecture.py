"""What the models have in common: sizes, the start of training, and what the trainer asks of an architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .vocabulary import BOS, COLUMNS, EOS, GRID, PAD, ROWS, TOKEN_ID, WORDS, encode

TOKENS: Final = {"pad_token_id": TOKEN_ID[PAD], "bos_token_id": TOKEN_ID[BOS], "eos_token_id": TOKEN_ID[EOS]}


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Size of a model.

    Attributes:
        layers: Layers of the language model.
        hidden: Its width.
        intermediate: Width of its feed-forward layers.
        query_heads: Its query heads, of 32 dimensions each.
        kv_heads: Its KV heads.
        vision_hidden: Width of the vision tower.
    """

    layers: int
    hidden: int = 128
    intermediate: int = 256
    query_heads: int = 8
    kv_heads: int = 4
    vision_hidden: int = 128


HEAD_DIM: Final = 32


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the trainer needs to know of a family of models.

    Attributes:
        build: An untrained model, float32, initialised from torch's global generator.
        features: (model, patches float32 `[B, N, 192]`, cells int64 `[B, N]`, columns) -> float32 `[B, N, hidden]`: the
            image features of crops `columns` cells wide, as the stock model computes them for a whole page. Patches are
            normalised cells in the order (channel, y, x), `cells` their row-major indices in the full grid.
        positions: (cells int64 `[B, N]`, first free position) -> int64 `[A, B, N]` positions of an image's cells on the
            model's A axes, and the next free position.
        vision: The modules that make image features.
        processor: The stock processor, without torchvision.
        places: Whether image features can tell a cell's row and column.
    """

    build: Callable[[Dimensions], Any]
    features: Callable[[Any, Tensor, Tensor, int], Tensor]
    positions: Callable[[Tensor, int], tuple[Tensor, int]]
    vision: Callable[[Any], nn.ModuleList]
    processor: Callable[[], Any]
    places: bool


def text_options(dimensions: Dimensions) -> dict[str, Any]:
    """Options of the language model's configuration that all architectures share."""
    return {
        **TOKENS,
        "vocab_size": len(WORDS),
        "hidden_size": dimensions.hidden,
        "intermediate_size": dimensions.intermediate,
        "num_hidden_layers": dimensions.layers,
        "num_attention_heads": dimensions.query_heads,
        "num_key_value_heads": dimensions.kv_heads,
        "max_position_embeddings": 4096,
        "initializer_range": 0.06,
    }


def place_codes(width: int) -> Tensor:
    """Codes of the 24 rows (or columns), float32 `[GRID, width]` of RMS 1 and rank 8: a randomly turned Fourier code.

    One head of 32 dimensions has to carry glyph, ink, row and column to the answer; 48 independent directions for the
    places alone do not fit through it, and training stays at chance for them for long.
    """
    angle = 2 * torch.pi * torch.arange(GRID)[:, None] / torch.tensor([24.0, 12.0, 6.0, 3.0])
    waves = torch.cat([angle.cos(), angle.sin()], dim=1)
    code: Tensor = waves @ torch.linalg.qr(torch.randn(width, waves.shape[1]))[0].T
    return F.normalize(code, dim=1).mul(width**0.5)


@torch.no_grad()
def start_language_model(model: Any) -> None:
    """Sets the embeddings, `lm_head` and the layers' outputs to a start from which training gets away.

    With the usual small embeddings the first layers' outputs drown the identity of a token and training stays at
    chance: embeddings start at RMS 1 and the layers write a tenth of the usual amount. Rows and columns start with
    `place_codes`. `lm_head` starts as a small copy of the embeddings (and is free of them afterwards): as image
    features are sums of embeddings, one circuit that copies what a head looks at serves digits, inks and places alike,
    and heads start as such a circuit.
    """
    language_model = model.model.language_model
    width = language_model.embed_tokens.weight.shape[1]
    language_model.embed_tokens.weight.normal_(0, 1)
    for words in (ROWS, COLUMNS):
        language_model.embed_tokens.weight[encode(words)] = place_codes(width)
    model.lm_head.weight.copy_(0.03 * language_model.embed_tokens.weight)
    for layer in language_model.layers:
        _start_as_copy(layer.self_attn)
        layer.mlp.down_proj.weight.mul_(0.1)


def _start_as_copy(attention: Any) -> None:
    """Makes every head write a tenth of what it looks at, each within a subspace of its own."""
    values = nn.init.orthogonal_(attention.v_proj.weight)
    heads = values.view(-1, HEAD_DIM, values.shape[1]).repeat_interleave(attention.num_key_value_groups, 0)
    attention.o_proj.weight.copy_(0.1 * heads.flatten(0, 1).T)

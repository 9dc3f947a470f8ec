"""The small vision-language model: a stock `LlavaForConditionalGeneration` with about one million parameters."""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from .glyphs import CELL
from .vocabulary import BOS, COLUMNS, EOS, GRID, IMAGE, PAD, ROWS, TOKEN_ID, WORDS, encode

LAYERS: Final = 4
HIDDEN: Final = 128
QUERY_HEADS: Final = 8
KV_HEADS: Final = 4
HEAD_DIM: Final = 32
VISION_HIDDEN: Final = 96


def build_config() -> LlavaConfig:
    """A one-layer SigLIP tower (one token per cell) and a four-layer Qwen2 language model."""
    vision = SiglipVisionConfig(
        hidden_size=VISION_HIDDEN,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=CELL * GRID,
        patch_size=CELL,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        initializer_range=0.06,
        pad_token_id=TOKEN_ID[PAD],
        bos_token_id=TOKEN_ID[BOS],
        eos_token_id=TOKEN_ID[EOS],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=TOKEN_ID[IMAGE],
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


def _place_codes(width: int) -> torch.Tensor:
    """Codes of the 24 rows (or columns), float32 `[GRID, width]` of RMS 1 and rank 8: a randomly turned Fourier code.

    One head of 32 dimensions has to carry glyph, ink, row and column to the answer; 48 independent directions for the
    places alone do not fit through it, and training stays at chance for them for long.
    """
    angle = 2 * torch.pi * torch.arange(GRID)[:, None] / torch.tensor([24.0, 12.0, 6.0, 3.0])
    waves = torch.cat([angle.cos(), angle.sin()], dim=1)
    code: torch.Tensor = waves @ torch.linalg.qr(torch.randn(width, waves.shape[1]))[0].T
    return F.normalize(code, dim=1).mul(width**0.5)


@torch.no_grad()
def build_model() -> LlavaForConditionalGeneration:
    """An untrained model, float32, initialised from torch's global generator.

    Rows and columns start with `_place_codes` wherever they occur: in the vision tower, the embeddings and `lm_head`.

    With the usual small embeddings the first layers' outputs drown the identity of a token and training stays at
    chance: embeddings start at RMS 1 and the layers write a tenth of the usual amount.
    """
    model = LlavaForConditionalGeneration(build_config())
    language_model = model.model.language_model
    language_model.embed_tokens.weight.normal_(0, 1)
    model.lm_head.weight.normal_(0, 0.03)
    for words in (ROWS, COLUMNS):
        language_model.embed_tokens.weight[encode(words)] = _place_codes(HIDDEN)
        model.lm_head.weight[encode(words)] = 0.03 * _place_codes(HIDDEN)
    model.model.multi_modal_projector.linear_2.weight.mul_(10)
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    rows, columns = _place_codes(VISION_HIDDEN), _place_codes(VISION_HIDDEN)
    positions.copy_(0.3 * (rows[:, None] + columns).flatten(0, 1))
    for layer in language_model.layers:
        layer.self_attn.o_proj.weight.mul_(0.1)
        layer.mlp.down_proj.weight.mul_(0.1)
    return model


def cell_features(model: LlavaForConditionalGeneration, patches: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Image features of any subset of a page's cells, as `get_image_features` gives them for a whole page.

    Args:
        model: The model.
        patches: float32 `[B, N, 192]`, normalised pixels of each cell in the order (channel, y, x).
        cells: int64 `[N]` or `[B, N]`, the row-major index of each cell in the full grid.

    Returns:
        float32 `[B, N, HIDDEN]`.
    """
    tower = model.model.vision_tower
    convolution = tower.embeddings.patch_embedding
    hidden = F.linear(patches, convolution.weight.flatten(1), convolution.bias)
    hidden = hidden + tower.embeddings.position_embedding.weight[cells]
    features: torch.Tensor = model.model.multi_modal_projector(tower.encoder(inputs_embeds=hidden).last_hidden_state)
    return features

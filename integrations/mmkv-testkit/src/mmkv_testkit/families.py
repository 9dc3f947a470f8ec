"""Tiny random vision-language models of the supported families, with inputs: no processor, no download.

The attention is sharp on purpose: with the default initialisation of transformers every token weighs the same, and
losing half of the cache would change the logits by less than the rounding of a broken adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from mmkv_testkit._models import FAMILY, IMAGE, TEXT, VIDEO, VISION_END, VISION_START, Family
from mmkv_testkit.prompts import Inputs, pad, row, unpadded

__all__ = ["FAMILIES", "IMAGE_TOKEN_ID", "NAMES", "PLAIN", "TinyVLM", "build", "pad", "row", "unpadded"]

FAMILIES: tuple[str, ...] = tuple(name for name in FAMILY if name not in ("paligemma2", "llama"))
"""The 17 families of vision-language models."""
PLAIN = tuple(name for name in FAMILIES if name not in ("gemma3", "gemma4", "mllama", "qwen3_5"))
"""Those without layers that slide, borrow keys, see images alone or recur."""
NAMES: tuple[str, ...] = tuple(FAMILY)
"""Everything `build` knows: `FAMILIES`, `paligemma2` (gemma2 text, capped attention logits) and text-only `llama`."""
IMAGE_TOKEN_ID = IMAGE
BETWEEN_IMAGES = 4
UNSPOKEN = [0, IMAGE, VIDEO, VISION_START, VISION_END]


@dataclass(frozen=True, slots=True)
class TinyVLM:
    """A tiny model in eval mode and `inputs` for `model(**inputs)` or `model.generate(**inputs)`."""

    model: Any
    inputs: Inputs
    name: str
    image_token_id: int | None

    @property
    def text_config(self) -> Any:
        """Configuration of the language model."""
        return self.model.config.get_text_config(decoder=True)


def build(
    name: str,
    *,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    images: int = 1,
    text: tuple[int, int] = (12, 60),
    **overrides: Any,
) -> TinyVLM:
    """A tiny random model of family `name` and inputs for it; leaves torch's global random state alone.

    Args:
        name: One of `NAMES`.
        batch: Rows; each has its own text and images.
        seed: Of the weights and of the inputs.
        dtype: Of the weights and pixels.
        images: Images per row, separated by `BETWEEN_IMAGES` text tokens.
        text: Text tokens before the first and after the last image. PaliGemma puts all of them after the image, as
            its processor does.
        **overrides: Settings of the language model, such as `num_hidden_layers=8`.
    """
    if name not in FAMILY:
        raise ValueError(f"unknown family {name!r}; known: {', '.join(NAMES)}")
    family = FAMILY[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(family, overrides).to(dtype)
        inputs = _inputs(name, family, batch, images, text)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return TinyVLM(model, inputs, name, IMAGE if family.tokens else None)


def _text_config(family: Family, overrides: Mapping[str, Any]) -> dict[str, Any]:
    settings = {**TEXT, **family.text, **overrides}
    if family.layer_types and "layer_types" not in overrides:
        settings["layer_types"] = [
            family.layer_types[i % len(family.layer_types)] for i in range(settings["num_hidden_layers"])
        ]
    return settings


def _model(family: Family, overrides: Mapping[str, Any]) -> Any:
    config_class = getattr(transformers, f"{family.prefix}Config")
    text = _text_config(family, overrides)
    if family.tokens:
        config = config_class(text_config=text, vision_config=dict(family.vision), **family.config)
        model = getattr(transformers, f"{family.prefix}ForConditionalGeneration")(config)
        model.set_attn_implementation({"text_config": family.text_attention})
    else:
        model = getattr(transformers, f"{family.prefix}ForCausalLM")(config_class(**text))
    _sharpen(model, family.query_norm)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = UNSPOKEN  # a second turn must not find a placeholder in the first answer
    return model.eval()


GAINS = {"q_proj.weight": 11.0, "k_proj.weight": 11.0, "v_proj.weight": 8.0, "o_proj.weight": 8.0}
HEAD_GAIN = 4.0


@torch.no_grad()
def _sharpen(model: Any, query_norm: float) -> None:
    """Make attention peaked and strong against the residual stream, logits large, and open Mllama's gates."""
    for name, weight in model.get_decoder().named_parameters():
        for ending, gain in GAINS.items():
            if name.endswith(ending):
                weight.mul_(gain)
        if name.endswith("q_norm.weight"):
            weight.add_(query_norm)
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            weight.fill_(1.0)
    model.get_output_embeddings().weight.mul_(HEAD_GAIN)
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():  # Gemma 3's projector starts at zero: images would not matter
            weight.normal_(std=0.1)


def _inputs(name: str, family: Family, batch: int, images: int, text: tuple[int, int]) -> Inputs:
    before, after = (0, sum(text)) if name.startswith("paligemma") else text
    tokens = family.tokens_among_many if images > 1 and family.tokens_among_many else family.tokens
    image = [IMAGE] * tokens
    gap = [0] * (BETWEEN_IMAGES if family.tokens else 0)
    template = torch.tensor([0] * before + (image + gap) * (images - 1) + image + [0] * after)
    words = torch.randint(3, 400, (batch, len(template)))
    ids = torch.where(template == IMAGE, template, words)
    if {"vision_start_token_id", "image_start_token_id"} & set(family.config):  # what processors put before an image
        ids[:, :-1][:, (template[1:] == IMAGE) & (template[:-1] != IMAGE)] = VISION_START
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **family.vision_inputs(batch, images)}
    if family.types is not None:
        inputs[family.types] = (ids == IMAGE).int() * (not name.startswith("paligemma"))
    if name == "mllama":
        inputs["cross_attention_mask"] = _cross_attention_mask(ids, images)
    return inputs


def _cross_attention_mask(ids: Tensor, images: int, tiles: int = 2) -> Tensor:
    """Tiles each text token may look at [B, N, images, tiles]: an image is seen from its placeholder on."""
    so_far = (ids == IMAGE).cumsum(1)
    sees = so_far[:, :, None] > torch.arange(images)
    return sees[..., None].expand(*sees.shape, tiles).long().contiguous()

"""The examples of the documentation run as they are written."""

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmkv_hf import share
from mmkv_layershare import LazyPlan
from mmkv_testkit.families import build
from transformers import DynamicCache

PAGE = Path(__file__).parents[3] / "docs" / "transformers.md"
README = Path(__file__).parents[1] / "README.md"


def stock(model, *settings, **more):
    """In place of `compress`: hands out the cache of transformers."""
    return nullcontext(
        SimpleNamespace(cache=lambda **inputs: DynamicCache(config=model.config.get_text_config(decoder=True)))
    )


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_5", "mllama"])
def test_first_answer_token_example(kit, name):
    if not PAGE.exists():
        pytest.skip("the documentation is not part of the sdist")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    example = next(block for block in blocks if "crop" in block)
    tiny = build(name)
    scope = {"torch": torch, "model": tiny.model, "inputs": tiny.inputs}
    tiny.model.generation_config.max_new_tokens = 3
    if name != "mllama":  # stock crop would cut the image
        kit.stock_or_skip(lambda: exec(example, {**scope, "compress": stock}))
    exec("from mmkv_hf import compress\n" + example, scope)
    assert scope["out"].shape[1] == tiny.inputs["input_ids"].shape[1] + 3
    assert any(layer.kept is not None for layer in scope["cache"].compressed_layers)


@pytest.mark.parametrize("session", ["prune", "share"])
def test_fine_tuning_example(session):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    example = next(block for block in blocks if "Curriculum" in block)
    if session == "share":
        example = example.replace("prune(model, schedule(step))", "share(model, plan)")
    tiny = build("llava")
    weight = tiny.model.get_decoder().layers[2].self_attn.q_proj.weight
    before = weight.detach().clone()
    scope = {
        "model": tiny.model,
        "inputs": tiny.inputs,
        "share": share,
        "plan": LazyPlan(4, ((2, 3),)),
    }
    exec(example, scope)
    assert scope["loss"].isfinite()
    assert not torch.equal(weight, before)

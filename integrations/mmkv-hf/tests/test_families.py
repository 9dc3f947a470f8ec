"""Every family: nothing changes at full budget, and a compressed cache computes what a masked dense one does."""

import pytest
import torch
from mmkv_hf import compress
from mmkv_testkit.families import NAMES, pad, unpadded
from mmkv_testkit.oracle import MaskedDense
from transformers import DynamicCache

F64 = torch.float64
EXACT = 1e-9
MATTERS = 1e-2  # eviction has to change the logits by more than this, or a test of them is vacuous
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v")


def prompt(kit, name, is_padded, dtype):
    if is_padded:
        return kit.padded(name, dtype)
    tiny = kit.vlm(name, dtype=dtype)
    return tiny.model, tiny.inputs


@pytest.mark.parametrize("is_padded", [False, True], ids=["one row", "left-padded"])
@pytest.mark.parametrize("name", NAMES)
def test_full_budget_changes_nothing(kit, name, is_padded):
    model, inputs = prompt(kit, name, is_padded, torch.float32)
    stock = kit.decode(model, inputs)
    for budget in (1.0, 4096):
        out, cache = kit.compressed(model, inputs, budget=budget)
        assert torch.equal(out.sequences, stock.sequences)
        assert all(layer.prefix is None and layer.slots is None for layer in cache.compressed_layers)


@pytest.mark.parametrize("is_padded", [False, True], ids=["one row", "left-padded"])
@pytest.mark.parametrize("name", NAMES)
def test_ragged_cache_computes_what_a_masked_dense_one_does(kit, name, is_padded):
    model, inputs = prompt(kit, name, is_padded, F64)
    stock = kit.decode(model, inputs)
    out, cache = kit.compressed(model, inputs, stock.tokens)
    keep = cache.kept_masks()
    lengths = torch.stack([mask.sum(-1) for mask in keep.values()])
    assert len(lengths.unique()) > 1, "every head keeps the same number"
    expected = kit.masked(model, inputs, stock.tokens, keep)
    assert kit.difference(out.logits, expected.logits) < EXACT
    assert kit.difference(out.logits, stock.logits) > MATTERS
    assert out.logits.dtype == F64


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_within_rounding(kit, name):
    """2e-6 of the largest logit, plus what sdpa and explicit attention differ by uncompressed.

    Both sides carry that second rounding, which in one sharp family exceeds the first, so the bound is their sum, not
    the larger. Float64 above shows that it is nothing but rounding.
    """
    model, inputs = kit.padded(name)
    stock = kit.decode(model, inputs)
    out, cache = kit.compressed(model, inputs, stock.tokens)
    expected = kit.masked(model, inputs, stock.tokens, cache.kept_masks())
    with MaskedDense(model, {}):
        explicit = kit.decode(model, inputs, stock.tokens)
    floor = kit.difference(stock.logits, explicit.logits)
    assert floor < 2e-5
    assert kit.difference(out.logits, expected.logits) < 2e-6 * float(expected.logits.abs().max()) + floor


@pytest.mark.parametrize("name", NAMES)
def test_each_padded_row_is_the_row_alone(kit, name):
    """In float64: in float32 the rounding of a padded batch swaps scores that agree in six digits."""
    model, inputs = kit.padded(name, F64)
    together, cache = kit.compressed(model, inputs)
    keep = cache.kept_masks()
    for i in range(2):
        alone, own = kit.compressed(model, unpadded(inputs, i))
        real = inputs["attention_mask"][i].bool()
        assert torch.equal(together.tokens[i : i + 1], alone.tokens)
        for layer, kept in own.kept_masks().items():
            wide = keep[layer][i : i + 1]
            assert torch.equal(wide[..., real] if wide.shape[-1] == len(real) else wide, kept)


def test_right_padded_rows_of_mllama_keep_the_image_tokens_of_the_rows_alone(kit):
    """Its image layers get no mask of the text: Mllama lets padding see every image."""
    tiny = kit.vlm("mllama", batch=2, dtype=F64)
    inputs, kept = pad(tiny.inputs, right=[9, 0]), []
    alone = [unpadded(inputs, i) for i in range(2)]
    with compress(tiny.model, kit.PIPELINE, 20) as session, torch.no_grad():
        for given in (inputs, *alone):
            positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
            cache = session.cache(**given)
            tiny.model(**given, position_ids=positions, past_key_values=cache)
            kept.append([cache.kept_masks()[layer] for layer in (1, 3)])
            assert cache.request.padding is None
    for together, *rows in zip(*kept, strict=True):
        assert torch.equal(together, torch.cat(rows))
        assert not together.all()


def loop(model, inputs, cache, forced):
    """Hand-written decoding of right-padded rows along forced tokens: logits [B, n, V] after the prompt."""
    mask = inputs["attention_mask"]
    real = mask.sum(1)
    first = {} if model.config.model_type in MROPE else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    logits = []
    with torch.no_grad():
        model(**inputs, **first, past_key_values=cache, use_cache=True)
        for step in range(forced.shape[1]):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            position = (real + step)[:, None]
            position = position.expand(3, -1, -1) if model.config.model_type in MROPE else position
            out = model(
                input_ids=forced[:, step : step + 1],
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("name", NAMES)
def test_right_padded_forward_loop(kit, name):
    tiny = kit.vlm(name, batch=2, dtype=F64)
    inputs, forced = pad(tiny.inputs, right=[9, 0]), kit.words(2, 4)
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET) as session:
        cache = session.cache(**inputs)
        out = loop(tiny.model, inputs, cache, forced)
    keep = cache.kept_masks()
    with MaskedDense(tiny.model, keep):
        expected = loop(tiny.model, inputs, DynamicCache(config=tiny.text_config), forced)
    stock = loop(tiny.model, inputs, DynamicCache(config=tiny.text_config), forced)
    assert kit.difference(out, expected) < EXACT
    assert kit.difference(out, stock) > MATTERS
    real = inputs["attention_mask"].bool()
    for kept in keep.values():
        if kept.shape[-1] == real.shape[1]:
            assert not (kept & ~real[:, None])[..., :-1].any()  # the tail starts with the last column, whatever it is
            assert (kept & real[:, None]).sum((1, 2)).tolist() == [kit.BUDGET * kept.shape[1]] * 2

"""Equal counts everywhere make a dense cache that stock attention reads once the prompt is compressed."""

import pytest
import torch
from mmkv_hf import Budget, compress, set_attention
from mmkv_testkit.oracle import MaskedDense

F64 = torch.float64
EXACT = 1e-9
UNIFORM = ["snapkv(window=8)", "streamingllm", "mixkv+snapkv(window=8)", "tova"]
RAGGED = ["adakv+snapkv(window=8)", "pyramidkv(beta=3)+snapkv(window=8)"]


def after_prompt(kit, model, inputs, pipeline, budget=30):
    """A cache that has read the prompt, cropped by its last token, and the text inputs to go on with."""
    with compress(model, pipeline, budget) as session:
        kit.decode(model, inputs, 1)
    text = {
        k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    }
    cache = session.last
    cache.crop(-1)
    return cache, text


@pytest.mark.parametrize("pipeline", UNIFORM)
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, attention) for name in ("llava", "qwen2_vl", "internvl") for attention in ("sdpa", "eager")),
        ("llava", "flex_attention"),  # which transformers refuses for Qwen2-VL's text model
        ("internvl", "flex_attention"),
    ],
)
def test_stock_attention_decodes(kit, name, pipeline, attention):
    dtype = torch.float32 if attention == "flex_attention" else F64
    model, inputs = kit.padded(name, dtype)
    forced = kit.words(2, 4)
    cache, text = after_prompt(kit, model, inputs, pipeline)
    assert all(layer.slots is not None and layer.prefix is None for layer in cache.compressed_layers)
    set_attention(model, attention)
    torch.compiler.set_stance("force_eager")  # compiling flex attention for CPUs takes a minute
    try:
        out = kit.decode(model, text, forced, past_key_values=cache)
    finally:
        torch.compiler.set_stance("default")
        set_attention(model, "sdpa")
    n = inputs["input_ids"].shape[1]
    expected = kit.masked(model, inputs, forced, cache.kept_masks(), n - 1)
    bound = {"sdpa": EXACT, "eager": 2e-5, "flex_attention": 2e-5}[attention]  # eager's softmax is in float32
    assert kit.difference(out.logits, expected.logits) < bound


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_stock_attention_reads_several_tokens_at_once(kit, attention):
    model, inputs = kit.padded("llama", F64)
    cache, _ = after_prompt(kit, model, inputs, "snapkv(window=8)")
    n, keep = inputs["input_ids"].shape[1], cache.kept_masks()
    ids = torch.cat([inputs["input_ids"], kit.words(2, 4)], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    set_attention(model, attention)
    try:
        with torch.no_grad():
            out = model(
                input_ids=ids[:, n - 1 :],
                attention_mask=mask,
                position_ids=positions[:, n - 1 :],
                past_key_values=cache,
            ).logits
    finally:
        set_attention(model, "sdpa")
    keep = {layer: kept | (torch.arange(n) == n - 1) for layer, kept in keep.items()}
    with MaskedDense(model, keep, from_query=n - 1), torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, n - 1 :]
    assert kit.difference(out, expected) < (EXACT if attention == "sdpa" else 2e-5)  # eager's softmax is in float32


@pytest.mark.parametrize("pipeline", UNIFORM + RAGGED)
def test_form_follows_the_counts(kit, pipeline):
    model, inputs = kit.padded("llava")
    _, cache = kit.compressed(model, inputs, 2, pipeline=pipeline)
    assert all((layer.slots is not None) == (pipeline in UNIFORM) for layer in cache.compressed_layers)
    assert all((layer.prefix is None) == (pipeline in UNIFORM) for layer in cache.compressed_layers)


@pytest.mark.parametrize("budget", [0.4, Budget(ratio=0.4)])
def test_unequal_rows_are_ragged(kit, budget):
    model, inputs = kit.padded("llava")
    _, cache = kit.compressed(model, inputs, 2, pipeline="snapkv(window=8)", budget=budget)
    assert all(layer.slots is None for layer in cache.compressed_layers)
    _, cache = kit.compressed(
        model, {k: v[1:] for k, v in inputs.items()}, 2, pipeline="snapkv(window=8)", budget=budget
    )
    assert all(layer.slots is not None for layer in cache.compressed_layers)


def test_a_row_shorter_than_the_budget_makes_it_ragged(kit):
    model, inputs = kit.padded("llava")
    budget = int(inputs["attention_mask"].sum(1).max()) - 3
    _, cache = kit.compressed(model, inputs, 2, pipeline="snapkv(window=8)", budget=budget)
    assert all(layer.slots is None for layer in cache.compressed_layers)
    assert cache.compressed_layers[0].kept.tolist() == [[budget - 6] * 2, [budget] * 2]


@pytest.mark.parametrize("pipeline", [UNIFORM[0], RAGGED[0]])
def test_crop_stops_at_the_compressed_prompt(kit, pipeline):
    tiny = kit.vlm("llava")
    _, cache = kit.compressed(tiny.model, tiny.inputs, 4, pipeline=pipeline)
    n = tiny.inputs["input_ids"].shape[1]
    held = [t.clone() for t in cache.tensors()]
    for layer in cache.compressed_layers:
        with pytest.raises(ValueError, match="compressed"):
            layer.crop(-5)
    assert all(torch.equal(a, b) for a, b in zip(held, cache.tensors(), strict=True))
    cache.crop(0)
    assert cache.get_seq_length() == n + 3
    cache.crop(-4)
    assert cache.get_seq_length() == n - 1


@pytest.mark.parametrize("pipeline", [UNIFORM[0], RAGGED[0]])
def test_lengths_are_logical(kit, pipeline):
    model, inputs = kit.padded("llava")
    out, cache = kit.compressed(model, inputs, 4, pipeline=pipeline)
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    length, offset = cache.get_mask_sizes(1, 0)
    held = 30 + 3 if pipeline == UNIFORM[0] else cache.get_seq_length()
    assert (length, offset) == (held + 1, cache.get_seq_length() - held)


@pytest.mark.parametrize("pipeline", [UNIFORM[0], RAGGED[0]])
def test_batch_operations(kit, pipeline):
    """Selecting, repeating and reordering rows moves everything a row holds."""
    model, inputs = kit.padded("llava", F64)
    with compress(model, pipeline, 30) as session:
        kit.decode(model, inputs, 1)
        cache = session.last
        kept = cache.kept_masks()
        cache.batch_repeat_interleave(2)
        assert all(torch.equal(cache.kept_masks()[i], m.repeat_interleave(2, 0)) for i, m in kept.items())
        cache.reorder_cache(torch.tensor([2, 3, 0, 0]))
        cache.batch_select_indices(torch.tensor([1, 2]))
        assert all(torch.equal(cache.kept_masks()[i], m[[1, 0]]) for i, m in kept.items())
        turn = kit.conversation(
            {k: v[[1, 0]] for k, v in inputs.items() if k != "pixel_values"}, kit.words(2, 1), kit.words(2, 6)
        )
        swapped = kit.decode(model, turn, kit.words(2, 3), past_key_values=cache)
    with compress(model, pipeline, 30) as session:
        kit.decode(model, inputs, 1)
        turn = {name: value[[1, 0]] for name, value in turn.items()}
        straight = kit.decode(model, turn, kit.words(2, 3)[[1, 0]], past_key_values=session.last)
    assert kit.difference(swapped.logits, straight.logits[[1, 0]]) < EXACT

"""A replayed cache is the cache of a real session: same entries, same bytes, same answer."""

from functools import lru_cache

import pytest
import torch
from mmkv_hf import compress, set_attention
from mmkv_quality.replay import answer, answer_after, observed, record, replay
from mmkv_testbed import batch_inputs, load, make_samples
from mmkv_testkit.families import build, pad

PIPELINES = [
    "snapkv(window=8)",
    "adakv+mixkv+bacon+snapkv(window=8)",
    "pyramidkv+tova",
    "h2o",
    "adakv+h2o",
    "keydiff",
    "streamingllm",
    "snapkv(window=8)+select(protect=text)",
]
BUDGET = 44


@lru_cache(maxsize=2)
def prompts(name):
    """A model and two prompts of different lengths, so that one is padded."""
    if name == "testbed":
        model, processor = load()
        samples = [*make_samples(2, seed=5, suffix=3), *make_samples(3, seed=5, suffix=17)[2:]]
        return model, batch_inputs(processor, samples)
    tiny = build(name, batch=2, text=(12, 24))
    return tiny.model, pad(tiny.inputs, left=[9, 0])


@lru_cache(maxsize=2)
def recorded(name):
    model, inputs = prompts(name)
    with observed(model):
        return record(model, inputs)


def in_session(model, inputs, pipeline, budget, steps):
    """The honest protocol as a user of the product would write it."""
    with compress(model, pipeline, budget=budget) as session, torch.no_grad():
        first = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        cache = session.last
        masks, held = cache.kept_masks(), cache.bytes_held
        cache.crop(-1)
        text = {name: value for name, value in inputs.items() if name != "pixel_values"}
        out = model.generate(**text, past_key_values=cache, max_new_tokens=steps, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return masks, held, out[:, length:], first[:, length]


@pytest.mark.parametrize("name", ["testbed", "qwen2_vl"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_replay_is_the_session(name, pipeline):
    model, inputs = prompts(name)
    assert (inputs["attention_mask"] == 0).any()
    masks, held, tokens, first = in_session(model, inputs, pipeline, BUDGET, steps=8)
    with observed(model):
        recording = record(model, inputs)
        cache = replay(model, recording, pipeline, BUDGET)
        again, bytes_again = cache.kept_masks(), cache.bytes_held
        out = answer(model, inputs, cache, 8)
    assert masks.keys() == again.keys()
    assert all(torch.equal(masks[layer], again[layer]) for layer in masks)
    assert 0 < bytes_again == held
    assert torch.equal(out, tokens)
    assert torch.equal(recording.logits.argmax(-1), first)


@pytest.mark.parametrize("name", ["testbed", "qwen2_vl"])
def test_the_usual_protocol_is_generate_in_a_session(name):
    """What a user gets who changes nothing: the first token comes from the dense prefill."""
    model, inputs = prompts(name)
    length, wrong_first = inputs["input_ids"].shape[1], False
    for pipeline in PIPELINES:
        with compress(model, pipeline, budget=24 if "protect" not in pipeline else BUDGET), torch.no_grad():
            usual = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, length:]
        with observed(model):
            recording = record(model, inputs)
            cache = replay(model, recording, pipeline, 24 if "protect" not in pipeline else BUDGET)
            out = answer_after(model, inputs, cache, recording.logits.argmax(-1), 8)
            fresh = replay(model, recording, pipeline, 24 if "protect" not in pipeline else BUDGET)
            honest = answer(model, inputs, fresh, 8)
            assert torch.equal(answer(model, inputs, cache, 8), honest)  # a cache that has answered can answer again
        assert torch.equal(out, usual)
        wrong_first |= bool((honest[:, 0] != usual[:, 0]).any())
    assert wrong_first  # else the two protocols would be the same thing


def test_one_recording_serves_any_number_of_pipelines_in_any_order():
    model, inputs = prompts("testbed")
    recording = recorded("testbed")
    before = [(x.keys.clone(), x.values.clone(), x.query.clone()) for x in recording.layers]

    def run(pipeline):
        with observed(model):
            return answer(model, inputs, replay(model, recording, pipeline, BUDGET), 8)

    first = [run(pipeline) for pipeline in PIPELINES]
    second = [run(pipeline) for pipeline in reversed(PIPELINES)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for (keys, values, query), layer in zip(before, recording.layers, strict=True):
        assert torch.equal(keys, layer.keys)
        assert torch.equal(values, layer.values)
        assert torch.equal(query, layer.query)


def test_a_budget_above_the_prompt_answers_as_the_full_cache():
    model, inputs = prompts("testbed")
    with torch.no_grad():
        full = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    with observed(model):
        out = answer(model, inputs, replay(model, recorded("testbed"), "adakv+bacon", 10_000), 8)
    assert torch.equal(out, full)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_prompt_read_in_two_parts_is_answered_as_a_whole_one(name):
    """With M-RoPE too, whose positions after the images depend on them."""
    tiny = build(name, batch=2)
    inputs, shape = tiny.inputs, tiny.inputs["input_ids"].shape
    end = int((inputs["input_ids"][0] == tiny.image_token_id).nonzero().max()) + 1
    part = {key: x[:, :end] if x.shape[:2] == shape else x for key, x in inputs.items()}
    with torch.no_grad():
        whole = tiny.model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, shape[1] :]
    with observed(tiny.model):
        record(tiny.model, {**inputs, "pixel_values": inputs["pixel_values"] * 0})  # leaves its state in the model
        cache = replay(tiny.model, record(tiny.model, part), "snapkv(window=8)", 10_000)
        assert cache.get_seq_length() == end < shape[1]
        assert torch.equal(answer(tiny.model, inputs, cache, 8), whole)


def test_the_first_part_of_a_prompt_is_compressed_and_the_rest_is_not():
    """Compress before the question is seen: what is kept cannot depend on the question."""
    model, processor = load()
    asked = [batch_inputs(processor, make_samples(2, seed=5, suffix=8, task=task)) for task in ("value", "describe")]
    image = 577
    kept = []
    for inputs in asked:
        with observed(model):
            part = {name: x[:, :image] if x.ndim == 2 else x for name, x in inputs.items()}
            cache = replay(model, record(model, part), "snapkv(window=8)", BUDGET)
            kept.append(cache.kept_masks())
            answer(model, inputs, cache, 4)
        length = inputs["input_ids"].shape[1]
        assert cache.get_seq_length() >= length
        assert all(layer.keys.shape[2] >= length - image for layer in cache.layers)
        assert all(int(layer.kept.max()) == BUDGET for layer in cache.layers)
    assert all(torch.equal(kept[0][layer], kept[1][layer]) for layer in kept[0])


def test_models_with_other_cache_layers_are_refused():
    tiny = build("gemma3")
    with observed(tiny.model), pytest.raises(ValueError, match="without full self-attention; it cannot be replayed"):
        record(tiny.model, tiny.inputs)


def test_the_attention_setting_comes_back():
    model, _ = prompts("testbed")
    set_attention(model, "eager")
    seen = []
    try:
        with pytest.raises(KeyError), observed(model):
            seen.append(model.config.get_text_config(decoder=True)._attn_implementation) or {}["no such key"]
        seen.append(model.config.get_text_config(decoder=True)._attn_implementation)
    finally:
        set_attention(model, "sdpa")
    assert seen == ["mmkv", "eager"]

"""Freed means freed: all live storages <= kept entries x (2 x D x itemsize + 4) + 8 (B H + 1) per layer."""

import gc
import weakref

import pytest
import torch
from mmkv_hf import Pipeline, compress
from mmkv_testkit.families import pad
from mmkv_testkit.memory import live_bytes, live_tensors
from transformers import DynamicCache

PIPELINES = [
    "adakv+mixkv+bacon+snapkv(window=8)",
    "snapkv(window=8)",
    "pyramidkv(beta=3)+adakv+h2o+select(recent=4)",
    "streamingllm",
    "adakv+snapkv(window=8)+select(protect=text)",
]


def limit(cache, new_tokens=0):
    """Rule 7: per layer kept entries x (2 x D x itemsize + 4) + 8 (B H + 1), and the tokens generated since."""
    total = 0
    for layer in cache.compressed_layers:
        kept = layer.kept_mask()
        heads, size = kept[..., 0].numel(), 2 * layer.keys.shape[-1] * layer.keys.element_size()
        total += int(kept.sum()) * (size + 4) + 8 * (heads + 1) + heads * new_tokens * size
    return total


def prompt(kit, name, batch, dtype=torch.float32):
    tiny = kit.vlm(name, batch=batch, dtype=dtype, text=(30, 60))
    return tiny.model, pad(tiny.inputs, left=[21, 0, 9, 2][:batch] if batch > 1 else [0])


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_live_bytes_after_the_prompt(kit, name, batch, pipeline):
    model, inputs = prompt(kit, name, batch)
    budget = 99 if "protect" in pipeline else 30
    with compress(model, pipeline, budget) as session:
        kit.decode(model, inputs, 1)
        cache = session.last
        assert all(layer.kept is not None for layer in cache.compressed_layers)
        assert live_bytes(cache) <= limit(cache)
        assert cache.bytes_held == live_bytes(cache)
        assert live_bytes(cache) < cache.bytes_full
        kit.decode(model, kit.conversation(inputs, kit.words(batch, 1), kit.words(batch, 7)), 5, past_key_values=cache)
    assert live_bytes(cache) <= limit(cache, 4)
    assert cache.bytes_held == live_bytes(cache)


@pytest.mark.parametrize("name", ["mllama", "gemma3", "gemma4", "qwen3_5", "paligemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_bytes_of_other_families(kit, name, dtype):
    model, inputs = prompt(kit, name, 2, dtype)
    _, cache = kit.compressed(model, inputs, 3)
    ours = [layer for layer in cache.compressed_layers if type(layer).__name__ == "CompressedLayer"]
    image = [layer for layer in cache.compressed_layers if layer not in ours]
    size = 2 * 16 * ours[0].keys.element_size()
    allowed = limit(cache, 2) - sum(layer.kept_mask()[..., 0].numel() * 2 * size for layer in image)
    assert sum(live_bytes(layer.tensors()) for layer in cache.compressed_layers) <= allowed
    assert cache.bytes_held == live_bytes(cache)
    stock = DynamicCache(config=model.config.get_text_config(decoder=True))
    kit.decode(model, inputs, 3, past_key_values=stock)
    assert cache.bytes_full == live_bytes(stock)


def test_every_live_tensor_is_known_while_a_prompt_is_read(kit):
    model, inputs = prompt(kit, "llama", 4)
    held = []

    def look(module, args, given):
        cache = given["past_key_values"]
        known = {t.untyped_storage().data_ptr() for t in cache.tensors()}
        assert {t.untyped_storage().data_ptr() for t in live_tensors(cache)} == known
        held.append(len(known))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    for pipeline in PIPELINES[:3]:
        kit.compressed(model, inputs, 3, pipeline=pipeline, prefill_chunk_size=17)
    hook.remove()
    assert max(held) > 8


def test_the_dense_prompt_never_exists_in_all_layers(kit):
    """When the last layer reads the prompt, the ones before it are compressed already."""
    model, inputs = prompt(kit, "llama", 1)
    sizes = []
    with compress(model, "adakv+snapkv(window=8)", 30) as session:
        cache = session.cache(**inputs)
        last = model.get_decoder().layers[-1]
        hook = last.register_forward_pre_hook(
            lambda module, args: sizes.append(live_bytes(cache.compressed_layers[:-1]))
        )
        kit.decode(model, inputs, 1, past_key_values=cache)
        hook.remove()
    per_layer = 2 * 30 * (2 * 16 * 4 + 4) + 8 * 3
    assert (
        sizes[0] <= 3 * per_layer + 4096
    )  # BACON-free: the trace is empty; queries of the last layer are not there yet


def test_a_dropped_cache_is_gone_at_once(kit):
    model, inputs = prompt(kit, "mllama", 1)
    gc.collect()
    gc.disable()
    try:
        _, cache = kit.compressed(model, inputs, 2)
        alive = [weakref.ref(layer) for layer in cache.compressed_layers]
        tensors = [weakref.ref(t) for t in live_tensors(cache)]
        del cache
        assert not any(ref() for ref in alive)
        assert not any(ref() is not None for ref in tensors)
    finally:
        gc.enable()


def test_reset_frees_and_the_cache_reads_again(kit):
    tiny = kit.vlm("mllama")
    with compress(tiny.model, "adakv+snapkv(window=8)", 30) as session:
        first = kit.decode(tiny.model, tiny.inputs)
        cache = session.last
        cache.reset()
        assert live_bytes(cache) == 0
        again = kit.decode(tiny.model, tiny.inputs, past_key_values=cache)
    assert torch.equal(first.logits, again.logits)


def test_offload_and_prefetch_change_nothing(kit):
    tiny = kit.vlm("llava")
    for pipeline in PIPELINES[:2]:
        _, cache = kit.compressed(tiny.model, tiny.inputs, 3, pipeline=pipeline)
        before = [t.clone() for t in cache.tensors()]
        for layer in cache.compressed_layers:
            layer.offload()
            layer.prefetch()
        assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors(), strict=True))


def test_protected_modality_is_forgotten_with_the_prompt(kit):
    tiny = kit.vlm("llava")
    method = Pipeline.parse("snapkv(window=8)+select(protect=text)")
    _, cache = kit.compressed(tiny.model, tiny.inputs, 2, pipeline=method, budget=80)
    text = tiny.inputs["input_ids"] != tiny.image_token_id
    for kept in cache.kept_masks().values():
        assert (kept | ~text[:, None]).all()
        assert kept.sum(-1).tolist() == [[80, 80]]
    assert not any(t.dtype in (torch.int8, torch.bool) for t in live_tensors(cache))

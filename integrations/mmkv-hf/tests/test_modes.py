"""Every way of running a model that transformers offers, each against a dense cache masked to what was kept."""

import copy

import pytest
import torch
from mmkv_budget import HeadScores, SparseMM
from mmkv_hf import CompressedCache, Pipeline, compress, set_attention
from mmkv_scores import SnapKV
from mmkv_testkit.families import build, pad
from mmkv_testkit.oracle import MaskedDense
from transformers import DynamicCache, GenerationConfig, StaticCache

F64 = torch.float64
EXACT = 1e-9
MATTERS = 1e-2
TABLE = HeadScores([[1.0, 3.0], [0.2, 0.1], [2.0, 0.4], [0.6, 0.9]])
PIPELINES = {
    "snapkv": "snapkv(window=8)",
    "adakv": "adakv+mixkv+bacon+snapkv(window=8)",
    "pyramidkv": "pyramidkv(beta=3)+adakv+snapkv(window=8)",
    "h2o": "h2o+select(recent=8)",
    "streamingllm": "streamingllm",
    "tova": "adakv+tova",
    "sparsemm": Pipeline(score=SnapKV(window=8), heads=SparseMM(TABLE)),
    "random": "random+select(recent=4)",
}
some_pipelines = pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)


def rows_of_prompts(keep, group):
    """Kept masks of one row per prompt, where every prompt has `group` rows of beams or samples."""
    return {layer: kept[::group] for layer, kept in keep.items()}


@some_pipelines
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_pipeline(kit, name, pipeline):
    model, inputs = kit.padded(name, F64)
    stock = kit.decode(model, inputs)
    out, cache = kit.compressed(model, inputs, stock.tokens, pipeline=pipeline)
    expected = kit.masked(model, inputs, stock.tokens, cache.kept_masks())
    assert kit.difference(out.logits, expected.logits) < EXACT
    assert kit.difference(out.logits, stock.logits) > MATTERS
    total = sum(layer.kept.sum(1) for layer in cache.compressed_layers)
    assert total.tolist() == [kit.BUDGET * 2 * 4] * 2


@pytest.mark.parametrize("pipeline", ["adakv", "snapkv"])
@pytest.mark.parametrize("budget", [0.4, 30])
def test_beam_search(kit, pipeline, budget):
    model, inputs = kit.padded("qwen2_vl", F64)
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True}
    with compress(model, PIPELINES[pipeline], budget) as session:
        out = model.generate(**inputs, **settings, output_scores=True)
    keep = rows_of_prompts(session.last.kept_masks(), 3)
    with MaskedDense(model, keep) as oracle:
        expected = model.generate(**inputs, **settings, output_scores=True)
    assert oracle.masked_calls
    assert torch.equal(out.sequences, expected.sequences)
    assert kit.difference(out.sequences_scores, expected.sequences_scores) < 1e-6  # generate scores in float32
    assert (session.last.compressed_layers[0].slots is not None) == (pipeline == "snapkv" and budget == 30)


@pytest.mark.parametrize("pipeline", ["adakv", "snapkv"])
def test_sampling_several_sequences(kit, pipeline):
    model, inputs = kit.padded("llava", F64)
    settings = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 6}
    with compress(model, PIPELINES[pipeline], kit.BUDGET) as session:
        torch.manual_seed(1)
        out = model.generate(**inputs, **settings)
    with MaskedDense(model, rows_of_prompts(session.last.kept_masks(), 3)):
        torch.manual_seed(1)
        expected = model.generate(**inputs, **settings)
    torch.manual_seed(1)
    assert torch.equal(out, expected)
    assert not torch.equal(out, model.generate(**inputs, **settings))


@some_pipelines
@pytest.mark.parametrize("chunk", [1000, 50, 17, 3])
def test_chunked_prefill(kit, pipeline, chunk):
    model, inputs = kit.padded("llama", F64)
    whole, once = kit.compressed(model, inputs, pipeline=pipeline)
    out, cache = kit.compressed(model, inputs, pipeline=pipeline, prefill_chunk_size=chunk)
    assert torch.equal(out.sequences, whole.sequences)
    assert kit.difference(out.logits, whole.logits) < EXACT
    for layer, kept in once.kept_masks().items():
        assert torch.equal(kept, cache.kept_masks()[layer])


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_chunked_prefill_with_an_encoded_image(kit, name):
    tiny = kit.vlm(name, dtype=F64)
    inputs = dict(tiny.inputs)
    with torch.no_grad():
        inputs["mm_encoder_outputs"] = {"image": tiny.model.get_image_features(inputs.pop("pixel_values"))}
    stock = kit.stock_or_skip(lambda: kit.decode(tiny.model, inputs, prefill_chunk_size=17))
    out, cache = kit.compressed(tiny.model, inputs, stock.tokens, prefill_chunk_size=17)
    expected = kit.masked(tiny.model, inputs, stock.tokens, cache.kept_masks(), prefill_chunk_size=17)
    assert kit.difference(out.logits, expected.logits) < EXACT
    assert kit.difference(out.logits, stock.logits) > MATTERS


@pytest.mark.parametrize("pipeline", ["adakv", "snapkv", "h2o"])
@pytest.mark.parametrize("assistant", ["lookup", "model"])
def test_assisted_decoding(kit, pipeline, assistant):
    """The first pass verifies its candidates with the whole prompt still there; everything after it is compressed."""
    tiny = kit.vlm("llama", dtype=F64)
    model, inputs = tiny.model, tiny.inputs
    draft = build("llama", seed=3, dtype=F64).model if assistant == "model" else None
    settings = {"assistant_model": draft} if draft else {"prompt_lookup_num_tokens": 3}
    starts = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: starts.append(given["past_key_values"].get_seq_length()), with_kwargs=True
    )
    with compress(model, PIPELINES[pipeline], kit.BUDGET) as session:
        out = model.generate(**inputs, **settings, max_new_tokens=24, do_sample=False)
    hook.remove()
    cache = session.last
    with MaskedDense(model, cache.kept_masks(), from_query=starts[1]):
        expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert torch.equal(out, expected)
    assert not torch.equal(out, model.generate(**inputs, max_new_tokens=24, do_sample=False))
    _, other = kit.compressed(model, inputs, pipeline=PIPELINES[pipeline])
    for layer, kept in other.kept_masks().items():
        assert torch.equal(kept, cache.kept_masks()[layer])
    assert cache.get_seq_length() == out.shape[1] - 1
    assert starts == sorted(starts)


def cropped(kit, model, inputs, cache):
    """The cache after the prompt, without its last token."""
    for layer in cache.layers:
        if hasattr(layer, "activate_past_recording"):  # what transformers wants before sliding layers are cropped
            layer.activate_past_recording()
    kit.decode(model, inputs, 1, past_key_values=cache)
    cache.crop(-1)
    return cache


@pytest.mark.parametrize("pipeline", ["adakv", "snapkv"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "gemma4", "mllama", "paligemma2"])
def test_first_answer_token_from_the_compressed_cache(kit, name, pipeline):
    """Cropped by one, the cache answers again: this time its first token, too, has seen only what was kept."""
    model, inputs = kit.padded(name, F64)
    forced = kit.words(2, 4)
    text = {
        k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    }

    def stock():
        return DynamicCache(config=model.config.get_text_config(decoder=True))

    if name != "mllama":  # stock crop would cut the image
        kit.stock_or_skip(lambda: kit.decode(model, text, forced, past_key_values=cropped(kit, model, inputs, stock())))
    with compress(model, PIPELINES[pipeline], kit.BUDGET) as session:
        cache = cropped(kit, model, inputs, session.cache(**inputs))
        before = cache.kept_masks()
        out = kit.decode(model, text, forced, past_key_values=cache)
    keep = cache.kept_masks()
    if name == "mllama":
        expected = kit.masked(model, inputs, forced, keep, inputs["input_ids"].shape[1] - 1)
    else:
        with MaskedDense(model, {}):  # eager attention computes in float32
            own = cropped(kit, model, inputs, stock())
        expected = kit.masked(model, text, forced, keep, inputs["input_ids"].shape[1] - 1, past_key_values=own)
    assert kit.difference(out.logits, expected.logits) < EXACT
    for layer, kept in before.items():
        assert torch.equal(kept[..., :-1], keep[layer][..., :-1])
    dense = kit.decode(model, inputs, forced)
    assert kit.difference(out.logits[:, 0], dense.logits[:, 0]) > MATTERS


def test_inputs_embeds(kit):
    tiny = kit.vlm("llava", dtype=F64)
    model, inputs = tiny.model, tiny.inputs
    ids = inputs["input_ids"]
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
        embeds = model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == tiny.image_token_id)[..., None].expand_as(embeds), features)
    whole, once = kit.compressed(model, inputs)
    for prompt in ({"inputs_embeds": embeds}, {"inputs_embeds": embeds, "input_ids": ids}):
        out, cache = kit.compressed(model, {**prompt, "attention_mask": inputs["attention_mask"]})
        assert torch.equal(out.tokens, whole.tokens)
        assert all(torch.equal(kept, cache.kept_masks()[layer]) for layer, kept in once.kept_masks().items())


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma4", "mllama"])
@pytest.mark.parametrize("pipeline", ["adakv", "snapkv"])
def test_forward_loop_without_positions(kit, name, pipeline):
    tiny = kit.vlm(name, dtype=F64)
    model, inputs = tiny.model, {k: v for k, v in tiny.inputs.items() if k != "attention_mask"}
    whole, _ = kit.compressed(model, tiny.inputs, pipeline=PIPELINES[pipeline])
    with compress(model, PIPELINES[pipeline], kit.BUDGET) as session, torch.no_grad():
        cache = session.cache(**inputs)
        steps = [inputs, *({"input_ids": whole.tokens[:, i : i + 1]} for i in range(kit.STEPS - 1))]
        logits = [model(**step, past_key_values=cache).logits[:, -1] for step in steps]
    assert kit.difference(torch.stack(logits, 1), whole.logits) < EXACT
    assert session.report().layers


def test_deepcopy(kit):
    tiny = kit.vlm("qwen2_vl", dtype=F64)
    for pipeline in ("adakv", "snapkv"):
        with compress(tiny.model, PIPELINES[pipeline], kit.BUDGET) as session:
            first = kit.decode(tiny.model, tiny.inputs, 4)
            cache = session.last
            twin = copy.deepcopy(cache)
            assert not {t.data_ptr() for t in twin.tensors()} & {t.data_ptr() for t in cache.tensors()}
            turn = kit.conversation(tiny.inputs, first.tokens, kit.words(1, 9))
            answers = [kit.decode(tiny.model, turn, past_key_values=c) for c in (cache, twin)]
        assert torch.equal(answers[0].logits, answers[1].logits)
        assert cache.get_seq_length() == twin.get_seq_length()


def test_training_and_gradient_checkpointing():
    tiny = build("llava")
    model = tiny.model.train()
    model.gradient_checkpointing_enable()
    with compress(model, "snapkv(window=8)", 30):
        loss = model(**tiny.inputs, labels=tiny.inputs["input_ids"], use_cache=False).loss
        loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model(**tiny.inputs, labels=tiny.inputs["input_ids"], use_cache=False).loss.backward()
    assert torch.equal(gradient, model.lm_head.weight.grad)


def test_a_cache_refuses_to_pin_a_graph(kit):
    tiny = kit.vlm("llava")
    with (
        compress(tiny.model, kit.PIPELINE, kit.BUDGET) as session,
        pytest.raises(RuntimeError, match=r"torch.no_grad"),
    ):
        tiny.model(**tiny.inputs, past_key_values=session.cache(**tiny.inputs))


@pytest.mark.parametrize("name", ["llava", "paligemma2"])
def test_gradients_inside_a_session_are_those_outside(kit, name):
    """paligemma2 caps its logits, which sdpa does not know: mmkv's own path has to be differentiable."""

    def gradients(model):
        model.zero_grad()
        model(**tiny.inputs, use_cache=False).logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if "language_model" in n and p.grad is not None}

    tiny = build(name, dtype=torch.float64)
    outside = gradients(tiny.model)
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET):
        inside = gradients(tiny.model)
    assert inside.keys() == outside.keys()
    assert any("q_proj" in n and g.abs().max() > 0 for n, g in inside.items())
    for n, g in inside.items():
        narrowed = 1e-5 * outside[n].abs().max()  # paligemma2's eager takes its softmax in float32
        torch.testing.assert_close(g, outside[n], rtol=0, atol=float(narrowed))


@pytest.mark.slow
def test_compile_with_graph_breaks(kit):
    tiny = build("llama")
    whole, _ = kit.compressed(tiny.model, tiny.inputs, 4)
    torch._dynamo.reset()
    tiny.model.forward = torch.compile(tiny.model.forward, backend="eager")
    out, _ = kit.compressed(tiny.model, tiny.inputs, 4)
    assert torch.equal(out.sequences, whole.sequences)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "mllama", "idefics3"])
def test_two_images(kit, name):
    tiny = kit.vlm(name, batch=2, dtype=F64, images=2)
    inputs = pad(tiny.inputs, left=[0, 5])
    stock = kit.decode(tiny.model, inputs)
    out, cache = kit.compressed(tiny.model, inputs, stock.tokens)
    expected = kit.masked(tiny.model, inputs, stock.tokens, cache.kept_masks())
    assert kit.difference(out.logits, expected.logits) < EXACT
    assert kit.difference(out.logits, stock.logits) > MATTERS


def test_prompt_shorter_than_the_window(kit):
    tiny = kit.vlm("llama", dtype=F64, text=(2, 4))
    stock = kit.decode(tiny.model, tiny.inputs)
    for budget in (33, 100):
        out, cache = kit.compressed(tiny.model, tiny.inputs, pipeline="snapkv", budget=budget)
        assert torch.equal(out.sequences, stock.sequences)
        assert all(layer.kept is None for layer in cache.compressed_layers)
    out, cache = kit.compressed(tiny.model, tiny.inputs, stock.tokens, pipeline="snapkv+select(recent=2)", budget=4)
    expected = kit.masked(tiny.model, tiny.inputs, stock.tokens, cache.kept_masks())
    assert kit.difference(out.logits, expected.logits) < EXACT
    assert kit.difference(out.logits, stock.logits) > MATTERS
    out, cache = kit.compressed(tiny.model, tiny.inputs, pipeline="snapkv", budget=0.5)  # all of it is protected
    assert torch.equal(out.sequences, stock.sequences)


def test_one_row_of_a_batch_shorter_than_the_window(kit):
    tiny = kit.vlm("llama", batch=2, dtype=F64, text=(12, 28))
    inputs = pad(tiny.inputs, left=[35, 0])
    stock = kit.decode(tiny.model, inputs)
    out, cache = kit.compressed(tiny.model, inputs, stock.tokens, pipeline="adakv+snapkv(window=8)", budget=20)
    expected = kit.masked(tiny.model, inputs, stock.tokens, cache.kept_masks())
    assert kit.difference(out.logits, expected.logits) < EXACT
    kept = cache.kept_masks()[0]
    assert kept[0].sum(-1).tolist() == [5, 5]
    assert kept[1].sum().tolist() == 40


def test_positional_arguments_and_config_object(kit):
    tiny = kit.vlm("llama")
    whole, _ = kit.compressed(tiny.model, tiny.inputs)
    config = GenerationConfig(
        max_new_tokens=kit.STEPS, do_sample=False, pad_token_id=0, suppress_tokens=[0, 500, 501, 502, 503]
    )
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET):
        out = tiny.model.generate(tiny.inputs["input_ids"], config)
    assert torch.equal(out, whole.sequences)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("llava", DynamicCache),
        ("gemma3", DynamicCache),
        ("paligemma2", DynamicCache),
        ("llava", lambda config: StaticCache(config=config, max_cache_len=200)),
        ("gemma3", lambda config: StaticCache(config=config, max_cache_len=200)),
    ],
)
def test_other_caches_are_untouched_by_the_attention(kit, name, make):
    tiny = kit.vlm(name)
    before = tiny.text_config._attn_implementation
    stock = kit.decode(tiny.model, tiny.inputs, past_key_values=make(config=tiny.text_config))
    set_attention(tiny.model, "mmkv")
    try:
        out = kit.decode(tiny.model, tiny.inputs, past_key_values=make(config=tiny.text_config))
    finally:
        set_attention(tiny.model, before)
    assert torch.equal(out.sequences, stock.sequences)
    assert kit.difference(out.logits, stock.logits) < 2e-5  # eager has another order of summation
    assert before == "eager" or torch.equal(out.logits, stock.logits)


@pytest.mark.parametrize("pipeline", ["adakv", "snapkv"])
def test_handshake_on_the_prompt(kit, pipeline):
    tiny = kit.vlm("llava")
    cache = CompressedCache(
        tiny.model, PIPELINES[pipeline], kit.BUDGET, prompt_length=tiny.inputs["input_ids"].shape[1]
    )
    with pytest.raises(RuntimeError, match="set_attention"):
        kit.decode(tiny.model, tiny.inputs, 1, past_key_values=cache)
    with pytest.raises(RuntimeError, match="set_attention"):  # what went wrong stays known
        cache.expect(200)


def test_handshake_on_the_first_token_after_a_ragged_prompt(kit):
    tiny = kit.vlm("llava")
    _, cache = kit.compressed(tiny.model, tiny.inputs, 2)
    with pytest.raises(RuntimeError, match="set_attention"), torch.no_grad():
        tiny.model(input_ids=kit.words(1, 1), past_key_values=cache)


def test_handshake_of_mllama_with_equal_counts(kit):
    """Its image layers are always ragged and are read without `update`, so its text layers keep the handshake."""
    tiny = kit.vlm("mllama")
    _, cache = kit.compressed(tiny.model, tiny.inputs, 2, pipeline="snapkv(window=8)")
    with pytest.raises(RuntimeError, match="set_attention"), torch.no_grad():
        tiny.model(input_ids=kit.words(1, 1), past_key_values=cache)


def test_mllama_without_an_image(kit):
    tiny = kit.vlm("mllama", dtype=F64)
    inputs = {
        k: kit.words(1, 60) if k == "input_ids" else torch.ones(1, 60).long() for k in ("input_ids", "attention_mask")
    }
    stock = kit.decode(tiny.model, inputs)
    out, cache = kit.compressed(tiny.model, inputs, stock.tokens)
    keep = {layer: kept for layer, kept in cache.kept_masks().items() if layer in (0, 2)}
    expected = kit.masked(tiny.model, inputs, stock.tokens, keep)
    assert kit.difference(out.logits, expected.logits) < EXACT

"""What a session changes on a model, that it takes all of it back, and what it refuses."""

import copy

import pytest
import torch
import transformers
from mmkv_budget import HeadScores, SparseMM
from mmkv_hf import Budget, CompressedCache, Pipeline, compress, set_attention
from mmkv_scores import SnapKV
from mmkv_testkit.families import NAMES, build
from mmkv_testkit.memory import live_bytes
from transformers import DynamicCache, GenerationConfig


def fingerprint(model):
    """All a session could leave behind: configs, instance attributes, attention settings and hooks of every module."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    settings = {i: (copy.deepcopy(c.to_dict()), c._attn_implementation) for i, c in configs.items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    own = {
        k: v
        for k, v in vars(model).items()
        if not k.startswith("_") and not isinstance(v, (torch.Tensor, torch.nn.Module))
    }
    return settings, attributes, hooks, {k: id(v) for k, v in own.items()}, type(model), model.generate.__func__


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_as_before(kit, name):
    tiny = kit.vlm(name)
    stock = kit.decode(tiny.model, tiny.inputs, 3)  # the first call of some models installs hooks of transformers
    before = fingerprint(tiny.model)
    kit.compressed(tiny.model, tiny.inputs, 3)
    assert fingerprint(tiny.model) == before
    again = kit.decode(tiny.model, tiny.inputs, 3)
    assert torch.equal(again.logits, stock.logits)


@pytest.mark.parametrize("name", ["llava", "mllama", "llama", "gemma4"])
def test_the_model_is_as_before_after_an_error(kit, name):
    tiny = kit.vlm(name)
    stock, calls = kit.decode(tiny.model, tiny.inputs, 3), []
    before = fingerprint(tiny.model)

    def fail(module, args, output):
        calls.append(module)
        if len(calls) == 1:
            raise KeyboardInterrupt

    for error, at in [(KeyboardInterrupt, tiny.model.get_decoder().layers[2]), (ZeroDivisionError, None)]:
        hook = at.register_forward_hook(fail) if at else None
        session = compress(tiny.model, kit.PIPELINE, kit.BUDGET)
        with pytest.raises(error):
            interrupted(kit, tiny, session, raises=at is None)
        if hook:
            hook.remove()
        assert session.last is None
        assert fingerprint(tiny.model) == before
    assert torch.equal(kit.decode(tiny.model, tiny.inputs, 3).logits, stock.logits)


def interrupted(kit, tiny, session, raises):
    with session:
        if raises:
            raise ZeroDivisionError
        kit.decode(tiny.model, tiny.inputs, 3)


def test_only_the_language_model_gets_the_attention(kit):
    tiny = kit.vlm("llava")
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET):
        assert tiny.text_config._attn_implementation == "mmkv"
        assert tiny.model.config.vision_config._attn_implementation == "sdpa"
    assert tiny.text_config._attn_implementation == "sdpa"


def test_nothing_of_transformers_is_patched(kit):
    tiny = kit.vlm("llava")
    watched = [DynamicCache, transformers.cache_utils.DynamicLayer, transformers.GenerationMixin, type(tiny.model)]
    watched += [transformers.integrations.sdpa_attention, transformers.masking_utils, transformers.generation.utils]
    before = [dict(vars(thing)) for thing in watched]
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET):
        kit.decode(tiny.model, tiny.inputs, 2)
        assert all(dict(vars(thing)) == then for thing, then in zip(watched, before, strict=True))


def test_sessions_cannot_be_nested_but_can_follow(kit):
    tiny = kit.vlm("llava")
    kit.decode(tiny.model, tiny.inputs, 1)
    before = fingerprint(tiny.model)
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET) as session:
        with pytest.raises(RuntimeError, match="nested"), compress(tiny.model, "snapkv", 64):
            pass
        with pytest.raises(RuntimeError, match="nested"), session:
            pass
        kit.decode(tiny.model, tiny.inputs, 2)
    assert fingerprint(tiny.model) == before
    with session:
        kit.decode(tiny.model, tiny.inputs, 2)
    assert fingerprint(tiny.model) == before


def test_attention_that_was_mmkv_before_stays_so(kit):
    tiny = kit.vlm("llava")
    set_attention(tiny.model, "mmkv")
    try:
        kit.compressed(tiny.model, tiny.inputs, 2)
        assert tiny.text_config._attn_implementation == "mmkv"
    finally:
        set_attention(tiny.model, "sdpa")


def test_a_generate_of_the_instance_is_called_and_kept(kit):
    tiny = build("llama")
    calls = []

    def own(*args, **kwargs):
        calls.append(kwargs["past_key_values"])
        return type(tiny.model).generate(tiny.model, *args, **kwargs)

    tiny.model.generate = own
    _, cache = kit.compressed(tiny.model, tiny.inputs, 2)
    assert calls == [cache]
    assert tiny.model.generate is own


def test_report(kit):
    model, inputs = kit.padded("qwen2_vl")
    with compress(model, kit.PIPELINE, kit.BUDGET) as session:
        with pytest.raises(RuntimeError, match="nothing to report"):
            session.report()
        model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
    report = session.report()
    assert report.to_dict()["bytes_held"] == live_bytes(session.last)
    assert report.prompt == inputs["input_ids"].shape[1]
    for layer in report.layers:
        assert [sum(row) for row in layer.kept] == [2 * kit.BUDGET] * 4
        assert sum(layer.share.values()) == pytest.approx(1)
        kept = session.last.kept_masks()[layer.layer]
        vision = (inputs["input_ids"] == 500).repeat_interleave(2, 0)[:, None]
        assert layer.share["image"] == pytest.approx(int((kept & vision).sum()) / int(kept.sum()))
    assert "adakv" in str(report)


def test_padding_is_not_reported_as_kept(kit):
    model, inputs = kit.padded("llava")
    real = inputs["attention_mask"].sum(1)
    with compress(model, kit.PIPELINE, 500) as session:
        model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
        generated = session.report()
        with torch.no_grad():
            model(**inputs, past_key_values=session.cache(**inputs))
        looped = session.report()
        kit.decode(model, kit.conversation(inputs, kit.words(2, 2), kit.words(2, 2)), 2, past_key_values=session.last)
        longer = session.report()
    for made, rows in ((generated, real.repeat_interleave(2)), (looped, real), (longer, real + 4)):
        for layer in made.layers:
            assert layer.kept == [[count] * len(layer.kept[0]) for count in rows.tolist()]
            assert layer.share["image"] == pytest.approx(16 * len(rows) / int(rows.sum()))


# -- bad input


@pytest.mark.parametrize("budget", [0, -3, 0.0, 1.5, -0.1, float("nan"), "64", True])
def test_budgets_that_are_none(kit, budget):
    with pytest.raises((ValueError, TypeError), match=r"(?i)budget"):
        compress(kit.vlm("llava").model, "snapkv(window=8)", budget)


def test_budget_within_the_protected_tokens(kit):
    tiny = kit.vlm("llava")
    kit.decode(tiny.model, tiny.inputs, 1)
    before = fingerprint(tiny.model)
    with pytest.raises(ValueError, match=r"least that works is 9"):
        compress(tiny.model, "snapkv(window=8)", 8)
    with (
        pytest.raises(ValueError, match=r"least that works is 9"),
        compress(tiny.model, "snapkv(window=8)", 0.05) as session,
    ):
        kit.decode(tiny.model, tiny.inputs, 2)
    assert session.last is None
    assert fingerprint(tiny.model) == before
    kit.compressed(tiny.model, tiny.inputs, 2, pipeline="snapkv(window=8)", budget=9)


def test_budget_larger_than_the_prompt(kit):
    tiny = kit.vlm("llava")
    for budget in (1.0, 10**6, Budget(bytes=10**9)):
        _, cache = kit.compressed(tiny.model, tiny.inputs, 2, budget=budget)
        assert all(layer.kept is None for layer in cache.compressed_layers)


def test_budget_in_bytes_is_kept(kit):
    model, inputs = kit.padded("llava")
    with compress(model, kit.PIPELINE, Budget(bytes=40_000)) as session:
        kit.decode(model, inputs, 1)
    pairs = sum(mask.sum((1, 2)) for mask in session.last.kept_masks().values())
    size = 2 * 16 * 4 + 4
    assert (pairs * size <= 40_000).all()
    assert (pairs * size > 40_000 - 4 * 2 * size).all()


@pytest.mark.parametrize("source", ["adakw", "snapkv(windw=3)", "snapkv+h2o", "snapkv(", ""])
def test_unknown_pipelines(kit, source):
    with pytest.raises(ValueError, match=r"(?i)unknown|settings|two|brackets|a stage is missing"):
        compress(kit.vlm("llava").model, source, 30)


@pytest.mark.parametrize("shape", [(3, 2), (4, 3), (5, 4)])
def test_table_of_another_model(kit, shape):
    table = HeadScores(torch.rand(shape).tolist())
    with pytest.raises(ValueError, match=r"(?i)head|layer"):
        compress(kit.vlm("llava").model, Pipeline(score=SnapKV(window=8), heads=SparseMM(table)), 30)


def test_models_that_cannot_be_compressed():
    bert = transformers.BertModel(
        transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=16, vocab_size=99)
    )
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=99))
    clip = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    sliding = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            vocab_size=99,
            sliding_window=4,
        )
    )
    latent = transformers.DeepseekV3Config(num_hidden_layers=1)
    for model, message in [
        (bert, "cannot generate"),
        (t5, "encoder-decoder"),
        (mamba, "no text decoder"),
        (clip, "cannot generate"),
        (sliding, "no full-attention layer"),
        (torch.nn.Linear(2, 2), "not a transformers model"),
    ]:
        with pytest.raises(ValueError, match=message):
            compress(model, "snapkv", 64)
    with pytest.raises(ValueError, match="MLA"):
        CompressedCache(latent, "snapkv", 64, prompt_length=100)


def test_attention_sinks_are_refused():
    config = transformers.GptOssConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
        vocab_size=99, head_dim=16, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    with pytest.raises(ValueError, match="sinks"), compress(model, "snapkv(window=8)", 16):
        model.generate(torch.randint(3, 99, (1, 40)), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"custom_generate": lambda model, **kwargs: None}, "custom_generate"),
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"use_cache": False}, "use_cache"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache"),
        ({"generation_config": GenerationConfig(cache_implementation="static")}, "cache_implementation"),
        ({"past_key_values": DynamicCache()}, "DynamicCache"),
    ],
)
def test_settings_that_bring_another_cache(kit, settings, message):
    tiny = kit.vlm("llava")
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET), pytest.raises(ValueError, match=message):
        tiny.model.generate(**tiny.inputs, **settings, max_new_tokens=2)


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "llama"}])
def test_assisted_decoding_of_a_second_turn_is_refused(kit, settings):
    """Transformers 5.23 feeds the whole prompt to a cache that holds it already, and answers wrongly without a word."""
    tiny = kit.vlm("llama")
    if "assistant_model" in settings:
        settings = {"assistant_model": build("llama", seed=3).model}
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET) as session:
        answer = kit.decode(tiny.model, tiny.inputs, 2).tokens
        turn = kit.conversation(tiny.inputs, answer, kit.words(1, 4))
        with pytest.raises(ValueError, match="assisted decoding cannot start"):
            tiny.model.generate(**turn, **settings, past_key_values=session.last, max_new_tokens=2)
        kit.decode(tiny.model, turn, 2, past_key_values=session.last)


def test_continuous_batching_is_refused(kit):
    tiny = kit.vlm("llama")
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET), pytest.raises(ValueError, match="continuous batching"):
        tiny.model.generate_batch([[1, 2, 3]])


def test_empty_prompts(kit):
    tiny = kit.vlm("llama")
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET) as session:
        for prompt in ({}, {"input_ids": torch.ones(1, 0).long()}, {"inputs_embeds": torch.ones(1, 0, 64)}):
            with pytest.raises(ValueError, match="empty"):
                tiny.model.generate(**prompt, max_new_tokens=2)
            with pytest.raises(ValueError, match="empty"):
                session.cache(**prompt)
        kit.decode(tiny.model, tiny.inputs, 3)
        with pytest.raises(ValueError, match="empty"):  # all of it has been read
            tiny.model.generate(**tiny.inputs, past_key_values=session.last, max_new_tokens=2)
    with pytest.raises(ValueError, match="empty"):
        CompressedCache(tiny.model, "snapkv", 64, prompt_length=0)


def test_shapes_that_do_not_fit(kit):
    model, inputs = kit.padded("llava")
    n = inputs["input_ids"].shape[1]
    for protect in (torch.ones(2, n - 1).bool(), torch.ones(n).bool(), torch.ones(3, n).bool(), torch.ones(2, n)):
        with compress(model, kit.PIPELINE, kit.BUDGET, protect=protect), pytest.raises(ValueError, match="protect"):
            kit.decode(model, inputs, 2)
    with pytest.raises(ValueError, match="modality"):
        CompressedCache(model, kit.PIPELINE, 30, prompt_length=n, modality=torch.zeros(2, n + 1, dtype=torch.int8))
    with pytest.raises(ValueError, match="modality"):
        CompressedCache(model, "snapkv(window=8)+select(protect=text)", 30, prompt_length=n)


def test_named_tokens_stay_over_turns(kit):
    model, inputs = kit.padded("llava")
    n = inputs["input_ids"].shape[1]
    protect = torch.zeros(2, n, dtype=torch.bool)
    protect[:, 20:29] = True
    with compress(model, kit.PIPELINE, kit.BUDGET, protect=protect) as session:
        answer = kit.decode(model, inputs, 3).tokens
        kit.decode(model, kit.conversation(inputs, answer, kit.words(2, 6)), 2, past_key_values=session.last)
    assert all(kept[:, :, 20:29].all() for kept in session.last.kept_masks().values())
    assert all(kept.sum() == 4 * kit.BUDGET for kept in session.last.kept_masks().values())


def test_scores_that_are_not_finite(kit):
    tiny = build("llava")
    kit.decode(tiny.model, tiny.inputs, 1)
    before = fingerprint(tiny.model)
    with torch.no_grad():
        tiny.model.get_decoder().layers[2].self_attn.k_proj.weight[3] = float("nan")
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET) as session:
        cache = session.cache(**tiny.inputs)
        with pytest.raises(ValueError, match=r"(?i)nan|finite"):
            kit.decode(tiny.model, tiny.inputs, 2, past_key_values=cache)
    assert session.last is None
    assert fingerprint(tiny.model) == before
    with pytest.raises(RuntimeError, match="make a new one"):
        cache.expect(300)
    with pytest.raises(RuntimeError, match="make a new one"):
        cache.layers[0].update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))


def test_a_cache_stopped_within_a_forward_pass_is_refused(kit):
    tiny = kit.vlm("llava")
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET) as session:
        cache = session.cache(**tiny.inputs)
        hook = tiny.model.get_decoder().layers[1].register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            kit.decode(tiny.model, tiny.inputs, 2, past_key_values=cache)
        hook.remove()
        turn = kit.conversation(tiny.inputs, kit.words(1, 2), kit.words(1, 2))
        with pytest.raises(RuntimeError, match="make a new one"):
            kit.decode(tiny.model, turn, 2, past_key_values=cache)


def test_a_reader_of_compressed_keys_is_refused(kit, monkeypatch):
    """What transformers up to 5.16 did with Gemma 4: a layer that reads keys after they were compressed."""
    monkeypatch.setattr("mmkv_hf.cache.last_readers", lambda config: {})
    tiny = kit.vlm("gemma4")
    with pytest.raises(RuntimeError, match="compressed before its last reader"):
        kit.compressed(tiny.model, tiny.inputs, 2)


def test_flex_masks_are_refused_with_words(kit):
    from mmkv_hf.attention import _as_bool

    with pytest.raises(ValueError, match="flex_attention"):
        _as_bool(object())


def test_half_precision(kit):
    for dtype in (torch.bfloat16, torch.float16):
        model, inputs = kit.padded("llava", dtype)
        stock = kit.decode(model, inputs)
        out, cache = kit.compressed(model, inputs, stock.tokens)
        assert out.logits.dtype == dtype
        assert cache.layers[0].prefix.keys.dtype == dtype
        expected = kit.masked(model, inputs, stock.tokens, cache.kept_masks())
        scale = float(expected.logits.abs().max())
        assert kit.difference(out.logits.float(), expected.logits.float()) < 16 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("steps", [0, 1])
def test_a_cache_broken_in_the_middle_of_a_pass_is_refused(kit, steps):
    tiny = kit.vlm("llava")
    layer = tiny.model.get_decoder().layers[1].mlp

    def stop(*args):
        raise KeyboardInterrupt

    with torch.no_grad(), compress(tiny.model, kit.PIPELINE, kit.BUDGET) as session:
        cache = session.cache(**tiny.inputs)
        passes = [dict(tiny.inputs)] + [{"input_ids": torch.tensor([[4]])}] * 2
        for inputs in passes[:steps]:
            tiny.model(**inputs, past_key_values=cache, use_cache=True)
        hook = layer.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            tiny.model(**passes[steps], past_key_values=cache, use_cache=True)
        hook.remove()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="make a new one"):
                tiny.model(**passes[-1], past_key_values=cache, use_cache=True)


def test_the_setting_is_restored_when_generate_was_taken_away(kit):
    tiny = kit.vlm("llava")
    before = tiny.model.config.get_text_config(decoder=True)._attn_implementation
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET):
        del tiny.model.generate
    assert tiny.model.config.get_text_config(decoder=True)._attn_implementation == before
    assert not {"generate", "generate_batch"} & vars(tiny.model).keys()


def test_a_wrapped_generate_does_not_hide_an_open_session(kit):
    tiny = kit.vlm("llava")
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET):
        inner = tiny.model.generate
        tiny.model.generate = lambda *a, **k: inner(*a, **k)
        with pytest.raises(RuntimeError, match="nested"), compress(tiny.model, kit.PIPELINE, kit.BUDGET):
            pass


def test_a_table_leaves_no_image_layer_uncompressed(kit):
    """A table has no rows for Mllama's image layers; they share their budget equally."""
    tiny = kit.vlm("mllama")
    heads = tiny.text_config.num_key_value_heads
    pipeline = Pipeline(score=SnapKV(window=8), heads=SparseMM([[1.0] * heads] * 2))
    with torch.no_grad(), compress(tiny.model, pipeline, 20) as session:
        tiny.model.generate(**tiny.inputs, max_new_tokens=2)
    kept = {layer.layer: layer.kept for layer in session.report().layers}
    assert set(kept) == {0, 1, 2, 3}
    assert all(kept[i] == [[20] * heads] for i in (1, 3))

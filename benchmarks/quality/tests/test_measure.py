"""A cell's outcomes against the same pipeline run by hand, answers compared as text."""

import json
from dataclasses import replace

import pytest
import torch
from mmkv_hf import CompressedCache, Pipeline, Stages, compress, reduce_images, set_attention, share
from mmkv_layershare import LazyPlan
from mmkv_quality.cells import Cell, Method, Setting
from mmkv_quality.measure import Block, measure
from mmkv_quality.replay import observed
from mmkv_quality.stages import LAZY, PRUNERS, REDUCERS
from mmkv_quality.worlds import encode, image_part, make_block
from mmkv_testbed import batch_inputs

AFTER = Setting("small-seed0")
BEFORE = Setting("small-seed0", when="before")
METHODS = [Method(share="adakv", wraps=("bacon",)), Method("h2o"), Method("keydiff", "pyramidkv")]


def samples(setting, count=6):
    return make_block(setting, 77, 3, count)


def words(checkpoint, tokens, asked):
    """[n][words] whether each word is right, and the end."""
    tokenizer, rows = checkpoint.processor.tokenizer, []
    for row, sample in zip(tokens, asked, strict=True):
        got = tokenizer.convert_ids_to_tokens(row.tolist())
        wanted = [*sample.answer.split(), tokenizer.eos_token]
        rows.append([i < len(got) and got[i] == word for i, word in enumerate(wanted)])
    return rows


def text_only(inputs):
    return {name: value for name, value in inputs.items() if name != "pixel_values"}


@pytest.mark.parametrize("method", METHODS)
def test_after_the_question(checkpoint, method):
    asked = samples(AFTER)
    cell = Cell(AFTER, method, 32)
    (block,) = measure(checkpoint, asked, [cell])
    inputs = batch_inputs(checkpoint.processor, asked)
    length, model = inputs["input_ids"].shape[1], checkpoint.model
    with compress(model, method.text(8), budget=32) as session, torch.no_grad():
        usual = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, length:]
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        cache = session.last
        held, full = cache.bytes_held, cache.bytes_full
        cache.crop(-1)
        honest = model.generate(**text_only(inputs), past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert block.cell == cell.key
    assert block.honest.right.tolist() == words(checkpoint, honest[:, length:], asked)
    assert block.usual.right.tolist() == words(checkpoint, usual, asked)
    assert (block.held, block.full) == (held, full)
    assert 0 < held < full / 10


@pytest.mark.parametrize("method", METHODS)
def test_before_the_question(checkpoint, method):
    asked = samples(BEFORE)
    (block,) = measure(checkpoint, asked, [Cell(BEFORE, method, 64)])
    inputs, _ = encode(checkpoint, asked)
    image, model = image_part(checkpoint, inputs), checkpoint.model
    cache = CompressedCache(model, method.text(8), 64, prompt_length=577)
    with observed(model), torch.no_grad():
        model.generate(**image, past_key_values=cache, max_new_tokens=1, do_sample=False)
        out = model.generate(**text_only(inputs), past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert block.honest.right.tolist() == words(checkpoint, out[:, inputs["input_ids"].shape[1] :], asked)
    assert block.usual is None


def test_sparsemm_reads_the_table_of_the_checkpoint(checkpoint, tmp_path):
    table = tmp_path / "head_scores.json"
    rows = [[1 + layer * head for head in range(4)] for layer in range(4)]
    table.write_text(json.dumps({"format": "mmkv-head-scores/1", "model": "x", "kind": "visual", "scores": rows}))
    asked, method = samples(AFTER), Method(share="sparsemm")
    with_table = replace(checkpoint, table=table)
    (block,) = measure(with_table, asked, [Cell(AFTER, method, 32)])
    inputs = batch_inputs(checkpoint.processor, asked)
    with compress(checkpoint.model, f"sparsemm({table})+snapkv(window=8)", budget=32) as session, torch.no_grad():
        out = checkpoint.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert block.usual.right.tolist() == words(checkpoint, out[:, inputs["input_ids"].shape[1] :], asked)
    assert len({count for layer in session.report().layers for row in layer.kept for count in row}) > 3


def test_the_full_cache_is_stock_generate_before_and_after(checkpoint):
    asked = samples(AFTER, 8)
    inputs = batch_inputs(checkpoint.processor, asked)
    with torch.no_grad():
        out = checkpoint.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    right = words(checkpoint, out[:, inputs["input_ids"].shape[1] :], asked)
    (after,) = measure(checkpoint, asked, [Cell(AFTER)])
    (before,) = measure(checkpoint, asked, [Cell(BEFORE)])
    assert after.honest.right.tolist() == after.usual.right.tolist() == before.honest.right.tolist() == right
    assert sum(map(sum, right)) > 20
    assert after.held == after.full


def test_the_image_part_ends_with_the_image(checkpoint):
    inputs, _ = encode(checkpoint, samples(AFTER))
    part = image_part(checkpoint, inputs)
    assert part["input_ids"].shape == (6, 577)
    assert (part["input_ids"][:, -1] == checkpoint.model.config.image_token_id).all()
    assert part["pixel_values"] is inputs["pixel_values"]
    uneven, _ = encode(checkpoint, [*samples(AFTER, 1), *samples(Setting("x", suffix=9), 1)])
    with pytest.raises(ValueError, match="images end at different columns"):
        image_part(checkpoint, uneven)


def test_samples_are_numbered_and_paired():
    long, short = samples(AFTER), make_block(AFTER, 77, 5, 2)
    assert [x.prompt for x in long[2:4]] == [x.prompt for x in short]
    other = samples(Setting("x", task="describe", suffix=0))
    assert [x.records for x in other] == [x.records for x in long]


def test_answers_of_two_lengths_are_refused(checkpoint):
    mixed = [*samples(AFTER, 1), *samples(Setting("x", task="describe"), 1)]
    with pytest.raises(ValueError, match="have to be of one length"):
        encode(checkpoint, mixed)


def test_an_impossible_cell_is_named(checkpoint):
    cell = Cell(AFTER, METHODS[0], 8)
    with pytest.raises(ValueError, match=r"cell small-seed0/.*adakv\+bacon\|8\|w8: budget 8 does not exceed"):
        list(measure(checkpoint, samples(AFTER, 1), [cell]))


def test_the_attention_setting_is_left_as_it_was(checkpoint):
    set_attention(checkpoint.model, "sdpa")
    list(measure(checkpoint, samples(AFTER, 1), [Cell(AFTER)]))
    assert checkpoint.model.config.get_text_config(decoder=True)._attn_implementation == "sdpa"


def test_a_block_survives_json(checkpoint):
    for setting in (AFTER, BEFORE):
        (block,) = measure(checkpoint, samples(setting, 2), [Cell(setting, METHODS[0], 32)])
        assert Block.of_json(block.to_json()).to_json() == block.to_json()


@pytest.mark.parametrize("method", [Method("", stages=("fastv",)), Method(stages=("pyramiddrop",))])
def test_dropped_tokens(checkpoint, method):
    """The same by the product's own session."""
    asked = samples(AFTER)
    (block,) = measure(checkpoint, asked, [Cell(AFTER, method, 32 if method.score else 0)])
    inputs = batch_inputs(checkpoint.processor, asked)
    length, model = inputs["input_ids"].shape[1], checkpoint.model
    before = Stages(prune=PRUNERS[method.stages[0]](len(model.model.language_model.layers)))
    stages = replace(before, evict=Pipeline.parse("snapkv(window=8)"))
    with compress(model, stages, budget=32 if method.score else 10_000) as session, torch.no_grad():
        usual = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, length:]
        held = session.last.bytes_held
    assert block.usual.right.tolist() == words(checkpoint, usual, asked)
    assert held <= block.held + 6 * 2 * 4 * 32 * 4 * 4 * 8  # the session's cache has four more tokens
    (full,) = measure(checkpoint, asked, [Cell(AFTER)])
    assert block.held < full.held


@pytest.mark.parametrize("name", ["prumergeplus", "visionzip 192"])
def test_fewer_tokens_before_the_language_model(checkpoint, name):
    """The same with a stock cache; and behind it, eviction by the product's own session."""
    asked = samples(AFTER)
    alone, behind = Method("", stages=(name,)), Method(stages=(name,))
    blocks = list(measure(checkpoint, asked, [Cell(AFTER, alone), Cell(AFTER, behind, 64)]))
    inputs = batch_inputs(checkpoint.processor, asked)
    length, model = inputs["input_ids"].shape[1], checkpoint.model
    with reduce_images(model, REDUCERS[name]) as session, torch.no_grad():
        usual = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, length:]
        given = session.last.columns.shape[1]
    assert blocks[0].usual.right.tolist() == words(checkpoint, usual, asked)
    assert blocks[0].full == 6 * given * 2 * 4 * 32 * 4 * 4  # K and V, heads, size, layers, bytes
    assert blocks[0].full <= blocks[0].held < 1.01 * blocks[0].full  # rows that keep fewer have fillers to mark
    stages = Stages(reduce=REDUCERS[name], evict=Pipeline.parse("snapkv(window=8)"))
    with compress(model, stages, budget=64) as session, torch.no_grad():
        usual = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, length:]
    assert blocks[1].usual.right.tolist() == words(checkpoint, usual, asked)
    assert blocks[1].held < blocks[0].held / 2


@pytest.mark.parametrize("name", ["vla", "gla"])
def test_borrowed_attention(checkpoint, name, tmp_path):
    LazyPlan(4, ((2, 3),)).save(tmp_path / "plan.json")
    with_plan = replace(checkpoint, plan=tmp_path / "plan.json")
    asked = samples(AFTER)
    blocks = list(measure(with_plan, asked, [Cell(AFTER), Cell(AFTER, Method("", stages=(name,)))]))
    inputs = batch_inputs(checkpoint.processor, asked)
    length, model = inputs["input_ids"].shape[1], checkpoint.model
    with share(model, LazyPlan(4, ((2, 3),), LAZY[name])), torch.no_grad():
        usual = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, length:]
    assert blocks[1].usual.right.tolist() == words(checkpoint, usual, asked)
    assert 0.8 < blocks[1].held / blocks[0].held < 0.95


def test_a_missing_plan_is_named(checkpoint):
    with pytest.raises(ValueError, match=r"cell .*vla.*: vla needs a plan of lazy layers"):
        list(measure(replace(checkpoint, plan=None), samples(AFTER), [Cell(AFTER, Method("", stages=("vla",)))]))

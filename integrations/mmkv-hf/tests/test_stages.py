"""Pruning, lazy layers and eviction together, against a dense model that forbids what each of them took away."""

import pytest
import torch
from mmkv_hf import compress, prune
from mmkv_prune import ADSC, FastV, PyramidDrop, RandomDrop, SparseVLM
from mmkv_testkit.families import FAMILIES
from mmkv_testkit.oracle import MaskedDense, Round

F64 = torch.float64
EXACT = 1e-9
MATTERS = 1e-2
OTHERS = {"gemma3", "gemma4", "mllama", "qwen3_5"}
FULL = [family for family in FAMILIES if family not in OTHERS]
METHODS = [
    ADSC(layers=(1, 3), stride=2),
    FastV(layer=2, keep=0.5),
    PyramidDrop(layers=(1, 2, 3), keep=(0.6, 0.4, 0.2)),
    SparseVLM(layers=(1, 3), keep=(0.6, 0.3)),
]


def first_layer(model):
    return 3 if "qwen3_vl" in model.config.model_type else 1


def alive_of(session, heads):
    """Layer -> [B, H, N] bool, the columns that reached it."""
    return {
        layer: torch.zeros(len(held.columns), held.length, dtype=torch.bool)
        .scatter(1, held.columns, held.real)[:, None]
        .expand(-1, heads, -1)
        for layer, held in session.held.items()
    }


def pruned_and_compressed(kit, model, inputs, method, tokens, pipeline=None, budget=None):
    """What both together gave, the cache, and what the layers were given."""
    with prune(model, method) as session:
        out, cache = kit.compressed(model, inputs, tokens, pipeline or kit.PIPELINE, budget or kit.BUDGET)
        alive = alive_of(session, model.config.get_text_config(decoder=True).num_key_value_heads)
    return out, cache, alive


def check_against_masks(kit, model, inputs, found, cache, alive):
    keep = cache.kept_masks()
    end = inputs["input_ids"].shape[1]
    with MaskedDense(model, [Round(alive, 0), Round(keep, end)]) as oracle:
        wanted = kit.decode(model, inputs, found.tokens)
    assert oracle.masked_calls
    assert kit.difference(found.logits, wanted.logits) < EXACT
    for layer, mask in alive.items():
        assert not (keep[layer] & ~mask).any()


@pytest.mark.parametrize("is_padded", [False, True], ids=["one row", "left-padded"])
@pytest.mark.parametrize("family", FULL)
def test_pruned_and_evicted_equals_both_masks(kit, family, is_padded):
    if is_padded:
        model, inputs = kit.padded(family, dtype=F64)
    else:
        tiny = kit.vlm(family, dtype=F64)
        model, inputs = tiny.model, tiny.inputs
    first = first_layer(model)
    method = ADSC(layers=(first,) if first > 1 else (1, 3), stride=2)
    stock = kit.decode(model, inputs)
    found, cache, alive = pruned_and_compressed(kit, model, inputs, method, stock.tokens)
    check_against_masks(kit, model, inputs, found, cache, alive)
    assert len({int(n) for mask in cache.kept_masks().values() for n in mask.sum(-1).flatten()}) > 1
    only_pruned = prune_alone(kit, model, inputs, method, stock.tokens)
    assert kit.difference(found.logits, only_pruned.logits) > MATTERS
    only_evicted, _ = kit.compressed(model, inputs, stock.tokens)
    assert kit.difference(found.logits, only_evicted.logits) > MATTERS


def prune_alone(kit, model, inputs, method, tokens):
    with prune(model, method):
        return kit.decode(model, inputs, tokens)


@pytest.mark.parametrize("pipeline", ["snapkv(window=8)", "h2o+select(recent=4)", "pyramidkv+bacon+snapkv(window=8)"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_methods_compose(kit, method, pipeline):
    model, inputs = kit.padded("llava", dtype=F64)
    stock = kit.decode(model, inputs)
    found, cache, alive = pruned_and_compressed(kit, model, inputs, method, stock.tokens, pipeline)
    check_against_masks(kit, model, inputs, found, cache, alive)


def test_rows_that_hold_different_counts(kit):
    """One row has no image, so that the other one is filled up; a filler takes part in nothing."""
    tiny = kit.vlm("llava", batch=2, dtype=F64)
    inputs = kit.without_image(tiny.inputs, row=1)
    method = RandomDrop(layers=(1, 2), keep=(0.5, 0.25))
    for budget in (25, 4096):
        found, cache, alive = pruned_and_compressed(kit, tiny.model, inputs, method, 4, budget=budget)
        assert not alive[1][0].all()
        assert len(set(alive[1][:, 0].sum(-1).tolist())) == 2
        check_against_masks(kit, tiny.model, inputs, found, cache, alive)


@pytest.mark.parametrize("budget", [25, 4096])
def test_a_second_turn_goes_on(kit, budget):
    tiny = kit.vlm("llava", dtype=F64)
    model, inputs = tiny.model, tiny.inputs
    with prune(model, METHODS[0]) as pruning, compress(model, kit.PIPELINE, budget) as session:
        first = kit.decode(model, inputs, 3)
        cache = session.last
        alive = alive_of(pruning, tiny.text_config.num_key_value_heads)
        before = cache.kept_masks()
        turn = kit.conversation(inputs, first.tokens, kit.words(1, 5))
        second = kit.decode(model, turn, 3, past_key_values=cache)
        after = cache.kept_masks()
    ends = [inputs["input_ids"].shape[1], turn["input_ids"].shape[1]]
    with MaskedDense(model, [Round(alive, 0), Round(before, ends[0]), Round(after, ends[1])]):
        wanted = kit.decode(model, inputs | turn, second.tokens)
    assert kit.difference(second.logits, wanted.logits) < EXACT


def test_nothing_evicted_is_pruning_alone(kit):
    model, inputs = kit.padded("llava", dtype=F64)
    alone = prune_alone(kit, model, inputs, METHODS[1], 4)
    found, cache, _ = pruned_and_compressed(kit, model, inputs, METHODS[1], alone.tokens, budget=4096)
    assert kit.difference(found.logits, alone.logits) < EXACT
    assert all(layer.prefix is None for layer in cache.compressed_layers)


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}, {"do_sample": True, "top_k": 3}],
)
def test_generate_modes(kit, settings):
    tiny = kit.vlm("llava", dtype=F64)
    model, inputs = tiny.model, tiny.inputs

    def generated(**more):
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=6, **settings, **more).tolist()

    with prune(model, METHODS[0]) as pruning, compress(model, kit.PIPELINE, kit.BUDGET) as session:
        found = generated()
        alive = {i: x[:1] for i, x in alive_of(pruning, tiny.text_config.num_key_value_heads).items()}
        keep = {i: x[:1] for i, x in session.last.kept_masks().items()}
    with MaskedDense(model, [Round(alive, 0), Round(keep, inputs["input_ids"].shape[1])]):
        assert generated() == found


def test_every_answer_token_from_what_is_left(kit):
    """The cache is cropped by one and the last prompt token run again."""
    tiny = kit.vlm("llava", dtype=F64)
    model, inputs = tiny.model, tiny.inputs
    for budget in (25, 4096):
        with prune(model, METHODS[0]) as pruning, compress(model, kit.PIPELINE, budget) as session, torch.no_grad():
            cache = session.cache(**inputs)
            model(**inputs, past_key_values=cache)
            keep, alive = cache.kept_masks(), alive_of(pruning, tiny.text_config.num_key_value_heads)
            cache.crop(-1)
            ids = inputs["input_ids"]
            again = model(input_ids=ids[:, -1:], attention_mask=inputs["attention_mask"], past_key_values=cache)
        with MaskedDense(model, [Round(alive, 0), Round(keep, ids.shape[1] - 1)]), torch.no_grad():
            wanted = model(**inputs)
        assert kit.difference(again.logits[:, -1], wanted.logits[:, -1]) < EXACT

"""Pruning, lazy layers and eviction together, against a dense model that forbids what each of them took away."""

import copy

import pytest
import torch
from mmkv_hf import Budget, Stages, compress, prune
from mmkv_hf.follower import FollowerLayer
from mmkv_hf.kinds import layer_kinds
from mmkv_layershare import LazyPlan
from mmkv_pipelines import Pipeline
from mmkv_prune import ADSC, FastV, PyramidDrop, RandomDrop, SparseVLM
from mmkv_testkit.families import PLAIN, pad
from mmkv_testkit.oracle import MaskedDense, Round, attending, dense_attention, visible_to
from transformers import DynamicCache

F64 = torch.float64
EXACT = 1e-9
MATTERS = 1e-2
METHODS = [
    ADSC(layers=(1, 3), stride=2),
    FastV(layer=2, keep=0.5),
    PyramidDrop(layers=(1, 2, 3), keep=(0.6, 0.4, 0.2)),
    SparseVLM(layers=(1, 3), keep=(0.6, 0.3)),
]


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
@pytest.mark.parametrize("family", PLAIN)
def test_pruned_and_evicted_equals_both_masks(kit, family, is_padded):
    if is_padded:
        model, inputs = kit.padded(family, dtype=F64)
    else:
        tiny = kit.vlm(family, dtype=F64)
        model, inputs = tiny.model, tiny.inputs
    method = METHODS[0]
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


def test_survivors_numbered_anew_are_evicted(kit):
    """Against a stock cache behind the same pruning, in whose physical columns the evicted ones are forbidden."""
    tiny = kit.vlm("llava", batch=2, dtype=F64)
    model, inputs = tiny.model, pad(tiny.inputs, left=[9, 0])
    method = ADSC(layers=(1, 3), stride=2, positions="reindex")
    with prune(model, method), compress(model, kit.PIPELINE, kit.BUDGET) as session:
        found = kit.decode(model, inputs, 5)
    keep = session.last.kept_masks()
    with prune(model, method) as pruning, physically(kit, model, keep, pruning):
        wanted = kit.decode(model, inputs, found.tokens)
    assert kit.difference(found.logits, wanted.logits) < EXACT
    assert kit.difference(found.logits, prune_alone(kit, model, inputs, method, found.tokens).logits) > MATTERS


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


@pytest.mark.parametrize("budget", [25, 4096])
def test_drafts_that_come_with_the_prompt_are_taken_back(kit, budget):
    """Prompt lookup proposes tokens before the prompt has been read; layers must not count those it takes back."""
    tiny = kit.vlm("llava", dtype=F64)
    inputs = pad(tiny.inputs, left=[5])
    inputs["input_ids"][0, -4:] = inputs["input_ids"][0, -14:-10]
    lengths = []
    hook = tiny.model.get_decoder().register_forward_pre_hook(
        lambda m, a, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with prune(tiny.model, METHODS[0]), compress(tiny.model, kit.PIPELINE, budget):
        found = tiny.model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=3)
        hook.remove()
        assert lengths[0] > inputs["input_ids"].shape[1]
        assert torch.equal(found, tiny.model.generate(**inputs, max_new_tokens=8, do_sample=False))


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


# -- lazy layers that keep what their anchors keep

BLOCKS = ((0, 1), (2, 3))
MODES = pytest.mark.parametrize("mode", ["visual", "global"])


def physically(kit, model, keep, pruning):
    """A context: while it decodes, a stock cache behind pruning, of whose physical columns `keep` [B, H, N] is seen."""

    def attend(layer, query, key, value, mask, scaling, softcap):
        columns, kept, held = key.shape[2], keep[layer], pruning.held.get(layer)
        visible = visible_to(torch.arange(columns - query.shape[2], columns), columns, mask)
        if query.shape[2] == 1:
            if held is not None:
                kept = kept.gather(2, held.columns[:, None].expand(-1, kept.shape[1], -1)) & held.real[:, None]
            visible = visible & kit.wide(kept, len(query), columns, value=True)[:, :, None]
        return dense_attention(query, key, value, visible, scaling, softcap)

    return attending(model, attend)


def stages_of(model, mode, pipeline, method=None, blocks=BLOCKS):
    plan = LazyPlan(len(layer_kinds(model)), blocks, mode)
    return Stages(prune=method, share=plan, evict=Pipeline.parse(pipeline))


def shared_and_compressed(kit, model, inputs, stages, tokens, budget, **settings):
    """What the stages gave, the cache, and what the reference gives with the cache's masks."""
    with compress(model, stages, budget) as session:
        found = kit.decode(model, inputs, tokens, **settings)
        held = {} if stages.prune is None else alive_of(session._pruning, session.last.layers[0].keys.shape[1])
    keep, end = session.last.kept_masks(), inputs["input_ids"].shape[1]
    with kit.sharing(model, stages.share, inputs, [Round(held, 0), Round(keep, end)]):
        wanted = kit.decode(model, inputs, found.tokens)
    return found, wanted, session.last


@pytest.mark.parametrize("left", [(0, 0), (5, 0)])
@pytest.mark.parametrize("family", ["gemma3", "paligemma2"])
def test_layers_that_slide_between_those_that_evict(kit, family, left):
    """Those that slide are pruned too, and keep what their window holds."""
    text = (0, 12) if family == "paligemma2" else (30, 6)
    tiny = kit.vlm(family, batch=2, dtype=F64, images=4, text=text)
    model, inputs = tiny.model, pad(tiny.inputs, left=left)
    with prune(model, METHODS[0]) as pruning, compress(model, kit.PIPELINE, kit.BUDGET) as session:
        found = kit.decode(model, inputs, 12)
    alive = alive_of(pruning, tiny.text_config.num_key_value_heads)
    rounds = [Round(alive, 0), Round(session.last.kept_masks(), inputs["input_ids"].shape[1])]
    with kit.sharing(model, LazyPlan(len(layer_kinds(model))), inputs, rounds):
        wanted = kit.decode(model, inputs, found.tokens, past_key_values=DynamicCache())
    assert kit.difference(found.logits, wanted.logits) < EXACT
    assert kit.difference(found.logits, prune_alone(kit, model, inputs, METHODS[0], found.tokens).logits) > MATTERS


@MODES
@pytest.mark.parametrize("is_padded", [False, True], ids=["one row", "left-padded"])
@pytest.mark.parametrize("family", PLAIN)
def test_lazy_layers_keep_what_their_anchor_keeps(kit, family, is_padded, mode):
    if is_padded:
        model, inputs = kit.padded(family, dtype=F64)
    else:
        tiny = kit.vlm(family, dtype=F64)
        model, inputs = tiny.model, tiny.inputs
    stages = stages_of(model, mode, "adakv+bacon+snapkv(window=8)")
    stock = kit.decode(model, inputs)
    found, wanted, cache = shared_and_compressed(kit, model, inputs, stages, stock.tokens, kit.BUDGET)
    assert kit.difference(found.logits, wanted.logits) < EXACT
    assert kit.difference(found.logits, stock.logits) > MATTERS
    only_evicted, _ = kit.compressed(model, inputs, stock.tokens, "adakv+bacon+snapkv(window=8)")
    assert kit.difference(found.logits, only_evicted.logits) > MATTERS
    keep = cache.kept_masks()
    assert not keep[0].all()
    for layer in stages.share.lazy:
        assert torch.equal(keep[layer], keep[stages.share.anchor(layer)])
        assert isinstance(cache.layers[layer], FollowerLayer)


@MODES
@pytest.mark.parametrize("blocks", [((0, 3),), ((1, 2),)])
@pytest.mark.parametrize(
    "pipeline", ["pyramidkv+snapkv(window=8)", "h2o+select(recent=4)", "adakv(normalize=false)+knorm"]
)
def test_blocks_and_pipelines(kit, pipeline, blocks, mode):
    model, inputs = kit.padded("llava", dtype=F64)
    stages = stages_of(model, mode, pipeline, blocks=blocks)
    found, wanted, cache = shared_and_compressed(kit, model, inputs, stages, 5, kit.BUDGET)
    assert kit.difference(found.logits, wanted.logits) < EXACT
    group = cache.layers[0].group
    assert group.num_layers == 4 - len(stages.share.lazy)
    assert group.round is None


@MODES
@pytest.mark.parametrize("is_padded", [False, True], ids=["one row", "left-padded"])
@pytest.mark.parametrize("method", [ADSC(layers=(2,), stride=2), FastV(layer=2, keep=0.5)])
def test_all_three_stages(kit, method, is_padded, mode):
    if is_padded:
        model, inputs = kit.padded("qwen2_vl", dtype=F64)
    else:
        tiny = kit.vlm("qwen2_vl", dtype=F64)
        model, inputs = tiny.model, tiny.inputs
    stages = stages_of(model, mode, "adakv+bacon+snapkv(window=8)", method)
    found, wanted, _ = shared_and_compressed(kit, model, inputs, stages, 5, kit.BUDGET)
    assert kit.difference(found.logits, wanted.logits) < EXACT
    without, _, _ = shared_and_compressed(
        kit, model, inputs, stages_of(model, mode, "adakv+bacon+snapkv(window=8)"), found.tokens, kit.BUDGET
    )
    assert kit.difference(found.logits, without.logits) > MATTERS


@MODES
@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}, {"do_sample": True, "top_k": 3}],
)
def test_generate_modes_with_lazy_layers(kit, settings, mode):
    tiny = kit.vlm("llava", dtype=F64)
    model, inputs = tiny.model, tiny.inputs
    stages = stages_of(model, mode, kit.PIPELINE)

    def generated():
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=6, **settings).tolist()

    with compress(model, stages, kit.BUDGET) as session:
        found = generated()
        keep = {i: x[:1] for i, x in session.last.kept_masks().items()}
    with kit.sharing(model, stages.share, inputs, [Round(keep, inputs["input_ids"].shape[1])]):
        assert generated() == found


@MODES
@pytest.mark.parametrize("budget", [25, 4096])
def test_a_second_turn_with_lazy_layers(kit, budget, mode):
    tiny = kit.vlm("llava", dtype=F64)
    model, inputs = tiny.model, tiny.inputs
    stages = stages_of(model, mode, kit.PIPELINE)
    with compress(model, stages, budget) as session:
        first = kit.decode(model, inputs, 3)
        cache = session.last
        before = cache.kept_masks()
        turn = kit.conversation(inputs, first.tokens, kit.words(1, 5))
        second = kit.decode(model, turn, 3, past_key_values=cache)
        after = cache.kept_masks()
    ends = [inputs["input_ids"].shape[1], turn["input_ids"].shape[1]]
    with kit.sharing(model, stages.share, inputs | turn, [Round(before, ends[0]), Round(after, ends[1])]):
        wanted = kit.decode(model, inputs | turn, second.tokens)
    assert kit.difference(second.logits, wanted.logits) < EXACT


@MODES
@pytest.mark.parametrize("budget", [30, 4096])
def test_bytes_of_a_block(kit, mode, budget):
    """Lazy layers hold values, and keys of kept text in visual mode; slots and sums come on top."""
    tiny = kit.vlm("llava")
    stages = stages_of(tiny.model, mode, "snapkv(window=8)", blocks=((0, 3),))
    with compress(tiny.model, stages, budget) as session:
        kit.decode(tiny.model, tiny.inputs, 1)
    cache, text = session.last, tiny.text_config
    heads, width = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    vision = tiny.inputs["input_ids"][0] == tiny.model.config.image_token_id
    kept_vision = int((cache.kept_masks()[0][0] & vision).sum())
    entries, lazy = min(budget, len(vision)) * heads, 3
    keys = entries + (lazy * (entries - kept_vision) if mode == "visual" else 0)
    wanted = 4 * width * (keys + (1 + lazy) * entries)
    prefixes = [x.prefix for x in cache.layers if x.prefix is not None]
    held = sum(x.keys.nbytes + x.values.nbytes for x in [*cache.layers, *prefixes])
    held += sum(x._text.keys.nbytes for x in cache.layers[1:] if mode == "visual")
    assert held == wanted
    slots = 8 * (heads + 1) + 4 * entries
    text_slots = 8 * (heads + 1) + 4 * (entries - kept_vision) if mode == "visual" else 0
    vision_flags = len(vision) if mode == "visual" else 0
    assert cache.bytes_held <= wanted + 4 * slots + lazy * text_slots + vision_flags


@MODES
def test_a_budget_in_bytes_counts_what_lazy_layers_store(kit, mode):
    tiny = kit.vlm("llava")
    budget = Budget(bytes=40_000)
    with compress(tiny.model, stages_of(tiny.model, mode, "snapkv(window=8)"), budget) as session:
        kit.decode(tiny.model, tiny.inputs, 1)
    shared = session.last
    with compress(tiny.model, "snapkv(window=8)", budget) as session:
        kit.decode(tiny.model, tiny.inputs, 1)
    assert shared.bytes_held < 40_000 * 1.05
    kept = [int(x.kept_masks()[0].sum()) for x in (shared, session.last)]
    assert kept[0] > kept[1] if mode == "global" else kept[0] == kept[1]


def test_every_answer_token_with_lazy_layers(kit):
    tiny = kit.vlm("llava", dtype=F64)
    model, inputs = tiny.model, tiny.inputs
    for mode in ("visual", "global"):
        stages = stages_of(model, mode, kit.PIPELINE)
        with compress(model, stages, 25) as session, torch.no_grad():
            cache = session.cache(**inputs)
            model(**inputs, past_key_values=cache)
            keep, ids = cache.kept_masks(), inputs["input_ids"]
            cache.crop(-1)
            again = model(input_ids=ids[:, -1:], attention_mask=inputs["attention_mask"], past_key_values=cache)
        with kit.sharing(model, stages.share, inputs, [Round(keep, ids.shape[1] - 1)]), torch.no_grad():
            wanted = model(**inputs)
        assert kit.difference(again.logits[:, -1], wanted.logits[:, -1]) < EXACT


def test_what_does_not_go_together_is_refused(kit):
    tiny = kit.vlm("llava")
    with pytest.raises(ValueError, match=r"nothing in 'adsc.*' evicts"):
        compress(tiny.model, "adsc(layers=[1])", 40)
    with pytest.raises(ValueError, match="the plan was made for 32 layers"):
        compress(tiny.model, "lazy(preset=llava-1.5-7b) | snapkv", 40)
    with pytest.raises(ValueError, match="last layer is 3"):
        compress(tiny.model, "adsc | snapkv", 40)
    with pytest.raises(ValueError, match="did you mean"):
        compress(tiny.model, "adsk | snapkv", 40)


def test_the_model_is_as_before(kit):
    tiny = kit.vlm("llava")
    model = tiny.model
    kit.decode(model, tiny.inputs, 1)  # transformers leaves hooks of its own behind
    before = kit.state(model)
    stages = stages_of(model, "visual", kit.PIPELINE, ADSC(layers=(2,), stride=2))
    for ids in (tiny.inputs["input_ids"], tiny.inputs["input_ids"][:, :5]):  # the second one has too few image tokens
        try:
            with compress(model, stages, 30) as session:
                model.generate(**tiny.inputs | {"input_ids": ids}, max_new_tokens=2)
            assert str(stages) in str(session.report())
        except (ValueError, RuntimeError):
            assert ids.shape[1] == 5
        assert kit.state(model) == before


@MODES
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices"])
def test_rows_change_places(kit, how, mode):
    """With what is known of their vision tokens: one of them has no image."""
    tiny = kit.vlm("llava", batch=2, dtype=F64)
    model, inputs = tiny.model, kit.without_image(tiny.inputs, row=1)
    swap, step = torch.tensor([1, 0]), kit.words(2, 5)
    logits = []
    for is_swapped in (False, True):
        with compress(model, stages_of(model, mode, kit.PIPELINE), 25) as session, torch.no_grad():
            cache = session.cache(**inputs)
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            model(**inputs, position_ids=positions, past_key_values=cache)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
            if is_swapped:
                getattr(cache, how)(swap)
            order = swap if is_swapped else torch.arange(2)
            cache.expect(mask.shape[1])
            more = {"position_ids": ((mask.cumsum(1) - 1)[:, -5:])[order], "attention_mask": mask[order]}
            model(input_ids=step[order], past_key_values=cache, **more)
            last = {"position_ids": mask.sum(1, keepdim=True)[order]}
            longer = torch.nn.functional.pad(mask, (0, 1), value=1)[order]
            out = model(input_ids=step[order, :1], attention_mask=longer, past_key_values=cache, **last)
            logits.append(out.logits[order])
    assert kit.difference(*logits) < EXACT


@pytest.mark.parametrize(
    ("text", "budget"),
    [("lazy", 25), ("lazy", 4096), ("adsc", 25), ("adsc", 4096), ("adsc and lazy", 25)],
)
@MODES
def test_a_copied_cache_goes_on_alone(kit, text, budget, mode):
    tiny = kit.vlm("llava", dtype=F64)
    model, inputs = tiny.model, tiny.inputs
    stages = Stages(
        prune=ADSC(layers=(1, 3), stride=2) if "adsc" in text else None,
        share=stages_of(model, mode, kit.PIPELINE, blocks=((1, 2),)).share if "lazy" in text else None,
        evict=Pipeline.parse(kit.PIPELINE),
    )
    with compress(model, stages, budget) as session:
        first = kit.decode(model, inputs, 4)
        cache = session.last
        turn = kit.conversation(inputs, first.tokens, kit.words(1, 9))
        twin = copy.deepcopy(cache)
        held, copied = ({t.data_ptr() for t in x.tensors() if t.numel()} for x in (cache, twin))
        assert not held & copied
        whole = kit.decode(model, turn, past_key_values=cache)
        kept = cache.kept_masks()
        session.last = cache = None
        alone = kit.decode(model, turn, past_key_values=twin)
    assert torch.equal(whole.logits, alone.logits)
    assert all(torch.equal(mask, kept[layer]) for layer, mask in twin.kept_masks().items())


@pytest.mark.parametrize("method", [METHODS[1], METHODS[3]], ids=lambda method: type(method).__name__)
def test_drafts_have_no_say_in_what_is_pruned_and_evicted(kit, method):
    tiny = kit.vlm("llava", dtype=F64)
    ids = tiny.inputs["input_ids"].clone()
    ids[0, -4:] = ids[0, -20:-16]
    inputs = tiny.inputs | {"input_ids": ids}
    with compress(tiny.model, Stages(prune=method, evict=Pipeline.parse(kit.PIPELINE)), 40) as session:
        found = tiny.model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=3)
        kept = session.last.kept_masks()
        assert torch.equal(found, tiny.model.generate(**inputs, max_new_tokens=8, do_sample=False))
        assert all(torch.equal(mask, kept[layer]) for layer, mask in session.last.kept_masks().items())


@MODES
def test_a_prompt_in_parts_is_refused_before_anything_runs(kit, mode):
    tiny = kit.vlm("llava")
    model, inputs, ids = tiny.model, tiny.inputs, tiny.inputs["input_ids"]
    for stages in (stages_of(model, mode, kit.PIPELINE, METHODS[0], ((1, 2),)), "fastv | " + kit.PIPELINE):
        with compress(model, stages, 30) as session, torch.no_grad():
            with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
                model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=60)
            first = inputs | {"input_ids": ids[:, :60], "attention_mask": torch.ones_like(ids[:, :60])}
            with pytest.raises(ValueError, match="read at once"):
                model(**first, past_key_values=session.cache(**inputs))

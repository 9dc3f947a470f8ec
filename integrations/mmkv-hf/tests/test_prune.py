"""Pruned layers against a dense model that forbids the dropped columns from that layer on."""

import copy
from dataclasses import replace

import pytest
import torch
from mmkv_hf import prune, share
from mmkv_hf.survivors import Held, numbering
from mmkv_layershare import LazyPlan
from mmkv_prune import ADSC, FastV, PyramidDrop, RandomDrop, SparseVLM, UniformDrop
from mmkv_testkit.families import PLAIN, build, pad, unpadded
from mmkv_testkit.oracle import attending, dense_attention, visible_to
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import pad as widen
from transformers import DynamicCache

F64 = torch.float64
EXACT = 1e-9
MATTERS = 1e-2
METHODS = [
    ADSC(layers=(1, 3), stride=2),
    FastV(layer=2, keep=0.5),
    PyramidDrop(layers=(1, 2, 3), keep=(0.6, 0.4, 0.2)),
    SparseVLM(layers=(1, 3), keep=(0.6, 0.3)),
    UniformDrop(layers=(2,), keep=(0.5,)),
    RandomDrop(layers=(1, 2), keep=(0.5, 0.25)),
]


def masked(kit, model, alive):
    """A context: layers may see of the prompt only `alive` [layer] [B, N]."""

    def attend(layer, query, key, value, mask, scaling, softcap):
        columns = key.shape[2]
        visible = visible_to(torch.arange(columns - query.shape[2], columns), columns, mask)
        if layer in alive:
            visible = visible & kit.wide(alive[layer], len(query), columns, value=True)[:, None, None]
        return dense_attention(query, key, value, visible, scaling, softcap)

    return attending(model, attend)


def alive_of(session):
    """Layer -> [B, N] bool, what it held."""
    return {
        layer: torch.zeros(len(held.columns), held.length, dtype=torch.bool).scatter(1, held.columns, held.real)
        for layer, held in session.held.items()
    }


def both(kit, model, inputs, method, tokens=5, **settings):
    with prune(model, method) as session:
        found = kit.decode(model, inputs, tokens, **settings)
        alive = alive_of(session)
    with masked(kit, model, alive):
        wanted = kit.decode(model, inputs, found.tokens, past_key_values=DynamicCache())  # no layer slides in it
    return found, wanted, alive


@pytest.mark.parametrize("family", PLAIN)
def test_a_pruned_model_equals_the_masked_one(kit, family):
    tiny = kit.vlm(family, dtype=F64)
    found, wanted, alive = both(kit, tiny.model, tiny.inputs, ADSC(layers=(1, 3), stride=2))
    assert kit.difference(found.logits, wanted.logits) < EXACT
    stock = kit.decode(tiny.model, tiny.inputs, found.tokens)
    assert kit.difference(stock.logits, wanted.logits) > 1e-4
    assert not alive[1].all()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_methods_equal_the_masked_model_in_padded_batches(kit, family, method):
    model, inputs = kit.padded(family, dtype=F64)
    found, wanted, alive = both(kit, model, inputs, method)
    assert kit.difference(found.logits, wanted.logits) < EXACT
    vision = inputs["input_ids"] == model.config.image_token_id
    for layer in method.layers:
        dropped = inputs["attention_mask"].bool() & ~alive[layer]
        assert dropped.any()
        assert not (dropped & ~vision).any()


@pytest.mark.parametrize("family", PLAIN)
def test_looking_ahead_works_without_a_mask(kit, family):
    """Whose attention layers need to be told that there is none."""
    tiny = kit.vlm(family, dtype=F64)
    found, wanted, _ = both(kit, tiny.model, tiny.inputs, PyramidDrop(layers=(1,), keep=(0.5,)))
    assert kit.difference(found.logits, wanted.logits) < EXACT


SLIDING = [("gemma3", {}), ("paligemma2", {}), ("mistral3", {"sliding_window": 24})]


def sliding(kit, family, **settings):
    """Many images near the end of the prompt, so that a window of 24 tokens reaches over dropped ones."""
    text = (0, 12) if family == "paligemma2" else (30, 6)
    tiny = kit.vlm(family, batch=2, dtype=F64, images=2 if family == "mistral3" else 4, text=text, **settings)
    assert tiny.text_config.sliding_window == 24
    return tiny.model, tiny.inputs


@pytest.mark.parametrize("left", [(0, 0), (5, 0)])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize(("family", "settings"), SLIDING, ids=lambda x: x if isinstance(x, str) else "")
def test_layers_that_slide_equal_the_masked_model(kit, family, settings, method, left):
    model, inputs = sliding(kit, family, **settings)
    found, wanted, alive = both(kit, model, pad(inputs, left=left), method, tokens=12)
    assert kit.difference(found.logits, wanted.logits) < EXACT
    assert not alive[method.layers[-1]].all()


@pytest.mark.parametrize(("family", "settings"), SLIDING, ids=lambda x: x if isinstance(x, str) else "")
def test_layers_that_slide_hold_the_last_that_came_so_far(kit, family, settings):
    model, inputs = sliding(kit, family, **settings)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with prune(model, METHODS[0]) as session:
        found = kit.decode(model, inputs, 3, past_key_values=cache)
        first = alive_of(session)
        turn = kit.conversation(inputs, found.tokens, kit.words(2, 5))
        turn["attention_mask"][0, -5:-3] = 0  # what this row says is shorter
        second = kit.decode(model, turn, 3, past_key_values=cache)
    for index, layer in enumerate(cache.layers):
        came = cache.get_seq_length() - (0 if index not in first else int((~first[index][0]).sum()))
        assert layer.keys.shape[2] == (min(came, 23) if layer.is_sliding else came)
    with masked(kit, model, first):
        stock = DynamicCache()
        kit.decode(model, inputs, found.tokens, past_key_values=stock)
        wanted = kit.decode(model, turn, second.tokens, past_key_values=stock)
    assert kit.difference(second.logits, wanted.logits) < EXACT


@torch.no_grad()
def segments(model, inputs, alive, tokens):
    """Logits [1, n, V] of a row without padding: each layer runs on what came so far, numbered from the row's first."""
    decoder, cache = model.get_decoder(), DynamicCache()
    hidden = merged(model, inputs)
    came = torch.arange(hidden.shape[1])
    logits = []
    for step in range(tokens.shape[1]):
        for index, layer in enumerate(decoder.layers):
            if step == 0 and index in alive:
                wanted = alive[index].nonzero()[:, 0]
                hidden, came = hidden[:, torch.isin(came, wanted)], wanted
            where = (model.config.model_type == "paligemma") + (cache.get_seq_length(index) if step else 0)
            ids = torch.arange(where, where + hidden.shape[1])[None]
            given = {"position_ids": ids, "position_embeddings": decoder.rotary_emb(hidden, ids)}
            prefix = model.config.model_type == "paligemma" and step == 0
            mask = torch.ones(1, 1, *[hidden.shape[1]] * 2, dtype=torch.bool) if prefix else None
            hidden = layer(hidden, attention_mask=mask, past_key_values=cache, **given)
        logits.append(model.get_output_embeddings()(decoder.norm(hidden)[:, -1]))
        hidden = model.get_input_embeddings()(tokens[:, step : step + 1])
    return torch.stack(logits, 1)


def merged(model, inputs):
    """Embeddings [1, N, D] that enter the language model, scaled where it scales them."""
    seen = []
    hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    hook.remove()
    return seen[0]


NUMBERED = [
    ADSC(layers=(1, 3), stride=2, positions="reindex"),
    PyramidDrop(layers=(1, 2, 3), keep=(0.6, 0.4, 0.2), positions="reindex"),
    SparseVLM(layers=(1, 3), keep=(0.6, 0.3), positions="reindex"),
]
IN_ORDER = ["llava", "llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm", "paligemma", "mistral3"]


@pytest.mark.parametrize("family", IN_ORDER)
@pytest.mark.parametrize("method", NUMBERED, ids=lambda method: type(method).__name__)
def test_survivors_numbered_anew_equal_a_run_per_segment(kit, family, method):
    tiny = kit.vlm(family, batch=2, dtype=F64)
    inputs = pad(tiny.inputs, left=[9, 0])
    with prune(tiny.model, method) as session:
        found = kit.decode(tiny.model, inputs, 5)
        alive = alive_of(session)
        kept = replace(method, positions="keep")
    with prune(tiny.model, kept):
        other = kit.decode(tiny.model, inputs, found.tokens)
    assert kit.difference(found.logits, other.logits) > MATTERS
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        mine = {layer: x[row, real] for layer, x in alive.items()}
        wanted = segments(tiny.model, unpadded(inputs, row), mine, found.tokens[row : row + 1])
        assert kit.difference(found.logits[row : row + 1], wanted) < EXACT


@pytest.mark.parametrize("padding", [0, 9])
def test_a_second_turn_of_survivors_numbered_anew(kit, padding):
    tiny = kit.vlm("llava", dtype=F64)
    inputs = pad(tiny.inputs, left=[padding])
    with prune(tiny.model, NUMBERED[0]) as session:
        cache = DynamicCache()
        first = kit.decode(tiny.model, inputs, 3, past_key_values=cache)
        alive = {layer: x[0, padding:] for layer, x in alive_of(session).items()}
        turn = kit.conversation(inputs, first.tokens, kit.words(1, 5))
        second = kit.decode(tiny.model, turn, 3, past_key_values=cache)
    said = torch.cat([first.tokens, turn["input_ids"][:, -5:], second.tokens], 1)
    wanted = segments(tiny.model, unpadded(inputs, 0), alive, said)
    assert kit.difference(second.logits, wanted[:, -3:]) < EXACT


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, method) for family in ("llava", "qwen2_vl") for method in METHODS), ("llava", NUMBERED[0])],
    ids=lambda x: x if isinstance(x, str) else f"{type(x).__name__}-{x.positions}",
)
def test_drafts_that_come_with_the_prompt_have_no_say_and_are_taken_back(kit, family, method):
    """Prompt lookup proposes tokens before the prompt has been read."""
    tiny = kit.vlm(family, dtype=F64)
    inputs = pad(tiny.inputs, left=[5])
    inputs["input_ids"][0, -4:] = inputs["input_ids"][0, -20:-16]
    lengths = []
    hook = tiny.model.get_decoder().register_forward_pre_hook(
        lambda m, a, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with prune(tiny.model, method):
        found = tiny.model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=3)
        hook.remove()
        assert lengths[0] > inputs["input_ids"].shape[1]
        assert torch.equal(found, tiny.model.generate(**inputs, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], NUMBERED[0]], ids=["ADSC", "FastV", "reindex"])
def test_a_row_of_text_stays_whole_beside_a_row_with_an_image(kit, method):
    tiny = kit.vlm("llava", dtype=F64)
    ids, text = tiny.inputs["input_ids"], kit.words(1, tiny.inputs["input_ids"].shape[1])
    both = {**tiny.inputs, "input_ids": torch.cat([text, ids]), "attention_mask": torch.ones(2, ids.shape[1])}
    with prune(tiny.model, method):
        found = kit.decode(tiny.model, both)
        wanted = kit.decode(tiny.model, tiny.inputs, found.tokens[1:])
        with torch.no_grad():
            whole, pruned = tiny.model(**both).logits, tiny.model(**tiny.inputs).logits
    alone = kit.decode(tiny.model, {"input_ids": text}, found.tokens[:1])
    assert kit.difference(found.logits, torch.cat([alone.logits, wanted.logits])) < EXACT
    with torch.no_grad():
        plain = tiny.model(input_ids=text).logits
    assert kit.difference(whole, torch.cat([plain, pruned])) < EXACT


def test_a_row_is_numbered_from_its_first_token_on():
    """Whatever position padding has been given."""
    held = Held(torch.tensor([[2, 4], [1, 4]]), torch.tensor([[True, True], [False, True]]), 5)
    ids, valid = torch.tensor([[7, 7, 3, 4, 5]]), torch.tensor([[False, False, True, True, True]])
    first, held = numbering(held, ids, valid.expand(2, -1))
    assert first.tolist() == [[3], [3]]
    assert held.moved.tolist() == [1, 2]


@pytest.mark.parametrize("method", METHODS[1:4], ids=lambda method: type(method).__name__)
def test_a_row_keeps_what_it_keeps_alone(kit, method):
    tiny = kit.vlm("llava", batch=2, dtype=F64)
    with prune(tiny.model, method) as session:
        kit.decode(tiny.model, tiny.inputs, 1)
        together = alive_of(session)
        for row in range(2):
            alone = {name: x[row : row + 1] for name, x in tiny.inputs.items()}
            kit.decode(tiny.model, alone, 1)
            for layer, alive in alive_of(session).items():
                assert torch.equal(alive, together[layer][row : row + 1])


def test_fastv_keeps_what_the_last_row_of_the_layer_before_attends_to_most(kit):
    tiny = kit.vlm("llava")
    model, inputs = tiny.model, tiny.inputs
    with prune(model, FastV(layer=2, keep=0.5)) as session:
        kit.decode(model, inputs, 1)
        alive = alive_of(session)[2][0]
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = model(**inputs, output_attentions=True).attentions[1][0, :, -1].mean(0)
    finally:
        model.set_attn_implementation("sdpa")
    vision = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    best = vision[weights[vision].argsort(descending=True)[: round(len(vision) * 0.5)]]
    assert sorted(best.tolist()) == [column for column in vision.tolist() if alive[column]]


def test_pyramiddrop_looks_at_the_layer_about_to_come(kit):
    """Its queries and keys over what enters it, from the stock model's own hidden states."""
    tiny = kit.vlm("llava")
    model, inputs = tiny.model, tiny.inputs
    with prune(model, PyramidDrop(layers=(2,), keep=(0.5,))) as session:
        kit.decode(model, inputs, 1)
        alive = alive_of(session)[2][0]
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = model(**inputs, output_attentions=True).attentions[2][0, :, -1].mean(0)
    finally:
        model.set_attn_implementation("sdpa")
    vision = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    best = vision[weights[vision].argsort(descending=True)[: int(len(vision) * 0.5)]]
    assert sorted(best.tolist()) == [column for column in vision.tolist() if alive[column]]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
    ],
)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_generate_modes_give_the_masked_model_s_tokens(kit, family, settings):
    tiny = kit.vlm(family, dtype=F64, images=4, text=(30, 6))
    model = tiny.model

    def generated(**cache):
        torch.manual_seed(0)
        return model.generate(**tiny.inputs, max_new_tokens=6, **settings, **cache).tolist()

    with prune(model, METHODS[0]) as session:
        found = kit.stock_or_skip(generated)
        alive = {layer: x[:1] for layer, x in alive_of(session).items()}
    with masked(kit, model, alive):
        assert generated(past_key_values=DynamicCache()) == found


def test_samples_of_survivors_numbered_anew_are_the_greedy_ones(kit):
    tiny = kit.vlm("llava", batch=2, dtype=F64)
    inputs = pad(tiny.inputs, left=[9, 0])
    with prune(tiny.model, NUMBERED[1]):
        greedy = tiny.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        sampled = tiny.model.generate(**inputs, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(sampled, greedy.repeat_interleave(2, 0))


def test_a_row_without_an_image_beside_one_that_is_pruned(kit):
    tiny = kit.vlm("llava", batch=2, dtype=F64)
    for row in (0, 1):
        inputs = kit.without_image(tiny.inputs, row)
        found, wanted, alive = both(kit, tiny.model, inputs, METHODS[-1])
        assert kit.difference(found.logits, wanted.logits) < EXACT
        assert alive[1].all(1).tolist() == [row == 0, row == 1]


def test_layers_hold_exactly_what_is_left(kit):
    tiny = kit.vlm("llava")
    vision = int((tiny.inputs["input_ids"] == tiny.model.config.image_token_id).sum())
    length = tiny.inputs["input_ids"].shape[1]
    cache = DynamicCache(config=tiny.text_config)
    with prune(tiny.model, ADSC(layers=(1, 3), stride=2)), torch.no_grad():
        tiny.model(**tiny.inputs, past_key_values=cache)
    half = (vision + 1) // 2
    left = [vision, half, half, (half + 1) // 2]
    assert [layer.keys.shape[2] for layer in cache.layers] == [length - vision + n for n in left]


def test_losses_and_gradients_go_through(kit):
    tiny = kit.vlm("llava")
    labels = tiny.inputs["input_ids"].masked_fill(tiny.inputs["input_ids"] == tiny.model.config.image_token_id, -100)
    with prune(tiny.model, ADSC(layers=(1,), stride=2)):
        out = tiny.model(**tiny.inputs, labels=labels, use_cache=False)
        grad = torch.autograd.grad(out.loss, tiny.model.get_decoder().layers[0].self_attn.q_proj.weight)[0]
    assert out.logits.shape[1] == labels.shape[1]
    assert grad.abs().max() > 0


def test_a_second_turn_goes_on(kit):
    tiny = kit.vlm("llava", dtype=F64)
    with prune(tiny.model, METHODS[0]) as session:
        cache = DynamicCache(config=tiny.text_config)
        first = kit.decode(tiny.model, tiny.inputs, 3, past_key_values=cache)
        alive = alive_of(session)
        turn = kit.conversation(tiny.inputs, first.tokens, kit.words(1, 5))
        second = kit.decode(tiny.model, turn, 3, past_key_values=cache)
    with masked(kit, tiny.model, alive):
        stock = DynamicCache(config=tiny.text_config)
        kit.decode(tiny.model, tiny.inputs, first.tokens, past_key_values=stock)
        wanted = kit.decode(tiny.model, turn, second.tokens, past_key_values=stock)
    assert kit.difference(second.logits, wanted.logits) < EXACT


def test_text_alone_passes_untouched(kit):
    tiny = kit.vlm("llava")
    ids = kit.words(2, 20)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with prune(tiny.model, METHODS[1]):
        found = kit.decode(tiny.model, inputs)
    assert torch.equal(found.logits, kit.decode(tiny.model, inputs).logits)


@pytest.mark.parametrize(
    ("family", "method", "message"),
    [
        ("llava", ADSC(layers=(4,)), "last layer is 3"),
        ("gemma4", ADSC(layers=(1,)), "does not attend to the tokens before it"),
        ("qwen3_5", ADSC(layers=(1,)), "does not attend to the tokens before it"),
        ("mllama", ADSC(layers=(1,)), "does not attend to the tokens before it"),
        ("qwen2_vl", ADSC(layers=(1,), positions="reindex"), "M-RoPE"),
        ("glm4v", ADSC(layers=(1,), positions="reindex"), "M-RoPE"),
        ("gemma3", ADSC(layers=(1,), positions="reindex"), "no one rotary embedding"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_anything_runs(kit, family, method, message):
    with pytest.raises(ValueError, match=message):
        prune(kit.vlm(family).model, method)


def test_flex_attention_makes_no_difference(kit):
    """A model set to it gets other attention inside a session, whose masks can be cut, and it back afterwards."""
    tiny = kit.vlm("llava", batch=2)
    inputs, found = pad(tiny.inputs, left=[9, 0]), {}
    for attention in ("flex_attention", "sdpa"):
        tiny.model.set_attn_implementation({"text_config": attention})
        with prune(tiny.model, FastV(layer=1)):
            found[attention] = kit.decode(tiny.model, inputs)
        assert tiny.model.config.text_config._attn_implementation == attention
    assert torch.equal(found["flex_attention"].logits, found["sdpa"].logits)


def test_what_cannot_work_is_refused_and_the_model_is_as_before(kit):
    tiny = kit.vlm("llava")
    model = tiny.model
    kit.decode(model, tiny.inputs, 1)  # transformers leaves hooks of its own behind
    before = kit.state(model)
    method = ADSC(layers=(1,), stride=2)
    with prune(model, method):
        with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
            model.generate(**tiny.inputs, max_new_tokens=2, prefill_chunk_size=16)
        with share(model, LazyPlan(4, ((1, 2),))), pytest.raises(ValueError, match="evicts nothing"):
            model.generate(**tiny.inputs, max_new_tokens=2)
        embeds = model.get_input_embeddings()(tiny.inputs["input_ids"])
        with pytest.raises(ValueError, match="pass input_ids, or mm_token_type_ids"):
            model(inputs_embeds=embeds)
        count = embeds.shape[1]
        flex = create_block_mask(lambda b, h, q, k: q >= k, 1, None, count, count, device="cpu")
        for mask, name in ((flex, "a BlockMask"), (torch.ones(1, 1, count, count).bool(), r"\[1, 1, 88, 88\]")):
            with pytest.raises(ValueError, match=rf"reads an attention mask \[B, N\], not {name}"):
                model(**tiny.inputs | {"attention_mask": mask})
    assert kit.state(model) == before


def test_a_copied_cache_goes_on_alone(kit):
    tiny = kit.vlm("llava", dtype=F64)
    with prune(tiny.model, METHODS[0]):
        cache = DynamicCache(config=tiny.text_config)
        first = kit.decode(tiny.model, tiny.inputs, 3, past_key_values=cache)
        twin = copy.deepcopy(cache)
        turn = kit.conversation(tiny.inputs, first.tokens, kit.words(1, 5))
        whole = kit.decode(tiny.model, turn, 3, past_key_values=cache)
        del cache
        alone = kit.decode(tiny.model, turn, 3, past_key_values=twin)
    assert torch.equal(whole.logits, alone.logits)


def test_a_cache_that_was_emptied_knows_nothing_of_before(kit):
    """Prompts of text alone, read into a cache that held pruned ones."""
    tiny = kit.vlm("llava", batch=2, dtype=F64)
    ids = kit.words(2, 40)
    text = pad({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, left=[9, 0])
    with prune(tiny.model, METHODS[0]):
        cache = DynamicCache(config=tiny.text_config)
        kit.decode(tiny.model, tiny.inputs, 3, past_key_values=cache)
        cache.crop(-cache.get_seq_length())
        found = kit.decode(tiny.model, text, 3, past_key_values=cache)
    assert kit.difference(found.logits, kit.decode(tiny.model, text, found.tokens).logits) < EXACT


@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], METHODS[2]], ids=lambda m: type(m).__name__)
def test_without_a_cache_the_prompt_is_pruned_as_with_one(kit, method):
    tiny = kit.vlm("llava", dtype=F64)
    with prune(tiny.model, method):
        found = kit.decode(tiny.model, tiny.inputs, 5)
        again = kit.decode(tiny.model, tiny.inputs, found.tokens, use_cache=False)
    assert kit.difference(found.logits, again.logits) < EXACT


@pytest.mark.parametrize("layout", ["raster", "grid2d", "quincunx"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_generation_knows_the_grids_that_a_forward_pass_knows(kit, family, layout):
    """Two images side by side, without text between them: only their grids say that they are two."""
    tiny = kit.vlm(family, batch=1, images=2, dtype=F64)
    method = ADSC(layers=(1,), stride=4, layout=layout)
    inputs = side_by_side(tiny) if family == "llava" else tiny.inputs
    found, wanted, alive = both(kit, tiny.model, inputs, method)
    assert kit.difference(found.logits, wanted.logits) < EXACT
    with prune(tiny.model, method) as session, torch.no_grad():
        tiny.model(**inputs, use_cache=False)
    assert torch.equal(alive_of(session)[1], alive[1])


def side_by_side(tiny):
    """Inputs without what stands between two images."""
    ids = tiny.inputs["input_ids"]
    places = (ids[0] == tiny.image_token_id).nonzero()[:, 0]
    inside = torch.arange(ids.shape[1])
    keep = (inside < places[0]) | (inside > places[-1]) | (ids[0] == tiny.image_token_id)
    ids = ids[:, keep]
    return tiny.inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_rows_of_a_pruned_cache_can_be_chosen_repeated_and_reordered(kit):
    """Against the rows left where they were; they are padded differently, so that what was pruned differs."""
    tiny = kit.vlm("llava", batch=2, dtype=F64)
    inputs = pad(tiny.inputs, left=[7, 0])
    mask = widen(inputs["attention_mask"], (0, 1), value=1)
    new, last = kit.words(2, 1), {"position_ids": (mask.sum(1, keepdim=True) - 1)}

    def step(cache, rows):
        given = {"input_ids": new[rows], "attention_mask": mask[rows], "position_ids": last["position_ids"][rows]}
        return tiny.model(**given, past_key_values=cache).logits

    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for method in (FastV(layer=1, keep=0.4), ADSC(layers=(1,), stride=3, positions="reindex")):
        with prune(tiny.model, method), torch.no_grad():
            cache = DynamicCache(config=tiny.text_config)
            tiny.model(**inputs, position_ids=positions, past_key_values=cache)
            copies = [copy.deepcopy(cache) for _ in range(3)]
            wanted = step(cache, torch.arange(2))
            copies[0].reorder_cache(torch.tensor([1, 0]))
            copies[1].batch_select_indices(torch.tensor([1]))
            copies[2].batch_repeat_interleave(2)
            for held, rows in zip(copies, ([1, 0], [1], [0, 0, 1, 1]), strict=True):
                assert kit.difference(step(held, torch.tensor(rows)), wanted[rows]) < EXACT


def test_the_model_below_the_head_is_pruned_too(kit):
    tiny = kit.vlm("llava", dtype=F64)
    with prune(tiny.model, METHODS[0]), torch.no_grad():
        found = tiny.model.model(**tiny.inputs).last_hidden_state
        wanted = tiny.model(**tiny.inputs, output_hidden_states=True).hidden_states[-1]
        with pytest.raises(RuntimeError, match="not its decoder"):
            tiny.model.get_decoder()(input_ids=kit.words(1, 5))
        with pytest.raises(ValueError, match="unpack"):  # and after a pass that failed
            tiny.model(**tiny.inputs | {"pixel_values": torch.zeros(1, 2)})
        with pytest.raises(RuntimeError, match="not its decoder"):
            tiny.model.get_decoder()(input_ids=kit.words(1, 5))
    assert kit.difference(found[:, -1], wanted[:, -1]) < EXACT


def test_a_placeholder_that_the_model_says_is_a_word(kit):
    tiny = kit.vlm("llava", dtype=F64)
    tokens = kit.words(1, 5)
    tokens[0, 2] = tiny.image_token_id
    found, wanted, _ = both(kit, tiny.model, tiny.inputs, METHODS[1], tokens)
    assert kit.difference(found.logits, wanted.logits) < EXACT


def test_embeddings_beside_what_they_are(kit):
    """LLaVA takes no mm_token_type_ids; the session does."""
    for family in ("llava", "qwen2_vl"):
        tiny = kit.vlm(family, dtype=F64)
        ids = tiny.inputs["input_ids"]
        kinds = (ids == tiny.image_token_id).long()
        with torch.no_grad():
            embeds = tiny.model.get_input_embeddings()(ids)
        given = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
        if family == "qwen2_vl":
            given["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)
        with prune(tiny.model, METHODS[1]) as session, torch.no_grad():
            tiny.model(**given)
            wanted = alive_of(session)
            if family == "llava":
                kit.decode(tiny.model, given, 2)
                assert all(torch.equal(x, wanted[layer]) for layer, x in alive_of(session).items())
        assert not wanted[2].all()


@pytest.mark.parametrize("size", [16, 40, 80])
def test_images_read_in_chunks_are_refused_and_text_is_not(kit, size):
    tiny = kit.vlm("llava")
    text = {"input_ids": kit.words(1, 60)}
    calls = []
    hook = tiny.model.model.register_forward_pre_hook(lambda *a: calls.append(1))
    with prune(tiny.model, METHODS[1]):
        with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
            tiny.model.generate(**tiny.inputs, max_new_tokens=2, prefill_chunk_size=size)
        assert not calls
        found = tiny.model.generate(**text, max_new_tokens=2, do_sample=False, prefill_chunk_size=size)
    hook.remove()
    assert torch.equal(found, tiny.model.generate(**text, max_new_tokens=2, do_sample=False))


def test_layers_that_run_anew_in_the_backward_pass_are_refused():
    tiny = build("llava")
    model = tiny.model.train()
    model.gradient_checkpointing_enable()
    with prune(model, METHODS[0]), pytest.raises(RuntimeError, match="runs layers anew"):
        model(**tiny.inputs, labels=tiny.inputs["input_ids"])


def test_sessions_that_cannot_be_nested_leave_the_model_as_it_was(kit):
    tiny = kit.vlm("llava")
    model, plan = tiny.model, LazyPlan(4, ((1, 2),))
    kit.decode(model, tiny.inputs, 1)
    before = kit.state(model)
    session = prune(model, METHODS[0])
    with session:
        with pytest.raises(RuntimeError, match="open already"):
            session.__enter__()
        with pytest.raises(RuntimeError, match="pruned already"), prune(model, METHODS[1]):
            pass
    assert kit.state(model) == before
    shared = share(model, plan)
    with shared:
        with pytest.raises(RuntimeError, match="open already"):
            shared.__enter__()
        with pytest.raises(RuntimeError, match="share attention already"), share(model, plan):
            pass
    assert kit.state(model) == before
    inside = ADSC(layers=(2,), stride=2)
    for outer, inner in ((prune(model, inside), share(model, plan)), (share(model, plan), prune(model, inside))):
        with outer, inner, torch.no_grad(), pytest.raises(ValueError, match="let a block of the plan begin there"):
            model(**tiny.inputs, use_cache=False)
    assert kit.state(model) == before


def test_static_caches_are_refused(kit):
    tiny = kit.vlm("llava")
    with prune(tiny.model, METHODS[0]), pytest.raises(ValueError, match="leave cache_implementation out"):
        tiny.model.generate(**tiny.inputs, max_new_tokens=2, cache_implementation="static")

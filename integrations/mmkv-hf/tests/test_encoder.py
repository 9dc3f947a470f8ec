"""Fewer vision tokens before the language model, against prompts of embeddings and positions made by hand."""

import copy
import gc
import re
import weakref

import pytest
import torch
from mmkv_hf import compress, prune, reduce_images, share
from mmkv_hf.encoder import _slots
from mmkv_layershare import LazyPlan
from mmkv_prune import ADSC, KeepRandom, KeepUniform, PruMerge, PruMergePlus, Reduced, TowerEvidence, VisionZip
from mmkv_testkit.families import FAMILIES, pad
from transformers import DynamicCache, SiglipVisionConfig

F64 = torch.float64
EXACT = 1e-9
MATTERS = 1e-2
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
KNOWN = ["llava", "llava_next", "internvl", "idefics3", "smolvlm", "qwen2_vl"]
METHODS = [
    VisionZip(dominant=5, contextual=3),
    PruMerge(neighbours=4),
    PruMergePlus(neighbours=4),
    KeepUniform(0.4),
    KeepRandom(0.4),
]
IMAGE, VIDEO = 500, 501


def name_of(method):
    return type(method).__name__


def wanted_logits(kit, model, rows, tokens):
    return torch.cat([kit.dense(model, *row[:2], tokens[i : i + 1]) for i, row in enumerate(rows)])


def check(kit, model, inputs, method, tokens=5, **settings):
    """Generation in a session equals the prompts by hand; gives what it found, and them."""
    with reduce_images(model, method) as session:
        found = kit.decode(model, inputs, tokens, **settings)
    rows = kit.rows_by_hand(model, inputs, method)
    assert kit.difference(found.logits, wanted_logits(kit, model, rows, found.tokens)) < EXACT
    starts = (~inputs["attention_mask"].bool()).sum(1).tolist()
    held = [columns[real].tolist() for columns, real in zip(session.last.columns, session.last.real, strict=True)]
    assert held == [[start + i for i in row[2]] for start, row in zip(starts, rows, strict=True)]
    assert all(len(row[2]) < inputs["input_ids"].shape[1] - 4 for row in rows)
    return found, rows, session


# -- tests


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("family", KNOWN)
def test_a_padded_batch_of_two_images_equals_the_prompts_by_hand(kit, family, method):
    tiny = kit.vlm(family, batch=2, images=2, dtype=F64)
    inputs = pad(tiny.inputs, left=[9, 0])
    found, _, _ = check(kit, tiny.model, inputs, method)
    stock = kit.decode(tiny.model, inputs, found.tokens)
    assert kit.difference(stock.logits, found.logits) > MATTERS
    assert torch.equal(found.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_a_llava_whose_tower_has_no_cls_token(kit, method):
    tiny = kit.vlm("llava", batch=2, images=2, dtype=F64)
    config = copy.deepcopy(tiny.model.config)
    vision = {k: v for k, v in config.vision_config.to_dict().items() if k in SIZES}
    config.vision_config = SiglipVisionConfig(**vision, vision_use_head=False)
    config.vision_feature_select_strategy = "full"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(tiny.model)(config).to(F64).eval()
    model.load_state_dict({k: v for k, v in tiny.model.state_dict().items() if "vision_tower" not in k}, strict=False)
    model.generation_config = tiny.model.generation_config
    check(kit, model, pad(tiny.inputs, left=[9, 0]), method)


def test_rows_keep_different_counts(kit):
    """The batches above are ragged where the method looks at content."""
    tiny = kit.vlm("llava", batch=2, images=2, dtype=F64)
    _, rows, session = check(kit, tiny.model, pad(tiny.inputs, left=[9, 0]), PruMergePlus(4))
    assert not session.last.real.all()
    assert len({len(row[2]) for row in rows}) == 2


def test_padded_patches_are_not_looked_at(kit):
    """Idefics3 pads images; what a padded patch attends to does not count."""
    tiny = kit.vlm("idefics3", dtype=F64)
    mask = torch.ones(1, 1, 56, 56, dtype=torch.long)
    mask[..., 35:] = 0
    check(kit, tiny.model, {**tiny.inputs, "pixel_attention_mask": mask}, METHODS[0])


def test_tiles_beyond_the_picture_take_their_tokens_along(kit):
    tiny = kit.vlm("llava_next", dtype=F64)
    cut = (tiny.inputs["input_ids"][0] == IMAGE).nonzero()[:18, 0]  # two of eight rows, with their line ends
    stays = torch.ones(tiny.inputs["input_ids"].shape[1], dtype=torch.bool).scatter(0, cut, False)
    inputs = {**tiny.inputs, "image_sizes": torch.tensor([[84, 112]])}
    inputs |= {name: inputs[name][:, stays] for name in ("input_ids", "attention_mask")}
    check(kit, tiny.model, inputs, VisionZip(4, 2))


def test_frames_of_a_video_are_reduced_one_by_one(kit):
    tiny = kit.vlm("qwen2_vl", dtype=F64)
    inputs = {name: x for name, x in tiny.inputs.items() if name not in ("pixel_values", "image_grid_thw")}
    ids, kinds = tiny.inputs["input_ids"].clone(), tiny.inputs["mm_token_type_ids"] * 2
    ids[ids == IMAGE] = VIDEO
    inputs |= {"input_ids": ids, "mm_token_type_ids": kinds, "pixel_values_videos": tiny.inputs["pixel_values"]}
    check(kit, tiny.model, {**inputs, "video_grid_thw": torch.tensor([[2, 4, 12]])}, VisionZip(3, 2))


def test_columns_that_were_left_out_have_no_output(kit):
    """Nor have the fillers of rows that hold fewer."""
    model, inputs = kit.padded("llava", dtype=F64)
    model.set_attn_implementation({"text_config": "eager"})  # where a filler, which sees nothing, puts out something
    try:
        with reduce_images(model, PruMergePlus(4)) as session, torch.no_grad():
            logits = model(**inputs).logits
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})
    assert not session.last.real.all()
    for row, columns, real in zip(logits, session.last.columns, session.last.real, strict=True):
        gone = torch.ones(len(row), dtype=torch.bool).scatter(0, columns[real], False)
        assert not row[gone].any()
        assert row[~gone].any(-1).all()


def test_a_cache_may_be_repeated(kit):
    model, inputs = kit.padded("llava", dtype=F64)
    tokens, counted = kit.words(6, 2), inputs["attention_mask"].cumsum(1)
    with reduce_images(model, PruMergePlus(4)), torch.no_grad():
        cache = model(**inputs, position_ids=(counted - 1).clamp(min=0)).past_key_values
        cache.batch_repeat_interleave(3)
        after = counted[:, -1:].repeat_interleave(3, 0)
        found = model(input_ids=tokens[:, :1], past_key_values=cache, position_ids=after).logits
    rows = [row for row in kit.rows_by_hand(model, inputs, PruMergePlus(4)) for _ in range(3)]
    assert kit.difference(found, wanted_logits(kit, model, rows, tokens)[:, 1:]) < EXACT


def test_tokens_without_a_place_take_the_last_free_ones():
    source = torch.tensor([[-1, 1, -1, 4], [3, -1, -1, -1]])
    valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    slots = _slots(Reduced(torch.zeros(2, 4, 1), source, valid), real, by_place=True)
    assert slots.tolist() == [[3, 1, 5, 4], [3, 2, 6, 6]]


def test_the_cache_holds_what_is_left(kit):
    tiny = kit.vlm("llava")
    cache = DynamicCache(config=tiny.text_config)
    with reduce_images(tiny.model, METHODS[0]), torch.no_grad():
        out = tiny.model(**tiny.inputs, past_key_values=cache)
    length = tiny.inputs["input_ids"].shape[1]
    config, left = tiny.text_config, length - 16 + 8
    size = config.hidden_size // config.num_attention_heads
    assert [layer.keys.shape for layer in cache.layers] == [(1, config.num_key_value_heads, left, size)] * 4
    stored = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert sum(t.untyped_storage().nbytes() for t in stored) == 4 * 2 * config.num_key_value_heads * left * size * 4
    assert out.logits.shape[1] == length
    alive = weakref.ref(cache)
    gc.disable()
    try:
        del cache, out, stored
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("family", KNOWN)
def test_without_a_cache_every_column_that_stays_has_its_logits(kit, family):
    tiny = kit.vlm(family, dtype=F64)
    model = tiny.model
    inputs = {name: x for name, x in tiny.inputs.items() if name != "attention_mask"}
    embeds, where, stays = kit.rows_by_hand(model, tiny.inputs, METHODS[0])[0]
    if where.ndim == 3:  # as `generate` gives them: the first numbers the columns
        ids = tiny.inputs["input_ids"]
        positions = torch.tensor(kit.positions_of(model, ids[0].tolist(), tiny.inputs["image_grid_thw"])).T[:, None]
        inputs["position_ids"] = torch.cat([torch.arange(ids.shape[1]).expand(1, 1, -1), positions])
    with reduce_images(model, METHODS[0]), torch.no_grad():
        found = model(**inputs, use_cache=False).logits
    with torch.no_grad():
        hidden = model.get_decoder()(inputs_embeds=embeds, position_ids=where, use_cache=False).last_hidden_state
        wanted = model.get_output_embeddings()(hidden)
    assert kit.difference(found[:, stays], wanted) < EXACT
    gone = torch.ones(found.shape[1], dtype=torch.bool).scatter(0, torch.tensor(stays), False)
    assert gone.any()
    assert not found[:, gone].any()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
    ],
)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_generate_modes_give_the_tokens_of_the_prompt_by_hand(kit, family, settings):
    tiny = kit.vlm(family, dtype=F64, images=2)
    model = tiny.model
    embeds, where, _ = kit.rows_by_hand(model, tiny.inputs, METHODS[0])[0]
    by_hand = {"inputs_embeds": embeds, "position_ids": where}
    if where.ndim == 3:
        by_hand["position_ids"] = torch.cat([torch.arange(embeds.shape[1]).expand(1, 1, -1), where])

    def repeats_rows():
        greedy = model.generate(**tiny.inputs, max_new_tokens=2, do_sample=False)
        repeated = model.generate(**tiny.inputs, max_new_tokens=2, do_sample=True, top_k=1, num_return_sequences=2)
        assert torch.equal(repeated, greedy.repeat_interleave(2, 0)), "rows of several images are repeated wrongly"

    def generated(inputs, **settings):
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=6, **settings)[:, -6:].tolist()

    if "num_return_sequences" in settings:
        kit.stock_or_skip(repeats_rows)
    with reduce_images(model, METHODS[0]):
        found = generated(tiny.inputs, **settings)
    if "prompt_lookup_num_tokens" in settings:  # gives the greedy tokens, and needs the prompt's to look up
        settings = {"do_sample": False}
    assert found == generated(by_hand, **settings)


def test_drafts_that_come_with_the_prompt_are_taken_back(kit):
    """Prompt lookup proposes tokens before the prompt has been read."""
    tiny = kit.vlm("llava", dtype=F64, batch=2)
    inputs = pad({name: x[:1] for name, x in tiny.inputs.items()}, left=[5])
    inputs["input_ids"][0, -4:] = inputs["input_ids"][0, -14:-10]
    with reduce_images(tiny.model, METHODS[0]) as session:
        cache = DynamicCache()
        first = tiny.model.generate(**inputs, max_new_tokens=3, prompt_lookup_num_tokens=3, past_key_values=cache)
        assert session.last.length > inputs["input_ids"].shape[1]
        assert cache.get_seq_length() == first.shape[1] - 1
        turn = kit.conversation(inputs, first[:, -3:], kit.words(1, 5))
        second = kit.decode(tiny.model, turn, 3, past_key_values=cache)
    said = torch.cat([first[:, -3:], turn["input_ids"][:, -5:], second.tokens], 1)
    logits = wanted_logits(kit, tiny.model, kit.rows_by_hand(tiny.model, inputs, METHODS[0]), said)
    assert torch.equal(logits[:, :3].argmax(-1), first[:, -3:])
    assert kit.difference(second.logits, logits[:, -3:]) < EXACT


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_second_turn_goes_on(kit, family, copied):
    tiny = kit.vlm(family, dtype=F64)
    model = tiny.model
    with reduce_images(model, METHODS[0]):
        cache = DynamicCache(config=tiny.text_config)
        first = kit.decode(model, tiny.inputs, 3, past_key_values=cache)
        cache = copy.deepcopy(cache) if copied else cache
        turn = kit.conversation(tiny.inputs, first.tokens, kit.words(1, 5))
        second = kit.decode(model, turn, 3, past_key_values=cache)
    said = torch.cat([first.tokens, turn["input_ids"][:, -5:], second.tokens], 1)
    logits = wanted_logits(kit, model, kit.rows_by_hand(model, tiny.inputs, METHODS[0]), said)
    assert kit.difference(second.logits, logits[:, -3:]) < EXACT


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_second_turn_of_a_padded_batch_goes_on(kit, family):
    model, inputs = kit.padded(family, dtype=F64)
    with reduce_images(model, PruMergePlus(4)):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        first = kit.decode(model, inputs, 3, past_key_values=cache)
        turn = kit.conversation(inputs, first.tokens, kit.words(2, 5))
        second = kit.decode(model, turn, 3, past_key_values=cache)
    said = torch.cat([first.tokens, turn["input_ids"][:, -5:], second.tokens], 1)
    logits = wanted_logits(kit, model, kit.rows_by_hand(model, inputs, PruMergePlus(4)), said)
    assert kit.difference(second.logits, logits[:, -3:]) < EXACT


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_loop_without_positions_goes_on(kit, family):
    tiny = kit.vlm(family, dtype=F64)
    model, tokens = tiny.model, kit.words(1, 4)
    tokens[0, 1] = IMAGE  # said by the model, there is no image behind it
    inputs = {name: x for name, x in tiny.inputs.items() if name != "attention_mask"}
    with reduce_images(model, METHODS[0]), torch.no_grad():
        out = model(**inputs, use_cache=True)
        logits = [out.logits[:, -1]]
        for step in range(3):
            out = model(input_ids=tokens[:, step : step + 1], past_key_values=out.past_key_values)
            logits.append(out.logits[:, -1])
    wanted = wanted_logits(kit, model, kit.rows_by_hand(model, tiny.inputs, METHODS[0]), tokens)
    assert kit.difference(torch.stack(logits, 1), wanted) < EXACT


def test_losses_and_gradients_go_through(kit):
    tiny = kit.vlm("llava")
    labels = tiny.inputs["input_ids"].masked_fill(tiny.inputs["input_ids"] == IMAGE, -100)
    with reduce_images(tiny.model, METHODS[0]):
        out = tiny.model(**tiny.inputs, labels=labels, use_cache=False)
        weights = tiny.model.get_decoder().layers[0].self_attn.q_proj.weight, kit.projector(tiny.model).linear_1.weight
        grads = torch.autograd.grad(out.loss, weights)
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)


def test_text_alone_passes_untouched(kit):
    tiny = kit.vlm("llava")
    ids = kit.words(2, 20)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with reduce_images(tiny.model, METHODS[0]) as session:
        found = kit.decode(tiny.model, inputs)
    assert torch.equal(found.logits, kit.decode(tiny.model, inputs).logits)
    assert session.last is None


def test_a_row_of_text_stays_whole_beside_a_row_with_an_image(kit):
    tiny = kit.vlm("llava", dtype=F64)
    ids, text = tiny.inputs["input_ids"], kit.words(1, tiny.inputs["input_ids"].shape[1])
    mask = torch.ones(2, ids.shape[1], dtype=torch.long)
    mask[1, :9] = 0
    both = {**tiny.inputs, "input_ids": torch.cat([ids, text]), "attention_mask": mask}
    with reduce_images(tiny.model, METHODS[0]):
        found = kit.decode(tiny.model, both)
    alone = kit.decode(tiny.model, {"input_ids": text[:, 9:]}, found.tokens[1:])
    assert kit.difference(found.logits[1:], alone.logits) < EXACT
    wanted = wanted_logits(kit, tiny.model, kit.rows_by_hand(tiny.model, tiny.inputs, METHODS[0]), found.tokens[:1])
    assert kit.difference(found.logits[:1], wanted) < EXACT


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in KNOWN] + ["llama"])
def test_other_models_are_refused(kit, family):
    model = kit.vlm(family).model
    with pytest.raises(ValueError, match=rf"{type(model).__name__} .* cannot be given fewer vision tokens"):
        reduce_images(model, METHODS[0])


class Deep:
    evidence = TowerEvidence(layer=-3, heads="apart")

    def __call__(self, seen):
        raise AssertionError


class Twice:
    evidence = TowerEvidence(layer=-1, heads="apart")

    def __call__(self, seen):
        source = torch.zeros(len(seen.features), 2, dtype=torch.long)
        return Reduced(seen.features[:, :2], source, torch.ones_like(source, dtype=torch.bool))


def test_what_the_model_cannot_do_is_refused_before_anything_runs(kit):
    model = kit.vlm("llava").model
    for wrong in (ADSC(), VisionZip, None):
        with pytest.raises(TypeError, match=f"{re.escape(repr(wrong))} does not reduce images; a method such as"):
            reduce_images(model, wrong)
    with pytest.raises(ValueError, match="layer -3 of the vision tower, which has 2"):
        reduce_images(model, Deep())
    model.config.vision_feature_select_strategy = "full"
    try:
        with pytest.raises(ValueError, match="'full' does not cut off exactly the CLS token"):
            reduce_images(model, METHODS[0])
    finally:
        model.config.vision_feature_select_strategy = "default"


def test_what_cannot_work_is_refused_and_the_model_is_as_before(kit):
    tiny = kit.vlm("llava")
    model, inputs, method = tiny.model, tiny.inputs, METHODS[0]
    stock = kit.decode(model, inputs).logits  # first: transformers leaves hooks of its own behind
    before, plan = kit.state(model), LazyPlan(num_layers=4, blocks=((1, 2),))
    with reduce_images(model, method):
        with pytest.raises(RuntimeError, match="cannot be nested"), reduce_images(model, method):
            pass
        for other in (compress(model, "snapkv", 40), share(model, plan), prune(model, ADSC((1,), 2))):
            with (
                other,
                pytest.raises(ValueError, match=r"name everything in one text, as in compress\(model, 'visionzip"),
            ):
                model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16)
        cache = DynamicCache(config=tiny.text_config)
        model(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="images in the first turn"):
            model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], past_key_values=cache)
        with pytest.raises(ValueError, match="without the images"):
            model(input_ids=inputs["input_ids"])
        with pytest.raises(ValueError, match="the config's, not the call's"):
            model(**inputs, vision_feature_layer=1)
    with pytest.raises(ValueError, match="no room for more"), reduce_images(model, VisionZip(17, 3)) as session:
        model.generate(**inputs, max_new_tokens=2)
    assert session._hidden is None
    assert not session._heard
    assert kit.state(model) == before
    assert torch.equal(kit.decode(model, inputs).logits, stock)
    with reduce_images(model, method), pytest.raises(ValueError, match="leave cache_implementation"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    grid = kit.vlm("qwen2_vl")
    with pytest.raises(ValueError, match="two tokens at one place"), reduce_images(grid.model, Twice()):
        grid.model.generate(**grid.inputs, max_new_tokens=2)


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_vl"])
def test_pixels_that_are_no_numbers_are_named(kit, family, method):
    tiny = kit.vlm(family)
    inputs = {**tiny.inputs, "pixel_values": tiny.inputs["pixel_values"].clone()}
    inputs["pixel_values"].view(-1)[7] = float("nan")
    with reduce_images(tiny.model, method):
        with pytest.raises(ValueError, match="features of these images that are NaN or infinite; look at the pixels"):
            tiny.model(**inputs)
        tiny.model(**tiny.inputs)


def test_inputs_may_be_given_by_their_place(kit):
    model, inputs = kit.padded("llava", dtype=F64)
    names = ("input_ids", "pixel_values", "attention_mask")
    with reduce_images(model, METHODS[0]) as session, torch.no_grad():
        wanted = model(**inputs, use_cache=False).logits
        found = model(*(inputs[name] for name in names), use_cache=False).logits
        assert session.last is not None
        assert torch.equal(found, wanted)


def test_embeddings_are_taken_as_they_are(kit):
    """Unless placeholders are among them, whose images come beside."""
    tiny = kit.vlm("llava", dtype=F64)
    model, inputs = tiny.model, tiny.inputs
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    text = model.get_input_embeddings()(ids).detach()
    kinds = (ids == IMAGE).int()
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(pixels).pooler_output))
        merged = text.masked_scatter(kinds.bool()[..., None], features)
        plain = model(**inputs, use_cache=False).logits
        with reduce_images(model, METHODS[0]) as session:
            assert kit.difference(model(inputs_embeds=merged, use_cache=False).logits, plain) < EXACT
            assert session.last is None
            with pytest.raises(ValueError, match=r"embeddings are taken as they are, .* give input_ids"):
                model(inputs_embeds=merged, mm_token_type_ids=kinds)
            found = model(inputs_embeds=text, pixel_values=pixels, use_cache=False).logits
            assert kit.difference(found, model(**inputs, use_cache=False).logits) < EXACT
            assert session.last is not None


def test_a_cache_that_an_error_left_is_counted_as_before(kit, monkeypatch):
    """`generate` may go on after an interrupt between two steps; the length it sees is that of the whole prompt."""
    tiny = kit.vlm("llava")
    cache = DynamicCache(config=tiny.text_config)
    with reduce_images(tiny.model, METHODS[0]), torch.no_grad():
        tiny.model(**tiny.inputs, past_key_values=cache)
        monkeypatch.setattr(tiny.model.get_decoder().layers[0], "forward", None)
        with pytest.raises(TypeError):
            tiny.model(input_ids=kit.words(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == tiny.inputs["input_ids"].shape[1]

"""Lazy layers against a model that keeps every key and mixes queries, keys or probabilities by hand."""

import copy

import pytest
import torch
from mmkv_hf import attention, share
from mmkv_hf.kinds import layer_kinds
from mmkv_hf.lazy import Lending
from mmkv_hf.lazy_cache import LazyCache, pack, spread
from mmkv_layershare import LazyPlan
from mmkv_testkit.families import IMAGE_TOKEN_ID, PLAIN, build
from torch.nn.functional import pad as widen
from transformers import DynamicCache

F64 = torch.float64
EXACT = 1e-9
MATTERS = 1e-2


def plan_of(model, mode, blocks=((0, 1), (2, 3))):
    return LazyPlan(len(layer_kinds(model)), blocks, mode)


MODES = pytest.mark.parametrize("mode", ["visual", "global"])


def both(kit, model, inputs, plan, tokens=6, **settings):
    """What the session decodes, and what the reference does with the same tokens."""
    with share(model, plan) as session:
        found = kit.decode(model, inputs, tokens, **settings)
    with kit.sharing(model, plan, inputs):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        wanted = kit.decode(model, inputs, found.tokens, past_key_values=cache)
    return found, wanted, session.last


@MODES
@pytest.mark.parametrize("family", PLAIN)
def test_lazy_layers_equal_the_reference(kit, family, mode):
    tiny = kit.vlm(family, dtype=F64)
    found, wanted, _ = both(kit, tiny.model, tiny.inputs, plan_of(tiny.model, mode))
    assert kit.difference(found.logits, wanted.logits) < EXACT
    stock = kit.decode(tiny.model, tiny.inputs, found.tokens)
    assert kit.difference(stock.logits, wanted.logits) > MATTERS


@MODES
@pytest.mark.parametrize("blocks", [((0, 3),), ((1, 2),)])
def test_blocks_of_other_lengths(kit, mode, blocks):
    tiny = kit.vlm("qwen2_vl", dtype=F64)
    found, wanted, _ = both(kit, tiny.model, tiny.inputs, plan_of(tiny.model, mode, blocks))
    assert kit.difference(found.logits, wanted.logits) < EXACT


@MODES
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
def test_padded_rows_equal_the_reference(kit, family, mode):
    model, inputs = kit.padded(family, dtype=F64)
    found, wanted, _ = both(kit, model, inputs, plan_of(model, mode))
    assert kit.difference(found.logits, wanted.logits) < EXACT


@MODES
def test_no_lazy_layer_is_the_model_bit_by_bit(kit, mode):
    tiny = kit.vlm("llava")
    with share(tiny.model, plan_of(tiny.model, mode, ())):
        found = kit.decode(tiny.model, tiny.inputs)
    stock = kit.decode(tiny.model, tiny.inputs)
    assert torch.equal(found.logits, stock.logits)


def test_a_text_only_prompt_is_the_model_bit_by_bit_in_visual_mode_alone(kit):
    tiny = kit.vlm("llava")
    ids = kit.words(2, 20)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    stock = kit.decode(tiny.model, inputs)
    for mode, is_equal in (("visual", True), ("global", False)):
        with share(tiny.model, plan_of(tiny.model, mode)):
            found = kit.decode(tiny.model, inputs, stock.tokens)
        assert torch.equal(found.logits, stock.logits) is is_equal


@MODES
def test_reading_a_token_more_equals_a_decoding_step(kit, mode):
    """Property 3: prefill(T + 1) is prefill(T) and one step; a forward loop, an explicit cache."""
    tiny = kit.vlm("llava", dtype=F64)
    new = kit.words(1, 1)
    longer = kit.conversation(tiny.inputs, new, new[:, :0]) | {"pixel_values": tiny.inputs["pixel_values"]}
    with share(tiny.model, plan_of(tiny.model, mode)) as session, torch.no_grad():
        whole = tiny.model(**longer, past_key_values=session.cache()).logits[:, -1]
        cache = session.cache()
        tiny.model(**tiny.inputs, past_key_values=cache)
        step = tiny.model(input_ids=new, attention_mask=longer["attention_mask"], past_key_values=cache).logits[:, -1]
        without = tiny.model(**longer, use_cache=False).logits[:, -1]
    assert kit.difference(whole, step) < EXACT
    assert kit.difference(whole, without) < EXACT


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
    ],
)
@MODES
def test_generate_modes_give_the_reference_s_tokens(kit, mode, settings):
    tiny = kit.vlm("llava", dtype=F64)
    model, plan = tiny.model, plan_of(tiny.model, mode)

    def generated(**more):
        torch.manual_seed(0)
        return model.generate(**tiny.inputs, max_new_tokens=6, **settings, **more).tolist()

    with share(model, plan) as session:
        found = generated()
        assert isinstance(session.last, LazyCache)
    with kit.sharing(model, plan, tiny.inputs):
        assert generated() == found


@MODES
@pytest.mark.parametrize("copied", [False, True])
def test_a_second_turn_goes_on_with_the_cache_or_a_copy(kit, copied, mode):
    tiny = kit.vlm("llava", dtype=F64)
    with share(tiny.model, plan_of(tiny.model, mode)) as session:
        first = kit.decode(tiny.model, tiny.inputs)
        turn = kit.conversation(tiny.inputs, first.tokens, kit.words(1, 5))
        cache = copy.deepcopy(session.last) if copied else session.last
        second = kit.decode(tiny.model, turn, past_key_values=cache)
        whole = kit.decode(tiny.model, turn | {"pixel_values": tiny.inputs["pixel_values"]}, second.tokens)
    assert kit.difference(second.logits, whole.logits) < EXACT


VISION_START = 502


@pytest.fixture
def apart(monkeypatch):
    """Counts the calls that attend to vision and text apart."""
    calls = []
    split = attention.split_attention
    monkeypatch.setattr(attention, "split_attention", lambda *args: calls.append(0) or split(*args))
    return calls


def mixed(kit, name, dtype=F64):
    """Three left-padded rows: more vision tokens, fewer, none; two images of llava, other sizes of qwen2_vl."""
    model = kit.vlm(name, dtype=dtype).model
    image = [IMAGE_TOKEN_ID] * 8
    torch.manual_seed(3)
    if name == "llava":
        middles = [image * 2 + [5, 6] + image * 2, image * 2, []]
        more = {"pixel_values": torch.randn(3, 3, 56, 56, dtype=dtype)}
    else:
        middles = [[VISION_START, *image * 3], [VISION_START, *image], []]
        more = {"pixel_values": torch.randn(128, 1176, dtype=dtype)}
        more["image_grid_thw"] = torch.tensor([[1, 8, 12], [1, 4, 8]])
    rows = [[7, 8 + i, *middle, *kit.words(1, 11 + 4 * i, seed=i)[0].tolist()] for i, middle in enumerate(middles)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), **more}
    if name != "llava":
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN_ID).int()
    return model, inputs


def passes(model, cache, chunks):
    """Last logits [B, n, V] of forward passes one after the other; they may bring images, be padded, or hide tokens."""
    mask, logits = None, []
    for chunk in chunks:
        new = chunk.pop("attention_mask", torch.ones_like(chunk["input_ids"]))
        for row, column in chunk.pop("hides", ()):
            mask[row, column] = 0
        mask = new.clone() if mask is None else torch.cat([mask, new], 1)
        logits.append(model(**chunk, attention_mask=mask, past_key_values=cache).logits[:, -1])
    return torch.stack(logits, 1)


def both_pass(kit, model, plan, chunks):
    """`passes` in a session and by hand, where each pass knows the vision tokens of all before it."""
    with share(model, plan) as session, torch.no_grad():
        cache = session.cache()
        found = passes(model, cache, [dict(chunk) for chunk in chunks])
    whole = {"input_ids": torch.cat([chunk["input_ids"] for chunk in chunks], 1)}
    with kit.sharing(model, plan, whole), torch.no_grad():
        wanted = passes(model, DynamicCache(config=model.config.get_text_config()), [dict(chunk) for chunk in chunks])
    return found, wanted, cache


@MODES
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_rows_with_other_images_or_none_are_read_apart(kit, apart, name, mode):
    model, inputs = mixed(kit, name)
    plan = plan_of(model, mode)
    found, wanted, cache = both(kit, model, inputs, plan)
    assert kit.difference(found.logits, wanted.logits) < EXACT
    assert len(apart) == (kit.STEPS - 1) * 4, "every layer of a block, every step after the prompt"
    real = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE_TOKEN_ID)
    heads, steps = cache.layers[0].tail_keys.shape[1], kit.STEPS - 1
    if mode == "visual":
        assert cache.layers[0].tail_keys.shape[2] == real.sum(1).max() + steps, "padding is not stored"
    else:
        assert cache.layers[0].tail_keys.shape[2] == steps
        assert len(cache.layers[0].prefix_keys) == heads * inputs["attention_mask"].sum(), "padding is not stored"


@MODES
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_beams_of_rows_with_other_images(kit, apart, name, mode):
    model, inputs = mixed(kit, name)
    plan = plan_of(model, mode)
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    with share(model, plan):
        found = model.generate(**inputs, **settings)
    assert apart
    with kit.sharing(model, plan, inputs):
        assert torch.equal(model.generate(**inputs, **settings), found)


@MODES
def test_another_image_in_a_later_turn(kit, apart, mode):
    """Rows get images at other places, text of other lengths, and no image at all; steps in between and after."""
    model, inputs = mixed(kit, "llava")
    image = [IMAGE_TOKEN_ID] * 16
    second = torch.tensor([[0] * 16 + [9, 10, 11], [9, *image, 10, 11], [0, *image, 10, 11]])
    turn = {"input_ids": second, "attention_mask": (second != 0).long(), "pixel_values": inputs["pixel_values"][:2]}
    step = [{"input_ids": kit.words(3, n, seed=n)} for n in (1, 2, 5)]
    chunks = [inputs, step[0], step[0], turn, step[0], step[1], step[2], step[0]]
    found, wanted, cache = both_pass(kit, model, plan_of(model, mode), chunks)
    assert kit.difference(found, wanted) < EXACT
    assert len(apart) == 6 * 4
    entries = (32 + 16 + 16 + 16) if mode == "visual" else inputs["attention_mask"].sum()
    assert len(cache.layers[0].prefix_keys) == entries * cache.layers[0].tail_keys.shape[1]


@MODES
def test_an_image_between_steps_without_padding(kit, apart, mode):
    """Nothing is masked, so nothing but the cache tells the passes before the second image from those after it."""
    tiny = kit.vlm("llava", dtype=F64)
    step = {"input_ids": kit.words(1, 1)}
    chunks = [tiny.inputs, step, {name: x for name, x in tiny.inputs.items() if name != "attention_mask"}, step]
    found, wanted, _ = both_pass(kit, tiny.model, plan_of(tiny.model, mode), chunks)
    assert kit.difference(found, wanted) < EXACT
    assert len(apart) == 2 * 4


def test_layers_with_masks_of_their_own_are_not_confused(kit):
    model, inputs = mixed(kit, "llava")
    plan = plan_of(model, "visual")
    with share(model, plan) as session, torch.no_grad():
        cache = session.cache()
        model(**inputs, past_key_values=cache)
    cache.layout.extend(torch.zeros(3, 1, dtype=torch.bool))
    lending, query = Lending(plan), torch.zeros(3, 4, 1, 8)
    lending.begin(cache.layout.prefix, cache)
    masks = [torch.ones(3, 1, 1, inputs["input_ids"].shape[1] + 1, dtype=torch.bool) for _ in range(2)]
    masks[1][0, :, :, 20] = False
    found = [lending.prefix_of(layer, query, mask).columns.prefix_mask for layer, mask in enumerate(masks)]
    assert found[0] is None
    assert int((~found[1]).sum()) == cache.layers[0].tail_keys.shape[1]


@MODES
@pytest.mark.parametrize("count", [2, 32, 33])
def test_longer_passes_of_text_after_an_image(kit, apart, count, mode):
    model, inputs = mixed(kit, "llava")
    chunks = [inputs, {"input_ids": kit.words(3, count)}, {"input_ids": kit.words(3, 1)}]
    found, wanted, _ = both_pass(kit, model, plan_of(model, mode), chunks)
    assert kit.difference(found, wanted) < EXACT
    assert len(apart) == (8 if count <= 32 else 4)


@MODES
def test_padded_text_after_an_image(kit, mode):
    model, inputs = mixed(kit, "llava")
    new = torch.tensor([[0, 0, 9, 10], [0, 9, 10, 11], [9, 10, 11, 12]])
    turn = {"input_ids": new, "attention_mask": (new != 0).long()}
    found, wanted, _ = both_pass(kit, model, plan_of(model, mode), [inputs, turn, {"input_ids": kit.words(3, 1)}])
    assert kit.difference(found, wanted) < EXACT


@MODES
def test_what_a_later_mask_hides_is_hidden(kit, apart, mode):
    """Vision tokens and text that were visible when they were read."""
    model, inputs = mixed(kit, "llava")
    steps = [{"input_ids": kit.words(3, n)} for n in (1, 3)]
    hiding = steps[0] | {"hides": [(0, 20), (0, 4), (1, -3), (1, 22), (2, -1)]}
    found, wanted, _ = both_pass(kit, model, plan_of(model, mode), [inputs, hiding, steps[1]])
    assert kit.difference(found, wanted) < EXACT
    seen, _, _ = both_pass(kit, model, plan_of(model, mode), [inputs, *steps])
    assert kit.difference(found, seen) > MATTERS
    assert len(apart) == 2 * 2 * 4


@MODES
def test_what_a_mask_hides_at_first_is_not_stored(kit, mode):
    model, inputs = mixed(kit, "llava")
    mask = inputs["attention_mask"].clone()
    mask[0, 20] = mask[1, -3] = 0
    step = {"input_ids": kit.words(3, 1)}
    found, wanted, cache = both_pass(kit, model, plan_of(model, mode), [inputs | {"attention_mask": mask}, step])
    assert kit.difference(found, wanted) < EXACT
    with share(model, cache.plan), pytest.raises(ValueError, match="shows tokens that it hid"):
        model(**step, attention_mask=grown(inputs, 2), past_key_values=cache)


@MODES
@pytest.mark.parametrize("name", ["llava", "paligemma2"])
def test_steps_with_gradients_equal_steps_without(kit, apart, name, mode):
    """Recording gradients joins keys, which sdpa or torch attend to; PaliGemma 2 caps its logits."""
    settings = {} if name == "llava" else {"layer_types": ["full_attention"] * 4}
    tiny = build(name, dtype=F64, **settings)
    chunks = [tiny.inputs, *({"input_ids": kit.words(1, 1, seed=n)} for n in range(3))]
    logits = []
    for records in (False, True):
        with share(tiny.model, plan_of(tiny.model, mode)) as session, torch.set_grad_enabled(records):
            logits.append(passes(tiny.model, session.cache(), [dict(chunk) for chunk in chunks]))
    assert len(apart) == 3 * 4
    assert kit.difference(logits[0], logits[1].detach()) < EXACT
    weight = tiny.model.get_decoder().layers[0].self_attn.k_proj.weight
    assert torch.autograd.grad(logits[1][:, -1].square().mean(), weight)[0].any()


@MODES
def test_a_step_leaves_vision_where_it_is(kit, mode):
    model, inputs = mixed(kit, "llava", torch.float32)
    with share(model, plan_of(model, mode)) as session, torch.no_grad():
        cache = session.cache()
        model(**inputs, past_key_values=cache)
        held = [x for layer in cache.layers for x in (layer.prefix_keys, layer.prefix_values)]
        for n in range(3):
            model(input_ids=kit.words(3, 1), attention_mask=grown(inputs, n + 1), past_key_values=cache)
        after = [x for layer in cache.layers for x in (layer.prefix_keys, layer.prefix_values)]
    assert all(a is b for a, b in zip(held, after, strict=True))
    assert [len(layer.prefix_keys) > 0 for layer in cache.layers] == [True, False] * 2, "lazy layers hold no such keys"


def grown(inputs, more):
    return widen(inputs["attention_mask"], (0, more), value=1)


@MODES
def test_rows_of_a_cache_can_be_cropped_repeated_and_chosen(kit, apart, mode):
    """Cropping reaches back over text whose rows are padded; what is left goes on as if nothing else had been."""
    model, inputs = mixed(kit, "llava")
    plan, order, step = plan_of(model, mode), torch.tensor([1, 2, 0]), {"input_ids": kit.words(3, 1)}
    new = torch.tensor([[0, 0, 9, 10], [0, 9, 10, 11], [9, 10, 11, 12]])
    turn = {"input_ids": new, "attention_mask": (new != 0).long()}
    kept = [
        {name: x[order] for name, x in inputs.items() if name != "pixel_values"},
        {name: x[order, :1] for name, x in turn.items()},
    ]
    kept[0]["pixel_values"] = inputs["pixel_values"][[2, 0, 1]]
    with share(model, plan) as session, torch.no_grad():
        cache = session.cache()
        passes(model, cache, [dict(inputs), dict(turn)])
        cache.crop(-3)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(2 * order)
        mask = widen(torch.cat([chunk["attention_mask"] for chunk in kept], 1), (0, 1), value=1)
        found = model(**step, attention_mask=mask, past_key_values=cache).logits[:, -1]
    assert len(apart) == 4
    _, wanted, same = both_pass(kit, model, plan, [*kept, step])
    assert kit.difference(found, wanted[:, -1]) < EXACT
    assert cache.layers[1].tail_keys.shape == same.layers[1].tail_keys.shape


def test_global_mode_forgets_part_of_the_prompt(kit):
    model, inputs = mixed(kit, "llava")
    plan, step = plan_of(model, "global"), {"input_ids": kit.words(3, 1)}
    width = inputs["input_ids"].shape[1]
    with share(model, plan) as session, torch.no_grad():
        cache = session.cache()
        passes(model, cache, [dict(inputs), dict(step)])
        cache.crop(-5)
        mask = widen(inputs["attention_mask"][:, : width - 4], (0, 1), value=1)
        found = model(**step, attention_mask=mask, past_key_values=cache).logits[:, -1]
    shorter = {name: x[:, : width - 4] if name != "pixel_values" else x for name, x in inputs.items()}
    _, wanted, _ = both_pass(kit, model, plan, [shorter, step])
    assert kit.difference(found, wanted[:, -1]) < EXACT


def test_a_decoder_called_alone_is_refused_in_visual_mode_or_later(kit):
    """The session sees calls of the model; global mode needs to know nothing, as long as it never does."""
    tiny = kit.vlm("llava")
    decoder, embeds = tiny.model.get_decoder(), torch.zeros(1, 40, tiny.text_config.hidden_size)
    for mode in ("visual", "global"):
        with share(tiny.model, plan_of(tiny.model, mode)) as session, torch.no_grad():
            if mode == "visual":
                with pytest.raises(RuntimeError, match="given to the model"):
                    decoder(inputs_embeds=embeds, past_key_values=session.cache())
                continue
            cache = session.cache()
            decoder(inputs_embeds=embeds, past_key_values=cache)
            with pytest.raises(RuntimeError, match="given to the model"):
                tiny.model(input_ids=kit.words(1, 1), past_key_values=cache)


@MODES
def test_stored_bytes_are_the_formula(kit, mode):
    """Property 6, live: every tensor of the cache, on its storage; generated tokens count as text."""
    tiny = kit.vlm("llava")
    plan = plan_of(tiny.model, mode, ((0, 3),))
    vision = int((tiny.inputs["input_ids"] == tiny.model.config.image_token_id).sum())
    for steps in (1, 7):
        with share(tiny.model, plan) as session:
            kit.decode(tiny.model, tiny.inputs, kit.words(1, steps))
        seen = session.last.get_seq_length()
        text = tiny.text_config
        width = text.head_dim if getattr(text, "head_dim", None) else text.hidden_size // text.num_attention_heads
        entry = text.num_key_value_heads * width * 4
        layers, lazy, shared = len(session.last.layers), len(plan.lazy), seen if mode == "global" else vision
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in session.last.tensors()}
        assert sum(storages.values()) == (2 * layers * seen - lazy * shared) * entry


@MODES
def test_projections_of_lazy_layers_matter_only_where_they_are_used(kit, mode):
    """Property 4: in global mode they have no influence at all, in visual mode through text alone."""
    tiny = kit.vlm("llava")
    model, plan = tiny.model, plan_of(tiny.model, mode, ((0, 3),))
    layers = [model.get_decoder().layers[i].self_attn for i in plan.lazy]
    image_only = {name: x.clone() for name, x in tiny.inputs.items()}

    def hidden(inputs):
        with share(model, plan), torch.no_grad():
            out = model(**inputs, use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1], out.logits

    before, logits = hidden(image_only)
    saved = [(m.q_proj.weight.clone(), m.k_proj.weight.clone()) for m in layers]
    try:
        for module in layers:
            torch.nn.init.normal_(module.q_proj.weight, std=0.5)
            torch.nn.init.normal_(module.k_proj.weight, std=0.5)
        after, other = hidden(image_only)
    finally:
        for module, (q, k) in zip(layers, saved, strict=True):
            module.q_proj.weight.data.copy_(q)
            module.k_proj.weight.data.copy_(k)
    first_text = int((image_only["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    if mode == "global":
        assert torch.equal(before, after)
    else:
        assert kit.difference(logits, other) > MATTERS
        if first_text == 0:
            vision = image_only["input_ids"][0] == model.config.image_token_id
            assert torch.equal(before[:, vision], after[:, vision])


@MODES
def test_gradients_reach_the_anchor_s_projections(kit, mode):
    """Trained by the loss of a lazy layer; its own query and key projections get none from vision tokens or at all."""
    tiny = kit.vlm("llava")
    model, plan = tiny.model, plan_of(tiny.model, mode, ((2, 3),))
    layers = model.get_decoder().layers
    parameters = [layers[2].self_attn.q_proj.weight, layers[3].self_attn.q_proj.weight]
    hook = layers[2].self_attn.o_proj.register_forward_hook(
        lambda m, a, out: out.detach()
    )  # cuts the anchor's own path
    try:
        with share(model, plan):
            loss = model(**tiny.inputs, use_cache=False).logits.square().mean()
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        hook.remove()
    assert grads[0].abs().max() > 0
    assert (grads[1] is None or not grads[1].any()) is (mode == "global")


@MODES
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "qwen2_vl"])
def test_skipped_projections_change_nothing_but_the_work(kit, family, mode):
    """Logits are the same, also of padded rows; the projections see the text tokens, or nothing."""
    model, inputs = kit.padded(family, dtype=F64)
    plan = plan_of(model, mode)
    rows = []
    layers = [model.get_decoder().layers[i].self_attn for i in plan.lazy]
    hooks = [m.q_proj.register_forward_hook(lambda m, args, out: rows.append(args[0].numel())) for m in layers]
    try:
        with share(model, plan) as session:
            wanted = kit.decode(model, inputs)
        full = sum(rows)
        rows.clear()
        with share(model, plan, skip_projections=True):
            found = kit.decode(model, inputs, wanted.tokens)
    finally:
        for hook in hooks:
            hook.remove()
    assert kit.difference(found.logits, wanted.logits) < EXACT
    vision = int((inputs["input_ids"] == model.config.image_token_id).sum())
    width = model.config.get_text_config().hidden_size
    skipped = vision if mode == "visual" else 2 * session.last.get_seq_length()
    assert full - sum(rows) == len(plan.lazy) * skipped * width
    assert all(type(m.q_proj) is torch.nn.Linear for m in layers)


def test_projections_that_are_not_separate_cannot_be_skipped(kit, monkeypatch):
    tiny = kit.vlm("llava")
    module = tiny.model.get_decoder().layers[1].self_attn
    monkeypatch.delitem(module._modules, "k_proj")
    with pytest.raises(ValueError, match="leave skip_projections out"):
        share(tiny.model, plan_of(tiny.model, "visual"), skip_projections=True)


@pytest.mark.parametrize(
    ("family", "blocks", "message"),
    [
        ("gemma3", ((0, 1),), "does not attend to everything"),
        ("llava", ((0, 4),), "below 4"),
    ],
)
def test_plans_that_do_not_fit_are_refused(kit, family, blocks, message):
    tiny = kit.vlm(family)
    with pytest.raises(ValueError, match=message):
        share(tiny.model, plan_of(tiny.model, "visual", blocks))
    with pytest.raises(ValueError, match="made for 99 layers"):
        share(tiny.model, LazyPlan(99))


def test_the_model_is_as_before_also_after_an_error(kit):
    tiny = kit.vlm("llava")
    model = tiny.model
    before = (dict(vars(model)), model.config.to_dict(), model.config.get_text_config()._attn_implementation)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(RuntimeError, match="mine"), share(model, plan_of(model, "visual")):
        raise RuntimeError("mine")
    assert (dict(vars(model)), model.config.to_dict(), model.config.get_text_config()._attn_implementation) == before
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks


def test_what_cannot_work_is_refused(kit):
    tiny = kit.vlm("llava")
    model, plan = tiny.model, plan_of(tiny.model, "visual")
    with share(model, plan) as session:
        with pytest.raises(ValueError, match="continues a LazyCache"):
            model.generate(**tiny.inputs, past_key_values=DynamicCache(), max_new_tokens=2)
        embeds = model.get_input_embeddings()(tiny.inputs["input_ids"])
        with pytest.raises(ValueError, match="pass input_ids, or mm_token_type_ids"):
            model(inputs_embeds=embeds, use_cache=False)
        model.generate(**tiny.inputs, max_new_tokens=2, do_sample=False)
        with pytest.raises(ValueError, match="vision tokens among them"):
            session.last.crop(-(session.last.get_seq_length() - 1))


def test_packing_and_spreading_are_inverse_on_text():
    torch.manual_seed(0)
    keys, is_text = torch.randn(3, 2, 9, 4), torch.rand(3, 9) < 0.5
    is_text[1] = False
    packed = pack(keys, is_text)
    assert packed.shape[2] == int(is_text.sum(-1).max())
    back = spread(packed, is_text)
    mask = is_text[:, None, :, None].expand_as(keys)
    assert torch.equal(back[mask], keys[mask])
    for row in range(3):
        count = int(is_text[row].sum())
        assert torch.equal(packed[row, :, packed.shape[2] - count :], keys[row][:, is_text[row]])


def test_layers_that_run_anew_in_the_backward_pass_are_refused():
    tiny = build("llava")
    tiny.model.train().gradient_checkpointing_enable()
    with share(tiny.model, plan_of(tiny.model, "global")), pytest.raises(RuntimeError, match="gradient checkpointing"):
        tiny.model(**tiny.inputs, use_cache=False)


@MODES
def test_the_model_below_the_head_shares_too(kit, mode):
    tiny = kit.vlm("llava", dtype=F64)
    with share(tiny.model, plan_of(tiny.model, mode)), torch.no_grad():
        found = tiny.model.model(**tiny.inputs, use_cache=False).last_hidden_state
        wanted = tiny.model(**tiny.inputs, use_cache=False, output_hidden_states=True).hidden_states[-1]
    assert kit.difference(found, wanted) < EXACT


def test_a_stock_cache_cannot_be_gone_on_with_in_visual_mode(kit):
    """It does not say which of its tokens are vision tokens; in global mode nobody needs to know."""
    tiny = kit.vlm("llava", dtype=F64)
    token = kit.words(1, 1)
    for mode in ("visual", "global"):
        plan = plan_of(tiny.model, mode)
        with share(tiny.model, plan) as session, torch.no_grad():
            cache = tiny.model(**tiny.inputs).past_key_values
            if mode == "visual":
                with pytest.raises(ValueError, match=r"session\.cache\(\)"):
                    tiny.model(input_ids=token, past_key_values=cache)
                continue
            found = tiny.model(input_ids=token, past_key_values=cache).logits
            own = session.cache()
            tiny.model(**tiny.inputs, past_key_values=own)
            assert kit.difference(found, tiny.model(input_ids=token, past_key_values=own).logits) < EXACT

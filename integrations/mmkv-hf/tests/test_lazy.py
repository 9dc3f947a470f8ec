"""Lazy layers against a model that keeps every key and mixes queries, keys or probabilities by hand."""

from contextlib import contextmanager

import pytest
import torch
from mmkv_hf import share
from mmkv_hf.kinds import layer_kinds
from mmkv_hf.lazy_cache import LazyCache, pack, spread
from mmkv_layershare import LazyPlan
from mmkv_testkit.families import FAMILIES
from torch.nn.functional import pad as widen
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

NAME = "mmkv_lazy_reference"
OTHERS = {"gemma3", "gemma4", "mllama", "qwen3_5"}  # layers that slide, borrow keys, see images alone, or recur
FULL = [family for family in FAMILIES if family not in OTHERS]
F64 = torch.float64
EXACT = 1e-9
MATTERS = 1e-2
_STATE: dict = {}


def reference_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None, **kwargs):
    """Eager attention in float64 over full caches; lazy layers take probabilities (global) or q and k (visual)."""
    plan, layer = _STATE["plan"], module.layer_idx
    group = query.shape[1] // key.shape[1]
    rows, columns = query.shape[2], key.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)[None, None]
    anchor = plan.anchor(layer)
    if plan.mode == "visual" and anchor != layer:
        vision = widen(_STATE["vision"], (0, columns - _STATE["vision"].shape[1]))
        vision = vision.repeat_interleave(len(query) // len(vision), 0)
        other_query, other_key = _STATE["lent"][anchor]
        query, key = query.clone(), key.clone()
        for row in range(len(query)):
            for column in vision[row].nonzero()[:, 0].tolist():
                key[row, :, column] = other_key[row, :, column]
                if column >= columns - rows:
                    query[row, :, column - columns + rows] = other_query[row, :, column - columns + rows]
    if plan.mode == "global" and anchor != layer:
        weights = _STATE["lent"][anchor]
    else:
        logits = query.double() @ key.double().repeat_interleave(group, 1).transpose(-1, -2) * scaling
        weights = logits.masked_fill(~attention_mask, -torch.inf).softmax(-1).nan_to_num(0)
    if anchor == layer:
        _STATE["lent"][layer] = weights if plan.mode == "global" else (query, key)
    out = weights @ value.double().repeat_interleave(group, 1)
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register(NAME, reference_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def by_hand(model, plan, inputs):
    """The model with the reference's attention."""
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation
    ids = inputs["input_ids"]
    _STATE.update(plan=plan, lent={}, vision=ids == model.config.image_token_id)
    key = next((k for k in model.config.sub_configs if getattr(model.config, k, None) is text), "")
    model.set_attn_implementation({key: NAME})
    try:
        yield
    finally:
        model.set_attn_implementation({key: before})


def plan_of(model, mode, blocks=((0, 1), (2, 3))):
    return LazyPlan(len(layer_kinds(model)), blocks, mode)


MODES = pytest.mark.parametrize("mode", ["visual", "global"])


def both(kit, model, inputs, plan, tokens=6, **settings):
    """What the session decodes, and what the reference does with the same tokens."""
    with share(model, plan) as session:
        found = kit.decode(model, inputs, tokens, **settings)
    with by_hand(model, plan, inputs):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        wanted = kit.decode(model, inputs, found.tokens, past_key_values=cache)
    return found, wanted, session.last


@MODES
@pytest.mark.parametrize("family", FULL)
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
    with by_hand(model, plan, tiny.inputs):
        assert generated() == found


@MODES
def test_a_second_turn_goes_on_with_the_cache(kit, mode):
    tiny = kit.vlm("llava", dtype=F64)
    with share(tiny.model, plan_of(tiny.model, mode)) as session:
        first = kit.decode(tiny.model, tiny.inputs)
        turn = kit.conversation(tiny.inputs, first.tokens, kit.words(1, 5))
        second = kit.decode(tiny.model, turn, past_key_values=session.last)
        whole = kit.decode(tiny.model, turn | {"pixel_values": tiny.inputs["pixel_values"]}, second.tokens)
    assert kit.difference(second.logits, whole.logits) < EXACT


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

"""Images reduced before pruning, lazy layers and eviction, against these stages on prompts made by hand."""

import copy
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from mmkv_hf import Stages, compress, prune, reduce_images, share
from mmkv_layershare import LazyPlan
from mmkv_prune import ADSC, KeepUniform, PruMergePlus, VisionZip
from mmkv_testkit.families import FAMILIES, build, pad
from torch.nn.functional import pad as widen

F64 = torch.float64
EXACT = 1e-9
MATTERS = 1e-2
IMAGE = 500
KNOWN = ["llava", "llava_next", "internvl", "idefics3", "smolvlm", "qwen2_vl"]
METHODS = [VisionZip(dominant=5, contextual=3), PruMergePlus(neighbours=4)]
EVICT = "adakv+bacon+snapkv(window=8)"
LAZY = "lazy(num_layers=4,blocks=[[0,1],[2,3]],mode={})"
STAGES = [
    (EVICT, 30),
    (EVICT, 0.5),
    ("mixkv+snapkv(window=8)", 30),
    ("snapkv(window=8)+select(protect=image)", 0.9),
    (f"adsc(layers=[1,3],stride=2) | {EVICT}", 30),
    (f"fastv(layer=2,keep=0.5) | {EVICT}", 30),
    (f"{LAZY.format('visual')} | {EVICT}", 30),
    (f"{LAZY.format('global')} | {EVICT}", 30),
    (f"adsc(layers=[2],stride=2) | {LAZY.format('visual')} | {EVICT}", 30),
]


def name_of(method):
    return type(method).__name__


def stages_of(method, text):
    return replace(Stages.parse(text), reduce=method)


def kinds_of(inputs, i, row):
    """[1, K] int8 of one row's prompt by hand: 1 for vision tokens."""
    ids = inputs["input_ids"][i][inputs["attention_mask"][i].bool()]
    return (ids[row[2]] == IMAGE).to(torch.int8)[None]


@contextmanager
def opened(model, kinds, *args, **settings):
    """A `compress` session for a prompt of embeddings, whose pieces are told which of them are vision tokens.

    The model itself is not: not every family takes `mm_token_type_ids`.
    """

    def tell(module, args, kwargs):
        new = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        types = torch.zeros(new.shape[:2], dtype=torch.int8)
        cache = kwargs.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            types[:, : kinds.shape[1]] = kinds
        return args, kwargs | {"mm_token_type_ids": types}

    def hide(module, args, kwargs):
        return args, {name: value for name, value in kwargs.items() if name != "mm_token_type_ids"}

    with ExitStack() as stack:
        stack.callback(model.base_model.register_forward_pre_hook(tell, with_kwargs=True).remove)
        session = stack.enter_context(compress(model, *args, **settings))
        stack.callback(model.base_model.register_forward_pre_hook(hide, with_kwargs=True).remove)
        yield session


@torch.no_grad()
def read(model, cache, embeds, where, tokens):
    """Logits [1, n, V] of a model that reads a prompt and then `tokens` [1, n]."""
    logits = []
    for step in range(tokens.shape[1]):
        logits.append(model(inputs_embeds=embeds, position_ids=where, past_key_values=cache).logits[:, -1])
        embeds, where = after(model, where, tokens[:, step : step + 1])
    return torch.stack(logits, 1)


def after(model, where, tokens):
    """Embeddings and positions of tokens [1, n] that follow these positions."""
    following = torch.arange(1, tokens.shape[1] + 1) + where.max()
    return model.get_input_embeddings()(tokens), following.expand(*where.shape[:-1], -1)


def alone(model, row, kinds, turns, stages, budget, protect=None):
    """One row's prompt by hand through the stages that follow: logits [1, n, V], and the session.

    Args:
        turns: for each turn, what is said [1, m] (nothing in the first one) and the answer [1, n] that is fed.
    """
    with opened(model, kinds, replace(stages, reduce=None), budget, protect=protect) as session:
        embeds, where, _ = row
        cache, logits = session.cache(inputs_embeds=embeds, mm_token_type_ids=kinds), []
        for i, (said, answer) in enumerate(turns):
            if i:
                last = torch.cat([turns[i - 1][1][:, -1:], said], 1)
                embeds, where = after(model, where + turns[i - 1][1].shape[1] - 1, last)
                announce(session, kinds, cache.get_seq_length() + last.shape[1])
            logits.append(read(model, cache, embeds, where, answer))
    return logits, session


def announce(session, kinds, length):
    wider = [None if x is None else widen(x, (0, length - x.shape[1])) for x in (kinds, session.protect)]
    session.last.expect(length, modality=wider[0], protect=wider[1])
    session._modality = wider[0]  # for the report


def check(kit, model, inputs, stages, budget, tokens=5, protect=None, said=(), copied=False):
    """Generation under all stages equals each row's prompt by hand under those that follow; gives what both made."""
    turns, conversation = [], inputs
    with compress(model, stages, budget, protect=protect) as session:
        for new in (torch.empty(len(inputs["input_ids"]), 0).long(), *said):
            settings = {}
            if turns:
                conversation = kit.conversation(conversation, turns[-1][1], new)
                settings["past_key_values"] = copy.deepcopy(session.last) if copied else session.last
            found = kit.decode(model, conversation, tokens, **settings)
            turns.append((new, found.tokens, found.logits))
    rows = kit.rows_by_hand(model, inputs, stages.reduce)
    for i, row in enumerate(rows):
        own = None if protect is None else protect[i][inputs["attention_mask"][i].bool()][row[2]][None]
        mine = [(new[i : i + 1], answer[i : i + 1]) for new, answer, _ in turns]
        wanted, by_hand = alone(model, row, kinds_of(inputs, i, row), mine, stages, budget, own)
        for (_, _, logits), expected in zip(turns, wanted, strict=True):
            assert kit.difference(logits[i : i + 1], expected) < EXACT
        check_kept(session, by_hand, i)
    return found, session, rows


def check_kept(session, by_hand, i):
    """Row i keeps what its prompt by hand keeps, and the report says so."""
    real, end = session._reducing.last.real[i], session.report().prompt
    real = widen(real, (0, end - len(real)), value=True)
    for layer, mask in by_hand.last.kept_masks().items():
        assert torch.equal(session.last.kept_masks()[layer][i][:, real], mask[0])
    found, wanted = session.report(), by_hand.report()
    assert int(real.sum()) == wanted.prompt
    assert [layer.kept[i] for layer in found.layers] == [layer.kept[0] for layer in wanted.layers]
    fillers = int((~real).sum())
    assert found.vision_columns[i] == [fillers + column for column in wanted.vision_columns[0]]
    assert torch.equal(found.vision_kept[i], wanted.vision_kept[0])
    if len(session._reducing.last.real) == 1:
        assert found.layers == wanted.layers
    for layer, held in {} if session._pruning is None else session._pruning.held.items():
        columns = held.columns[i][held.real[i]] - fillers
        assert columns.tolist() == by_hand._pruning.held[layer].columns[0].tolist()


# -- tests


@pytest.mark.parametrize(("text", "budget"), STAGES)
@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("family", KNOWN)
def test_a_padded_batch_of_two_images_equals_the_prompts_by_hand(kit, family, method, text, budget):
    tiny = kit.vlm(family, batch=2, images=2, dtype=F64)
    check(kit, tiny.model, pad(tiny.inputs, left=[9, 0]), stages_of(method, text), budget)


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("family", KNOWN)
def test_every_stage_matters(kit, family, method):
    """And rows of one batch may be given different counts."""
    tiny = kit.vlm(family, batch=2, images=2, dtype=F64)
    model, inputs = tiny.model, pad(tiny.inputs, left=[9, 0])
    stages = stages_of(method, f"adsc(layers=[2],stride=2) | {LAZY.format('visual')} | {EVICT}")
    found, session, rows = check(kit, model, inputs, stages, 30)
    assert session.report().prompt == max(len(row[2]) for row in rows) < inputs["input_ids"].shape[1]
    for name in ("reduce", "prune", "share"):
        with compress(model, replace(stages, **{name: None}), 30):
            assert kit.difference(kit.decode(model, inputs, found.tokens).logits, found.logits) > MATTERS
    with compress(model, stages, 1.0):
        assert kit.difference(kit.decode(model, inputs, found.tokens).logits, found.logits) > MATTERS


def test_rows_are_given_different_counts(kit):
    """So that the batches above have fillers where the method looks at content."""
    tiny = kit.vlm("llava", batch=2, images=2, dtype=F64)
    inputs = pad(tiny.inputs, left=[9, 0])
    rows = kit.rows_by_hand(tiny.model, inputs, METHODS[1])
    assert len(rows[0][2]) != len(rows[1][2])


@pytest.mark.parametrize(
    "prunes",
    [
        "pyramiddrop(layers=[1,2,3],keep=[0.6,0.4,0.2])",
        "sparsevlm(layers=[1,3],keep=[0.6,0.3])",
        "adsc(layers=[1,3],stride=2,positions=reindex)",
    ],
)
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_methods_that_prune(kit, method, prunes):
    model, inputs = kit.padded("llava", dtype=F64)
    check(kit, model, inputs, stages_of(method, f"{prunes} | {EVICT}"), 30)


@pytest.mark.parametrize(("text", "budget"), STAGES)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_one_row_with_a_second_and_a_third_turn(kit, family, text, budget):
    tiny = kit.vlm(family, dtype=F64)
    said = (kit.words(1, 5), kit.words(1, 40, seed=3))
    check(kit, tiny.model, tiny.inputs, stages_of(METHODS[0], text), budget, 3, said=said)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_second_turn_of_a_padded_batch(kit, family, copied):
    model, inputs = kit.padded(family, dtype=F64)
    for text, budget in (STAGES[0], STAGES[3]):
        stages = stages_of(METHODS[1], text)
        check(kit, model, inputs, stages, budget, 3, said=(kit.words(2, 40),), copied=copied)


def test_bytes_are_those_of_the_prompt_by_hand_and_of_what_is_known_of_its_columns(kit):
    tiny = kit.vlm("llava", dtype=F64)
    inputs, stages = tiny.inputs, stages_of(METHODS[0], EVICT)
    found, session, rows = check(kit, tiny.model, inputs, stages, 30)
    turns = [(None, found.tokens)]
    _, by_hand = alone(tiny.model, rows[0], kinds_of(inputs, 0, rows[0]), turns, stages, 30)
    given = session._reducing.last
    known = sum(x.nbytes for x in (given.columns, given.real, given.moved))
    assert session.last.bytes_held == by_hand.last.bytes_held + known
    assert session.last.bytes_full == by_hand.last.bytes_full


@pytest.mark.parametrize("budget", [40, 4096])
def test_protected_columns_are_those_that_go_on(kit, budget):
    tiny = kit.vlm("llava", batch=2, images=2, dtype=F64)
    inputs = pad(tiny.inputs, left=[9, 0])
    protect = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    protect[:, 10:40:3] = True  # text, and columns of images of which some are left out
    stages, said = stages_of(METHODS[1], EVICT), (kit.words(2, 5),)
    _, session, _ = check(kit, tiny.model, inputs, stages, budget, 3, protect=protect, said=said)
    given = session._reducing.last
    kept = session.last.kept_masks()[0][:, :, : given.columns.shape[1]]
    wanted = protect.gather(1, given.columns) & given.real
    assert bool(wanted.any())
    assert not (wanted[:, None] & ~kept).any()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
    ],
)
@pytest.mark.parametrize("text", [STAGES[i][0] for i in (0, 2, 8)])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_generate_modes_give_the_tokens_of_the_prompt_by_hand(kit, family, text, settings):
    tiny = kit.vlm(family, dtype=F64)
    model, stages = tiny.model, stages_of(METHODS[0], text)
    row = kit.rows_by_hand(model, tiny.inputs, METHODS[0])[0]
    embeds, where, _ = row
    if where.ndim == 3:  # as `generate` gives them: the first numbers the columns
        where = torch.cat([torch.arange(embeds.shape[1]).expand(1, 1, -1), where])

    def generated(inputs, **settings):
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=6, **settings)[:, -6:].tolist()

    with compress(model, stages, 30) as session:
        found = generated(tiny.inputs, **settings)
    if "prompt_lookup_num_tokens" in settings:  # gives the greedy tokens, and needs the prompt's to look up
        settings = {"do_sample": False}
    with opened(model, kinds_of(tiny.inputs, 0, row), replace(stages, reduce=None), 30) as by_hand:
        assert found == generated({"inputs_embeds": embeds, "position_ids": where}, **settings)
    for layer, mask in by_hand.last.kept_masks().items():
        assert torch.equal(session.last.kept_masks()[layer], mask)
    assert session.report().prompt == embeds.shape[1]
    modalities = session.report().layers[0].share
    assert modalities["image"] > 0
    assert sum(modalities.values()) == pytest.approx(1)


@pytest.mark.parametrize("budget", [30, 4096])
@pytest.mark.parametrize("text", [STAGES[i][0] for i in (0, 2, 8)])
def test_drafts_that_come_with_the_prompt_are_taken_back(kit, text, budget):
    """Prompt lookup proposes tokens before the prompt has been read."""
    tiny = kit.vlm("llava", dtype=F64)
    inputs = pad(tiny.inputs, left=[5])
    inputs["input_ids"][0, -4:] = inputs["input_ids"][0, -14:-10]
    stages = stages_of(METHODS[0], text)
    with compress(tiny.model, stages, budget) as session:
        found = tiny.model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=3)
        assert session._reducing.last.length > inputs["input_ids"].shape[1]
        kept, report = session.last.kept_masks(), session.report()
        greedy = tiny.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert torch.equal(found, greedy)
        assert (report.layers, report.prompt) == (session.report().layers, session.report().prompt)
        assert all(torch.equal(mask, kept[layer]) for layer, mask in session.last.kept_masks().items())


def test_drafts_of_another_model(kit):
    tiny, draft = kit.vlm("llava", dtype=F64), kit.vlm("llama", dtype=F64).model
    with compress(tiny.model, stages_of(METHODS[0], EVICT), 30):
        assisted = kit.stock_or_skip(
            lambda: tiny.model.generate(**tiny.inputs, max_new_tokens=8, do_sample=False, assistant_model=draft)
        )
        assert torch.equal(assisted, tiny.model.generate(**tiny.inputs, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize(("window", "text"), [(24, (12, 60)), (64, (12, 6))])
@pytest.mark.parametrize("family", ["internvl", "qwen2_vl"])
def test_layers_that_slide_see_the_window_of_what_was_given(kit, family, window, text):
    """A window that reaches into the text alone, and one that holds the padding of the prompt."""
    slides = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": window}
    tiny = build(family, batch=2, images=2, dtype=F64, text=text, use_sliding_window=True, **slides)
    stages = stages_of(METHODS[1], f"adsc(layers=[1,2],stride=2) | {EVICT}")
    check(kit, tiny.model, pad(tiny.inputs, left=[9, 0]), stages, 30, 12)


def test_every_answer_token_from_what_is_left(kit):
    """The cache is cropped by one and the last prompt token run again."""
    tiny = kit.vlm("llava", dtype=F64)
    model, inputs, stages = tiny.model, tiny.inputs, stages_of(METHODS[0], STAGES[8][0])
    with compress(model, stages, 25) as session, torch.no_grad():
        cache = session.cache(**inputs)
        model(**inputs, past_key_values=cache)
        cache.crop(-1)
        last = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": inputs["attention_mask"]}
        found = model(**last, past_key_values=cache).logits
    row = kit.rows_by_hand(model, inputs, METHODS[0])[0]
    embeds, where, _ = row
    with opened(model, kinds_of(inputs, 0, row), replace(stages, reduce=None), 25) as by_hand, torch.no_grad():
        cache = by_hand.cache(inputs_embeds=embeds)
        model(inputs_embeds=embeds, position_ids=where, past_key_values=cache)
        cache.crop(-1)
        wanted = model(inputs_embeds=embeds[:, -1:], position_ids=where[:, -1:], past_key_values=cache).logits
    assert kit.difference(found, wanted) < EXACT


@pytest.mark.parametrize("mode", ["visual", "global"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_without_a_cache_every_column_that_was_given_has_its_logits(kit, family, mode):
    tiny = kit.vlm(family, dtype=F64)
    model, text = tiny.model, f"adsc(layers=[2],stride=2) | {LAZY.format(mode)} | {EVICT}"
    row = kit.rows_by_hand(model, tiny.inputs, METHODS[0])[0]
    with compress(model, stages_of(METHODS[0], text), 30), torch.no_grad():
        found = model(**tiny.inputs, use_cache=False).logits
    with opened(model, kinds_of(tiny.inputs, 0, row), text, 30), torch.no_grad():
        wanted = model(inputs_embeds=row[0], position_ids=row[1], use_cache=False).logits
    assert kit.difference(found[:, row[2]], wanted) < EXACT
    gone = torch.ones(found.shape[1], dtype=torch.bool).scatter(0, torch.tensor(row[2]), False)
    assert not found[:, gone].any()


@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("text", [STAGES[0][0], STAGES[6][0]])
def test_rows_change_places(kit, text, how):
    """With what is known of their columns: they were given different counts."""
    model, inputs = kit.padded("llava", dtype=F64)
    swap, steps = torch.tensor([1, 0]), kit.words(2, 5)
    mask = inputs["attention_mask"]
    logits = []
    for order in (torch.arange(2), swap):
        with compress(model, stages_of(METHODS[1], text), 25) as session, torch.no_grad():
            cache = session.cache(**inputs)
            model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
            assert not session._reducing.last.real.all()
            getattr(cache, how)(order)
            longer = widen(mask, (0, 5), value=1)
            cache.expect(longer.shape[1])
            more = {"position_ids": (longer.cumsum(1) - 1)[:, -5:][order], "attention_mask": longer[order]}
            logits.append(model(input_ids=steps[order], past_key_values=cache, **more).logits[order])
    assert kit.difference(*logits) < EXACT


def test_a_cache_may_be_repeated(kit):
    model, inputs = kit.padded("llava", dtype=F64)
    mask, steps = inputs["attention_mask"], kit.words(2, 5)
    logits, kept = [], []
    for times in (1, 3):
        with compress(model, stages_of(METHODS[1], STAGES[3][0]), 60) as session, torch.no_grad():
            cache = session.cache(**inputs)
            model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
            cache.batch_repeat_interleave(times)
            longer = widen(mask, (0, 5), value=1).repeat_interleave(times, 0)
            kinds = widen((inputs["input_ids"] == IMAGE).to(torch.int8), (0, 5)).repeat_interleave(times, 0)
            cache.expect(longer.shape[1], modality=kinds)
            more = {"position_ids": (longer.cumsum(1) - 1)[:, -5:], "attention_mask": longer}
            out = model(input_ids=steps.repeat_interleave(times, 0), past_key_values=cache, **more)
            logits.append(out.logits.repeat_interleave(3 // times, 0))
            kept.append(cache.kept_masks()[0].repeat_interleave(3 // times, 0))
    assert kit.difference(*logits) < EXACT
    assert torch.equal(*kept)


@pytest.mark.parametrize("text", [STAGES[i][0] for i in (0, 2, 8)])
def test_text_alone_passes_untouched(kit, text):
    """Also through a cache that held an image before it was emptied."""
    tiny = kit.vlm("llava", dtype=F64)
    ids = kit.words(1, 60)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with compress(tiny.model, text, 30) as session:
        wanted = kit.decode(tiny.model, inputs)
    report = session.report()
    with compress(tiny.model, stages_of(METHODS[0], text), 30) as session:
        found = kit.decode(tiny.model, inputs)
        assert session._reducing.last is None
        assert session.report().layers == report.layers
        kit.decode(tiny.model, tiny.inputs, 2)
        session.last.reset()
        again = kit.decode(tiny.model, inputs, past_key_values=session.last)
        assert session.report().layers == report.layers
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(again.logits, wanted.logits)


def test_a_row_of_text_stays_whole_beside_a_row_with_an_image(kit):
    tiny = kit.vlm("llava", batch=2, dtype=F64)
    inputs = kit.without_image(tiny.inputs, row=1)
    stages = stages_of(METHODS[0], STAGES[8][0])
    with compress(tiny.model, stages, 30) as session:
        found = kit.decode(tiny.model, inputs)
    assert session.report().vision_columns[1] == []
    assert sum(session.report().layers[0].kept[1]) == 60
    text = {name: inputs[name][1:] for name in ("input_ids", "attention_mask")}
    with compress(tiny.model, stages, 30):
        assert kit.difference(found.logits[1:], kit.decode(tiny.model, text, found.tokens[1:]).logits) < EXACT


def test_grids_are_not_known_any_more(kit, tmp_path):
    """Even where nothing was left out: a method may have put tokens in another order."""
    tiny = kit.vlm("llava")
    with compress(tiny.model, "snapkv(window=8)", 30) as session:
        kit.decode(tiny.model, tiny.inputs, 1)
    assert session.report().vision_grids == [[(4, 4)]]
    for method, count in ((METHODS[0], 8), (KeepUniform(1.0), 16)):
        with compress(tiny.model, stages_of(method, "snapkv(window=8)"), 30) as session:
            kit.decode(tiny.model, tiny.inputs, 1)
        assert session.report().vision_grids == [[]]
        assert len(session.report().vision_columns[0]) == count
        grid = stages_of(method, "adsc(layers=[2],layout=grid2d) | snapkv(window=8)")
        with compress(tiny.model, grid, 30), pytest.raises(ValueError, match="grid"):
            kit.decode(tiny.model, tiny.inputs, 1)


def test_whoever_looks_at_the_decoder_sees_what_it_is_given(kit):
    tiny, seen = kit.vlm("llava"), []
    hook = tiny.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with compress(tiny.model, stages_of(METHODS[0], STAGES[8][0]), 30) as session:
        kit.decode(tiny.model, tiny.inputs, 1)
        hook.remove()
    assert seen == [session.report().prompt]


def test_the_model_is_as_before(kit):
    tiny = kit.vlm("llava")
    model, stages = tiny.model, stages_of(METHODS[0], STAGES[8][0])
    stock = kit.decode(model, tiny.inputs).logits  # first: transformers leaves hooks of its own behind
    before = kit.state(model)
    with compress(model, stages, 30) as session:
        kit.decode(model, tiny.inputs, 2)
    assert str(stages) in str(session.report())
    assert kit.state(model) == before
    with pytest.raises(ValueError, match="no room for more"), compress(model, stages_of(VisionZip(17, 3), EVICT), 30):
        kit.decode(model, tiny.inputs, 2)
    assert kit.state(model) == before
    assert torch.equal(kit.decode(model, tiny.inputs).logits, stock)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in KNOWN] + ["llama"])
def test_other_models_are_refused_when_the_session_is_made(kit, family):
    model = kit.vlm(family).model
    with pytest.raises(ValueError, match=rf"{type(model).__name__} .* cannot be given fewer vision tokens"):
        compress(model, "visionzip | adakv", 64)


def test_what_would_not_be_told_is_refused(kit):
    tiny = kit.vlm("llava")
    model, inputs, text = tiny.model, tiny.inputs, "visionzip(dominant=5,contextual=3) | snapkv(window=8)"
    in_one_text = r"name everything in one text, as in compress\(model, 'visionzip"
    plan = LazyPlan(4, ((1, 2),), "visual")
    for other in (prune(model, ADSC((1,), 2)), share(model, plan)):
        with other, compress(model, text, 30), torch.no_grad(), pytest.raises(ValueError, match=in_one_text):
            model(**inputs, use_cache=False)
        with other, reduce_images(model, METHODS[0]), torch.no_grad(), pytest.raises(ValueError, match=in_one_text):
            model(**inputs, use_cache=False)
    with compress(model, text, 30):
        with pytest.raises(RuntimeError, match="cannot be nested"):
            reduce_images(model, METHODS[0])
        with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
            kit.decode(model, inputs, 2, prefill_chunk_size=16)
        first = kit.decode(model, inputs, 2)
        assert first.tokens.shape[1] == 2
    with pytest.raises(ValueError, match=r"nothing in 'visionzip' evicts"):
        compress(model, "visionzip", 30)
    with pytest.raises(TypeError, match=r"Stages\(reduce=...\) does not take a ADSC"):
        compress(model, Stages(reduce=ADSC((1,))), 30)


def test_a_conversation_goes_on_where_its_columns_are_counted(kit):
    tiny = kit.vlm("llava")
    with compress(tiny.model, stages_of(METHODS[0], EVICT), 30) as session:
        first = kit.decode(tiny.model, tiny.inputs, 2)
    turn = kit.conversation(tiny.inputs, first.tokens, kit.words(1, 3))
    with compress(tiny.model, EVICT, 30), pytest.raises(ValueError, match="a method that reduces, such as 'visionzip"):
        kit.decode(tiny.model, turn, 2, past_key_values=session.last)


def test_rows_that_do_not_fit_are_refused(kit):
    tiny = kit.vlm("llava", batch=2)
    protect = torch.zeros(3, tiny.inputs["input_ids"].shape[1], dtype=torch.bool)
    stages = stages_of(METHODS[0], EVICT)
    with compress(tiny.model, stages, 30, protect=protect), pytest.raises(ValueError, match="have 3 rows, the batch"):
        kit.decode(tiny.model, tiny.inputs, 2)

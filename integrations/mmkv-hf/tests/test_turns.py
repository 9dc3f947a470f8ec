"""Second and third turns: what is held is scored again together with what is new, and the budget holds again."""

from itertools import pairwise

import pytest
import torch
from mmkv_hf import Budget, Pipeline, compress
from mmkv_hf._compat import CHUNKS_LATER_TURNS
from mmkv_scores import Observation
from mmkv_testkit.oracle import MaskedDense, Round
from torch.nn.functional import pad as widen
from transformers import DynamicCache

F64 = torch.float64
EXACT = 1e-9
MATTERS = 1e-2
RAGGED, UNIFORM = "adakv+mixkv+bacon+snapkv(window=8)", "snapkv(window=8)"
PIPELINES = [
    RAGGED,
    UNIFORM,
    "pyramidkv(beta=3)+adakv+snapkv(window=8)",
    "adakv+h2o+select(recent=4)",
    "streamingllm",
    "adakv+tova",
]
NEW = (11, 5)  # tokens of the second and third turn; the third is shorter than the window


def talk(kit, model, inputs, pipeline, budget, answers, **settings):
    """Turns in one session with forced answers: logits per turn, kept masks per turn, inputs per turn, cache."""
    turns, logits, kept, cache = [inputs], [], [], None
    for count, answer in zip(NEW, answers[:-1], strict=False):
        new = torch.cat([words(count, row) for row in answer])
        turns.append(kit.conversation(turns[-1], answer, new))
    with compress(model, pipeline, budget) as session:
        for turn, answer in zip(turns, answers, strict=True):
            logits.append(kit.decode(model, turn, answer, past_key_values=cache, **settings).logits)
            cache = session.last
            kept.append(cache.kept_masks())
    return logits, kept, turns, cache


def words(count, answer):
    """New tokens [1, n] of a row, the same ones for the same answer, whatever the batch."""
    return torch.randint(3, 400, (1, count), generator=torch.Generator().manual_seed(int(answer.sum()) + count))


def rounds_of(kept, turns):
    """Every turn's kept set binds the queries after that turn's prompt."""
    return [Round(keep, turn["input_ids"].shape[1]) for keep, turn in zip(kept, turns, strict=True)]


def answers_of(kit, batch):
    return [kit.words(batch, n, seed=20 + n) for n in (4, 3, 4)]


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("is_padded", [False, True], ids=["one row", "left-padded"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_three_turns(kit, name, is_padded, pipeline):
    model, inputs = (
        kit.padded(name, F64) if is_padded else (kit.vlm(name, dtype=F64).model, kit.vlm(name, dtype=F64).inputs)
    )
    answers = answers_of(kit, len(inputs["input_ids"]))
    logits, kept, turns, cache = talk(kit, model, inputs, pipeline, kit.BUDGET, answers)
    stock = DynamicCache(config=model.config.get_text_config(decoder=True))
    plain = DynamicCache(config=model.config.get_text_config(decoder=True))
    for i, (turn, answer) in enumerate(zip(turns, answers, strict=True)):
        with MaskedDense(model, rounds_of(kept[: i + 1], turns[: i + 1])):
            expected = kit.decode(model, turn, answer, past_key_values=stock)
        dense = kit.decode(model, turn, answer, past_key_values=plain)
        assert kit.difference(logits[i], expected.logits) < EXACT
        assert kit.difference(logits[i], dense.logits) > MATTERS
    for before, after in pairwise(kept):
        for layer, keep in before.items():
            assert not (after[layer][..., : keep.shape[-1]] & ~keep).any(), "evicted entries came back"
    real = [turn["attention_mask"].bool()[:, None] for turn in turns]
    for keep, valid in zip(kept, real, strict=True):
        assert not any((layer & ~valid).any() for layer in keep.values())
        assert sum(layer.sum((1, 2)) for layer in keep.values()).tolist() == [kit.BUDGET * 2 * 4] * len(valid)
    assert all(
        (layer.slots is not None) == (pipeline in (UNIFORM, "streamingllm")) for layer in cache.compressed_layers
    )


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "paligemma", "mllama", "qwen3_5", "glm4v", "internvl"])
@pytest.mark.parametrize("pipeline", [RAGGED, UNIFORM])
def test_two_turns_of_other_families(kit, name, pipeline):
    model, inputs = kit.padded(name, F64)
    answers = answers_of(kit, 2)[:2]
    logits, kept, turns, _ = talk(kit, model, inputs, pipeline, kit.BUDGET, answers)
    stock = DynamicCache(config=model.config.get_text_config(decoder=True))
    for i, (turn, answer) in enumerate(zip(turns, answers, strict=True)):
        with MaskedDense(model, rounds_of(kept[: i + 1], turns[: i + 1])):
            expected = kit.decode(model, turn, answer, past_key_values=stock)
        assert kit.difference(logits[i], expected.logits) < EXACT


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("budget", [30, 0.4])
def test_kept_set_is_that_of_a_fresh_scoring(kit, pipeline, budget):
    """Layer by layer: a padded copy of what was held, plus what is new, given to the pipeline by hand."""
    model, inputs = kit.padded("llama", F64)
    answers = answers_of(kit, 2)[:2]
    _, kept, turns, _ = talk(kit, model, inputs, pipeline, budget, answers)
    stock = DynamicCache(config=model.config.get_text_config(decoder=True))
    with MaskedDense(model, rounds_of(kept, turns)):
        kit.decode(model, turns[0], answers[0], past_key_values=stock)
        queries = captured(model, lambda: kit.decode(model, turns[1], 1, past_key_values=stock))
    method = Pipeline.parse(pipeline)
    mask = turns[1]["attention_mask"].bool()
    first, end = turns[0]["input_ids"].shape[1], mask.shape[1]
    round_ = method.start(Budget.of(budget).per_head(mask.sum(1), 1), 4, mask.sum(1))
    for i, layer in enumerate(stock.layers):
        held = widen(kept[0][i], (0, end - first), value=True) & mask[:, None]
        seen = observation(i, layer, queries[i], held, method)
        chosen = round_.decide(seen, seen.slots == end - 1)
        assert torch.equal(on_columns(chosen.mask(), seen.slots, end), kept[1][i])


def captured(model, run):
    """Post-RoPE queries of every layer's first call while `run` runs, via the oracle's attention function."""
    import mmkv_testkit.oracle as oracle

    found, inner = {}, oracle.dense_attention

    def spy(query, *args):
        found.setdefault(len(found), query)
        return inner(query, *args)

    oracle.dense_attention = spy
    try:
        run()
    finally:
        oracle.dense_attention = inner
    return found


def observation(layer, cache, queries, held, method):
    """What is held [B, H, end], packed to the right per head, as one Observation."""
    batch, heads, end = held.shape
    width = int(held.sum(-1).max())
    slots = torch.full((batch, heads, width), -1)
    for b in range(batch):
        for h in range(heads):
            columns = held[b, h].nonzero()[:, 0]
            slots[b, h, width - len(columns) :] = columns
    index = slots.clamp(min=0)[..., None].expand(-1, -1, -1, cache.keys.shape[-1])
    rows = torch.arange(end - queries.shape[2], end)
    visible = (slots[:, :, None] <= rows[:, None]) & (slots >= 0)[:, :, None]
    keys = cache.keys.gather(2, index)
    sums, counts = sums_by_hand(queries, keys, visible)
    window = min(method.window, queries.shape[2])
    return Observation(
        queries=queries[:, :, queries.shape[2] - window :],
        keys=keys,
        values=cache.values.gather(2, index),
        valid=slots >= 0,
        candidates=slots >= 0,
        slots=slots,
        mask=visible[:, :, queries.shape[2] - window :],
        column_sums=sums,
        column_counts=counts,
        scaling=queries.shape[-1] ** -0.5,
        layer=layer,
        num_layers=4,
    )


def sums_by_hand(queries, keys, visible):
    """Attention each entry received [B, H, N], mean over the group, and how many queries could see it."""
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    logits = torch.einsum("bhgqd,bhkd->bhgqk", grouped, keys) * queries.shape[-1] ** -0.5
    weights = logits.masked_fill(~visible[:, :, None], float("-inf")).softmax(-1)
    return weights.mean(2).sum(2).float(), visible.sum(2)


def on_columns(mask, slots, end):
    """A mask over packed entries as one over logical columns."""
    wide = torch.zeros(*mask.shape[:2], end + 1, dtype=torch.bool)
    return wide.scatter(2, slots + 1, mask)[..., 1:]


@pytest.mark.parametrize("pipeline", [RAGGED, UNIFORM])
def test_second_turn_of_a_padded_row_is_that_of_the_row_alone(kit, pipeline):
    from mmkv_testkit.prompts import unpadded

    model, inputs = kit.padded("llama", F64)
    answers = answers_of(kit, 2)
    for budget in (kit.BUDGET, 0.3):
        together, kept, turns, _ = talk(kit, model, inputs, pipeline, budget, answers)
        for i in range(2):
            real = turns[-1]["attention_mask"][i].bool()
            alone, own, own_turns, _ = talk(
                kit, model, unpadded(inputs, i), pipeline, budget, [answer[i : i + 1] for answer in answers]
            )
            new = [turn["input_ids"][i : i + 1] for turn in turns]
            for a, t in zip(new, own_turns, strict=True):
                assert torch.equal(a[:, real[: a.shape[1]]], t["input_ids"]), (
                    "the test compares different conversations"
                )
            for layer, keep in own[-1].items():
                assert torch.equal(kept[-1][layer][i : i + 1][..., real], keep)
            assert kit.difference(together[-1][i : i + 1], alone[-1]) < EXACT


def stock_in_chunks(kit, model, inputs, answer, **settings):
    """Asserts that a second turn in chunks is, on the stock cache, the turn at once."""
    turn, logits = kit.conversation(inputs, answer, kit.words(len(answer), 11)), []
    for given in ({}, settings):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        kit.decode(model, inputs, answer, past_key_values=cache)
        logits.append(kit.decode(model, turn, answer, past_key_values=cache, **given).logits)
    assert kit.difference(*logits) < EXACT, "a second turn in chunks is not the turn at once"


@pytest.mark.parametrize("pipeline", [RAGGED, UNIFORM])
@pytest.mark.parametrize("settings", [{"prefill_chunk_size": 4}, {"prefill_chunk_size": 1}])
def test_second_turn_in_chunks(kit, pipeline, settings):
    model, inputs = kit.padded("llama", F64)
    answers = answers_of(kit, 2)
    kit.stock_or_skip(lambda: stock_in_chunks(kit, model, inputs, answers[0], **settings))
    whole, kept, *_ = talk(kit, model, inputs, pipeline, kit.BUDGET, answers)
    parts, again, *_ = talk(kit, model, inputs, pipeline, kit.BUDGET, answers, **settings)
    assert all(kit.difference(a, b) < EXACT for a, b in zip(whole, parts, strict=True))
    assert all(torch.equal(a[i], b[i]) for a, b in zip(kept, again, strict=True) for i in a)


def test_chunks_of_a_second_turn_are_refused_where_stock_gets_them_wrong(kit, monkeypatch):
    model, inputs = kit.padded("llama", F64)
    answers = answers_of(kit, 2)
    try:
        stock_in_chunks(kit, model, inputs, answers[0], prefill_chunk_size=4)
        stock_is_right = True
    except Exception:
        stock_is_right = False
    assert stock_is_right == CHUNKS_LATER_TURNS
    monkeypatch.setattr("mmkv_hf.session.CHUNKS_LATER_TURNS", False)
    with pytest.raises(ValueError, match="prefill_chunk_size cannot be used"):
        talk(kit, model, inputs, RAGGED, kit.BUDGET, answers, prefill_chunk_size=4)


@pytest.mark.parametrize("pipeline", [RAGGED, UNIFORM])
def test_second_turn_given_as_new_tokens_only(kit, pipeline):
    """Stock generate takes the new tokens alone where the attention mask shows that there are more."""
    model, inputs = kit.padded("llama", F64)
    answer = kit.words(2, 4)
    turn = kit.conversation(inputs, answer, kit.words(2, 11))
    out = []
    for short in (False, True):
        with compress(model, pipeline, kit.BUDGET) as session:
            kit.decode(model, inputs, answer)
            given = dict(turn)
            if short:
                given["input_ids"] = given["input_ids"][:, session.last.get_seq_length() :]
            out.append(kit.decode(model, given, kit.words(2, 4), past_key_values=session.last))
            assert session.last.kept_masks()[0].shape[-1] == turn["input_ids"].shape[1]
    assert kit.difference(out[0].logits, out[1].logits) < EXACT


@pytest.mark.parametrize("pipeline", [RAGGED, UNIFORM])
def test_second_turn_with_embeddings(kit, pipeline):
    tiny = kit.vlm("llama", dtype=F64)
    answer = kit.words(1, 4)
    turn = kit.conversation(tiny.inputs, answer, kit.words(1, 11))
    embeds = {
        "inputs_embeds": tiny.model.get_input_embeddings()(turn["input_ids"]).detach(),
        "attention_mask": turn["attention_mask"],
    }
    out = []
    for given in (turn, embeds):
        with compress(tiny.model, pipeline, kit.BUDGET) as session:
            kit.decode(tiny.model, tiny.inputs, answer)
            out.append(kit.decode(tiny.model, given, kit.words(1, 4), past_key_values=session.last))
    assert kit.difference(out[0].logits, out[1].logits) < EXACT


@pytest.mark.parametrize("pipeline", [RAGGED, UNIFORM])
def test_second_turn_after_beams(kit, pipeline):
    """A cache of beams goes on with one conversation per beam."""
    tiny = kit.vlm("llama", dtype=F64)
    with compress(tiny.model, pipeline, kit.BUDGET) as session:
        out = tiny.model.generate(**tiny.inputs, num_beams=2, num_return_sequences=2, do_sample=False, max_new_tokens=4)
        cache, first = session.last, session.last.kept_masks()
        cache.crop(-(cache.get_seq_length() - tiny.inputs["input_ids"].shape[1]))  # the beams' tails
        twice = {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in tiny.inputs.items()}
        turn = kit.conversation(twice, out[:, -4:], kit.words(2, 7))
        logits = kit.decode(tiny.model, turn, kit.words(2, 4), past_key_values=cache).logits
    stock = DynamicCache(config=tiny.text_config)
    rounds = [Round(first, tiny.inputs["input_ids"].shape[1]), Round(cache.kept_masks(), turn["input_ids"].shape[1])]
    with MaskedDense(tiny.model, rounds):
        with torch.no_grad():
            tiny.model(**twice, past_key_values=stock)
        expected = kit.decode(tiny.model, turn, kit.words(2, 4), past_key_values=stock).logits
    assert kit.difference(logits, expected) < EXACT


@pytest.mark.parametrize("pipeline", [RAGGED, UNIFORM])
def test_a_turn_of_another_batch_size_is_refused(kit, pipeline):
    """After beams the cache has a row for each; going on with one row has to say so, and leaves the cache whole."""
    tiny = kit.vlm("llava")
    with compress(tiny.model, pipeline, 30):
        beams = {"num_beams": 2, "num_return_sequences": 2, "do_sample": False, "return_dict_in_generate": True}
        out = tiny.model.generate(**tiny.inputs, max_new_tokens=3, **beams)
        cache, words = out.past_key_values, out.sequences
        assert cache.compressed_layers[0].batch_size == 2
        more = torch.cat([words, torch.full((2, 3), 5)], dim=1)
        with pytest.raises(ValueError, match="holds 2 rows and is given tokens of 1"):
            tiny.model.generate(input_ids=more[:1], max_new_tokens=2, past_key_values=cache)
        both = tiny.model.generate(input_ids=more, max_new_tokens=2, do_sample=False, past_key_values=cache)
    assert both.shape == (2, more.shape[1] + 2)


@pytest.mark.parametrize("pipeline", [RAGGED, UNIFORM])
def test_second_image_in_the_second_turn(kit, pipeline):
    tiny = kit.vlm("llava", dtype=F64, images=2)
    ids, pixels = tiny.inputs["input_ids"], tiny.inputs["pixel_values"]
    cut = 12 + 16 + 2
    first = {"input_ids": ids[:, :cut], "attention_mask": torch.ones(1, cut).long(), "pixel_values": pixels[:1]}
    second = {"input_ids": ids, "attention_mask": tiny.inputs["attention_mask"], "pixel_values": pixels[1:]}
    forced = kit.words(1, 4)
    with compress(tiny.model, pipeline, 20) as session:
        kit.decode(tiny.model, first, 1)
        cache, kept = session.last, [session.last.kept_masks()]
        out = kit.decode(tiny.model, second, forced, past_key_values=cache)
        kept.append(cache.kept_masks())
    assert all(layer.sum() == 40 for keep in kept for layer in keep.values())
    assert session.report().to_dict()["prompt"] == ids.shape[1]
    stock = DynamicCache(config=tiny.text_config)
    with MaskedDense(tiny.model, [Round(kept[0], cut), Round(kept[1], ids.shape[1])]):
        kit.decode(tiny.model, first, 1, past_key_values=stock)
        expected = kit.decode(tiny.model, second, forced, past_key_values=stock)
    assert kit.difference(out.logits, expected.logits) < EXACT


def test_uniform_first_turn_and_right_padded_second(kit):
    """Rows of unequal second turns, padded on the right in a forward loop: the cache turns ragged, and stays right."""
    model, inputs = kit.padded("llama", F64)
    new, forced = kit.words(2, 9), kit.words(2, 3, seed=1)
    n = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[1] * 6 + [0] * 3, [1] * 9])], 1)

    def run(cache, after_first=None):
        with torch.no_grad():
            model(**inputs, past_key_values=cache, position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, :n])
            if after_first:
                after_first()
            positions = (mask.cumsum(1) - 1)[:, n:]
            model(input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=cache)
            logits, grown = [], mask
            for i in range(3):
                grown = widen(grown, (0, 1), value=1)
                position = mask.sum(1, keepdim=True) + i
                logits.append(
                    model(
                        input_ids=forced[:, i : i + 1],
                        attention_mask=grown,
                        position_ids=position,
                        past_key_values=cache,
                    ).logits[:, -1]
                )
        return torch.stack(logits, 1)

    kept = []
    with compress(model, UNIFORM, kit.BUDGET) as session:
        cache = session.cache(**inputs)

        def after_first():
            assert all(layer.slots is not None for layer in cache.compressed_layers)
            kept.append(cache.kept_masks())
            cache.expect(n + 9)

        out = run(cache, after_first)
    kept.append(cache.kept_masks())
    with MaskedDense(model, [Round(kept[0], n), Round(kept[1], n + 9)]):
        expected = run(DynamicCache(config=model.config.get_text_config(decoder=True)))
    assert kit.difference(out, expected) < EXACT
    real = mask.bool()[:, None]
    assert all((keep & real).sum((1, 2)).tolist() == [kit.BUDGET * 2] * 2 for keep in kept[1].values())


def test_nothing_to_evict_in_either_turn(kit):
    tiny = kit.vlm("llava")
    answer = kit.words(1, 3)
    turn = kit.conversation(tiny.inputs, answer, kit.words(1, 5))
    stock = DynamicCache(config=tiny.text_config)
    with compress(tiny.model, RAGGED, 1000) as session:
        kit.decode(tiny.model, tiny.inputs, answer)
        out = kit.decode(tiny.model, turn, past_key_values=session.last)
    kit.decode(tiny.model, tiny.inputs, answer, past_key_values=stock)
    assert torch.equal(out.logits, kit.decode(tiny.model, turn, past_key_values=stock).logits)


def test_evicting_for_the_first_time_in_the_second_turn(kit):
    tiny = kit.vlm("llava", dtype=F64)
    n, answer = tiny.inputs["input_ids"].shape[1], kit.words(1, 3)
    turn = kit.conversation(tiny.inputs, answer, kit.words(1, 9))
    for pipeline in (RAGGED, UNIFORM):
        with compress(tiny.model, pipeline, n) as session:
            kit.decode(tiny.model, tiny.inputs, answer)
            assert session.last.compressed_layers[0].kept is None
            out = kit.decode(tiny.model, turn, kit.words(1, 4), past_key_values=session.last)
        keep = session.last.kept_masks()
        assert all(layer.sum() == 2 * n for layer in keep.values())
        stock = DynamicCache(config=tiny.text_config)
        kit.decode(tiny.model, tiny.inputs, answer, past_key_values=stock)
        expected = kit.masked(tiny.model, turn, kit.words(1, 4), keep, past_key_values=stock)
        assert kit.difference(out.logits, expected.logits) < EXACT

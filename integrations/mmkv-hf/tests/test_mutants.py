"""Typical mistakes, planted one at a time: the checks of the other files have to notice each of them.

What one check cannot see (hf.md, section 4) another one must: `catches` names the check that fails.
"""

from dataclasses import replace

import pytest
import torch
from mmkv_hf import attention, compress, layers
from mmkv_hf.window import WindowRows
from mmkv_select import RaggedKV
from mmkv_testkit.oracle import MaskedDense, Round
from mmkv_testkit.prompts import pad, row, unpadded
from transformers import DynamicCache

F64 = torch.float64
EXACT = 1e-9


class CaughtError(AssertionError):
    """A check failed."""


def demand(condition, what):
    if not condition:
        raise CaughtError(what)


def check_batch(kit, pipeline):
    """Left-padded generate against the masked dense cache."""
    model, inputs = kit.padded("llama", F64)
    stock = kit.decode(model, inputs)
    out, cache = kit.compressed(model, inputs, stock.tokens, pipeline=pipeline)
    expected = kit.masked(model, inputs, stock.tokens, cache.kept_masks())
    demand(kit.difference(out.logits, expected.logits) < EXACT, "padded batch")


def check_loop(kit, pipeline):
    """Forward loop whose positions come from the cache's length."""
    tiny = kit.vlm("llama", dtype=F64)
    ids = tiny.inputs["input_ids"]
    forced = kit.decode(tiny.model, tiny.inputs).tokens

    def run(cache):
        with torch.no_grad():
            tiny.model(input_ids=ids, past_key_values=cache)
            return torch.cat(
                [tiny.model(input_ids=forced[:, i : i + 1], past_key_values=cache).logits for i in range(4)], 1
            )

    with compress(tiny.model, pipeline, kit.BUDGET) as session:
        cache = session.cache(input_ids=ids)
        out = run(cache)
    with MaskedDense(tiny.model, cache.kept_masks()):
        expected = run(DynamicCache(config=tiny.text_config))
    demand(kit.difference(out, expected) < EXACT, "forward loop")


def check_turns(kit, pipeline):
    """A second turn of a padded batch, whose kept set depends on the slots of the first."""
    model, inputs = kit.padded("llama", F64)
    answer, forced = kit.words(2, 3), kit.words(2, 4, seed=3)
    turn = kit.conversation(inputs, answer, kit.words(2, 9))
    with compress(model, pipeline, kit.BUDGET) as session:
        kit.decode(model, inputs, answer)
        kept = [session.last.kept_masks()]
        out = kit.decode(model, turn, forced, past_key_values=session.last)
    kept.append(session.last.kept_masks())
    stock = DynamicCache(config=model.config.get_text_config(decoder=True))
    sizes = (inputs["input_ids"].shape[1], turn["input_ids"].shape[1])
    with MaskedDense(model, [Round(*pair) for pair in zip(kept, sizes, strict=True)]):
        kit.decode(model, inputs, answer, past_key_values=stock)
        expected = kit.decode(model, turn, forced, past_key_values=stock)
    demand(kit.difference(out.logits, expected.logits) < EXACT, "second turn")


def check_alone(kit, pipeline):
    """Each row of a padded batch keeps what it keeps alone, also where the budget is a share of the prompt."""
    model, inputs = kit.padded("llama", F64)
    for budget in (kit.BUDGET, 0.4):
        _, cache = kit.compressed(model, inputs, 2, pipeline=pipeline, budget=budget)
        for i in range(2):
            _, own = kit.compressed(model, unpadded(inputs, i), 2, pipeline=pipeline, budget=budget)
            real = inputs["attention_mask"][i].bool()
            same = [torch.equal(cache.kept_masks()[n][i : i + 1][..., real], m) for n, m in own.kept_masks().items()]
            demand(all(same), "row alone")


def check_slots(kit, pipeline):
    """What is stored are the keys of the columns that are said to be kept."""
    tiny = kit.vlm("llama", dtype=F64)
    stock = DynamicCache(config=tiny.text_config)
    kit.decode(tiny.model, tiny.inputs, 1, past_key_values=stock)
    _, cache = kit.compressed(tiny.model, tiny.inputs, 1, pipeline=pipeline)
    for ours, dense in zip(cache.compressed_layers, stock.layers, strict=True):
        keys, values, slots = ours.entries()
        index = slots.clamp(min=0)[..., None].expand_as(keys)
        held = (slots >= 0)[..., None]
        demand(torch.equal(keys * held, dense.keys.gather(2, index) * held), "keys are not those of their slots")
        demand(torch.equal(values * held, dense.values.gather(2, index) * held), "values are not those of their slots")


def check_chunks(kit, pipeline):
    """Reading in chunks keeps the same."""
    model, inputs = kit.padded("llama", F64)
    _, whole = kit.compressed(model, inputs, 2, pipeline=pipeline)
    _, parts = kit.compressed(model, inputs, 2, pipeline=pipeline, prefill_chunk_size=5)
    same = [torch.equal(parts.kept_masks()[layer], kept) for layer, kept in whole.kept_masks().items()]
    demand(all(same), "chunks")


def check_right(kit, pipeline):
    """A forward loop over rows padded on the right, where the tail starts with padding."""
    tiny = kit.vlm("llama", batch=2, dtype=F64)
    inputs, forced = pad(tiny.inputs, right=[9, 0]), kit.words(2, 3)

    def run(cache):
        mask, logits = inputs["attention_mask"], []
        with torch.no_grad():
            tiny.model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
            for i in range(3):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                given = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
                logits.append(tiny.model(input_ids=forced[:, i : i + 1], **given, past_key_values=cache).logits)
        return torch.cat(logits, 1)

    with compress(tiny.model, pipeline, kit.BUDGET) as session:
        cache = session.cache(**inputs)
        out = run(cache)
    with MaskedDense(tiny.model, cache.kept_masks()):
        expected = run(DynamicCache(config=tiny.text_config))
    demand(kit.difference(out, expected) < EXACT, "right-padded loop")


def check_share_of_a_padded_row(kit, pipeline):
    """In later turns a share of the prompt is one of its real tokens, as for the row without padding."""
    model, inputs = kit.padded("llama", F64)
    answer, new, kept = kit.words(1, 3), kit.words(1, 30), []
    for given in (row(inputs, 0), unpadded(inputs, 0)):
        with compress(model, pipeline, 0.4) as session:
            kit.decode(model, given, answer)
            kit.decode(model, kit.conversation(given, answer, new), 1, past_key_values=session.last)
        kept.append([mask.sum(-1) for mask in session.last.kept_masks().values()])
    demand(all(torch.equal(a, b) for a, b in zip(*kept, strict=True)), "share of a padded row")


CHECKS = (
    check_batch,
    check_loop,
    check_turns,
    check_alone,
    check_slots,
    check_chunks,
    check_right,
    check_share_of_a_padded_row,
)
RAGGED, UNIFORM = "adakv+mixkv+bacon+snapkv(window=8)", "snapkv(window=8)"


@pytest.mark.parametrize("pipeline", [RAGGED, UNIFORM])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_without_a_mutant_every_check_passes(kit, check, pipeline):
    check(kit, pipeline)


def physical(layer):
    if not layer.is_initialized:
        return 0
    return layer.keys.shape[2] + (0 if layer.prefix is None else int(layer.prefix.lengths.max()))


def physical_length(monkeypatch):
    monkeypatch.setattr(layers.CompressedLayer, "get_seq_length", physical)


def physical_mask(monkeypatch):
    monkeypatch.setattr(layers.CompressedLayer, "get_mask_sizes", lambda layer, n: (physical(layer) + n, 0))


def stored(change):
    """A mutant of what is stored when a prompt has been compressed."""

    def plant(monkeypatch):
        true = layers.compact
        monkeypatch.setattr(
            layers, "compact", lambda keys, values, slots, kept: change(true(keys, values, slots, kept))
        )

    plant.__name__ = change.__name__
    return plant


def shifted_slots(prefix):
    return replace(prefix, slots=(prefix.slots - 1).clamp(min=0))


def rolled_slots(prefix):
    return replace(prefix, slots=prefix.slots.roll(1))


def swapped_heads(prefix):
    a, b = prefix.cu_seqlens[1:3].tolist()
    order = torch.cat([torch.arange(a, b), torch.arange(a), torch.arange(b, len(prefix.keys))])
    return replace(prefix, keys=prefix.keys[order])


def swapped_keys_and_values(prefix):
    return replace(prefix, keys=prefix.values, values=prefix.keys)


def wrong_offsets(prefix):
    cu = prefix.cu_seqlens.clone()
    cu[1] -= 1
    return replace(prefix, cu_seqlens=cu)


def padding_counted(monkeypatch):
    """Every column is a real one: padding scores, competes and counts for shares."""
    true = layers.CompressedLayer._compress
    monkeypatch.setattr(layers.CompressedLayer, "_compress", lambda layer, visible, *rest: true(layer, None, *rest))


def padding_counts_for_the_budget(monkeypatch):
    true = layers.CompressedLayer._decide

    def decide(layer, keys, values, slots, visible, lengths, *rest):
        columns = torch.full_like(lengths, layer.group.request.prompt_end)
        return true(layer, keys, values, slots, visible, columns, *rest)

    monkeypatch.setattr(layers.CompressedLayer, "_decide", decide)


def padding_seen(monkeypatch):
    """The mask is dropped on the way to the ragged cache."""
    true = attention._ragged
    monkeypatch.setattr(
        attention, "_ragged", lambda layer, query, key, value, mask, *rest: true(layer, query, key, value, None, *rest)
    )


def mask_not_gathered(monkeypatch):
    """The prefix is masked by physical instead of logical columns."""

    def gather(prefix, mask):
        places = torch.cat([torch.arange(n) for n in prefix.lengths.flatten().tolist()])
        return true(replace(prefix, slots=places.to(torch.int32)), mask)

    true = RaggedKV.gather_mask
    monkeypatch.setattr(RaggedKV, "gather_mask", gather)


def window_of_the_last_chunk(monkeypatch):
    monkeypatch.setattr(WindowRows, "then", lambda rows, new, size: new)


def compressed_after_the_first_chunk(monkeypatch):
    true = layers.CompressedLayer.observe

    def observe(layer, *args):
        end, layer.group.request.prompt_end = layer.group.request.prompt_end, layer.seen
        true(layer, *args)
        layer.group.request.prompt_end = end

    monkeypatch.setattr(layers.CompressedLayer, "observe", observe)


def padding_forgotten_in_uniform_form(monkeypatch):
    true = layers.CompressedLayer._store

    def store(layer, keys, values, slots, kept, padding):
        true(layer, keys, values, slots, kept, torch.zeros_like(padding))

    monkeypatch.setattr(layers.CompressedLayer, "_store", store)


MUTANTS = [
    (physical_length, RAGGED, check_loop),
    (physical_length, RAGGED, check_batch),
    (physical_length, UNIFORM, check_loop),
    (physical_mask, RAGGED, check_batch),
    (physical_mask, UNIFORM, check_batch),
    (stored(shifted_slots), RAGGED, check_slots),
    (stored(shifted_slots), UNIFORM, check_slots),
    (stored(rolled_slots), RAGGED, check_slots),
    (stored(shifted_slots), RAGGED, check_turns),
    (stored(shifted_slots), UNIFORM, check_turns),
    (stored(swapped_heads), RAGGED, check_batch),
    (stored(swapped_keys_and_values), RAGGED, check_batch),
    (stored(swapped_keys_and_values), UNIFORM, check_slots),
    (stored(wrong_offsets), RAGGED, check_batch),
    (padding_counted, RAGGED, check_alone),
    (padding_counted, UNIFORM, check_alone),
    (padding_counts_for_the_budget, RAGGED, check_alone),
    (padding_seen, RAGGED, check_right),
    (padding_forgotten_in_uniform_form, UNIFORM, check_share_of_a_padded_row),
    (mask_not_gathered, RAGGED, check_batch),
    (window_of_the_last_chunk, RAGGED, check_chunks),
    (window_of_the_last_chunk, UNIFORM, check_chunks),
    (compressed_after_the_first_chunk, RAGGED, check_chunks),
]


@pytest.mark.parametrize(
    ("mutant", "pipeline", "catches"), MUTANTS, ids=[f"{m.__name__}-{p[:5]}-{c.__name__}" for m, p, c in MUTANTS]
)
def test_mutant_is_caught(kit, monkeypatch, mutant, pipeline, catches):
    mutant(monkeypatch)
    too_short = mutant is physical_mask and pipeline == RAGGED  # crashes when gathered; all others compute wrong values
    with pytest.raises(IndexError if too_short else CaughtError):
        catches(kit, pipeline)

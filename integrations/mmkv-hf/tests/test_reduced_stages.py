"""Images reduced before pruning, lazy layers and eviction, against these stages on prompts made by hand."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from mmkv_hf import Stages, compress
from mmkv_prune import PruMergePlus, VisionZip
from mmkv_testkit.families import pad

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
        if not kwargs["past_key_values"].get_seq_length():
            types[:, : kinds.shape[1]] = kinds
        return args, kwargs | {"mm_token_type_ids": types}

    def hide(module, args, kwargs):
        return args, {name: value for name, value in kwargs.items() if name != "mm_token_type_ids"}

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(tell, with_kwargs=True).remove)
        session = stack.enter_context(compress(model, *args, **settings))
        stack.callback(model.register_forward_pre_hook(hide, with_kwargs=True).remove)
        yield session


@torch.no_grad()
def read(model, cache, embeds, where, tokens):
    """Logits [1, n, V] of a model that reads a prompt and then `tokens` [1, n], and the next position."""
    logits = []
    for step in range(tokens.shape[1]):
        logits.append(model(inputs_embeds=embeds, position_ids=where, past_key_values=cache).logits[:, -1])
        embeds = model.get_input_embeddings()(tokens[:, step : step + 1])
        where = torch.full_like(where[..., :1], int(where.max()) + 1)
    return torch.stack(logits, 1)


def alone(model, row, kinds, tokens, stages, budget, protect=None):
    """One row's prompt by hand through the stages that follow: logits [1, n, V] and the session."""
    with opened(model, kinds, replace(stages, reduce=None), budget, protect=protect) as session:
        cache = session.cache(inputs_embeds=row[0], mm_token_type_ids=kinds)
        return read(model, cache, *row[:2], tokens), session


def check(kit, model, inputs, stages, budget, tokens=5, protect=None):
    """Generation under all stages equals each row's prompt by hand under those that follow; gives what both made."""
    with compress(model, stages, budget, protect=protect) as session:
        found = kit.decode(model, inputs, tokens)
    rows = kit.rows_by_hand(model, inputs, stages.reduce)
    for i, row in enumerate(rows):
        kinds = kinds_of(inputs, i, row)
        own = None if protect is None else protect[i][inputs["attention_mask"][i].bool()][row[2]][None]
        logits, by_hand = alone(model, row, kinds, found.tokens[i : i + 1], stages, budget, own)
        assert kit.difference(found.logits[i : i + 1], logits) < EXACT
        check_kept(session, by_hand, i)
    return found, session, rows


def check_kept(session, by_hand, i):
    """Row i keeps what its prompt by hand keeps, and the report says so."""
    real = session._reducing.last.real[i]
    for layer, mask in by_hand.last.kept_masks().items():
        assert torch.equal(session.last.kept_masks()[layer][i][:, real], mask[0])
    found, wanted = session.report(), by_hand.report()
    assert found.prompt == len(real)
    assert [layer.kept[i] for layer in found.layers] == [layer.kept[0] for layer in wanted.layers]
    fillers = int((~real).sum())
    assert found.vision_columns[i] == [fillers + column for column in wanted.vision_columns[0]]
    assert torch.equal(found.vision_kept[i], wanted.vision_kept[0])


@pytest.mark.parametrize(("text", "budget"), STAGES)
@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("family", KNOWN)
def test_a_padded_batch_of_two_images_equals_the_prompts_by_hand(kit, family, method, text, budget):
    tiny = kit.vlm(family, batch=2, images=2, dtype=F64)
    check(kit, tiny.model, pad(tiny.inputs, left=[9, 0]), stages_of(method, text), budget)

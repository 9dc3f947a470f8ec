"""Trace: what earlier layers left, joined by slot and head."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_scores import Trace


@st.composite
def histories(draw):
    """Layers of (slots [B, H or 1, N] ascending with -1 for padding on the left, values [B, H, N]) and the depth."""
    batch, heads, depth = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 4))
    layers = []
    for _ in range(draw(st.integers(1, 6))):
        length, rows = draw(st.integers(0, 6)), draw(st.sampled_from([1, heads]))
        slots = torch.full((batch, rows, length), -1)
        for row in slots.view(-1, length) if length else []:
            held = sorted(draw(st.sets(st.integers(0, 8), max_size=length)))
            row[length - len(held) :] = torch.tensor(held, dtype=torch.int64)
        value = draw(
            st.lists(st.floats(0, 1, width=32), min_size=batch * heads * length, max_size=batch * heads * length)
        )
        layers.append((slots, torch.tensor(value).view(batch, heads, length)))
    return layers, depth


@settings(deadline=None, max_examples=150)
@given(histories())
def test_recall_against_dictionaries(case):
    layers, depth = case
    trace, held = Trace(), []
    for layer, (slots, value) in enumerate(layers):
        mean, std = trace.recall("x", layer, slots, depth, value)
        for b, h, i in (
            (b, h, i) for b in range(value.shape[0]) for h in range(value.shape[1]) for i in range(value.shape[2])
        ):
            slot = int(slots[b, min(h, slots.shape[1] - 1), i])
            known = [x[b, h, slot] for x in (held[-depth:] if depth else []) if (b, h, slot) in x] if slot >= 0 else []
            average = sum(known) / len(known) if known else 0.0
            spread = (sum((x - average) ** 2 for x in known) / len(known)) ** 0.5 if known else 0.0
            if slot >= 0:
                assert abs(float(mean[b, h, i]) - average) < 1e-6
                assert abs(float(std[b, h, i]) - spread) < 1e-6
        trace.push("x", layer, slots, value, depth)
        held.append({})
        for b in range(value.shape[0]):
            for h in range(value.shape[1]):
                for i, slot in enumerate(slots[b, min(h, slots.shape[1] - 1)].tolist()):
                    held[-1][b, h, slot] = float(value[b, h, i])
        held[-1] = {key: x for key, x in held[-1].items() if key[2] >= 0}


def test_the_same_value_in_every_layer_has_no_deviation():
    trace, slots, value = Trace(), torch.arange(100)[None, None], torch.rand(1, 1, 100) / 10
    for layer in range(3):
        trace.push("x", layer, slots, value, 4)
    _, std = trace.recall("x", 3, slots, 4, value)
    assert float((std / value).max()) < 1e-6


def test_only_earlier_layers_within_the_depth_are_read():
    trace, slots = Trace(), torch.arange(2)[None, None]
    for layer in range(6):
        trace.push("x", layer, slots, torch.full((1, 1, 2), float(layer)), 3)
    like = torch.zeros(1, 1, 2)
    assert trace.recall("x", 6, slots, 3, like)[0].tolist() == [[[4.0, 4.0]]]
    assert trace.recall("x", 6, slots, 1, like)[0].tolist() == [[[5.0, 5.0]]]
    assert trace.recall("x", 5, slots, 3, like)[0].tolist() == [[[3.5, 3.5]]]  # layer 2 is forgotten, 5 is not earlier
    assert trace.recall("x", 0, slots, 3, like)[0].tolist() == [[[0.0, 0.0]]]
    assert len(trace.tensors()) == 6


def test_places_do_not_mix():
    trace, slots = Trace(), torch.arange(2)[None, None]
    trace.push("x", 0, slots, torch.ones(1, 1, 2), 4)
    assert not trace.recall("y", 1, slots, 4, torch.zeros(1, 1, 2))[0].any()


def test_layers_with_other_heads_are_left_out():
    trace, slots = Trace(), torch.arange(2)[None, None]
    trace.push("x", 0, slots, torch.ones(1, 4, 2), 4)
    assert not trace.recall("x", 1, slots, 4, torch.zeros(1, 2, 2))[0].any()


@pytest.mark.parametrize("depth", [0, 4])
def test_clear_frees(depth):
    trace, value, slots = Trace(), torch.ones(1, 1, 2), torch.arange(2)[None, None]
    alive = [weakref.ref(value), weakref.ref(slots)]
    trace.push("x", 0, slots, value, depth)
    assert len(trace.tensors()) == (2 if depth else 0)
    trace.clear()
    assert trace.tensors() == []
    del value, slots
    gc.collect()
    assert [ref() for ref in alive] == [None, None]

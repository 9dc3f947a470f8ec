"""Uniform and PyramidKV against schedules worked out with fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmkv_budget import PyramidKV, Uniform

rows = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000)), min_size=1, max_size=5)


def schedule(rule, rows, num_layers):
    """Capacities [row][layer]."""
    candidates, capacity = (torch.tensor(column, dtype=torch.int64) for column in zip(*rows, strict=True))
    layers = [rule(candidates, capacity, layer, num_layers) for layer in range(num_layers)]
    assert all(out.dtype == torch.int64 for out in layers)
    return torch.stack(layers, 1).tolist()


def exact_pyramid(candidates, capacity, num_layers, beta):
    mean = min(candidates, capacity)
    low = int(mean // beta)
    high = 2 * mean - low
    if high > candidates:
        high, low = candidates, 2 * mean - candidates
    if num_layers == 1:
        return [mean]
    due = [high - layer * Fraction(high - low, num_layers - 1) for layer in range(num_layers)]
    out = [int(x) for x in due]
    order = sorted(range(num_layers), key=lambda layer: (-(due[layer] - out[layer]), layer))
    for layer in order[: mean * num_layers - sum(out)]:
        out[layer] += 1
    return out


def released_pyramid(length, budget, window, num_layers, beta=20):
    """KVCache-Factory's three regimes, in tokens including the window."""
    low = (budget - window) // beta
    high = (budget - window) * 2 - low
    if high >= length - window:
        high = length - window
        low = (budget - window) * 2 - high
    step = (high - low) // (num_layers - 1)
    if length < budget:
        return [length] * num_layers
    if length < (budget - window) * 2:
        return [budget] * num_layers
    return [int(high - layer * step) + window for layer in range(num_layers)]


@given(rows)
def test_uniform(rows):
    assert schedule(Uniform(), rows, 3) == [[min(pair)] * 3 for pair in rows]


@given(rows, st.integers(1, 90), st.sampled_from([1, 1.5, 2, 7.3, 20, 20.0, 1000]))
def test_exact_pyramid(rows, num_layers, beta):
    for (candidates, capacity), got in zip(rows, schedule(PyramidKV(beta), rows, num_layers), strict=True):
        assert got == exact_pyramid(candidates, capacity, num_layers, beta)
        assert sum(got) == num_layers * min(capacity, candidates)
        assert got == sorted(got, reverse=True)
        assert min(got) >= 0
        assert max(got) <= candidates


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 3000), st.integers(1, 40))
def test_exact_pyramid_is_monotone_in_the_budget(candidates, first, second, num_layers):
    low, high = sorted((first, second))
    less, more = schedule(PyramidKV(), [(candidates, low), (candidates, high)], num_layers)
    assert sum(less) <= sum(more)


def test_published_vector():
    got = schedule(PyramidKV(exact=False), [(2000 - 32, 64 - 32)], 28)[0]
    assert [c + 32 for c in got] == list(range(95, 40, -2))
    assert sum(got) + 28 * 32 == 1904


def test_exact_spends_the_published_budget_and_no_more():
    assert sum(schedule(PyramidKV(), [(2000 - 32, 64 - 32)], 28)[0]) == 28 * 32


@given(st.integers(0, 64), st.integers(1, 600), st.integers(0, 2500), st.integers(2, 60), st.sampled_from([1, 7.5, 20]))
def test_released_pyramid(window, capacity, candidates, num_layers, beta):
    rule = PyramidKV(beta=beta, exact=False, window=window)
    got = schedule(rule, [(candidates, capacity)], num_layers)[0]
    want = released_pyramid(candidates + window, capacity + window, window, num_layers, beta)
    # The release then takes a top-k, which cannot exceed what exists (its uniform regime asks for more).
    assert [c + window for c in got] == [min(c, candidates + window) for c in want]
    assert got == sorted(got, reverse=True)


def test_released_regimes_differ_by_the_window():
    n, capacity = 90, 50
    assert len(set(schedule(PyramidKV(exact=False, window=5), [(n, capacity)], 8)[0])) == 1
    assert len(set(schedule(PyramidKV(exact=False, window=10), [(n, capacity)], 8)[0])) == 8


@pytest.mark.parametrize("exact", [True, False])
def test_nothing_is_remembered_and_nothing_inverted(exact):
    rule = PyramidKV(exact=exact)
    long, short = (5000, 480), (368, 480)
    before = schedule(rule, [long], 28)
    assert schedule(rule, [short], 28) == [[368] * 28]
    assert schedule(rule, [long], 28) == before
    assert schedule(rule, [short, long], 28) == [[368] * 28, *before]


@pytest.mark.parametrize("exact", [True, False])
def test_one_layer_and_empty_rows(exact):
    rule = PyramidKV(exact=exact)
    assert schedule(rule, [(100, 10), (5, 10), (0, 10), (10, 0)], 1) == [[10], [5], [0], [0]]
    assert schedule(rule, [(100, 0), (0, 0)], 4) == [[0] * 4] * 2


def test_batch_of_none():
    none = torch.zeros(0, dtype=torch.int64)
    assert PyramidKV()(none, none, 1, 3).shape == Uniform()(none, none, 1, 3).shape == (0,)


@pytest.mark.parametrize("beta", [0.5, 0, -1, float("nan"), float("inf")])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="beta"):
        PyramidKV(beta=beta)


@pytest.mark.parametrize("rule", [Uniform(), PyramidKV()])
def test_bad_inputs(rule):
    one = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="layer 3 of 3"):
        rule(one, one, 3, 3)
    with pytest.raises(ValueError, match="layer -1"):
        rule(one, one, -1, 3)
    with pytest.raises(ValueError, match=r"\[B\]"):
        rule(one, one[:1], 0, 3)
    with pytest.raises(ValueError, match="candidates"):
        rule(one.float(), one, 0, 3)


def test_settings_are_values():
    assert PyramidKV() == PyramidKV(beta=20) != PyramidKV(beta=10)
    assert hash(PyramidKV()) == hash(PyramidKV(20))
    assert (Uniform.capacities, PyramidKV.capacities) == ("equal", "static")

"""Blocks against a search over every way to cut, and what may never share."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_layershare import LayerKind, LazyPlan, plan_lazy_layers

steps = st.lists(st.floats(0, math.log(2)), min_size=1, max_size=9)
PLAIN = LayerKind(8, 4, 64, "default")


def is_block(divergences, first, last, epsilon, cap):
    return last - first + 1 <= cap and all(x < epsilon for x in divergences[first:last])


def most_lazy(divergences, epsilon, cap):
    """The most layers that any set of disjoint blocks makes lazy, by trying every cut of the layers into runs."""
    layers, best = len(divergences) + 1, 0
    for cuts in itertools.product([False, True], repeat=layers - 1):
        ends = [layer for layer, cut in enumerate(cuts) if cut] + [layers - 1]
        starts = [0, *(end + 1 for end in ends[:-1])]
        runs = list(zip(starts, ends, strict=True))
        if all(a == b or is_block(divergences, a, b, epsilon, cap) for a, b in runs):
            best = max(best, sum(b - a for a, b in runs))
    return best


@settings(deadline=None, max_examples=60)
@given(steps, st.floats(0.01, 1), st.integers(2, 5))
def test_blocks_are_runs_of_alike_neighbours_and_as_many_layers_lazy_as_can_be(divergences, epsilon, cap):
    plan = plan_lazy_layers(divergences, epsilon=epsilon, max_block=cap)
    assert all(is_block(divergences, first, last, epsilon, cap) for first, last in plan.blocks)
    assert len(plan.lazy) == most_lazy(divergences, epsilon, cap)
    assert plan == plan_lazy_layers(divergences, epsilon=epsilon, max_block=cap)


@settings(deadline=None)
@given(steps, st.floats(0.05, 0.8))
def test_a_share_takes_the_smallest_epsilon_that_reaches_it(divergences, share):
    reachable = most_lazy(divergences, 1.0, 5) / (len(divergences) + 1)
    if share > reachable:
        with pytest.raises(ValueError, match=r"at most .* can be lazy"):
            plan_lazy_layers(divergences, lazy_share=share)
        return
    plan = plan_lazy_layers(divergences, lazy_share=share)
    assert len(plan.lazy) >= share * plan.num_layers
    largest = max(max(divergences[first:last]) for first, last in plan.blocks)
    for epsilon in divergences:  # nothing below the largest divergence that is shared would do
        if 0 < epsilon <= largest:
            assert len(plan_lazy_layers(divergences, epsilon=epsilon).lazy) < share * plan.num_layers


def test_long_runs_are_cut_from_the_left():
    plan = plan_lazy_layers([0.1] * 7, epsilon=0.2, max_block=3)
    assert plan.blocks == ((0, 2), (3, 5), (6, 7))
    assert plan.lazy == (1, 2, 4, 5, 7)


@pytest.mark.parametrize(
    "other",
    [
        LayerKind(8, 2, 64, "default"),
        LayerKind(4, 4, 64, "default"),
        LayerKind(8, 4, 32, "default"),
        LayerKind(8, 4, 64, "local"),
        LayerKind(8, 4, 64, "default", full=False),
    ],
)
def test_layers_of_different_kinds_never_share(other):
    kinds = [PLAIN, PLAIN, other, PLAIN, PLAIN]
    plan = plan_lazy_layers([0.0] * 4, epsilon=0.1, kinds=kinds)
    assert plan.blocks == ((0, 1), (3, 4))
    plan.check(kinds)
    with pytest.raises(ValueError, match=r"layers 1 and 2 of block 1\.\.2 cannot share attention"):
        LazyPlan(5, ((1, 2),)).check(kinds)


def test_two_sliding_layers_never_share():
    kinds = [LayerKind(8, 4, 64, full=False)] * 3
    assert plan_lazy_layers([0.0, 0.0], epsilon=0.1, kinds=kinds).blocks == ()
    with pytest.raises(ValueError, match="does not attend to everything"):
        LazyPlan(3, ((0, 1),)).check(kinds)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({}, "either epsilon or lazy_share"),
        ({"epsilon": 0.1, "lazy_share": 0.5}, "either epsilon or lazy_share"),
        ({"epsilon": 0.0}, "epsilon must be in"),
        ({"epsilon": 1.5}, "epsilon must be in"),
        ({"lazy_share": 1.0}, "lazy_share must be in"),
        ({"lazy_share": 0.9}, "at most 66.7%"),
        ({"epsilon": 0.1, "max_block": 1}, "starts at 2"),
        ({"epsilon": 0.1, "kinds": [PLAIN]}, "got 1 kinds"),
        ({"epsilon": 0.1, "mode": "both"}, "mode is"),
    ],
)
def test_wrong_settings_are_named(settings_, message):
    with pytest.raises(ValueError, match=message):
        plan_lazy_layers([0.1, 0.2], **settings_)


@pytest.mark.parametrize("divergences", [[], [-0.1], [0.7], [float("nan")]])
def test_what_is_no_divergence_is_refused(divergences):
    with pytest.raises(ValueError, match="divergences are numbers"):
        plan_lazy_layers(divergences, epsilon=0.1)

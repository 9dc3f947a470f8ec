"""Costs against sums over layers and tokens, and the figures the paper states."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_layershare import Geometry, LazyPlan, lazy_cost

LLAVA = Geometry(num_layers=32, hidden=4096, intermediate=11008, query_heads=32, kv_heads=32, head_dim=128)
N23 = LazyPlan.preset("llava-1.5-7b")
GLOBAL = LazyPlan(32, N23.blocks, "global")
PLAIN = LazyPlan(32)


def by_layer(plan, g, vision, text):
    """KV bytes, parameters and multiply-adds, matrix by matrix."""
    stored = parameters = macs = 0
    tokens = vision + text
    for layer in range(g.num_layers):
        borrows = plan.anchor(layer) != layer
        own = tokens if not borrows else text if plan.mode == "visual" else 0  # tokens with own queries and keys
        for heads, count in ((g.query_heads, own), (g.kv_heads, own), (g.kv_heads, tokens)):  # q, k, v
            macs += g.hidden * heads * g.head_dim * count
        if not (borrows and plan.mode == "global"):
            parameters += g.hidden * g.head_dim * (g.query_heads + g.kv_heads)
        parameters += g.hidden * g.head_dim * (g.query_heads + g.kv_heads) + 3 * g.hidden * g.intermediate
        macs += g.hidden * g.query_heads * g.head_dim * tokens + 3 * g.hidden * g.intermediate * tokens  # output, MLP
        macs += 2 * g.query_heads * g.head_dim * tokens * tokens
        stored += (own + tokens) * g.kv_heads * g.head_dim * g.itemsize
    return stored, parameters, macs


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["visual", "global"]), st.integers(0, 40), st.integers(0, 9), st.sampled_from([1, 2, 8]))
def test_costs_are_the_sums_over_layers(mode, vision, text, group):
    g = Geometry(6, 40, 72, 8, 8 // group, 16, itemsize=4)
    plan = LazyPlan(6, ((0, 2), (4, 5)), mode)
    cost = lazy_cost(plan, g, vision=vision, text=text)
    assert (cost.kv_bytes, cost.parameters, cost.macs) == by_layer(plan, g, vision, text)
    assert cost.q_cache_bytes == (vision if mode == "visual" else vision + text) * 8 * 16 * 4


def saved(plan, vision, text, part="kv_bytes"):
    full, lazy = (getattr(lazy_cost(p, LLAVA, vision=vision, text=text), part) for p in (PLAIN, plan))
    return 1 - lazy / full


def test_the_paper_s_savings():
    assert saved(GLOBAL, 576, 60) == 23 / 64  # "over 35 %"
    assert saved(N23, 2000, 60) == pytest.approx(0.349, abs=5e-4)  # LLaVA-NeXT-length prompt
    assert saved(N23, 576, 60) == pytest.approx(0.325, abs=5e-4)  # below the paper's 35 % on a LLaVA-1.5 prompt
    plain, lazy = (lazy_cost(plan, LLAVA, vision=2004, text=60) for plan in (PLAIN, GLOBAL))
    assert 6.76 - (plain.parameters - lazy.parameters) / 1e9 == pytest.approx(5.98, abs=0.01)  # table 3
    assert plain.macs * 2 / 1e12 == pytest.approx(26.73 + 2.23, abs=0.01)
    assert (plain.macs - lazy.macs) * 2 / 26.73e12 == pytest.approx(0.119, abs=5e-4)  # of the linear layers


def test_no_blocks_cost_what_the_model_costs_and_share_nothing():
    assert lazy_cost(PLAIN, LLAVA, vision=5, text=7).q_cache_bytes == 0
    text_only = (lazy_cost(plan, LLAVA, vision=0, text=9) for plan in (PLAIN, N23))
    assert len({cost.kv_bytes for cost in text_only}) == 1


def test_the_q_cache_of_grouped_query_heads():
    """28 query heads on 4 KV heads: 12.5 % of the 28 layers' cache instead of 1.6 %."""
    g = Geometry(28, 3584, 18944, 28, 4, 128)
    cost = lazy_cost(LazyPlan(28, ((2, 6),), "global"), g, vision=100, text=0)
    full = lazy_cost(LazyPlan(28), g, vision=100, text=0)
    assert cost.q_cache_bytes / full.kv_bytes == 0.125


@pytest.mark.parametrize(
    ("sizes", "message"), [((4, 8, 8, 4, 3, 2), "no multiple"), ((4, 8, 0, 4, 2, 2), "intermediate")]
)
def test_impossible_geometries_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Geometry(*sizes)


def test_plans_and_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="plan is for 4 layers"):
        lazy_cost(LazyPlan(4), LLAVA, vision=1, text=1)
    with pytest.raises(ValueError, match="negative"):
        lazy_cost(PLAIN, LLAVA, vision=-1, text=1)

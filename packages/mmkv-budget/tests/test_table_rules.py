"""SparseMM and HeadKV against water-filling with fractions and the published formulas."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_budget import HeadKV, HeadScores, SparseMM


@st.composite
def tables(draw):
    """Scores [L][Hq] with zeros and ties, and the number of KV heads."""
    layers, kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    score = draw(st.sampled_from([st.integers(0, 3), st.integers(0, 1000), st.sampled_from([0, 0, 0, 7])]))
    scores = [[draw(score) for _ in range(kv_heads * group)] for _ in range(layers)]
    if not any(map(any, scores)):
        scores[-1][0] = 1
    return scores, kv_heads


rows = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 80)), min_size=1, max_size=4)


def plan(rule, rows, layers, heads):
    """Counts [row][layer][head]."""
    candidates, capacity = (torch.tensor(column, dtype=torch.int64) for column in zip(*rows, strict=True))
    counts = rule.plan(candidates, capacity, layers, heads)
    assert counts.dtype == torch.int64
    assert counts.shape == (layers, len(rows), heads)
    return counts.transpose(0, 1).tolist()


def kv_weights(scores, kv_heads):
    """Share of each KV head, layer by layer, exact."""
    group = len(scores[0]) // kv_heads
    total = sum(map(sum, scores))
    return [Fraction(sum(row[h * group : (h + 1) * group]), total) for row in scores for h in range(kv_heads)]


def fill(total, limit, base, weights):
    """u + level * w, cut to the limit, the excess going round by weight until nobody is over, then evenly."""
    amounts: list[Fraction | None] = [None] * len(weights)
    while True:
        open_heads = [i for i, amount in enumerate(amounts) if amount is None]
        rest = total - sum(a for a in amounts if a is not None)
        share = sum(weights[i] for i in open_heads)
        spare = rest - base * len(open_heads)
        if share == 0:
            for i in open_heads:
                amounts[i] = base + Fraction(spare, len(open_heads))
            return amounts
        due = {i: base + spare * weights[i] / share for i in open_heads}
        over = [i for i in open_heads if due[i] >= limit]
        if not over:
            for i in open_heads:
                amounts[i] = due[i]
            return amounts
        for i in over:
            amounts[i] = Fraction(limit)


def exact_oracle(scores, kv_heads, candidates, capacity, everyone):
    mean = min(candidates, capacity)
    weights = kv_weights(scores, kv_heads)
    total = mean * len(weights)
    due = fill(total, candidates, everyone(mean), weights)
    out = [int(x) for x in due]
    order = sorted(range(len(out)), key=lambda i: (-(due[i] - out[i]), i))
    for i in order[: total - sum(out)]:
        out[i] += 1
    return [out[i : i + kv_heads] for i in range(0, len(out), kv_heads)]


def released_oracle(scores, kv_heads, candidates, capacity, everyone):
    if candidates <= capacity:
        return [[candidates] * kv_heads for _ in scores]
    group, total = len(scores[0]) // kv_heads, float(sum(map(sum, scores)))
    u = everyone(capacity)
    pool = (capacity - u) * len(scores) * kv_heads
    return [
        [min(candidates, round(sum(row[h * group : (h + 1) * group]) / total * pool + u)) for h in range(kv_heads)]
        for row in scores
    ]


RULES = [
    pytest.param(lambda table, exact: SparseMM(table, exact=exact), lambda c: int(c * 0.1), id="sparsemm"),
    pytest.param(lambda table, exact: SparseMM(table, 0.5, exact), lambda c: int(c * 0.5), id="sparsemm-half"),
    pytest.param(lambda table, exact: SparseMM(table, 0, exact), lambda c: 0, id="sparsemm-0"),
    pytest.param(lambda table, exact: SparseMM(table, 1, exact), lambda c: c, id="sparsemm-1"),
    pytest.param(lambda table, exact: HeadKV(table, exact=exact), lambda c: int(c - c // 1.01), id="headkv"),
    pytest.param(lambda table, exact: HeadKV(table, 2, exact), lambda c: c - c // 2, id="headkv-2"),
]


@pytest.mark.parametrize(("rule", "everyone"), RULES)
@settings(max_examples=80, deadline=None)
@given(tables(), rows)
def test_exact(rule, everyone, table, rows):
    scores, heads = table
    for (candidates, capacity), got in zip(rows, plan(rule(scores, True), rows, len(scores), heads), strict=True):
        assert got == exact_oracle(scores, heads, candidates, capacity, everyone)
        assert sum(map(sum, got)) == min(candidates, capacity) * len(scores) * heads
        assert all(0 <= c <= candidates for layer in got for c in layer)


@pytest.mark.parametrize(("rule", "everyone"), RULES)
@settings(max_examples=50, deadline=None)
@given(tables(), rows)
def test_released(rule, everyone, table, rows):
    scores, heads = table
    for (candidates, capacity), got in zip(rows, plan(rule(scores, False), rows, len(scores), heads), strict=True):
        assert got == released_oracle(scores, heads, candidates, capacity, everyone)


@pytest.mark.parametrize("exact", [True, False])
def test_a_real_size(exact):
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(32, 32, generator=generator).pow(12)
    rows = [(2400, 32), (2400, 480), (300, 480), (40, 32), (10**6, 10**5)]
    out = torch.tensor(plan(SparseMM(scores, exact=exact), rows, 32, 8))
    totals = out.sum((1, 2)).tolist()
    want = [min(pair) * 32 * 8 for pair in rows]
    assert (totals == want) is exact
    assert bool((out <= torch.tensor([n for n, _ in rows]).view(-1, 1, 1)).all())


@settings(max_examples=50, deadline=None)
@given(tables(), st.integers(0, 60), st.integers(0, 60), st.integers(0, 20))
def test_more_budget_keeps_more(table, candidates, capacity, extra):
    scores, heads = table
    for rule in (SparseMM(scores), HeadKV(scores)):
        less, more = plan(rule, [(candidates, capacity), (candidates, capacity + extra)], len(scores), heads)
        assert sum(map(sum, less)) <= sum(map(sum, more))


@settings(max_examples=50, deadline=None)
@given(tables(), rows)
def test_a_row_alone_is_the_row_in_the_batch(table, rows):
    scores, heads = table
    for rule in (SparseMM(scores), HeadKV(scores), SparseMM(scores, exact=False)):
        whole = plan(rule, rows, len(scores), heads)
        assert [plan(rule, [row], len(scores), heads)[0] for row in rows] == whole


def test_heads_permute_with_their_scores():
    scores, order = [[5, 1, 9, 30]], [2, 0, 3, 1]
    rows = [(50, 12), (14, 12)]
    permuted = plan(SparseMM([[scores[0][i] for i in order]]), rows, 1, 4)
    assert permuted == [[[row[0][i] for i in order]] for row in plan(SparseMM(scores), rows, 1, 4)]


def test_scale_of_the_scores_does_not_matter():
    rows = [(50, 12)]
    assert plan(SparseMM([[1, 2], [3, 4]]), rows, 2, 2) == plan(SparseMM([[1e-6, 2e-6], [3e-6, 4e-6]]), rows, 2, 2)


def test_group_scores_are_summed():
    assert plan(SparseMM([[1, 3, 4, 0]], 0), [(99, 8)], 1, 2) == [[[8, 8]]]
    assert plan(HeadKV([[1, 3, 12, 0]], 1), [(99, 8)], 1, 2) == [[[4, 12]]]


def test_saturated_heads_pass_their_share_on():
    rows = [(10, 8)]
    assert plan(SparseMM([[0, 4], [1, 45]], 0), rows, 2, 2) == [[[2, 10], [10, 10]]]
    assert plan(SparseMM([[0, 4], [1, 45]], 0, exact=False), rows, 2, 2) == [[[0, 3], [1, 10]]]


def test_the_table_can_be_a_path_read_once(tmp_path):
    path = tmp_path / "table.json"
    HeadScores([[1, 2], [3, 4]], "m", "visual").save(path)
    rule = SparseMM(str(path))
    path.unlink()
    assert plan(rule, [(20, 5)], 2, 2) == plan(SparseMM([[1, 2], [3, 4]]), [(20, 5)], 2, 2)
    assert rule.table.source == str(path)
    assert rule == SparseMM(HeadScores([[1, 2], [3, 4]], "m", "visual"))


@pytest.mark.parametrize("rule", [SparseMM, HeadKV])
def test_bad_tables(rule, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.json.*per model"):
        rule(tmp_path / "missing.json")
    with pytest.raises(ValueError, match=r"no table.*per model"):
        rule(None)
    with pytest.raises(ValueError, match="zero"):
        rule([[0, 0]])
    with pytest.raises(ValueError, match=r"2 layers of 3 heads, needed are 2 layers of 2 KV heads.*per model"):
        plan(rule([[1, 2, 3]] * 2), [(5, 2)], 2, 2)
    with pytest.raises(ValueError, match="2 layers of 4 heads, needed are 28 layers"):
        rule([[1, 2, 3, 4]] * 2).plan(torch.tensor([5]), torch.tensor([2]), 28, 4)
    with pytest.raises(ValueError, match="candidates"):
        rule([[1]]).plan(torch.tensor([5]), torch.tensor([2, 3]), 1, 1)


def test_bad_settings():
    with pytest.raises(ValueError, match="ratio"):
        SparseMM([[1]], ratio=1.5)
    with pytest.raises(ValueError, match="beta"):
        HeadKV([[1]], beta=0.9)
    with pytest.raises(TypeError, match="ratio"):
        SparseMM([[1]], ratio="a")


def test_settings_are_values():
    assert SparseMM([[1, 2]]) == SparseMM(((1.0, 2.0),)) == SparseMM(torch.tensor([[1, 2]]))
    assert len({SparseMM([[1, 2]]), SparseMM([[1, 2]], 0.2), HeadKV([[1, 2]]), HeadKV([[1, 2]])}) == 3
    assert SparseMM.counts == HeadKV.counts == "static"


def test_float_noise_does_not_settle_ties():
    """Due are 29.6 and 225.6 tokens (of 166.8, 10, 29.6, 225.6): the earlier of the two equal remainders wins."""
    assert plan(SparseMM([[8, 0, 1, 11]]), [(500, 108)], 1, 4) == [[[167, 10, 30, 225]]]


def test_a_negative_count_of_tokens_is_none():
    assert plan(SparseMM([[1, 2]]), [(9, -3), (-3, 9)], 1, 2) == [[[0, 0]]] * 2

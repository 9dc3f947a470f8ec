"""`Round.decide`: exact totals, padding, protected entries, short prompts, what layers pass on."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_pipelines import Pipeline
from mmkv_pipelines._checks import checked_counts
from mmkv_scores import Scores
from mmkv_select import Select

LAYERS, HEADS = 4, 2
TABLE = "[[3,1],[0,2],[5,5],[1,0.5]]"
SELECT = "select(recent=4)"
BASES = ["snapkv(window=4)", "tova", "h2o", "streamingllm", "knorm", "vnorm", "keydiff", "random"]
WRAPPED = ["bacon+snapkv(window=4)", "mixkv+snapkv(window=4)", "mixkv+bacon+snapkv(window=4)", "mixkv+h2o"]
PER_LAYER = [
    *BASES,
    *WRAPPED,
    *(f"adakv+{base}" for base in (*WRAPPED, "snapkv(window=4)", "h2o", "tova", "streamingllm", "random")),
    "adakv(normalize=False)+keydiff",
    "adakv(floor=0.5,normalize=False)+mixkv+bacon(preset=paper)+snapkv(window=4,pooling=max)",
]
OVER_LAYERS = [
    "pyramidkv+snapkv(window=4)",
    "pyramidkv(beta=3)+adakv+mixkv+bacon+snapkv(window=4)",
    "pyramidkv+bacon+snapkv(window=4)",
    f"sparsemm(table={TABLE})+snapkv(window=4)",
    f"headkv(table={TABLE})+mixkv+bacon+snapkv(window=4)",
    f"sparsemm(table={TABLE},ratio=0.5)+bacon+snapkv(window=4)",
]


def totals(kept):
    """Kept pairs per layer, of one row."""
    return kept.sum((1, 2)).tolist()


@pytest.mark.parametrize("text", PER_LAYER)
@pytest.mark.parametrize("budget", [5, 6, 13, 29, 30, 31, 500])
def test_every_layer_keeps_exactly_the_budget(request_of, decide, text, budget):
    rows, _ = decide(
        f"{text}+{SELECT}", budget, request_of(30, 1), request_of(3, 2), request_of(17, 3), request_of(41, 4)
    )
    for kept, length in zip(rows, (30, 3, 17, 41), strict=True):
        assert totals(kept) == [HEADS * min(budget, length)] * LAYERS


@pytest.mark.parametrize("text", OVER_LAYERS)
@pytest.mark.parametrize("budget", [5, 6, 13, 16, 29, 30, 31, 500])
def test_all_layers_together_keep_exactly_the_budget(request_of, decide, text, budget):
    rows, _ = decide(
        f"{text}+{SELECT}", budget, request_of(30, 1), request_of(3, 2), request_of(17, 3), request_of(41, 4)
    )
    for kept, length in zip(rows, (30, 3, 17, 41), strict=True):
        assert int(kept.sum()) == LAYERS * HEADS * min(budget, length)


def test_budgets_compose(request_of, decide):
    """PyramidKV gives each layer its capacity, AdaKV shares it out within the layer."""
    pyramid, _ = decide("pyramidkv(beta=4)+snapkv(window=4)", 14, request_of(60))
    both, _ = decide("pyramidkv(beta=4)+adakv+snapkv(window=4)", 14, request_of(60))
    assert totals(pyramid[0]) == totals(both[0])
    assert totals(both[0])[0] > totals(both[0])[-1]
    per_head = both[0].sum(-1)
    assert bool((per_head[:, 0] != per_head[:, 1]).any())
    # C = 10: the last layer gets 10 // 4 = 2 candidates, the first 18, in even steps; 4 are protected in each head
    assert totals(both[0]) == [HEADS * (4 + x) for x in (18, 13, 7, 2)]


@pytest.mark.parametrize("text", [*PER_LAYER, *OVER_LAYERS])
@settings(
    deadline=None, max_examples=12, derandomize=True
)  # sets are compared: scores may not come within 1e-7 of a cut
@given(data=st.data())
def test_a_row_keeps_the_same_alone_and_in_a_batch(request_of, decide, text, data):
    text = (
        f"{text}+select(recent=4,sinks={data.draw(st.integers(0, 2))},granularity={data.draw(st.sampled_from([1, 4]))})"
    )
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=3))
    budgets = [data.draw(st.integers(8, 30)) for _ in lengths]
    requests = [request_of(n, seed=n + 100 * i, named=(n - 1,)) for i, n in enumerate(lengths)]
    width = max(lengths) + data.draw(st.integers(0, 5))
    pads = [(left := data.draw(st.integers(0, width - n)), width - n - left) for n in lengths]
    together, _ = decide(text, budgets, *requests, pads=pads)
    for request, budget, found in zip(requests, budgets, together, strict=True):
        alone, _ = decide(text, budget, request)
        assert torch.equal(found, alone[0])


@pytest.mark.parametrize("text", ["snapkv(window=4)", "adakv+mixkv+bacon+snapkv(window=4)", *OVER_LAYERS, "random"])
@pytest.mark.parametrize("select", ["recent=3,sinks=2", "recent=0,sinks=0", "recent=2,protect=image", "sinks=5"])
def test_protected_entries_stay(request_of, decide, text, select):
    pipeline = Pipeline.parse(f"{text}+select({select})")
    requests = [request_of(40, 1, named=(7, 8)), request_of(25, 2, named=(0,))]
    rows, _ = decide(pipeline, 33, *requests)
    for kept, r in zip(rows, requests, strict=True):
        recent = pipeline.window if pipeline.select.recent is None else pipeline.select.recent
        safe = r.protect.clone()
        safe[r.length - recent :] = True
        safe[: pipeline.select.sinks] = True
        if pipeline.select.protect:
            safe |= r.modality == 1
        assert bool(kept[:, :, safe].all())
        assert int(kept.sum()) == LAYERS * HEADS * min(33, r.length)


@pytest.mark.parametrize("text", ["snapkv(window=4)", "adakv+mixkv+bacon+snapkv(window=4)", *OVER_LAYERS])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 16])
def test_nothing_to_evict(request_of, decide, text, length):
    rows, answers = decide(text, 16, request_of(length), request_of(16))
    assert answers == [None] * LAYERS
    assert all(bool(kept.all()) for kept in rows)


def test_some_layers_of_a_pyramid_keep_everything(request_of, decide):
    rows, answers = decide("pyramidkv+snapkv(window=4)", 14, request_of(18))
    assert [answer is None for answer in answers] == [True, False, False, False]
    assert totals(rows[0])[0] == 2 * 18


@pytest.mark.parametrize(
    "text", ["snapkv(window=4)", "adakv+snapkv(window=4)", "pyramidkv+snapkv(window=4)", OVER_LAYERS[3]]
)
def test_budget_within_the_protected_tokens(request_of, decide, text):
    """The message names the least that works; that works, and one less does not."""
    request = request_of(30, named=(3,))
    for budget in (1, 6):
        with pytest.raises(
            ValueError, match=f"budget {budget} .* 6 protected tokens of row 1; the least that works is 7"
        ):
            decide(f"{text}+select(sinks=1)", budget, request_of(2), request)
    rows, _ = decide(f"{text}+select(sinks=1)", 7, request)
    assert int(rows[0].sum()) == 7 * LAYERS * HEADS


@pytest.mark.parametrize(
    "text", ["snapkv(window=4)", "snapkv(window=4)+select(recent=0)", "knorm", "knorm+select(sinks=3)"]
)
def test_least_budget(request_of, decide, text):
    """With the last token protected, as adapters do."""
    least = Pipeline.parse(text).least_budget
    request = request_of(30, named=(29,))
    rows, _ = decide(text, least, request)
    assert totals(rows[0]) == [least * HEADS] * LAYERS
    with pytest.raises(ValueError, match=f"the least that works is {least}$"):
        decide(text, least - 1, request)


def test_scores_that_are_not_finite(request_of, decide):
    request = request_of(30)
    request.values[2, 1, 5] = float("nan")
    for text in ("vnorm", "mixkv+snapkv(window=4)"):
        with pytest.raises(ValueError, match="NaN or infinite"):
            decide(text, 10, request)


def kept_counts(decide, request_of, text, seed):
    rows, _ = decide(text, 12, request_of(40, seed), request_of(40, seed + 1))
    return torch.stack(rows).sum(-1)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("snapkv(window=4)", "equal"),
        ("mixkv+bacon+snapkv(window=4)", "equal"),
        ("uniform+equal+random", "equal"),
        ("pyramidkv+snapkv(window=4)", "static"),
        (f"sparsemm(table={TABLE})+snapkv(window=4)", "static"),
        (f"headkv(table={TABLE})+snapkv(window=4)", "static"),
        ("adakv+snapkv(window=4)", "dynamic"),
        ("pyramidkv+adakv+snapkv(window=4)", "dynamic"),
    ],
)
def test_counts_says_how_they_vary(request_of, decide, text, counts):
    assert Pipeline.parse(text).counts == counts
    one, two = (kept_counts(decide, request_of, text, seed) for seed in (1, 50))
    assert bool((one == one[0, 0, 0]).all()) == (counts == "equal")
    assert torch.equal(one, two) == (counts != "dynamic")
    assert torch.equal(one[0], one[1]) == (counts != "dynamic")


def test_bacon_hands_residuals_from_layer_to_layer(request_of, decide):
    """Cutting the trace between layers must change what is kept, and is the same as looking back no layers."""
    text, request = "bacon{}+snapkv(window=4)", request_of(60, 3)
    flowing, _ = decide(text.format(""), 20, request)
    cut, _ = decide(text.format(""), 20, request, before_layer=lambda round_: round_.trace.clear())
    blind, _ = decide(text.format("(depth=0)"), 20, request)
    assert torch.equal(flowing[0][0], cut[0][0])
    assert not torch.equal(flowing[0][1:], cut[0][1:])
    assert torch.equal(cut[0], blind[0])


def test_requests_share_nothing(request_of, decide):
    """One pipeline object, two rounds at once: the second neither sees nor disturbs the first."""
    pipeline = Pipeline.parse("bacon+snapkv(window=4)")
    first, second = request_of(60, 3), request_of(60, 4)
    alone, _ = decide(pipeline, 20, first)
    between, _ = decide(pipeline, 20, first, before_layer=lambda _: decide(pipeline, 20, second))
    assert torch.equal(alone[0], between[0])


def test_wraps_change_the_order_and_not_the_counts(request_of, decide):
    """AdaKV's counts come from the raw window score, whatever ranks."""
    plain, _ = decide("adakv+snapkv(window=4)", 12, request_of(50, 5))
    for wraps in ("bacon", "mixkv", "mixkv+bacon"):
        rows, _ = decide(f"adakv+{wraps}+snapkv(window=4)", 12, request_of(50, 5))
        assert torch.equal(rows[0].sum(-1), plain[0].sum(-1))
        assert not torch.equal(rows[0], plain[0])


def test_granularity_frees_whole_blocks(request_of, decide):
    rows, _ = decide("adakv+snapkv(window=4)+select(granularity=8)", 21, request_of(50, 5), request_of(20, 6))
    assert bool((rows[0].sum(-1) % 8 == 0).all())
    assert bool(rows[1].all())  # fits the budget: nothing is evicted, whole block or not


@dataclass(frozen=True)
class Told:
    """A third party's scorer."""

    rank: object
    backbone: object
    window: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, seen, capacity, trace):
        return Scores(self.rank, self.backbone)


@dataclass(frozen=True)
class Counts:
    """A third party's head rule."""

    answer: object
    counts: str = "dynamic"

    def __call__(self, backbone, is_candidate, capacity):
        return self.answer


FINE, BAD = torch.rand(1, HEADS, 30), torch.full((1, HEADS, 30), torch.nan)


@pytest.mark.parametrize(
    ("rank", "backbone", "message"),
    [
        (FINE[0], FINE, r"Told: rank must be float \[1, 2, 30\], got torch.float32 \[2, 30\]"),
        (FINE[:, :1], FINE, r"Told: rank must be float \[1, 2, 30\], got torch.float32 \[1, 1, 30\]"),
        (FINE, FINE.long(), r"Told: backbone must be float \[1, 2, 30\], got torch.int64 \[1, 2, 30\]"),
        (FINE, None, r"Told: backbone must be float \[1, 2, 30\], got NoneType"),
        (BAD, FINE, "Told: a candidate's rank is NaN or infinite"),
        (FINE, BAD, "Told: a candidate's backbone is NaN or infinite"),
        (FINE, -BAD.nan_to_num(torch.inf), "Told: a candidate's backbone is NaN or infinite"),
    ],
)
def test_scores_of_third_parties(request_of, decide, rank, backbone, message):
    with pytest.raises(ValueError, match=message):
        decide(Pipeline(score=Told(rank, backbone)), 10, request_of(30))


def test_scores_count_on_candidates_only(request_of, decide):
    hole = FINE.clone()
    hole[..., 0] = torch.nan
    rows, _ = decide(Pipeline(score=Told(hole, hole), select=Select(sinks=1)), 10, request_of(30))
    assert totals(rows[0]) == [10 * HEADS] * LAYERS


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.tensor([3, 3]), r"Counts: counts must be int64 \[1, 2\], got torch.int64 \[2\]"),
        (torch.tensor([[3.0, 3.0]]), r"Counts: counts must be int64 \[1, 2\], got torch.float32 \[1, 2\]"),
        (torch.tensor([[3, 3]], dtype=torch.int32), r"Counts: counts must be int64 \[1, 2\], got torch.int32"),
        ([[3, 3]], r"Counts: counts must be int64 \[1, 2\], got list"),
        (torch.tensor([[4, -1]]), "Counts: counts cannot be negative"),
    ],
)
def test_counts_of_third_parties(request_of, decide, answer, message):
    with pytest.raises(ValueError, match=message):
        decide(Pipeline(heads=Counts(answer), select=Select(recent=2)), 10, request_of(30))


def test_a_head_rule_that_is_not_as_equal_as_it_says(request_of, decide):
    unequal = torch.tensor([[9, 7]])
    pipeline = Pipeline(score=Told(FINE, FINE), heads=Counts(unequal, "equal"))
    with pytest.raises(ValueError, match=r"Counts says counts = 'equal' and gave row 0 \[9, 7\]"):
        decide(pipeline, 10, request_of(30))
    rows, _ = decide(replace(pipeline, heads=Counts(unequal)), 10, request_of(30))
    assert rows[0].sum(-1).tolist() == [[9, 7]] * LAYERS


@pytest.mark.parametrize(
    ("counts", "have", "is_fine"),
    [
        ([9, 4], [30, 4], True),
        ([4, 4], [30, 4], True),
        ([8, 20], [30, 4], True),  # clamped to what exists
        ([7, 6, 2], [30, 30, 2], True),  # a remainder
        ([9, 3], [30, 4], False),
        ([10, 8], [30, 20], False),
        ([7, 6], [30, 30], False),
    ],
)
def test_heads_that_hold_less_explain_unequal_counts(counts, have, is_fine):
    """As after an eviction, when heads come back with different numbers of candidates."""
    rule, counts, have = Counts(None, "equal"), torch.tensor([counts]), torch.tensor([have])
    if is_fine:
        assert checked_counts(rule, counts, have) is counts
    else:
        with pytest.raises(ValueError, match="says counts = 'equal'"):
            checked_counts(rule, counts, have)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.tensor(3), r"rule: capacity must be int64 \[1\], got torch.int64 \[\]"),
        (torch.tensor([3.0]), r"rule: capacity must be int64 \[1\], got torch.float32 \[1\]"),
        (3, r"rule: capacity must be int64 \[1\], got int"),
    ],
)
def test_capacities_of_third_parties(request_of, decide, answer, message):
    def rule(candidates, mean_capacity, layer, num_layers):
        return answer

    with pytest.raises(ValueError, match=message):
        decide(Pipeline(score=Told(FINE, FINE), layers=rule), 10, request_of(30))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.full((1, HEADS), 3), r"Plan: plan must be int64 \[4, 1, 2\], got torch.int64 \[1, 2\]"),
        (torch.full((LAYERS, 1, HEADS), -3), r"Plan: counts cannot be negative, gave row 0 \[-3, -3\]"),
    ],
)
def test_plans_of_third_parties(request_of, decide, answer, message):
    class Plan:
        counts = "static"

        def plan(self, candidates, mean_capacity, num_layers, num_heads):
            return answer

    with pytest.raises(ValueError, match=message):
        decide(Pipeline(score=Told(FINE, FINE), heads=Plan()), 10, request_of(30))


def test_a_budget_in_bytes_is_answered_in_bytes(request_of, decide):
    """The caller who counted bytes is told the least number of them."""
    with pytest.raises(ValueError, match=r"the least that works is 9 \(11,700 bytes\)$"):
        decide("snapkv(window=8)", 3, request_of(30), bytes_per_token=1300)
    with pytest.raises(ValueError, match=r"the least that works is 9$"):
        decide("snapkv(window=8)", 3, request_of(30))

"""BACON against check vectors, a float64 oracle written from the equations, and the properties the method must have."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_scores import BACON, Evidence, KeyDiff, LastQuery, MixKV, Observation, SnapKV, StreamingLLM, Trace
from mmkv_scores.bacon import calibrate

B0 = [0.30, 0.10, 0.06, 0.02, 0.015, 0.20, 0.01, 0.05]
Q0 = [0.28, 0.09, 0.05, 0.05, 0.07, 0.21, 0.02, 0.03]
B1 = [0.25, 0.15, 0.045, 0.03, 0.02, 0.22, 0.01, 0.04]
Q1 = [0.24, 0.12, 0.04, 0.06, 0.08, 0.20, 0.005, 0.06]
E0 = [0.0, 0.0, 0.0, 0.03, 0.055, 0.01, 0.01, 0.0]
E1 = [0.0, 0.0, 0.0, 0.03, 0.06, 0.0, 0.0, 0.02]

# name: settings, lambda, S and (where published with the vectors) L of both layers; capacity 2, rho 2.
VECTORS = {
    "release, k=3, gated": (
        {"reach": 3},
        (0.5295103771, 0.3553985856),
        [0.3, 0.1, 0.0652951038, 0.0508881053, 0.0608908994, 0.2185328632, 0.018825173, 0.0517650346],
        [0.25, 0.15, 0.0485539859, 0.0619858727, 0.0715327949, 0.2306619576, 0.0159233098, 0.0494772956],
        None,
    ),
    "release, k=3, ungated": (
        {"reach": 3, "gate": False},
        (1.7770010344, 0.8103088239),
        [0.3, 0.1, 0.0777700103, 0.1236583937, 0.1690067563, 0.2621950362, 0.0396166839, 0.0559233368],
        [0.25, 0.15, 0.0531030882, 0.1029277942, 0.1374947795, 0.2443092647, 0.0235051471, 0.0616082353],
        None,
    ),
    "release, k=5, gated": (
        {},
        (0.6440792216, 0.3712089246),
        [0.3, 0.1038644753, 0.0709493468, 0.0515598819, 0.0639500208, 0.2199664559, 0.0261019805, 0.0525763169],
        [0.25, 0.1522272535, 0.0516817606, 0.0589542961, 0.069370787, 0.2318786856, 0.019651432, 0.0489090142],
        [0.0, 0.006, 0.018, 0.018, 0.018, 0.022, 0.016, 0.004],
    ),
    "paper, r=1, gamma 1": (
        {"preset": "paper", "reach": 1, "gamma": 1.0},
        (6.5101167534, 6.438000387),
        [0.3, 0.1, 0.1251011675, 0.3997568106, 0.5792101186, 0.4278540864, 0.1185019459, 0.0825505838],
        [0.25, 0.15, 0.1093800039, 0.6094200348, 0.9535100561, 0.4131400116, 0.1173000064, 0.2331400116],
        [0.0, 0.0, 0.01, 0.03, 0.03, 0.02, 0.0066666667, 0.01],
    ),
    "paper, r=5, gamma .5": (
        {"preset": "paper"},
        (12.2634409712, 9.0719673781),
        [0.4941711487, 0.2839516146, 0.2209576627, 0.5488608919, 0.8504469162, 0.4835920725, 0.3165860243, 0.264610217],
        [
            0.3860795107,
            0.2666395806,
            0.1697395514,
            0.6990575941,
            1.1880157999,
            0.4354592252,
            0.2432791612,
            0.3877587495,
        ],
        [0.015, 0.0128571429, 0.01375, 0.01375, 0.01375, 0.01375, 0.0157142857, 0.0183333333],
    ),
}


def as_float32(x):
    return (x if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x))).float()


class Given:
    """A base that shows what it was given: B and Q [B, H, N] of each layer."""

    window, needs, is_attention = 2, frozenset(), True

    def __init__(self, *layers):
        self.layers = [Evidence(*map(as_float32, layer)) for layer in layers]

    def evidence(self, seen):
        return self.layers[seen.layer]

    def __call__(self, seen, capacity, trace):
        raise AssertionError("BACON asks for the evidence only")


def observation(layer, batch=1, heads=1, length=8, candidates=None, slots=None):
    ones = torch.ones(batch, 1, length, dtype=torch.bool)
    return Observation(
        queries=torch.zeros(batch, heads, 0, 4),
        keys=torch.zeros(batch, heads, length, 4),
        values=torch.zeros(batch, heads, length, 4),
        valid=ones,
        candidates=ones if candidates is None else candidates,
        slots=torch.arange(length).expand(batch, 1, length) if slots is None else slots,
        scaling=1.0,
        layer=layer,
        num_layers=8,
    )


def run(bacon, capacity, **fields):
    """Scores of all layers of a `Given` base, sharing a trace."""
    trace = Trace()
    batch, heads, length = bacon.base.layers[0].window.shape
    capacity = torch.tensor([capacity] * batch)
    return [
        bacon(observation(layer, batch, heads, length, **fields), capacity, trace)
        for layer in range(len(bacon.base.layers))
    ]


def flat_calibration(bacon, b, q, past, capacity):
    """`calibrate` of one head, all entries candidates: S, lambda, L as numpy."""
    evidence = Evidence(*(torch.tensor(x, dtype=torch.float32).view(1, 1, -1) for x in (b, q)))
    past = torch.tensor(past, dtype=torch.float32).view(1, 1, -1)
    found = calibrate(bacon, evidence, past, torch.ones_like(past, dtype=torch.bool), torch.tensor([capacity]))
    return found.score.flatten().numpy(), float(found.factor), found.local.flatten().numpy()


def oracle(b, q, traces, capacity, *, preset="release", terms="elt", reach=5, gamma=0.5, rho=2.0, gate=None):
    """S, lambda, V and E of one head in float64, element by element."""
    b, n = np.asarray(b, dtype=np.float64), len(b)
    e = np.array([max(x - y, 0.0) for x, y in zip(q, b, strict=True)])
    radius = reach if preset == "paper" else reach // 2
    local, around = np.zeros(n), np.zeros(n)
    for i in range(n):
        near = [u for u in range(n) if abs(u - i) <= radius]
        divisor = len(near) if preset == "paper" else reach
        local[i] = sum(e[u] for u in near) / divisor
        around[i] = sum(b[u] for u in near) / divisor
    past = np.mean(traces, axis=0) if len(traces) else np.zeros(n)
    if preset == "rel":
        local = local * around / (around + b + 1e-8)
        past = np.maximum(past - (np.std(traces, axis=0) if len(traces) else 0), 0)
    v = sum({"e": e, "l": local, "t": past}[name] for name in terms)
    size = max(1, min(int(rho * capacity), n))
    top_b, top_v = np.argsort(-b, kind="stable")[:size], np.argsort(-v, kind="stable")[:size]
    deviation = np.std(v[top_v])
    if preset == "paper" and np.std(v[top_b]) > 1e-6 * np.mean(v[top_v]):
        deviation = np.std(v[top_b])
    factor = gamma * np.std(b[top_b]) / (deviation + 1e-8)
    if (preset == "release" and terms == "elt") if gate is None else gate:
        factor *= np.clip(v[top_v].mean() / (b[top_b].mean() + 1e-8), 0, 1)
    return b + factor * v, factor, v, e


unit = st.integers(0, 1000).map(lambda x: x / 1000)


@st.composite
def evidences(draw, length=None, apart=False):
    """B and Q of one head; `apart`: no ties in B."""
    n = length or draw(st.integers(1, 16))
    b = draw(st.lists(unit, min_size=n, max_size=n, unique=apart))
    return b, draw(st.lists(unit, min_size=n, max_size=n))


settings_drawn = st.fixed_dictionaries(
    {
        "preset": st.sampled_from(["release", "paper", "rel"]),
        "terms": st.sampled_from(["elt", "el", "e", "et", "lt", "t", "l"]),
        "reach": st.sampled_from([1, 3, 5, 7]),
        "gamma": st.sampled_from([0.0, 0.5, 1.0]),
        "gate": st.sampled_from([None, True, False]),
    }
)


# Check vectors and the oracle


@pytest.mark.parametrize("name", VECTORS)
def test_check_vectors_of_calibrate(name):
    given_, factors, *expected, local = VECTORS[name]
    bacon = BACON(**given_)
    for b, q, past, factor, score in zip((B0, B1), (Q0, Q1), ([0] * 8, E0), factors, expected, strict=True):
        s, lam, found_local = flat_calibration(bacon, b, q, past, 2)
        np.testing.assert_allclose(s, score, atol=2e-6)
        np.testing.assert_allclose(lam, factor, rtol=1e-5)
    if local is not None:
        np.testing.assert_allclose(found_local, local, atol=1e-8)


@pytest.mark.parametrize("name", VECTORS)
def test_check_vectors_through_two_layers(name):
    given_, _, *expected, _ = VECTORS[name]
    layers = [([[b]], [[q]]) for b, q in ((B0, Q0), (B1, Q1))]
    bacon, trace = BACON(Given(*layers), **given_), Trace()
    for layer, (b, e) in enumerate(((B0, E0), (B1, E1))):
        scores = bacon(observation(layer), torch.tensor([2]), trace)
        np.testing.assert_allclose(scores.rank[0, 0], expected[layer], atol=2e-6)
        np.testing.assert_allclose(scores.backbone[0, 0], b)
        np.testing.assert_allclose(trace.tensors()[-1][0, 0], e, atol=1e-8)
    np.testing.assert_allclose(
        trace.recall(bacon, 1, torch.arange(8)[None, None], 4, scores.rank)[0][0, 0], E0, atol=1e-8
    )


@settings(deadline=None, max_examples=200)
@given(evidences(), settings_drawn, st.integers(1, 10), st.data())
def test_calibrate_against_the_oracle(case, drawn, capacity, data):
    b, q = case
    if drawn["preset"] == "paper":
        drawn["reach"] -= 1  # radii may be even, and 0
    past = data.draw(st.lists(unit, min_size=len(b), max_size=len(b)))
    expected, factor, _, _ = oracle(b, q, [past], capacity, **drawn)
    score, found, _ = flat_calibration(BACON(**drawn), b, q, past, capacity)
    if factor < 1e3:  # beyond, V is constant but for rounding, and so is lambda
        np.testing.assert_allclose(score, expected, rtol=1e-3, atol=2e-5)
        np.testing.assert_allclose(found, factor, rtol=1e-3, atol=1e-5)
    assert np.isfinite(score).all()


@pytest.mark.parametrize("preset", ["release", "paper", "rel"])
@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_layers_against_the_oracle(preset, depth):
    random = np.random.default_rng(0)
    layers = [(random.random((2, 3, 20)), random.random((2, 3, 20))) for _ in range(7)]
    found = run(BACON(Given(*layers), preset=preset, depth=depth), 5)
    for row, head in np.ndindex(2, 3):
        residuals = []
        for (b, q), scores in zip(layers, found, strict=True):
            traces = residuals[max(0, len(residuals) - depth) :] if depth else []
            expected, _, _, e = oracle(b[row, head], q[row, head], traces, 5, preset=preset)
            np.testing.assert_allclose(scores.rank[row, head], expected, rtol=2e-5)
            residuals.append(e)


@pytest.mark.parametrize("terms", ["e", "l", "t", "el", "et", "lt", "elt", "tle"])
def test_term_masks(terms):
    """Ablations: L and T are built from E even where E itself is off; without one of them there is no gate."""
    layers = [([[B0]], [[Q0]]), ([[B1]], [[Q1]])]
    second = run(BACON(Given(*layers), terms=terms), 2)[1].rank[0, 0]
    plain = "".join(sorted(terms))
    np.testing.assert_allclose(second, oracle(B1, Q1, [E0], 2, terms=plain)[0], atol=1e-6)
    gated = run(BACON(Given(*layers), terms=terms, gate=True), 2)[1].rank[0, 0]
    np.testing.assert_allclose(gated, oracle(B1, Q1, [E0], 2, terms=plain, gate=True)[0], atol=1e-6)


def test_ties_in_the_window_score_go_to_the_lower_slot():
    """Max pooling makes them; which of the tied entries the region of `paper` takes decides lambda."""
    b = np.repeat(np.linspace(0.4, 0.1, 12), 9)
    q = b + np.random.default_rng(0).random(108)
    for capacity in (3, 7, 20):
        _, factor, _ = flat_calibration(BACON(preset="paper"), b, q, np.zeros(108), capacity)
        expected = oracle(np.float32(b), np.float32(q), [], capacity, preset="paper")[1]
        np.testing.assert_allclose(factor, expected, rtol=1e-4)


def test_gate_defaults():
    assert BACON().is_gated
    assert not BACON(gate=False).is_gated
    assert not BACON(terms="el").is_gated
    assert not BACON(preset="paper").is_gated
    assert not BACON(preset="rel").is_gated
    assert BACON(preset="rel", gate=True).is_gated


def test_literal_equation_15_is_guarded():
    """Ten evidence tokens outside the top 32 of B: Std(V) is 0 there and the literal lambda is Std(B) / 1e-8."""
    b = np.concatenate([np.linspace(0.02, 0.01, 32), np.full(168, 0.001)])
    q = b.copy()
    q[100:110] += 0.01
    score, factor, _ = flat_calibration(BACON(preset="paper", reach=0, gamma=1.0), b, q, np.zeros(200), 16)
    v = 2 * np.maximum(q - b, 0)
    own = np.std(np.sort(v)[-32:])
    assert np.std(b[:32]) / 1e-8 > 1e5
    np.testing.assert_allclose(factor, np.std(b[:32]) / own, rtol=1e-4)
    assert score.max() < 0.03
    for preset in ("release", "rel"):
        assert flat_calibration(BACON(preset=preset), b, q, np.zeros(200), 16)[0].max() < 0.03


# Properties, numbered as in the notes on the method


@settings(deadline=None)
@given(evidences(), settings_drawn, st.integers(1, 10))
def test_1_no_residual_returns_the_window_score_bit_for_bit(case, drawn, capacity):
    b, q = case
    q = np.minimum(b, q)
    bacon = BACON(Given(*[([[b]], [[q]])] * 3), **drawn)
    for scores in run(bacon, capacity):
        assert torch.equal(scores.rank, scores.backbone)
        assert torch.equal(scores.rank, torch.tensor([[b]], dtype=torch.float32))


def test_1_but_traces_still_count_where_q_is_b():
    layers = [([[B0]], [[Q0]]), ([[B1]], [[B1]])]
    rank = run(BACON(Given(*layers)), 2)[1].rank[0, 0].numpy()
    np.testing.assert_allclose(rank, oracle(B1, B1, [E0], 2)[0], atol=1e-6)
    assert (rank[3:5] > np.float32(B1)[3:5]).all()
    assert torch.equal(*run(BACON(Given(*layers), depth=0), 2)[1])


@pytest.mark.parametrize("base", [SnapKV(window=1), LastQuery(), LastQuery(kernel=5, across_heads=False)])
def test_2_a_window_of_one_query_has_no_residual(prompt, observe, base):
    trace = Trace()
    for layer in range(3):
        seen = observe(prompt(20, seed=layer), window=1, layer=layer)
        scores = BACON(base)(seen, torch.tensor([4]), trace)
        assert torch.equal(scores.rank, base(seen, torch.tensor([4]), Trace()).rank)


@settings(deadline=None)
@given(evidences(), settings_drawn, st.integers(1, 10), st.data())
def test_3_never_below_the_window_score(case, drawn, capacity, data):
    b, q = case
    past = data.draw(st.lists(unit, min_size=len(b), max_size=len(b)))
    score, factor, _ = flat_calibration(BACON(**drawn), b, q, past, capacity)
    b = np.float32(b)
    v = oracle(b, np.float32(q), [np.float32(past)], capacity, **drawn)[2]
    assert factor >= 0
    assert (score >= b).all()
    assert (score[v == 0] == b[v == 0]).all()


@pytest.mark.parametrize("preset", ["release", "paper", "rel"])
@pytest.mark.parametrize("scale", [2.0**-6, 4.0])
def test_4_scale_equivariance(preset, scale):
    random = torch.Generator().manual_seed(1)
    layers = [tuple(torch.rand(2, 1, 2, 30, generator=random)) for _ in range(3)]
    scaled = [(scale * b, scale * q) for b, q in layers]
    for one, two in zip(
        run(BACON(Given(*layers), preset=preset), 6), run(BACON(Given(*scaled), preset=preset), 6), strict=True
    ):
        torch.testing.assert_close(two.rank, scale * one.rank, rtol=1e-4, atol=0)


@settings(deadline=None)
@given(evidences(length=14, apart=True), st.integers(2, 5), st.sampled_from([0.5, 1.0]))
def test_5_scale_control(case, capacity, gamma):
    b, q = case
    size, zeros = 2 * capacity, [0.0] * 14
    top = np.argsort(-np.array(b))[:size]
    sigma = gamma * np.std(np.array(b)[top])
    _, factor, _ = flat_calibration(BACON(preset="paper", gamma=gamma), b, q, zeros, capacity)
    v = oracle(b, q, [], capacity, preset="paper")[2]
    if np.std(v[top]) > 1e-4:
        np.testing.assert_allclose(factor * np.std(v[top]), sigma, rtol=1e-2)
    v = oracle(b, q, [], capacity)[2]
    own = np.std(np.sort(v)[-size:])
    _, ungated, _ = flat_calibration(BACON(gate=False, gamma=gamma), b, q, zeros, capacity)
    _, gated, _ = flat_calibration(BACON(gamma=gamma), b, q, zeros, capacity)
    if own > 1e-4:
        np.testing.assert_allclose(ungated * own, sigma, rtol=1e-2)
    assert 0 <= gated <= ungated


def test_6_suppression_is_relative():
    """At equal residual, the middle of a wide persistent region gets 3e, an isolated spike e (1 + 1 / width)."""
    b, residual = np.full(60, 0.01), np.zeros(60)
    residual[10:25] = residual[45] = 0.1
    persistent = np.where(np.arange(60) < 30, residual, 0.0)
    b[[50, 52, 55]] = 0.3, 0.2, 0.1
    for bacon, ratio in ((BACON(gate=False), 3 / 1.2), (BACON(preset="paper"), 3 / (1 + 1 / 11))):
        score, _, _ = flat_calibration(bacon, b, b + residual, persistent, 10)
        boost = score - b
        assert boost[45] > 0.001
        np.testing.assert_allclose(boost[17] / boost[45], ratio, rtol=1e-4)


def test_7_only_earlier_layers_are_read():
    random = torch.Generator().manual_seed(2)
    layers = [tuple(torch.rand(2, 1, 1, 12, generator=random)) for _ in range(4)]
    changed = [*layers[:3], (layers[3][0], 1 - layers[3][1])]
    one, two = run(BACON(Given(*layers)), 3), run(BACON(Given(*changed)), 3)
    assert all(torch.equal(one[i].rank, two[i].rank) for i in range(3))
    assert not torch.equal(one[3].rank, two[3].rank)


def test_7_a_layer_that_keeps_everything_leaves_nothing():
    """PyramidKV gives the first layers more than there is: alone such a row is not scored there at all."""
    random = torch.Generator().manual_seed(3)
    layers = [tuple(torch.rand(2, 2, 2, 12, generator=random)) for _ in range(2)]
    bacon, trace = BACON(Given(*layers)), Trace()
    bacon(observation(0, 2, 2, 12), torch.tensor([12, 5]), trace)
    second = bacon(observation(1, 2, 2, 12), torch.tensor([4, 4]), trace)
    for row in range(2):
        b, q = (x[row, 0].numpy() for x in layers[1])
        first = (layers[0][1] - layers[0][0]).clamp(min=0)[row, 0].numpy()
        expected = oracle(b, q, [first] if row == 1 else [], 4)[0]
        np.testing.assert_allclose(second.rank[row, 0], expected, rtol=1e-5)


def test_8_heads_and_rows_are_independent():
    random = torch.Generator().manual_seed(4)
    layers = [tuple(torch.rand(2, 2, 4, 16, generator=random)) for _ in range(3)]
    order = torch.tensor([2, 0, 3, 1])
    permuted = [(b[:, order], q[:, order]) for b, q in layers]
    flipped = [(b.flip(0), q.flip(0)) for b, q in layers]
    for one, two, three in zip(*(run(BACON(Given(*x)), 4) for x in (layers, permuted, flipped)), strict=True):
        assert torch.equal(one.rank[:, order], two.rank)
        assert torch.equal(one.rank.flip(0), three.rank)


def test_9_budgets_come_from_the_window_score(prompt, observe):
    seen = observe(prompt(40), window=8)
    for preset in ("release", "paper", "rel"):
        backbone = BACON(SnapKV(window=8), preset=preset)(seen, torch.tensor([5]), Trace()).backbone
        assert torch.equal(backbone, SnapKV(window=8)(seen, torch.tensor([5]), Trace()).rank)


@pytest.mark.parametrize("preset", ["release", "paper", "rel"])
def test_10_the_region_is_clipped(preset):
    for capacity in (4, 5, 100):  # 2 K >= N: the region is everything
        score, _, _ = flat_calibration(BACON(preset=preset), B0, Q0, [0] * 8, capacity)
        np.testing.assert_allclose(score, oracle(B0, Q0, [], 4, preset=preset)[0], atol=2e-6)
    for capacity in (0, 1):  # M = 1: no deviation, so no correction
        score, factor, _ = flat_calibration(BACON(preset=preset, rho=1), B0, Q0, [0] * 8, capacity)
        assert factor == 0
        assert score.tolist() == np.float32(B0).tolist()


def test_11_neighbourhood_region_and_trace_skip_padding():
    """What lies outside the candidates may hold anything finite; slots differ between the layers."""
    junk = [9.0, 9.0, 9.0]
    for preset in ("release", "paper", "rel"):
        bacon = BACON(
            Given(([[[*junk, *B0]]], [[[0, 9, 0, *Q0]]]), ([[[9.0, *B1, *junk]]], [[[0.0, *Q1, 0, 9, 0]]])),
            preset=preset,
        )
        trace, capacity = Trace(), torch.tensor([2])
        for layer, (left, total) in enumerate(((3, 11), (1, 12))):
            where = torch.zeros(1, 1, total, dtype=torch.bool)
            where[..., left : left + 8] = True
            slots = torch.where(where, torch.arange(total) - left, -1)
            rank = bacon(observation(layer, 1, 1, total, where, slots), capacity, trace).rank[0, 0, left : left + 8]
            b, q, past = ((B0, Q0, []), (B1, Q1, [E0]))[layer]
            np.testing.assert_allclose(rank, oracle(b, q, past, 2, preset=preset)[0], atol=3e-6)


def test_chunks_of_different_capacity_per_row():
    layers = [(torch.tensor([[B0], [B0]]), torch.tensor([[Q0], [Q0]]))]
    scores = BACON(Given(*layers))(observation(0, 2), torch.tensor([1, 3]), Trace())
    for row, capacity in ((0, 1), (1, 3)):
        np.testing.assert_allclose(scores.rank[row, 0], oracle(B0, Q0, [], capacity)[0], atol=1e-6)


# Settings


@pytest.mark.parametrize("base", [KeyDiff(), MixKV(), StreamingLLM(), BACON()])
def test_refuses_a_base_without_evidence(base):
    with pytest.raises(ValueError, match=rf"window evidence.*{type(base).__name__} has none.*MixKV\(BACON"):
        BACON(base)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"preset": "paperr"}, "preset is 'release', 'paper' or 'rel'"),
        ({"terms": ""}, "letters e, l, t"),
        ({"terms": "ee"}, "letters e, l, t"),
        ({"terms": "ex"}, "letters e, l, t"),
        ({"reach": 4}, "odd and positive"),
        ({"preset": "rel", "reach": 0}, "odd and positive"),
        ({"preset": "paper", "reach": -1}, "cannot be negative"),
        ({"depth": -1}, "cannot be negative"),
        ({"gamma": -0.5}, "cannot be negative"),
        ({"rho": 0}, "rho must be positive"),
        ({"gamma": float("inf")}, "finite"),
        ({"rho": float("nan")}, "finite"),
    ],
)
def test_bad_settings(given_, message):
    with pytest.raises(ValueError, match=message):
        BACON(**given_)


def test_defaults_are_the_published_ones():
    defaults = {name: p.default for name, p in inspect.signature(BACON).parameters.items() if name != "base"}
    assert defaults == {
        "preset": "release", "terms": "elt", "reach": 5, "depth": 4, "gamma": 0.5, "rho": 2.0, "gate": None
    }  # fmt: skip
    assert BACON().base == SnapKV(window=32, kernel=5, pooling="avg", group="mean")
    assert replace(BACON(SnapKV(window=7))).window == 7

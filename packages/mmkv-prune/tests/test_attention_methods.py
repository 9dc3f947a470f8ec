"""FastV, PyramidDrop and SparseVLM against loops in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_prune import (
    Attention,
    Evidence,
    FastV,
    PrunePlan,
    PyramidDrop,
    SparseVLM,
    attention_rows,
    kept_columns,
    last_rows,
    rank_counts,
    select_raters,
    spread,
)

seeds = st.integers(0, 10**6)
quick = settings(deadline=None, max_examples=60)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def best(scores, number):
    """Columns of the `number` best of {column: score}, ties to the lower column, in order."""
    return sorted(sorted(scores, key=lambda column: (-scores[column], column))[:number])


def random_attention(p, seed, rows=1, ties=False):
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(p.valid), rows, p.valid.shape[1], generator=g)
    weights = (weights * 4).floor() / 4 if ties else weights
    return Attention(weights, torch.ones(len(p.valid), rows, dtype=torch.bool))


def columns(mask):
    return mask.nonzero().flatten().tolist()


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_rows(group, softcap):
    """GQA without expanded keys; masked columns may hold NaN; a row that sees nothing is zero."""
    g = torch.Generator().manual_seed(group)
    q, k = torch.randn(2, 2 * group, 3, 8, generator=g), torch.randn(2, 2, 11, 8, generator=g)
    visible = torch.rand(2, 3, 11, generator=g) < 0.7
    visible[:, :, 4] = False
    visible[0, 1] = False
    k[:, :, 4] = torch.nan
    found = attention_rows(q, k, visible, scaling=0.35, softcap=softcap)
    for b in range(2):
        for r in range(3):
            wanted = np.zeros(11)
            seen = np.flatnonzero(visible[b, r])
            for head in range(2 * group) if len(seen) else ():
                logits = k[b, head // group, seen].double().numpy() @ q[b, head, r].double().numpy() * 0.35
                logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
                wanted[seen] += softmax(logits) / (2 * group)
            np.testing.assert_allclose(found[b, r], wanted, atol=2e-6)


def test_attention_rows_refuses_what_does_not_fit():
    q, k, visible = torch.zeros(1, 3, 1, 4), torch.zeros(1, 2, 5, 4), torch.ones(1, 1, 5, dtype=torch.bool)
    for arguments in ((q, k, visible), (q[:, :2], k, visible.float()), (q[:, :2], k, visible[..., :4])):
        with pytest.raises(ValueError, match="do not fit"):
            attention_rows(*arguments, scaling=1.0)


@quick
@given(seed=seeds)
def test_last_rows(seed, random_prompt):
    p = random_prompt(seed)
    for valid, found in zip(p.valid, last_rows(p), strict=True):
        assert columns(found) == columns(valid)[-1:]


@quick
@given(seed=seeds)
def test_spread(seed, random_prompt):
    """What a layer holds, back over the prompt: fillers add nothing, whatever they hold."""
    p = random_prompt(seed)
    g = torch.Generator().manual_seed(seed)
    alive = p.valid & (torch.rand(p.valid.shape, generator=g) < 0.5)
    held = kept_columns(alive)
    full = torch.rand(len(p.valid), 2, p.valid.shape[1], generator=g)
    short = full.gather(2, held.columns[:, None].expand(-1, 2, -1)).masked_fill(~held.real[:, None], torch.nan)
    assert spread(short, held.columns, held.real, p.valid.shape[1]).equal(full * alive[:, None])


@quick
@given(seed=seeds, ties=st.booleans(), keep=st.sampled_from([0.01, 0.25, 0.29, 0.5, 0.75, 1.0]))
def test_fastv(seed, ties, keep, random_prompt):
    p = random_prompt(seed)
    attention = random_attention(p, seed, ties=ties)
    plan = PrunePlan(FastV(2, keep), 4)
    kept = plan.keep(2, p, p.valid, attention)
    counts = plan.counts(p)
    for row in range(len(p.valid)):
        scores = {c: attention.weights[row, 0, c].item() for c in columns(p.vision[row])}
        number = min(len(scores), max(1, round(len(scores) * keep)))
        assert columns(kept[row] & p.vision[row]) == best(scores, number)
        assert (kept[row] & ~p.vision[row]).equal(p.valid[row] & ~p.vision[row])
        assert counts[:, row].tolist() == [len(scores)] * 2 + [number] * 2


def test_fastv_rows_choose_for_themselves(prompt):
    """The fork of the release gives a batch one index set; here the same image with other attention keeps others."""
    p = prompt([-1, 6, -1], [-1, 6, -1])
    attention = torch.tensor([[9, 1, 2, 3, 4, 5, 6, 9], [9, 6, 5, 4, 3, 2, 1, 9]]).float().unsqueeze(1)
    kept = PrunePlan(FastV(1, 0.5), 2).keep(1, p, p.valid, Attention(attention, torch.ones(2, 1, dtype=torch.bool)))
    assert [columns(row) for row in kept] == [[0, 4, 5, 6, 7], [0, 1, 2, 3, 7]]


def test_images_of_a_row_compete(prompt):
    p = prompt([-1, 3, -1, 3, -1])
    weights = torch.tensor([0, 1, 2, 3, 0, 7, 8, 9, 0]).float().view(1, 1, 9)
    kept = PrunePlan(FastV(1, 0.5), 2).keep(1, p, p.valid, Attention(weights, torch.ones(1, 1, dtype=torch.bool)))
    assert columns(kept[0]) == [0, 4, 5, 6, 7, 8]


@quick
@given(seed=seeds, ties=st.booleans())
def test_pyramiddrop(seed, ties, random_prompt):
    """Each stage among the survivors of the one before; what dropped columns hold is ignored."""
    p = random_prompt(seed)
    method = PyramidDrop((1, 3), (0.5, 0.29))
    plan, alive = PrunePlan(method, 5), p.valid
    left = [columns(row) for row in p.vision]
    for stage, layer in enumerate((1, 3)):
        attention = random_attention(p, seed + layer, ties=ties)
        weights = attention.weights.masked_fill(~alive[:, None], torch.nan)
        alive = plan.keep(layer, p, alive, Attention(weights, attention.real))
        for row, survivors in enumerate(left):
            total = int(p.counts[row])
            number = min(total, max(1, int(total * method.keep[stage] + 1e-9)))
            left[row] = best({c: attention.weights[row, 0, c].item() for c in survivors}, number)
            assert columns(alive[row] & p.vision[row]) == left[row]
            assert plan.counts(p)[layer, row] == number == len(left[row])


def test_pyramiddrop_published_counts(prompt):
    p = prompt([-35, 576, -66])
    assert PrunePlan(PyramidDrop(), 32).counts(p)[::8, 0].tolist() == [576, 288, 144, 72]
    assert PyramidDrop((1,), (0.29,)).counts(prompt([100])).item() == 29  # 28.999999999999996 in floats
    assert PyramidDrop().evidence == Evidence("own")
    assert FastV().evidence == Evidence("previous")
    assert PyramidDrop.__dataclass_fields__["positions"].default == "keep"
    assert PrunePlan(PyramidDrop(positions="reindex"), 32).positions == "reindex"
    assert last_rows(p).equal(PrunePlan(PyramidDrop(), 32).rows(p))


@pytest.mark.parametrize("number", [1, 2, 4, 7])
def test_a_few_vision_tokens_never_vanish(number, prompt):
    """int(4 * 0.125) is 0: the release would drop the image altogether."""
    p = prompt([-1, number, -1])
    alive = p.valid
    for layer in (8, 16, 24):
        alive = PrunePlan(PyramidDrop(), 32).keep(layer, p, alive, random_attention(p, layer))
    assert (alive & p.vision).sum() == 1


def oracle_raters(embeddings, p, row):
    vision = columns(p.vision[row])
    text = [c for c in columns(p.valid[row]) if c not in vision and vision and c > vision[0]]
    text = text or [c for c in columns(p.valid[row]) if c not in vision]
    if not vision or not text:
        return []
    x = embeddings[row].double().numpy()
    related = np.mean([softmax(x[text] @ x[v]) for v in vision], axis=0)
    above = [c for c, r in zip(text, related, strict=True) if r > related.mean()]
    return above or text


@quick
@given(seed=seeds)
def test_raters(seed, random_prompt):
    p = random_prompt(seed)
    embeddings = torch.randn(*p.valid.shape, 6, generator=torch.Generator().manual_seed(seed))
    embeddings[~p.valid] = torch.nan
    raters = SparseVLM().rows(p, embeddings)
    for row in range(len(p.valid)):
        wanted = oracle_raters(embeddings, p, row)
        if len(wanted) > 1 or not wanted:  # a single text token is exactly the mean, or above it by rounding
            assert columns(raters[row]) == wanted
        assert not (raters[row] & (p.vision[row] | ~p.valid[row])).any()


def test_raters_where_the_release_has_no_answer(prompt):
    embeddings = torch.ones(1, 6, 4)
    assert columns(select_raters(embeddings, prompt([-2, 3, -1]))[0]) == [5]
    assert columns(select_raters(embeddings, prompt([-3, 3]))[0]) == [0, 1, 2]
    assert columns(select_raters(embeddings, prompt([-6]))[0]) == []
    assert columns(select_raters(embeddings, prompt([6]))[0]) == []
    with pytest.raises(ValueError, match="embeddings must be"):
        select_raters(embeddings[:, :3], prompt([-3, 3]))
    with pytest.raises(ValueError, match="raters by the embeddings"):
        SparseVLM().rows(prompt([-3, 3]))


def low_rank_attention(p, seed, ranks, rows=6):
    """Rater rows whose attention to the vision tokens has a given rank in each batch row."""
    g = torch.Generator().manual_seed(seed)
    batch, length = p.valid.shape
    weights = torch.stack([torch.rand(rows, r, generator=g) @ torch.rand(r, length, generator=g) for r in ranks])
    real = torch.ones(batch, rows, dtype=torch.bool)
    return Attention(weights / weights.sum(-1, keepdim=True), real)


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_rank_adaptive(scale, rank, prompt):
    """n - int(lambda (n - rank)) stay, by the mean over the raters; each row on its own."""
    p = prompt([-2, 40, -8], [-20, 30])
    attention = low_rank_attention(p, 7, [rank, rank + 1])
    attention.real[1, 4:] = False
    attention.weights[1, 4:] = torch.nan
    plan = PrunePlan(SparseVLM((1,), scale=scale), 2)
    kept = plan.keep(1, p, p.valid, attention)
    for row, (n, r, raters) in enumerate([(40, rank, 6), (30, min(rank + 1, 4), 4)]):
        number = n - int(scale * (n - r))
        scores = attention.weights[row, :raters].double().mean(0)
        wanted = best({c: scores[c].item() for c in columns(p.vision[row])}, number)
        last = columns(p.valid[row])[-1]
        assert set(columns(kept[row] & p.vision[row])) == {*wanted, *([last] if row else [])}
    assert plan.counts(p) is None


def test_rank_is_that_of_the_survivors():
    """Raters that differ in what they pay to text and dropped tokens alone have rank 1."""
    weights = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.0], [0.1, 0.2, 0.3, 0.0, 0.4], [0.1, 0.2, 0.3, 0.2, 0.2]]])
    attention = Attention(weights, torch.ones(1, 3, dtype=torch.bool))
    assert rank_counts(attention, torch.tensor([[True, True, True, False, False]]), 1.0).tolist() == [1]
    assert rank_counts(attention, torch.ones(1, 5, dtype=torch.bool), 1.0).tolist() == [2]


def test_mean_over_real_rows():
    weights = torch.tensor([[[1.0, 3.0], [2.0, 5.0]], [[4.0, 8.0], [torch.nan, torch.nan]], [[1.0, 1.0], [1.0, 1.0]]])
    real = torch.tensor([[True, True], [True, False], [False, False]])
    assert Attention(weights, real).mean().tolist() == [[1.5, 4.0], [4.0, 8.0], [0.0, 0.0]]


def test_rank_counts_ends():
    attention = Attention(torch.zeros(3, 2, 5), torch.tensor([[True, True], [True, False], [False, False]]))
    survivors = torch.tensor([[True] * 5, [False] * 5, [True] + [False] * 4])
    assert rank_counts(attention, survivors, 1.0).tolist() == [1, 0, 1]
    full = Attention(torch.eye(5).unsqueeze(0), torch.ones(1, 5, dtype=torch.bool))
    assert rank_counts(full, survivors[:1], 1.0).tolist() == [5]  # full rank: nothing goes


@quick
@given(seed=seeds)
def test_fixed_tables(seed, random_prompt):
    p = random_prompt(seed)
    plan, alive = PrunePlan(SparseVLM((1, 2), (6, 3)), 3), p.valid
    for layer, number in ((1, 6), (2, 3)):
        attention = random_attention(p, seed + layer, rows=3)
        before, alive = alive, plan.keep(layer, p, alive, attention)
        for row in range(len(p.valid)):
            scores = attention.weights[row].double().mean(0)
            wanted = best({c: scores[c].item() for c in columns(before[row] & p.vision[row])}, number)
            assert columns(alive[row] & p.vision[row]) == wanted
            assert plan.counts(p)[layer, row] == len(wanted)


def test_release_tables(prompt):
    p = prompt([-35, 576, -66])
    assert PrunePlan(SparseVLM.release(192), 32).counts(p)[[2, 3, 7, 16], 0].tolist() == [576, 300, 200, 110]
    assert SparseVLM.release(64, version=2).keep == (66, 34, 20)
    assert SparseVLM(keep=[0.5, 0.25, 0.1]).counts(p)[:, 0].tolist() == [288, 144, 57]
    for wrong in ((100, 1), (192, 3)):
        with pytest.raises(ValueError, match="tables for 192, 128, 96 and 64"):
            SparseVLM.release(*wrong)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_attention_that_is_not_finite(bad, prompt):
    p = prompt([-1, 4, -1])
    attention = random_attention(p, 0)
    attention.weights[0, 0, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        PrunePlan(FastV(1), 2).keep(1, p, p.valid, attention)
    attention = random_attention(p, 0)
    attention.weights[0, 0, 0] = bad  # text: not looked at
    PrunePlan(FastV(1), 2).keep(1, p, p.valid, attention)


@pytest.mark.parametrize(
    ("make", "settings", "error", "message"),
    [
        (FastV, {"layer": 0}, ValueError, "FastV layer must be at least 1"),
        (FastV, {"layer": 2.5}, TypeError, "FastV layer must be an int"),
        (FastV, {"keep": 0}, ValueError, r"FastV keep must be in \(0, 1\]"),
        (FastV, {"keep": 1.5}, ValueError, "FastV keep"),
        (FastV, {"keep": float("nan")}, ValueError, "FastV keep"),
        (FastV, {"keep": "0.5"}, TypeError, "FastV keep must be a number"),
        (FastV, {"keep": True}, TypeError, "FastV keep must be a number"),
        (PyramidDrop, {"keep": (0.5, 0.25)}, ValueError, "one entry for each of the 3 layers"),
        (PyramidDrop, {"keep": (0.25, 0.5, 0.1)}, ValueError, "must not grow"),
        (PyramidDrop, {"keep": 0.5}, TypeError, "PyramidDrop keep must be a list or tuple"),
        (PyramidDrop, {"keep": (0.5, 0, 0)}, ValueError, r"PyramidDrop keep\[1\] must be in"),
        (PyramidDrop, {"layers": (8, 8, 9)}, ValueError, "PyramidDrop layers must be ascending"),
        (PyramidDrop, {"positions": None}, ValueError, "PyramidDrop positions"),
        (SparseVLM, {"keep": (300, 0.5, 0.1)}, TypeError, "all shares or all tokens"),
        (SparseVLM, {"keep": (300, 200)}, ValueError, "SparseVLM keep must have one entry"),
        (SparseVLM, {"keep": (0, 0, 0)}, ValueError, r"SparseVLM keep\[0\] must be at least 1"),
        (SparseVLM, {"keep": 192}, TypeError, "SparseVLM keep must be a list"),
        (SparseVLM, {"scale": 0}, ValueError, "SparseVLM scale"),
        (SparseVLM, {"layers": (0, 7, 16)}, ValueError, "SparseVLM layers"),
        (SparseVLM, {"positions": "compact"}, ValueError, "SparseVLM positions"),
    ],
)
def test_bad_settings(make, settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)

"""`bacon_calibrate` against float64, entry by entry."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_kernels import bacon_calibrate

IMPLS = ["reference", "triton"]
EPS = 1e-8


def oracle(b, q, t, size, terms="elt", radius=2, neighbourhood="padded", deviation="own", gamma=0.5, gated=True):
    """S, E, L and lambda of one head, all entries candidates."""
    n, e = len(b), np.maximum(q - b, 0)
    local, around = np.zeros(n), np.zeros(n)
    for i in range(n):
        near = slice(max(0, i - radius), i + radius + 1)
        divisor = len(e[near]) if neighbourhood == "truncated" else 2 * radius + 1
        local[i], around[i] = e[near].sum() / divisor, b[near].sum() / divisor
    if neighbourhood == "supported":
        local = local * around / (around + b + EPS)
    v = sum({"e": e, "l": local, "t": t}[name] for name in terms)
    size = max(1, min(size, n))
    top_b, top_v = (np.argsort(-x, kind="stable")[:size] for x in (b, v))
    spread = v[top_v].std()
    if deviation == "window" and v[top_b].std() > 1e-6 * v[top_v].mean():
        spread = v[top_b].std()
    factor = gamma * b[top_b].std() / (spread + EPS)
    if gated:
        factor *= np.clip(v[top_v].mean() / (b[top_b].mean() + EPS), 0, 1)
    return b + factor * v, e, local, factor


def evidence(kit, *shape, seed=0):
    """B, Q and T of some attention, few entries standing out."""
    return tuple(kit.randn(*shape, seed=seed + i).abs() ** 3 for i in range(3))


def check(kit, window, last, past, candidates, sizes, **options):
    result = kit.run(bacon_calibrate, window, last, past, candidates, sizes, **options)
    batch, heads = window.shape[:2]
    for b in range(batch):
        for h in range(heads):
            chosen = candidates[b, h if candidates.shape[1] > 1 else 0]
            if not chosen.any():
                assert result.factor[b, h] == 0 or not chosen.numel()
                continue
            # Candidates next to each other, or neighbourhoods would not be those of the oracle.
            assert chosen.nonzero().flatten().diff().eq(1).all()
            inputs = (x[b, h, chosen].double().numpy() for x in (window, last, past))
            wanted = oracle(*inputs, int(sizes[b]), **options)
            got = result.score[b, h, chosen], result.residual[b, h, chosen], result.local[b, h, chosen]
            for x, y in zip((*got, result.factor[b, h, 0]), wanted, strict=True):
                torch.testing.assert_close(x.double(), torch.as_tensor(y, dtype=torch.float64), rtol=2e-5, atol=2e-6)
            assert not result.local[b, h, ~chosen].any()
    return result


def all_of(entries):
    return torch.ones(1, 1, entries, dtype=torch.bool)


@pytest.mark.parametrize("entries", [1, 63, 1000, 5000])
@pytest.mark.parametrize("neighbourhood", ["padded", "truncated", "supported"])
def test_odd_lengths(kit, entries, neighbourhood):
    tensors = evidence(kit, 1, 2, entries)
    check(kit, *tensors, all_of(entries), torch.tensor([entries // 4]), neighbourhood=neighbourhood)


@pytest.mark.parametrize("terms", ["elt", "e", "l", "t", "et"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("radius", [0, 5])
def test_terms(kit, terms, gated, radius):
    tensors = evidence(kit, 2, 2, 40)
    options = {"terms": terms, "gated": gated, "radius": radius, "gamma": 0.7}
    check(kit, *tensors, all_of(40).expand(2, 2, 40), torch.tensor([9, 400]), **options)


def test_candidates_between_others(kit):
    """What is no candidate may hold NaN in T, but B and Q are 0 there; heads without any get lambda 0."""
    candidates = torch.zeros(2, 3, 50, dtype=torch.bool)
    for b, h, start, stop in ((0, 0, 3, 40), (0, 1, 0, 50), (1, 0, 20, 21), (1, 1, 49, 50), (1, 2, 0, 30)):
        candidates[b, h, start:stop] = True
    window, last, past = (x * candidates for x in evidence(kit, 2, 3, 50))
    sizes = torch.tensor([12, 7])
    check(kit, window, last, past, candidates, sizes)
    clean = kit.run(bacon_calibrate, window, last, past, candidates, sizes)
    spoilt = kit.run(bacon_calibrate, window, last, past.masked_fill(~candidates, torch.nan), candidates, sizes)
    assert all(torch.equal(x, y) for x, y in zip(spoilt, clean, strict=True))
    check(kit, *evidence(kit, 2, 3, 50, seed=5), torch.zeros(2, 1, 50).bool(), torch.tensor([3, 3]))


def test_ties_and_constants(kit):
    flat = torch.full((1, 1, 30), 0.25)
    steps = (torch.arange(30) % 3).float().view(1, 1, 30)
    check(kit, steps, steps.flip(-1), flat, all_of(30), torch.tensor([17]))
    check(kit, steps, steps + evidence(kit, 1, 1, 30)[0], flat, all_of(30), torch.tensor([17]))
    check(kit, flat, flat, flat, all_of(30), torch.tensor([17]))


def test_row_alone_is_bitwise_the_row_in_the_batch(kit):
    tensors, sizes = evidence(kit, 3, 2, 1100), torch.tensor([5, 100, 2000])
    candidates = (torch.arange(1100) < torch.tensor([[[1100]], [[1000]], [[7]]])).contiguous()
    batch = kit.run(bacon_calibrate, *tensors, candidates, sizes)
    for b in range(3):
        row = slice(b, b + 1)
        alone = kit.run(bacon_calibrate, *(x[row].clone() for x in tensors), candidates[row], sizes[row])
        assert all(torch.equal(x, y[row]) for x, y in zip(alone, batch, strict=True))


def test_strided_inputs_and_none(kit):
    wide = evidence(kit, 2, 60, 2)
    candidates = torch.ones(2, 1, 120, dtype=torch.bool)[..., ::4]
    check(kit, *(x.transpose(1, 2)[..., ::2] for x in wide), candidates, torch.tensor([3, 4, 5])[::2])
    for shape in ((0, 2, 5), (2, 0, 5), (2, 2, 0)):
        empty = torch.zeros(shape)
        mask, sizes = torch.ones(shape[0], 1, shape[2]).bool(), torch.ones(shape[0]).long()
        result = kit.run(bacon_calibrate, empty, empty, empty, mask, sizes)
        assert result.score.shape == shape
        assert result.factor.shape == (*shape[:2], 1)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 30),
    st.integers(0, 3),
    st.sampled_from(["elt", "el", "lt"]),
    st.sampled_from(["padded", "truncated", "supported"]),
    st.integers(1, 40),
)
def test_any_shape(kit, batch, heads, entries, radius, terms, neighbourhood, size):
    tensors = evidence(kit, batch, heads, entries, seed=entries)
    options = {"terms": terms, "radius": radius, "neighbourhood": neighbourhood}
    check(kit, *tensors, all_of(entries).expand(batch, 1, entries), torch.full((batch,), size), **options)


def test_the_deviation_over_the_windows_top_has_no_kernel(kit):
    tensors, mask, sizes = evidence(kit, 1, 2, 40), all_of(40), torch.tensor([9])
    if kit.impl == "triton":
        with pytest.raises(ValueError, match="needs a sort"):
            kit.run(bacon_calibrate, *tensors, mask, sizes, deviation="window")
    else:
        check(kit, *tensors, mask, sizes, deviation="window", gated=False)
        flat = torch.full((1, 1, 40), 0.25)
        check(kit, tensors[0][:, :1], flat, flat, mask, sizes, deviation="window", terms="t")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"last": torch.zeros(1, 2, 5).half()}, TypeError, "last must be float32"),
        ({"past": torch.zeros(1, 2, 4)}, ValueError, "past must be"),
        ({"candidates": torch.ones(1, 1, 5)}, TypeError, "candidates must be bool"),
        ({"sizes": torch.ones(1)}, TypeError, "sizes must be int64"),
        ({"sizes": torch.ones(2).long()}, ValueError, "sizes must be"),
        ({"terms": "x"}, ValueError, "terms"),
        ({"terms": ""}, ValueError, "terms"),
        ({"radius": -1}, ValueError, "radius"),
        ({"neighbourhood": "near"}, ValueError, "neighbourhood must be one of"),
        ({"deviation": "all"}, ValueError, "deviation must be one of"),
    ],
)
def test_wrong_arguments(changes, error, message):
    zeros = torch.zeros(1, 2, 5)
    arguments = {"window": zeros, "last": zeros, "past": zeros, "candidates": torch.ones(1, 1, 5).bool()}
    with pytest.raises(error, match=message):
        bacon_calibrate(**arguments | {"sizes": torch.ones(1).long()} | changes)

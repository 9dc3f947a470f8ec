import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_kernels import window_attention

IMPLS = ["reference", "triton"]


def oracle(kit, queries, keys, scaling, valid=None, mask=None, softcap=None, group="mean"):
    """Float64, one query row at a time."""
    (batch, query_heads, rows, _), (heads, entries) = queries.shape, keys.shape[1:3]
    size = query_heads // heads
    mean, last = torch.zeros(2, batch, heads, entries, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            seen = {w: kit.sees(valid, mask, b, h, w, rows, entries) for w in range(rows)}
            real = [w for w in range(rows) if seen[w]]
            if not real:
                continue
            per_head = [
                torch.stack(
                    [
                        kit.probabilities(queries[b, h * size + g, w], keys[b, h], seen[w], scaling, softcap)
                        for w in real
                    ]
                )
                for g in range(size)
            ]
            means, lasts = torch.stack([p.mean(0) for p in per_head]), torch.stack([p[-1] for p in per_head])
            mean[b, h] = means.mean(0) if group == "mean" else means.amax(0)
            last[b, h] = lasts.mean(0) if group == "mean" else lasts.amax(0)
    return mean, last


def check(kit, queries, keys, scaling=None, **options):
    scaling = keys.shape[-1] ** -0.5 if scaling is None else scaling
    result = kit.run(window_attention, queries, keys, scaling=scaling, **options)
    for actual, expected in zip(result, oracle(kit, queries, keys, scaling, **options), strict=True):
        assert actual.dtype == torch.float32
        kit.close(actual, expected)
    return result


@pytest.mark.parametrize("entries", [1, 7, 63, 1000])
@pytest.mark.parametrize("group", ["mean", "max"])
def test_odd_lengths(kit, entries, group):
    check(kit, kit.randn(1, 4, 5, 16), kit.randn(1, 2, entries, 16, seed=1), group=group)


def test_more_tiles_than_are_joined_at_a_time(kit):
    """The greatest logits come last: what was summed before fades."""
    keys = kit.randn(1, 1, 9000, 8, seed=1) * torch.linspace(0.5, 3, 9000)[:, None]
    check(kit, kit.randn(1, 1, 2, 8), keys)


@pytest.mark.parametrize("group", ["mean", "max"])
def test_more_rows_than_are_joined_at_a_time(kit, group):
    check(kit, kit.randn(1, 2, 19, 8), kit.randn(1, 1, 30, 8, seed=1), group=group)


@pytest.mark.parametrize("size", [16, 64, 72, 80, 96, 128])
def test_head_sizes_and_dtypes(kit, size, dtype):
    check(kit, kit.randn(2, 2, 3, size, dtype=dtype), kit.randn(2, 1, 63, size, dtype=dtype, seed=1))


@pytest.mark.parametrize("group_size", [1, 2, 7])
@pytest.mark.parametrize("group", ["mean", "max"])
def test_query_head_groups(kit, group_size, group):
    check(kit, kit.randn(1, 3 * group_size, 4, 8), kit.randn(1, 3, 20, 8, seed=1), group=group)


def test_softcap(kit):
    capped = check(kit, kit.randn(1, 2, 4, 16), kit.randn(1, 2, 30, 16, seed=1), scaling=2.0, softcap=3.0)
    assert not torch.allclose(
        capped.mean,
        kit.run(window_attention, kit.randn(1, 2, 4, 16), kit.randn(1, 2, 30, 16, seed=1), scaling=2.0).mean,
    )


def test_maximum_is_taken_over_means_of_rows(kit):
    """Not the mean over rows of the maximum."""
    queries, keys = 5 * torch.eye(2).expand(1, 2, 2, 2).clone(), torch.eye(2).expand(1, 1, 2, 2)
    queries[:, 1] = queries[:, 1].flip(-2)
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    torch.testing.assert_close(
        kit.run(window_attention, queries, keys, scaling=1.0, mask=mask, group="max").mean, torch.full((1, 1, 2), 0.5)
    )


@pytest.mark.parametrize("mask_heads", [1, 2])
@pytest.mark.parametrize("valid_heads", [None, 1, 2])
def test_explicit_masks(kit, mask_heads, valid_heads):
    mask = (kit.randn(2, mask_heads, 4, 50, seed=2) > 0)[..., ::2]
    mask[0, :, 1] = mask[1, :, 3] = False  # rows that see nothing; the second is the last row
    valid = None if valid_heads is None else (kit.randn(2, valid_heads, 50, seed=3) > -0.5)[..., ::2]
    check(kit, kit.randn(2, 4, 4, 8), kit.randn(2, 2, 25, 8, seed=1), mask=mask, valid=valid)


@pytest.mark.parametrize("heads", [1, 2])
def test_random_validity(kit, heads):
    valid = kit.randn(3, heads, 20, seed=3) > 0
    check(kit, kit.randn(3, 4, 6, 8), kit.randn(3, 2, 20, 8, seed=1), valid=valid)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("group", ["mean", "max"])
def test_padding_equals_the_row_alone(kit, left, group):
    """Padded entries hold NaN, padded query rows too; a row with fewer entries than W is among them."""
    lengths, longest, rows = [3, 17, 30], 30, 6
    keys, queries = torch.full((3, 2, longest, 8), torch.nan), torch.full((3, 4, longest, 8), torch.nan)
    valid = torch.zeros(3, 1, longest, dtype=torch.bool)
    part = [slice(longest - n, None) if left else slice(0, n) for n in lengths]
    for b, n in enumerate(lengths):
        keys[b, :, part[b]], queries[b, :, part[b]] = kit.randn(2, n, 8, seed=b), kit.randn(4, n, 8, seed=b + 9)
        valid[b, :, part[b]] = True
    window = queries[:, :, -rows:]
    batch = kit.run(window_attention, window, keys, scaling=0.3, valid=valid, group=group)
    for b, n in enumerate(lengths):
        in_window = [w for w in range(rows) if valid[b, 0, longest - rows + w]]
        expected = torch.zeros(2, 2, n)
        if in_window:
            mask = torch.ones(n, n, dtype=torch.bool).tril()[
                [longest - rows + w - (longest - n if left else 0) for w in in_window]
            ]
            alone = kit.run(
                window_attention,
                window[b : b + 1, :, in_window],
                keys[b : b + 1, :, part[b]],
                scaling=0.3,
                mask=mask[None, None],
                group=group,
            )
            expected = torch.stack([x[0] for x in alone])
        for actual, wanted in zip(batch, expected, strict=True):
            torch.testing.assert_close(actual[b, :, part[b]], wanted, rtol=1e-5, atol=1e-6)
            assert actual[b].sum(-1) == pytest.approx(float(bool(in_window)), abs=1e-5) if group == "mean" else True
            assert not actual[b].masked_select(~valid[b]).any()


def test_row_alone_is_bitwise_the_row_in_the_batch(kit, dtype):
    queries, keys = kit.randn(3, 4, 8, 64, dtype=dtype), kit.randn(3, 2, 200, 64, dtype=dtype, seed=1)
    valid = kit.randn(3, 1, 200, seed=2) > -1
    batch = kit.run(window_attention, queries, keys, scaling=0.1, valid=valid)
    for b in range(3):
        row = slice(b, b + 1)
        alone = kit.run(window_attention, queries[row].clone(), keys[row].clone(), scaling=0.1, valid=valid[row])
        assert all(torch.equal(x, y[row]) for x, y in zip(alone, batch, strict=True))


def test_no_rows_no_entries_and_more_rows_than_entries(kit):
    for result in kit.run(window_attention, kit.randn(1, 2, 0, 8), kit.randn(1, 2, 5, 8), scaling=1.0):
        assert torch.equal(result, torch.zeros(1, 2, 5))
    for result in kit.run(window_attention, kit.randn(1, 2, 3, 8), kit.randn(1, 2, 0, 8), scaling=1.0):
        assert result.shape == (1, 2, 0)
    check(kit, kit.randn(1, 2, 9, 8), kit.randn(1, 1, 4, 8, seed=1))


def test_huge_logits_and_strided_inputs(kit):
    check(kit, kit.randn(1, 2, 4, 16)[..., ::2], kit.randn(1, 2, 9, 24, seed=1)[..., ::3])
    check(
        kit,
        40 * kit.randn(1, 9, 4, 8).transpose(1, 2),
        40 * kit.randn(1, 31, 2, 8, seed=1).transpose(1, 2),
        scaling=1.0,
    )


def test_results_own_their_bytes_and_inputs_stay(kit):
    queries, keys = kit.randn(2, 4, 5, 8).requires_grad_(), kit.randn(2, 2, 30, 8, seed=1)
    before = queries.detach().clone(), keys.clone()
    result = kit.run(window_attention, queries, keys, scaling=1.0, softcap=4.0)
    kit.owns_its_bytes(*result)
    assert not result.mean.requires_grad
    assert torch.equal(queries, before[0])
    assert torch.equal(keys, before[1])


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(0, 12),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_any_shape(kit, batch, heads, group_size, rows, entries, size, seed):
    valid = kit.randn(batch, 1, entries, seed=seed) > -0.7
    queries = kit.randn(batch, heads * group_size, rows, size, seed=seed + 1)
    check(kit, queries, kit.randn(batch, heads, entries, size, seed=seed + 2), valid=valid)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keys": torch.zeros(1, 2, 9, 7)}, ValueError, r"keys must be \[B, H, N, D\] with .*'D': 8"),
        ({"keys": torch.zeros(2, 2, 9, 8)}, ValueError, "'B': 1"),
        ({"keys": torch.zeros(2, 9, 8)}, ValueError, "keys must be"),
        ({"keys": torch.zeros(1, 3, 9, 8)}, ValueError, "Hq=4 and H=3"),
        ({"keys": torch.zeros(1, 2, 9, 8).half()}, TypeError, "dtype of queries"),
        ({"queries": torch.zeros(1, 4, 3, 8).int()}, TypeError, "float32, bfloat16, float16 or float64"),
        ({"valid": torch.ones(1, 1, 9)}, TypeError, "valid must be bool"),
        ({"valid": torch.ones(1, 1, 8).bool()}, ValueError, "valid must be"),
        ({"valid": torch.ones(1, 4, 9).bool()}, ValueError, "valid must be"),
        ({"mask": torch.ones(1, 1, 2, 9).bool()}, ValueError, "mask must be"),
        ({"group": "sum"}, ValueError, "group"),
        ({"softcap": 0.0}, ValueError, "softcap"),
    ],
)
def test_wrong_arguments(changes, error, message):
    arguments = {"queries": torch.zeros(1, 4, 3, 8), "keys": torch.zeros(1, 2, 9, 8), "scaling": 1.0} | changes
    with pytest.raises(error, match=message):
        window_attention(arguments.pop("queries"), arguments.pop("keys"), **arguments)

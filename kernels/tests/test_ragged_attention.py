import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_kernels import dense_attention, ragged_attention

IMPLS = ["reference", "triton"]


def make(kit, lengths, batch, query_heads, heads, rows, tail, d=8, dv=8, dtype=torch.float32, seed=0):
    """Arguments of ragged_attention."""
    assert len(lengths) == batch * heads
    total = sum(lengths)
    shapes = [(batch, query_heads, rows, d), (total, d), (total, dv), (batch, heads, tail, d), (batch, heads, tail, dv)]
    q, pk, pv, tk, tv = (kit.randn(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes))
    return q, pk, pv, torch.tensor([0, *lengths]).cumsum(0), tk, tv


def check(kit, arguments, scaling=0.3, prefix_mask=None, tail_mask=None, causal=True, softcap=None):
    """Compares with float64, one query at a time over one concatenated list of entries."""
    queries, pk, pv, cu, tk, tv = arguments
    (batch, query_heads, rows, _), (heads, tail) = queries.shape, tk.shape[1:3]
    out = torch.zeros(batch, query_heads, rows, pv.shape[-1], dtype=torch.float64)
    lse = torch.zeros(batch, query_heads, rows, dtype=torch.float64)
    for b in range(batch):
        for q in range(query_heads):
            h = q // (query_heads // heads)
            start, stop = cu[b * heads + h], cu[b * heads + h + 1]
            keys, values = torch.cat((pk[start:stop], tk[b, h])), torch.cat((pv[start:stop], tv[b, h]))
            held = int(stop - start)
            for i in range(rows):
                seen = [j for j in range(held) if prefix_mask is None or prefix_mask[i, start + j]]
                for j in range(tail):
                    if tail_mask is not None:
                        visible = tail_mask[b, h if tail_mask.shape[1] > 1 else 0, i, j]
                    else:
                        visible = not causal or j <= tail - rows + i
                    if visible:
                        seen.append(held + j)
                out[b, q, i], lse[b, q, i] = kit.attention(queries[b, q, i], keys, values, seen, scaling, softcap)
    options = {"prefix_mask": prefix_mask, "tail_mask": tail_mask, "causal": causal, "softcap": softcap}
    result = kit.run(ragged_attention, *arguments, scaling=scaling, **options)
    assert result.out.dtype == queries.dtype
    assert result.lse.dtype == torch.float32
    kit.close(result.out, out, queries.dtype, scale=2)
    kit.close_lse(result.lse, lse, queries.dtype)
    kit.owns_its_bytes(*result)
    return result


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("sizes", [(16, 16), (64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (24, 16)])
def test_head_sizes_and_dtypes(kit, dtype, rows, sizes):
    check(kit, make(kit, [1, 63, 0, 7], 2, 4, 2, rows, 6, *sizes, dtype), scaling=sizes[0] ** -0.5)


@pytest.mark.parametrize("tail", [0, 1, 3, 5, 64])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[3, 0, 600, 12], [4, 4, 4, 4]])
@pytest.mark.parametrize("query_heads", [2, 4])
def test_tails(kit, tail, rows, causal, lengths, query_heads):
    check(kit, make(kit, lengths, 2, query_heads, 2, rows, tail), causal=causal)


@pytest.mark.parametrize("group_size", [1, 2, 7])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_groups_and_softcap(kit, group_size, softcap):
    check(kit, make(kit, [4, 0, 9], 1, 3 * group_size, 3, 2, 4), scaling=1.5, softcap=softcap)


def test_more_parts_and_rows_than_are_taken_at_a_time(kit):
    """The greatest logits come last: what was summed before fades."""
    q, keys, *rest = make(kit, [9000], 1, 1, 1, 1, 1)
    keys[8600:] *= 4
    check(kit, (q, keys, *rest))
    check(kit, make(kit, [4, 30], 1, 14, 2, 5, 6))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("heads", [1, 2])
def test_masks(kit, rows, heads):
    arguments = make(kit, [6, 0, 9, 3], 2, 4, 2, rows, 7)
    prefix_mask, tail_mask = kit.randn(rows, 18, seed=8) > 0, kit.randn(2, heads, rows, 7, seed=9) > 0
    prefix_mask[0, :6], tail_mask[0, :, 0] = False, False
    result = check(kit, arguments, prefix_mask=prefix_mask, tail_mask=tail_mask)
    assert torch.isneginf(result.lse[0, :, 0]).all()
    assert not result.out[0, :, 0].any()
    check(kit, arguments, prefix_mask=prefix_mask)
    check(kit, arguments, tail_mask=tail_mask)


@pytest.mark.parametrize("held", [0, 1, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_that_hold_equally_many(kit, held, masked, dtype):
    mask = kit.randn(3, 4 * held, seed=8) > 0 if masked else None
    check(kit, make(kit, [held] * 4, 2, 4, 2, 3, 5, dtype=dtype), prefix_mask=mask)
    wide = kit.randn(4 * held, 16, dtype=dtype, seed=7)
    q, _, _, cu, tk, tv = make(kit, [held] * 4, 2, 4, 2, 3, 5, dtype=dtype)
    check(kit, (q, wide[:, ::2], wide[:, 8:], cu, tk, tv), prefix_mask=mask)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_heads_that_hold_nothing(kit, softcap, dtype):
    result = check(kit, make(kit, [0, 0, 0, 0], 2, 4, 2, 1, 0, dtype=dtype), softcap=softcap)
    assert torch.isneginf(result.lse).all()
    check(kit, make(kit, [0, 0, 0, 0], 2, 4, 2, 3, 3, dtype=dtype), softcap=softcap)
    assert kit.run(ragged_attention, *make(kit, [], 0, 4, 2, 1, 3), scaling=1.0).out.shape == (0, 4, 1, 8)


@pytest.mark.parametrize("rows", [1, 5])
def test_full_prefix_is_dense_attention(kit, rows):
    q, pk, pv, cu, tk, tv = make(kit, [20] * 6, 2, 6, 3, rows, 9, 64, 64)
    keys, values = (torch.cat((p.view(2, 3, 20, 64), t), 2) for p, t in ((pk, tk), (pv, tv)))
    ragged = kit.run(ragged_attention, q, pk, pv, cu, tk, tv, scaling=0.125)
    dense = dense_attention(q, keys, values, scaling=0.125, causal=True)
    kit.close(ragged.out, dense.out)
    kit.close(ragged.lse, dense.lse)
    stock = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, torch.ones(rows, 29).tril(29 - rows).bool(), scale=0.125, enable_gqa=True
    )
    kit.close(ragged.out, stock)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_row_alone_is_the_row_in_the_batch(kit, dtype, rows, softcap):
    """To the bit in Triton; in torch within 1e-6, whose vector and remainder loops round exp differently."""
    lengths = [63, 5, 200, 0, 17, 400]
    q, pk, pv, cu, tk, tv = make(kit, lengths, 3, 4, 2, rows, 6, 64, 64, dtype)
    batch = kit.run(ragged_attention, q, pk, pv, cu, tk, tv, scaling=0.125, softcap=softcap)
    for b in range(3):
        row, part = slice(b, b + 1), slice(int(cu[2 * b]), int(cu[2 * b + 2]))
        tensors = q[row], pk[part], pv[part], cu[2 * b : 2 * b + 3] - cu[2 * b], tk[row], tv[row]
        alone = kit.run(ragged_attention, *(x.clone() for x in tensors), scaling=0.125, softcap=softcap)
        if kit.impl == "triton":
            assert torch.equal(alone.out, batch.out[row])
            assert torch.equal(alone.lse, batch.lse[row])
        rounding = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(alone.out, batch.out[row], rtol=rounding, atol=1e-6)
        torch.testing.assert_close(alone.lse, batch.lse[row], rtol=1e-6, atol=1e-6)


def test_strided_inputs_and_gradients(kit):
    q, pk, pv, cu, tk, tv = make(kit, [5, 9], 1, 4, 2, 1, 3, 8, 16)
    wide = kit.randn(14, 32, seed=7)
    tail = kit.randn(1, 3, 2, 8, seed=8).transpose(1, 2)
    check(kit, (q.transpose(1, 2).contiguous().transpose(1, 2), wide[:, ::4], wide[:, :8], cu, tail, tail))
    assert not kit.run(ragged_attention, q.requires_grad_(), pk, pv, cu, tk, tv, scaling=1.0).out.requires_grad


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 5),
    st.lists(st.integers(0, 9), min_size=6, max_size=6),
    st.integers(1, 9),
    st.booleans(),
)
def test_any_shape(kit, batch, heads, group_size, rows, tail, lengths, size, causal):
    check(
        kit,
        make(kit, lengths[: batch * heads], batch, heads * group_size, heads, rows, tail, size, size),
        causal=causal,
    )


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("queries", torch.zeros(1, 3, 1, 8), ValueError, "Hq=3 and H=2"),
        ("queries", torch.zeros(1, 4, 1, 8).half(), TypeError, "dtype of queries"),
        ("prefix_keys", torch.zeros(5, 7), ValueError, "prefix_keys"),
        ("prefix_values", torch.zeros(4, 8), ValueError, "prefix_values"),
        ("tail_values", torch.zeros(1, 2, 2, 8), ValueError, "tail_values"),
        ("cu_seqlens", torch.tensor([0, 5]), ValueError, r"B \* H \+ 1"),
        ("cu_seqlens", torch.tensor([0, 6, 5]), ValueError, "rise from 0 to 5"),
        ("cu_seqlens", torch.tensor([0, 2, 4]), ValueError, "rise from 0 to 5"),
        ("cu_seqlens", torch.tensor([0, 2, 5]).int(), TypeError, "int64"),
        ("prefix_mask", torch.ones(2, 5).bool(), ValueError, "prefix_mask"),
        ("tail_mask", torch.ones(1, 1, 1, 4).bool(), ValueError, "tail_mask"),
        ("tail_mask", torch.ones(1, 1, 1, 3), TypeError, "tail_mask"),
        ("softcap", 0.0, ValueError, "softcap"),
    ],
)
def test_wrong_arguments(kit, name, value, error, message):
    names = ["queries", "prefix_keys", "prefix_values", "cu_seqlens", "tail_keys", "tail_values"]
    arguments = dict(zip(names, make(kit, [2, 3], 1, 4, 2, 1, 3), strict=True)) | {name: value}
    with pytest.raises(error, match=message):
        ragged_attention(**arguments, scaling=1.0)

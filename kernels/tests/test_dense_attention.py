import pytest
import torch
from mmkv_kernels import AttentionOutput, dense_attention, merge_attention, ragged_attention, window_attention


def check(kit, queries, keys, values, scaling, mask=None, causal=False, softcap=None):
    """Compares with float64, one query at a time."""
    (batch, query_heads, rows, _), (heads, entries) = queries.shape, keys.shape[1:3]
    out = torch.zeros(batch, query_heads, rows, values.shape[-1], dtype=torch.float64)
    lse = torch.zeros(batch, query_heads, rows, dtype=torch.float64)
    for b in range(batch):
        for q in range(query_heads):
            h = q // (query_heads // heads)
            for i in range(rows):
                seen = [j for j in range(entries) if not causal or mask is not None or j <= entries - rows + i]
                if mask is not None:
                    seen = [j for j in seen if mask[b, h if mask.shape[1] > 1 else 0, i, j]]
                out[b, q, i], lse[b, q, i] = kit.attention(
                    queries[b, q, i], keys[b, h], values[b, h], seen, scaling, softcap
                )
    result = dense_attention(queries, keys, values, scaling=scaling, mask=mask, causal=causal, softcap=softcap)
    assert result.out.dtype == queries.dtype
    kit.close(result.out, out, queries.dtype)
    kit.close_lse(result.lse, lse, queries.dtype)
    kit.owns_its_bytes(*result)
    return result


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16), (64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (24, 16)])
def test_head_sizes_and_dtypes(kit, dtype, rows, causal, sizes):
    d, dv = sizes
    keys, values = kit.randn(2, 2, 63, d, dtype=dtype, seed=1), kit.randn(2, 2, 63, dv, dtype=dtype, seed=2)
    check(kit, kit.randn(2, 4, rows, d, dtype=dtype), keys, values, d**-0.5, causal=causal)


@pytest.mark.parametrize("group_size", [1, 2, 7])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_groups_and_softcap(kit, group_size, softcap, causal):
    keys, values = kit.randn(1, 2, 9, 8, seed=1), kit.randn(1, 2, 9, 8, seed=2)
    check(kit, kit.randn(1, 2 * group_size, 3, 8), keys, values, 2.0, softcap=softcap, causal=causal)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rows", [1, 5])
def test_masks_and_queries_that_see_nothing(kit, heads, rows):
    mask = kit.randn(2, heads, rows, 11, seed=3) > 0.5
    mask[0, :, 0] = False
    keys, values = kit.randn(2, 2, 11, 8, seed=1), kit.randn(2, 2, 11, 12, seed=2)
    result = check(kit, kit.randn(2, 4, rows, 8), keys, values, 0.3, mask=mask)
    assert torch.isneginf(result.lse[0, :, 0]).all()
    assert not result.out[0, :, 0].any()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_no_entries_and_rows_before_the_first(kit, softcap):
    check(kit, kit.randn(2, 4, 3, 8), kit.randn(2, 2, 0, 8), kit.randn(2, 2, 0, 8), 1.0, softcap=softcap)
    check(
        kit,
        kit.randn(1, 2, 5, 8),
        kit.randn(1, 1, 3, 8, seed=1),
        kit.randn(1, 1, 3, 8, seed=2),
        1.0,
        causal=True,
        softcap=softcap,
    )


def test_strided_inputs(kit):
    queries, keys = kit.randn(2, 1, 4, 8).transpose(1, 2), kit.randn(2, 20, 2, 8, seed=1).transpose(1, 2)
    check(kit, queries, keys, kit.randn(2, 20, 2, 8, seed=2).transpose(1, 2), 0.3)
    check(kit, queries, keys, kit.randn(2, 2, 20, 16, seed=2)[..., ::2], 0.3)


def test_huge_logits(kit):
    check(
        kit,
        40 * kit.randn(1, 2, 3, 8),
        40 * kit.randn(1, 2, 9, 8, seed=1),
        kit.randn(1, 2, 9, 8, seed=2),
        1.0,
        causal=True,
    )


@pytest.mark.parametrize("cut", [0, 1, 10, 21])
def test_merging_parts_gives_the_whole(kit, dtype, cut):
    queries = kit.randn(2, 4, 3, 16, dtype=dtype)
    keys, values = kit.randn(2, 2, 21, 16, dtype=dtype, seed=1), kit.randn(2, 2, 21, 16, dtype=dtype, seed=2)
    whole = dense_attention(queries, keys, values, scaling=0.3)
    parts = [
        dense_attention(queries, keys[:, :, s], values[:, :, s], scaling=0.3) for s in (slice(0, cut), slice(cut, None))
    ]
    for pair in (parts, parts[::-1]):
        merged = merge_attention(*pair)
        assert merged.out.dtype == dtype
        kit.close(merged.out, whole.out, dtype, scale=2)
        kit.close_lse(merged.lse, whole.lse, dtype)
        kit.owns_its_bytes(*merged)


def test_merging_nothing_and_far_apart(kit):
    nothing = AttentionOutput(torch.zeros(1, 2, 1, 8), torch.full((1, 2, 1), -torch.inf))
    something = AttentionOutput(kit.randn(1, 2, 1, 8), kit.randn(1, 2, 1, seed=1))
    for pair in ((nothing, something), (something, nothing)):
        merged = merge_attention(*pair)
        assert torch.equal(merged.out, something.out)
        assert torch.equal(merged.lse, something.lse)
    both = merge_attention(nothing, nothing)
    assert not both.out.any()
    assert torch.isneginf(both.lse).all()
    far = merge_attention(something, AttentionOutput(-something.out, something.lse + 1000))
    assert torch.equal(far.out, -something.out)


def test_wrong_arguments():
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 5, 8)
    for arguments, error in [
        ((q, k, torch.zeros(1, 2, 4, 8)), ValueError),
        ((q, torch.zeros(1, 3, 5, 8), torch.zeros(1, 3, 5, 8)), ValueError),
        ((q, k.half(), k), TypeError),
    ]:
        with pytest.raises(error):
            dense_attention(*arguments, scaling=1.0)
    with pytest.raises(ValueError, match="mask"):
        dense_attention(q, k, k, scaling=1.0, mask=torch.ones(1, 1, 2, 4).bool())
    part = AttentionOutput(q, q[..., 0])
    with pytest.raises(ValueError, match=r"b\.lse"):
        merge_attention(part, AttentionOutput(q, torch.zeros(1, 4, 3)))
    with pytest.raises(TypeError, match=r"b\.lse"):
        merge_attention(part, AttentionOutput(q, q[..., 0].half()))
    with pytest.raises(TypeError, match=r"b\.out"):
        merge_attention(part, AttentionOutput(q.half(), q[..., 0]))


def test_no_queries():
    """The fused kernel of torch divides by their number."""
    keys, offsets = torch.zeros(1, 2, 3, 4), torch.tensor([0, 3, 4])
    queries, prefix = torch.zeros(1, 2, 0, 4), torch.zeros(4, 4)
    assert dense_attention(queries, keys, keys, scaling=1.0).out.shape == (1, 2, 0, 4)
    assert ragged_attention(queries, prefix, prefix, offsets, keys, keys, scaling=1.0).lse.shape == (1, 2, 0)
    with pytest.raises(ValueError, match="multiple of KV heads"):
        dense_attention(torch.zeros(1, 0, 2, 4), keys, keys, scaling=1.0)
    with pytest.raises(ValueError, match="multiple of KV heads"):
        window_attention(torch.zeros(1, 0, 2, 4), keys, scaling=1.0, group="max")

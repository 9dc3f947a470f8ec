"""Float64 caches: attention loses nothing, scores are those of the float32 values."""

import pytest
import torch
from mmkv_kernels import (
    column_sums,
    dense_attention,
    gather_kv,
    key_statistics,
    merge_attention,
    ragged_attention,
    window_attention,
)

F64 = torch.float64


def exact(kit, queries, keys, values, softcap=None):
    """One query row per query head over all entries, in float64."""
    group = queries.shape[1] // keys.shape[1]
    seen = list(range(keys.shape[2]))
    rows = [
        kit.attention(queries[0, q, 0], keys[0, q // group], values[0, q // group], seen, 0.3, softcap)
        for q in range(queries.shape[1])
    ]
    lse = torch.tensor([[[lse] for _, lse in rows]], dtype=F64)
    return torch.stack([out for out, _ in rows])[None, :, None], lse


def close(result, expected):
    for actual, wanted in zip(result, expected, strict=True):
        assert actual.dtype == F64
        torch.testing.assert_close(actual, wanted, rtol=1e-13, atol=1e-13)


@pytest.fixture
def cache(kit):
    return tuple(kit.randn(1, *sizes, 8, dtype=F64, seed=i) for i, sizes in enumerate([(4, 1), (2, 9), (2, 9)]))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_computed_in_float64(kit, cache, softcap, masked):
    queries, keys, values = cache
    wanted = exact(kit, queries, keys, values, softcap)
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool) if masked else None
    close(dense_attention(queries, keys, values, scaling=0.3, softcap=softcap, mask=mask), wanted)
    cu = torch.tensor([0, 6, 12])
    prefix = keys[0, :, :6].reshape(12, 8), values[0, :, :6].reshape(12, 8)
    settings = {"scaling": 0.3, "softcap": softcap}
    if masked:
        settings |= {"prefix_mask": torch.ones(1, 12, dtype=torch.bool), "tail_mask": mask[..., :3]}
    close(ragged_attention(queries, *prefix, cu, keys[:, :, 6:], values[:, :, 6:], **settings), wanted)
    parts = [
        dense_attention(queries, keys[:, :, part], values[:, :, part], scaling=0.3, softcap=softcap, causal=False)
        for part in (slice(0, 4), slice(4, 9))
    ]
    close(merge_attention(*parts), wanted)


def test_scores_are_float32_of_the_values(cache):
    queries, keys, values = cache
    single = queries.float(), keys.float()
    for operator in (window_attention, column_sums):
        for actual, wanted in zip(operator(queries, keys, scaling=0.3), operator(*single, scaling=0.3), strict=True):
            assert torch.equal(actual, wanted)
    for actual, wanted in zip(key_statistics(keys, values), key_statistics(keys.float(), values.float()), strict=True):
        assert torch.equal(actual, wanted)


def test_gather_keeps_float64(cache):
    _, keys, values = cache
    kept = gather_kv(keys, values, torch.tensor([1, 8, 0]), torch.tensor([0, 2, 3]))
    assert torch.equal(kept.keys, torch.stack([keys[0, 0, 1], keys[0, 0, 8], keys[0, 1, 0]]))
    assert torch.equal(kept.values, torch.stack([values[0, 0, 1], values[0, 0, 8], values[0, 1, 0]]))

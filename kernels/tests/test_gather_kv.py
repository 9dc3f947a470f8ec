import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_kernels import gather_kv

IMPLS = ["reference", "triton"]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def ragged_columns(lengths, limits, seed=0):
    """Distinct ascending columns below each head's limit."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randperm(limit, generator=generator)[:n].sort().values for n, limit in zip(lengths, limits, strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def check(kit, keys, values, columns, lengths, prefix=None, prefix_lengths=None):
    """Compares with one list of entries per head."""
    heads = keys.shape[1]
    expected = ([], [])
    for segment, (start, stop) in enumerate(zip(offsets(lengths)[:-1], offsets(lengths)[1:], strict=True)):
        for source, out in enumerate(expected):
            entries = list((keys, values)[source][segment // heads, segment % heads])
            if prefix is not None:
                cu = prefix[2].tolist()
                entries = list(prefix[source][cu[segment] : cu[segment + 1]]) + entries
            out.extend(entries[j] for j in columns[start:stop].tolist())
    result = kit.run(gather_kv, keys, values, columns, offsets(lengths), prefix=prefix)
    kit.owns_its_bytes(*result)
    for actual, wanted, source in zip(result, expected, (keys, values), strict=True):
        assert actual.dtype == source.dtype
        assert torch.equal(actual, torch.stack(wanted) if wanted else source.new_empty(0, source.shape[-1]))


@pytest.mark.parametrize("entries", [1, 63, 1000])
def test_dense(kit, entries, dtype):
    lengths = [min(entries, n) for n in (0, 1, 40, 700, 5, 0)]
    columns = ragged_columns(lengths, [entries] * 6)
    check(
        kit,
        kit.randn(2, 3, entries, 16, dtype=dtype),
        kit.randn(2, 3, entries, 24, dtype=dtype, seed=1),
        columns,
        lengths,
    )


def test_strided_inputs_and_any_order(kit):
    keys, values = kit.randn(2, 9, 3, 8).transpose(1, 2), kit.randn(2, 3, 9, 16, seed=1)[..., ::2]
    columns = torch.tensor([3, 3, 8, 0, 5, 1, 8])
    check(kit, keys, values, columns, [3, 0, 2, 1, 0, 1])


@pytest.mark.parametrize("tail", [0, 1, 6])
def test_prefix(kit, tail, dtype):
    prefix_lengths, lengths = [5, 0, 9, 2], [3, min(1, tail), 9, 2]
    prefix = kit.randn(16, 8, dtype=dtype, seed=2), kit.randn(16, 12, dtype=dtype, seed=3), offsets(prefix_lengths)
    columns = ragged_columns(lengths, [n + tail for n in prefix_lengths])
    keys, values = kit.randn(2, 2, tail, 8, dtype=dtype), kit.randn(2, 2, tail, 12, dtype=dtype, seed=1)
    check(kit, keys, values, columns, lengths, prefix)


def test_gathering_twice_is_gathering_once(kit):
    keys, values = kit.randn(1, 2, 30, 8), kit.randn(1, 2, 30, 8, seed=1)
    first = ragged_columns([20, 10], [30, 30])
    once = kit.run(gather_kv, keys, values, first, offsets([20, 10]))
    picks = torch.tensor([0, 7, 19, 2, 9])
    prefix = (*once, offsets([20, 10]))
    twice = kit.run(gather_kv, keys[:, :, :0], values[:, :, :0], picks, offsets([3, 2]), prefix=prefix)
    wanted = kit.run(gather_kv, keys, values, first[torch.tensor([0, 7, 19, 22, 29])], offsets([3, 2]))
    assert all(torch.equal(x, y) for x, y in zip(twice, wanted, strict=True))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 8),
    st.lists(st.integers(0, 5), min_size=9, max_size=9),
    st.integers(0, 9),
)
def test_any_shape(kit, batch, heads, tail, prefix_lengths, seed):
    prefix_lengths = prefix_lengths[: batch * heads]
    limits = [n + tail for n in prefix_lengths]
    lengths = [limit * (seed + i) % (limit + 1) for i, limit in enumerate(limits)]
    prefix = kit.randn(sum(prefix_lengths), 4, seed=seed), kit.randn(sum(prefix_lengths), 2), offsets(prefix_lengths)
    keys, values = kit.randn(batch, heads, tail, 4, seed=seed + 1), kit.randn(batch, heads, tail, 2, seed=seed + 2)
    check(kit, keys, values, ragged_columns(lengths, limits, seed), lengths, prefix)


@pytest.mark.parametrize(
    ("columns", "cu", "error", "message"),
    [
        ([0, 9], [0, 1, 2], ValueError, "outside the 9 entries"),
        ([-1, 0], [0, 1, 2], ValueError, "outside"),
        ([0, 1], [0, 2], ValueError, r"B \* H \+ 1"),
        ([0, 1], [0, 3, 2], ValueError, "rise from 0 to 2"),
        ([0, 1], [0, 1, 3], ValueError, "rise from 0 to 2"),
        ([0, 1], [1, 1, 2], ValueError, "rise from 0 to 2"),
        ([[0, 1]], [0, 1, 2], ValueError, "columns must be"),
    ],
)
def test_wrong_offsets_and_columns(kit, columns, cu, error, message):
    keys = torch.zeros(1, 2, 9, 4)
    with pytest.raises(error, match=message):
        kit.run(gather_kv, keys, keys, torch.tensor(columns), torch.tensor(cu))


def test_wrong_types_and_prefixes(kit):
    keys, cu = torch.zeros(1, 2, 9, 4), torch.tensor([0, 1, 2])
    columns = torch.tensor([0, 1])
    with pytest.raises(TypeError, match="columns must be int64"):
        gather_kv(keys, keys, columns.int(), cu)
    with pytest.raises(TypeError, match="cu_seqlens must be int64"):
        gather_kv(keys, keys, columns, cu.int())
    with pytest.raises(TypeError, match="prefix_keys"):
        gather_kv(keys, keys, columns, cu, prefix=(torch.zeros(2, 4).half(), torch.zeros(2, 4).half(), cu))
    with pytest.raises(ValueError, match="prefix values"):
        gather_kv(keys, keys, columns, cu, prefix=(torch.zeros(2, 4), torch.zeros(3, 4), cu))
    with pytest.raises(ValueError, match="prefix cu_seqlens"):
        gather_kv(keys, keys, columns, cu, prefix=(torch.zeros(3, 4), torch.zeros(3, 4), cu))
    with pytest.raises(ValueError, match="outside the 10 entries"):  # a column that is in range for the other head only
        kit.run(
            gather_kv,
            keys,
            keys,
            torch.tensor([10, 1]),
            cu,
            prefix=(torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, 1, 3])),
        )


@pytest.mark.parametrize("size", [64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("new", [1, 5])
def test_appending_where_the_flattened_cache_kernels_lose_rows(kit, size, new):
    """Published append kernels drop rows when length x D passes a multiple of 131072 elements by less than D."""
    edge = 131072 // size
    lengths = [edge - 1, edge, edge + 1, 1]
    prefix = (kit.randn(sum(lengths), size, seed=2), kit.randn(sum(lengths), size, seed=3), offsets(lengths))
    grown = [n + new for n in lengths]
    columns = torch.cat([torch.arange(n) for n in grown])
    tail = kit.randn(2, 2, new, size), kit.randn(2, 2, new, size, seed=1)
    check(kit, *tail, columns, grown, prefix, lengths)

import pytest
import torch
from mmkv_kernels import column_sums, window_attention


def check(kit, queries, keys, scaling=0.3, block=256, **options):
    """Compares with float64, one query row at a time."""
    valid, mask = options.get("valid"), options.get("mask")
    (batch, query_heads, rows, _), (heads, entries) = queries.shape, keys.shape[1:3]
    size = query_heads // heads
    sums, counts = torch.zeros(2, batch, heads, entries, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                seen = kit.sees(valid, mask, b, h, i, rows, entries)
                counts[b, h, seen] += 1
                for g in range(size) if seen else ():
                    sums[b, h] += (
                        kit.probabilities(
                            queries[b, h * size + g, i], keys[b, h], seen, scaling, options.get("softcap")
                        )
                        / size
                    )
    got_sums, got_counts = column_sums(queries, keys, scaling=scaling, block=block, **options)
    kit.close(got_sums, sums, scale=max(1, rows))
    assert got_counts.dtype == torch.int64
    assert torch.equal(got_counts.expand(-1, heads, -1), counts.long())
    kit.owns_its_bytes(got_sums, got_counts)
    return got_sums, got_counts


@pytest.mark.parametrize("block", [1, 3, 8, 256])
@pytest.mark.parametrize("entries", [13, 29])
def test_blocks(kit, block, entries):
    check(kit, kit.randn(2, 4, 13, 8), kit.randn(2, 2, entries, 8, seed=1), block=block)


@pytest.mark.parametrize("entries", [1, 63, 1000])
def test_every_row_hands_out_one(kit, entries):
    sums, counts = column_sums(
        kit.randn(1, 2, entries, 16), kit.randn(1, 1, entries, 16, seed=1), scaling=0.25, block=100
    )
    assert float(sums.sum()) == pytest.approx(entries, rel=1e-5)
    assert counts[0, 0].tolist() == list(range(entries, 0, -1))


@pytest.mark.parametrize("size", [16, 72, 128])
def test_head_sizes_and_dtypes(kit, size, dtype):
    check(kit, kit.randn(1, 2, 9, size, dtype=dtype), kit.randn(1, 1, 9, size, dtype=dtype, seed=1), scaling=size**-0.5)


@pytest.mark.parametrize("group_size", [1, 2, 7])
def test_query_head_groups(kit, group_size):
    check(kit, kit.randn(1, 2 * group_size, 5, 8), kit.randn(1, 2, 11, 8, seed=1), softcap=2.0)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_validity_and_masks(kit, heads, masked):
    valid = kit.randn(2, heads, 15, seed=2) > -0.5
    mask = (kit.randn(2, 1, 15, 15, seed=3) > 0.5) if masked else None
    check(kit, kit.randn(2, 4, 15, 8), kit.randn(2, 2, 15, 8, seed=1), valid=valid, mask=mask, block=4)


@pytest.mark.parametrize("left", [True, False])
def test_padding_equals_the_row_alone(kit, left):
    lengths, longest = [0, 5, 12], 12
    keys, queries = torch.full((3, 2, longest, 8), torch.nan), torch.full((3, 4, longest, 8), torch.nan)
    valid = torch.zeros(3, 1, longest, dtype=torch.bool)
    for b, n in enumerate(lengths):
        part = slice(longest - n, None) if left else slice(0, n)
        keys[b, :, part], queries[b, :, part], valid[b, :, part] = (
            kit.randn(2, n, 8, seed=b),
            kit.randn(4, n, 8, seed=b + 9),
            True,
        )
    sums, counts = column_sums(queries, keys, scaling=0.3, valid=valid, block=5)
    for b, n in enumerate(lengths):
        part = slice(longest - n, None) if left else slice(0, n)
        alone = column_sums(queries[b : b + 1, :, part], keys[b : b + 1, :, part], scaling=0.3, block=5)
        torch.testing.assert_close(sums[b : b + 1, :, part], alone[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(counts[b : b + 1, :, part], alone[1])
        assert not sums[b].masked_select(~valid[b]).any()
        assert not counts[b].masked_select(~valid[b]).any()


def test_chunks_add_up(kit):
    queries, keys = kit.randn(1, 4, 20, 8), kit.randn(1, 2, 20, 8, seed=1)
    whole = column_sums(queries, keys, scaling=0.3)
    first = column_sums(queries[:, :, :7], keys[:, :, :7], scaling=0.3)
    second = column_sums(queries[:, :, 7:], keys, scaling=0.3)
    for index in range(2):
        padded = torch.nn.functional.pad(first[index], (0, 13))
        torch.testing.assert_close(padded + second[index], whole[index])


def test_agrees_with_window_attention(kit):
    queries, keys = kit.randn(2, 4, 6, 8), kit.randn(2, 2, 40, 8, seed=1)
    torch.testing.assert_close(
        column_sums(queries, keys, scaling=0.3)[0] / 6, window_attention(queries, keys, scaling=0.3).mean
    )


def test_row_alone_is_bitwise_the_row_in_the_batch(kit):
    queries, keys = kit.randn(3, 4, 33, 32), kit.randn(3, 2, 65, 32, seed=1)
    sums, _ = column_sums(queries, keys, scaling=0.2, block=16)
    for b in range(3):
        assert torch.equal(
            column_sums(queries[b : b + 1].clone(), keys[b : b + 1].clone(), scaling=0.2, block=16)[0], sums[b : b + 1]
        )


def test_nothing_to_sum(kit):
    for queries, entries in ((kit.randn(1, 2, 0, 8), 5), (kit.randn(1, 2, 3, 8), 0)):
        sums, counts = column_sums(queries, kit.randn(1, 2, entries, 8), scaling=1.0)
        assert torch.equal(sums, torch.zeros(1, 2, entries))
        assert torch.equal(counts, torch.zeros(1, 1, entries, dtype=torch.int64))
    check(kit, kit.randn(1, 2, 9, 8), kit.randn(1, 2, 4, 8, seed=1))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"block": 0}, ValueError),
        ({"softcap": -1.0}, ValueError),
        ({"keys": torch.zeros(1, 3, 9, 8)}, ValueError),
        ({"keys": torch.zeros(1, 2, 9, 8).half()}, TypeError),
        ({"mask": torch.ones(1, 1, 9, 3).bool()}, ValueError),
        ({"valid": torch.ones(1, 9)}, TypeError),
    ],
)
def test_wrong_arguments(changes, error):
    arguments = {"queries": torch.zeros(1, 4, 3, 8), "keys": torch.zeros(1, 2, 9, 8), "scaling": 1.0} | changes
    with pytest.raises(error):
        column_sums(arguments.pop("queries"), arguments.pop("keys"), **arguments)

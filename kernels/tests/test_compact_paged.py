"""`compact_paged` against moving entries one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_kernels import compact_paged

IMPLS = ["reference", "triton"]


def moved(cache, table, lengths, columns, bounds, align):
    """The cache as it must be: every entry read from the cache as it was."""
    before, after = cache.numpy(), cache.numpy().copy()
    size, heads = cache.shape[1:3]
    for segment in range(len(bounds) - 1):
        b, h = divmod(segment, heads)
        kept = columns[bounds[segment] : bounds[segment + 1]]
        first = lengths[b] - len(kept) if align == "right" else 0
        for i, j in enumerate(kept):
            to = first + i
            after[table[b][to // size], to % size, h] = before[table[b][j // size], j % size, h]
    return torch.from_numpy(after)


def make(kit, lengths, heads, size, share, d=8, seed=0):
    """Table with unused pages between, columns and offsets; each head keeps about `share` of its row."""
    generator = np.random.default_rng(seed)
    blocks = [-(-n // size) for n in lengths]
    pages = generator.permutation(sum(blocks) + 3)
    table = np.full((len(lengths), max(blocks) + 1), -7)
    for b, count in enumerate(blocks):
        table[b, :count] = pages[sum(blocks[:b]) : sum(blocks[: b + 1])]
    kept = [np.flatnonzero(generator.random(n) < share) for n in lengths for _ in range(heads)]
    bounds = np.cumsum([0, *map(len, kept)])
    return sum(blocks) + 3, torch.from_numpy(table), np.concatenate(kept), torch.from_numpy(bounds)


def check(kit, lengths, heads, size, share=0.5, align="left", dtype=torch.float32, sizes=(8, 8), joined=False, seed=0):
    pages, table, columns, bounds = make(kit, lengths, heads, size, share, seed=seed)
    if joined:  # as vLLM keeps them: [P, H, S, keys then values]
        memory = kit.randn(pages, heads, size, sum(sizes), dtype=dtype, seed=seed).transpose(1, 2)
    else:
        memory = kit.randn(pages, size, heads, sum(sizes), dtype=dtype, seed=seed)
    wanted = moved(memory.float(), table.tolist(), lengths, columns.tolist(), bounds.tolist(), align).to(dtype)
    memory = memory.to(kit.device) if joined else memory.clone().to(kit.device)
    keys, values = memory[..., : sizes[0]], memory[..., sizes[0] :]
    if not joined:
        keys, values = keys.contiguous(), values.contiguous()
    table = table.int().repeat_interleave(2, 1)[:, ::2] if joined else table
    tensors = table, torch.tensor(lengths), torch.from_numpy(columns), bounds
    compact_paged(keys, values, *(x.to(kit.device) for x in tensors), align=align, impl=kit.impl)
    assert torch.equal(torch.cat((keys, values), -1).cpu(), wanted)


@pytest.mark.parametrize("size", [1, 3, 16, 32])
@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("joined", [False, True])
def test_pages(kit, size, align, joined):
    check(kit, [70, 1, 33, 0], 2, size, align=align, joined=joined)


@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_moves_longer_than_a_step_overlap(kit, align, share):
    """What one step writes is what earlier ones have read, and nothing that later ones will."""
    check(kit, [1000, 63], 2, 16, share=share, align=align)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("align", ["left", "right"])
def test_nothing_and_all_kept(kit, share, align):
    check(kit, [40, 7], 2, 16, share=share, align=align)


@pytest.mark.parametrize("sizes", [(64, 64), (72, 80), (128, 16), (256, 8)])
def test_head_sizes_and_dtypes(kit, sizes, dtype):
    check(kit, [50, 20], 2, 16, dtype=dtype, sizes=sizes, align="right")


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 16]),
    st.floats(0, 1),
    st.sampled_from(["left", "right"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_shape(kit, lengths, heads, size, share, align, joined, seed):
    check(kit, lengths, heads, size, share, align, joined=joined, seed=seed)


def test_far_apart(kit):
    """Pages whose places pass 2^31 elements."""
    memory = torch.empty(2**31 + 1000, dtype=torch.float16, device=kit.device)
    cache = memory.as_strided((3, 1, 1, 8), (2**30 + 16, 8, 8, 1))
    cache.copy_(torch.arange(24).view(3, 1, 1, 8))
    tensors = torch.tensor([[0, 1, 2]]), torch.tensor([3]), torch.tensor([2]), torch.tensor([0, 1])
    compact_paged(cache[..., :4], cache[..., 4:], *(x.to(kit.device) for x in tensors), impl=kit.impl)
    assert cache[:, 0, 0, 0].tolist() == [16, 8, 16]


def arguments(**changes):
    """Two rows that share their first page; keeps entries 4 and 5 of each head but one."""
    cache = torch.arange(5 * 4 * 2).view(5, 4, 2, 1).float()
    given = {
        "keys": cache,
        "values": -cache,
        "table": torch.tensor([[0, 1], [0, 2]]),
        "lengths": torch.tensor([8, 7]),
        "columns": torch.tensor([4, 5, 4, 5, 3]),
        "cu_seqlens": torch.tensor([0, 2, 4, 5, 5]),
        "align": "right",
    }
    return given | changes


def test_shared_pages_that_nothing_is_moved_to(kit):
    given = {name: x.to(kit.device) if isinstance(x, torch.Tensor) else x for name, x in arguments().items()}
    compact_paged(**given, impl=kit.impl)
    cache = torch.arange(40).view(5, 4, 2).float()
    cache[1, 2:] = cache[1, :2].clone()
    cache[2, 2, 0] = cache[0, 3, 0]
    assert torch.equal(given["keys"][..., 0].cpu(), cache)
    assert torch.equal(given["values"][..., 0].cpu(), -cache)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"align": "left"}, ValueError, "used twice"),
        ({"align": "middle"}, ValueError, "align must be one of"),
        ({"table": torch.tensor([[0, 1], [0, 5]])}, ValueError, "none of the 5"),
        ({"table": torch.tensor([[0, 1], [-1, 2]])}, ValueError, "none of the 5"),
        ({"table": torch.tensor([[0, 1], [0, 2]]).short()}, TypeError, "table"),
        ({"lengths": torch.tensor([9, 7])}, ValueError, "lengths lie outside"),
        ({"lengths": torch.tensor([8, 3])}, ValueError, "columns lie outside"),
        ({"columns": torch.tensor([4, 4, 4, 5, 3])}, ValueError, "must ascend"),
        ({"columns": torch.tensor([-1, 4, 4, 5, 3])}, ValueError, "columns lie outside"),
        ({"columns": torch.tensor([4, 5, 4, 5, 3]).int()}, TypeError, "columns must be int64"),
        ({"cu_seqlens": torch.tensor([0, 2, 4, 5])}, ValueError, r"B \* H \+ 1"),
        ({"values": torch.zeros(5, 4, 2, 1).half()}, TypeError, "values must have the dtype"),
        ({"lengths": torch.tensor([8, 7], device="meta")}, ValueError, "must be on the device of"),
    ],
)
def test_wrong_arguments_move_nothing(changes, error, message):
    given = arguments(**changes)
    before = given["keys"].clone()
    with pytest.raises(error, match=message):
        compact_paged(**given)
    assert torch.equal(given["keys"], before)


def test_entries_that_share_memory_are_refused():
    keys, table = torch.zeros(2, 4, 2, 3), torch.tensor([[0, 1]])
    rest = table, torch.tensor([8]), torch.tensor([1, 1]), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="same memory"):
        compact_paged(keys, keys, *rest)
    with pytest.raises(ValueError, match="keys must have memory of its own"):
        compact_paged(keys[:, :, :1].expand(-1, -1, 2, -1), keys.clone(), *rest)
    with pytest.raises(ValueError, match="must have places"):
        compact_paged(keys[:, :0], keys[:, :0].clone(), *rest)

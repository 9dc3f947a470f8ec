"""Places in memory beyond 2^31 elements, by strides below that: heads, or entries, far apart in untouched memory."""

import pytest
import torch
from mmkv_kernels import gather_kv, head_topk, key_statistics, ragged_attention, window_attention

IMPLS = ["reference", "triton"]


@pytest.fixture(params=[(2**30 + 160, 16), (16, 2**28 + 32)], ids=["heads", "entries"])
def caches(kit, request):
    """The same keys close together and far apart."""
    near = kit.randn(1, 3, 9, 16, dtype=torch.float16).to(kit.device)
    far = torch.empty(2**31 + 1000, dtype=near.dtype, device=kit.device)
    return near, far.as_strided(near.shape, (2**31 - 16, *request.param, 1)).copy_(near)


@pytest.mark.parametrize("name", ["key_statistics", "window_attention", "gather_kv", "ragged_attention", "head_topk"])
def test_offsets_beyond_32_bits(kit, caches, name):
    queries = kit.randn(1, 6, 1, 16, dtype=torch.float16, seed=2).to(kit.device)
    cu_seqlens, columns = torch.tensor([0, 3, 5, 9]).to(kit.device), (torch.arange(9) * 7 % 9).to(kit.device)
    counts = torch.tensor([[3, 2, 9]]).to(kit.device)
    call = {
        "key_statistics": lambda keys: key_statistics(keys, keys, impl=kit.impl),
        "window_attention": lambda keys: window_attention(queries, keys, scaling=0.3, impl=kit.impl),
        "gather_kv": lambda keys: gather_kv(keys, keys, columns, cu_seqlens, impl=kit.impl),
        "ragged_attention": lambda keys: ragged_attention(
            queries, keys[0, 0], keys[0, 0], cu_seqlens, keys, keys, scaling=0.3, impl=kit.impl
        ),
        "head_topk": lambda keys: head_topk(
            keys[..., 0],
            counts,
            candidates=keys[..., 1] > -1,
            always=keys[..., 2] > 1,
            impl=kit.impl,
        ),
    }[name]
    near, far = map(call, caches)
    assert all(torch.equal(x, y) for x, y in zip(near, far, strict=True))

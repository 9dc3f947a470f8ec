"""Places in memory beyond 2^31 elements: the second head's entries, in memory that is not touched in between."""

import pytest
import torch
from mmkv_kernels import gather_kv, key_statistics, ragged_attention, window_attention

IMPLS = ["reference", "triton"]


@pytest.fixture
def caches(kit):
    """The same keys close together and far apart."""
    near = kit.randn(1, 2, 9, 16, dtype=torch.float16).to(kit.device)
    far = torch.empty(2**31 + 1000, dtype=near.dtype, device=kit.device)
    return near, far.as_strided(near.shape, (2**32, 2**31 + 160, 16, 1)).copy_(near)


@pytest.mark.parametrize("name", ["key_statistics", "window_attention", "gather_kv", "ragged_attention"])
def test_offsets_beyond_32_bits(kit, caches, name):
    queries = kit.randn(1, 4, 1, 16, dtype=torch.float16, seed=2).to(kit.device)
    cu_seqlens, columns = torch.tensor([0, 5, 9]).to(kit.device), (torch.arange(9) % 5).to(kit.device)
    call = {
        "key_statistics": lambda keys: key_statistics(keys, keys, impl=kit.impl),
        "window_attention": lambda keys: window_attention(queries, keys, scaling=0.3, impl=kit.impl),
        "gather_kv": lambda keys: gather_kv(keys, keys, columns, cu_seqlens, impl=kit.impl),
        "ragged_attention": lambda keys: ragged_attention(
            queries, caches[0][0, 0], caches[0][0, 0], cu_seqlens, keys, keys, scaling=0.3, impl=kit.impl
        ),
    }[name]
    near, far = map(call, caches)
    assert all(torch.equal(x, y) for x, y in zip(near, far, strict=True))

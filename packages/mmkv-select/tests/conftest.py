"""Random selections for the tests."""

import pytest
import torch
from hypothesis import strategies as st

torch.set_num_threads(1)


@st.composite
def draw_masks(draw, max_length=10):
    """[B, H, N] bool."""
    batch, heads, length = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, max_length))
    flat = draw(st.lists(st.booleans(), min_size=batch * heads * length, max_size=batch * heads * length))
    return torch.tensor(flat, dtype=torch.bool).view(batch, heads, length)


def make_cache(mask, width=3, dtype=torch.float32):
    """Keys [B, H, N, width] and values [B, H, N, width + 1] in which every number tells where it stands."""
    batch, heads, length = mask.shape
    keys = torch.arange(batch * heads * length * width).view(batch, heads, length, width).to(dtype)
    values = -torch.arange(batch * heads * length * (width + 1)).view(batch, heads, length, width + 1).to(dtype)
    return keys, values


@pytest.fixture(scope="session")
def cache():
    return make_cache


@pytest.fixture(scope="session")
def masks():
    return draw_masks

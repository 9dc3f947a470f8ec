"""Jensen-Shannon divergence against entropies written out term by term."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_layershare import LN2, adjacent_divergences, js_divergence

weights = st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(lambda row: sum(row) > 1e-6)


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def by_hand(p, q):
    """JS = H((p + q) / 2) - (H(p) + H(q)) / 2, another form than the one in the code."""
    p, q = ([x / sum(row) for x in row] for row in (p, q))
    return entropy([(a + b) / 2 for a, b in zip(p, q, strict=True)]) - (entropy(p) + entropy(q)) / 2


@settings(deadline=None)
@given(weights, weights)
def test_divergence_is_that_of_the_entropies_symmetric_and_bounded(p, q):
    found = js_divergence(torch.tensor(p), torch.tensor(q)).item()
    assert found == pytest.approx(by_hand(torch.tensor(p).tolist(), torch.tensor(q).tolist()), abs=1e-9)
    assert found == pytest.approx(js_divergence(torch.tensor(q), torch.tensor(p)).item(), abs=1e-12)
    assert 0 <= found <= LN2 + 1e-12


def test_equal_rows_are_at_0_and_disjoint_ones_at_ln_2():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.0, 3.0])
    assert js_divergence(p, p * 7).item() == 0
    assert js_divergence(p, q).item() == pytest.approx(LN2, abs=1e-15)


def test_layers_are_compared_with_the_next_one_over_the_chosen_tokens():
    rows = torch.rand(4, 2, 6, generator=torch.Generator().manual_seed(0))
    over = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]], dtype=torch.bool)
    whole, part = adjacent_divergences(rows), adjacent_divergences(rows, over)
    for layer in range(3):
        pairs = [(rows[layer, b].tolist(), rows[layer + 1, b].tolist()) for b in range(2)]
        assert whole[layer].item() == pytest.approx(sum(by_hand(p, q) for p, q in pairs) / 2, abs=1e-7)
        chosen = [[[x for x, keep in zip(row, over[b], strict=True) if keep] for row in pairs[b]] for b in range(2)]
        assert part[layer].item() == pytest.approx(sum(by_hand(p, q) for p, q in chosen) / 2, abs=1e-7)


@pytest.mark.parametrize(
    ("rows", "over", "message"),
    [
        (torch.rand(3, 4), None, r"rows is \[L, B, N\]"),
        (torch.rand(3, 2, 4), torch.ones(2, 5, dtype=torch.bool), r"over \[B, N\]"),
        (torch.rand(3, 2, 4), torch.zeros(2, 4, dtype=torch.bool), "above 0"),
        (torch.full((3, 2, 4), float("nan")), None, "finite sum"),
        (torch.tensor([[[1.0, -0.1]], [[1.0, 1.0]]]), None, ">= 0"),
    ],
)
def test_what_is_no_attention_is_refused(rows, over, message):
    with pytest.raises(ValueError, match=message):
        adjacent_divergences(rows, over)

"""Random: a function of (seed, layer, head, distance from the last real token) and nothing else."""

from dataclasses import replace

import pytest
import torch
from mmkv_scores import Random, Trace

CAPACITY = torch.tensor([4])


def scores(seen, seed=0):
    return Random(seed)(seen, CAPACITY, Trace()).rank


def test_does_not_depend_on_batch_contents_or_padding(prompt, observe):
    one = scores(observe(prompt(20, seed=1), window=0))
    two = scores(observe(prompt(25, seed=2), prompt(20, seed=3), window=0))
    assert torch.equal(two[1, :, 5:], one[0])
    for left, right in ((0, 7), (7, 0), (3, 4)):
        padded = scores(observe(prompt(20), window=0, pads=[(left, right)]))
        assert torch.equal(padded[0, :, left : left + 20], one[0])


def test_does_not_depend_on_the_order_of_entries(prompt, observe):
    seen = observe(prompt(20), window=0)
    before = scores(seen).clone()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    seen.slots[:] = seen.slots[..., order].clone()
    assert torch.equal(scores(seen), before[..., order])


def test_differs_by_seed_layer_head_and_distance(prompt, observe):
    p = prompt(1000, heads=3, group=1, dim=1)
    columns = [scores(observe(p, window=0, layer=layer), seed)[0] for layer in (0, 1) for seed in (0, 1, 2**31 - 1)]
    columns = torch.cat(columns)  # [18, 1000]
    correlation = torch.corrcoef(columns.double()) - torch.eye(18)
    assert float(correlation.abs().max()) < 0.15
    assert all(len(set(row.tolist())) > 990 for row in columns)


def test_is_roughly_uniform(prompt, observe):
    rank = scores(observe(prompt(50_000, heads=2, group=1, dim=1), window=0))
    assert rank.dtype == torch.float32
    assert float(rank.min()) >= 0
    assert float(rank.max()) < 1
    for head in rank[0]:
        bins = torch.histc(head, 20, 0, 1)
        chi_squared = float(((bins - 2500) ** 2 / 2500).sum())
        assert chi_squared < 60  # 19 degrees of freedom; 99.9 % lie below 44


def test_is_the_same_for_ever(prompt, observe):
    """Pinned, with the hash written out once more in Python's integers."""

    def mix(seed, layer, head, distance):
        state = 0
        steps = (0x2545F491, 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
        for part, step in zip((seed, layer, head, distance), steps, strict=True):
            state = ((state ^ (part + 1)) * step) % 2**31
            state = ((state ^ (state // 2**15)) * 0x2C1B3C6D) % 2**31
            state = ((state ^ (state // 2**12)) * 0x297A2D39) % 2**31
            state ^= state // 2**15
        return (state // 2**7) / 2**24

    rank = scores(observe(prompt(9), window=0, layer=3), 7)
    assert rank[0].tolist() == [[mix(7, 3, head, 8 - slot) for slot in range(9)] for head in range(2)]


@pytest.mark.parametrize("seed", [-1, 2**40])
def test_any_seed(prompt, observe, seed):
    rank = scores(observe(prompt(100), window=0), seed)
    assert 0 <= float(rank.min()) <= float(rank.max()) < 1


def test_heads_that_hold_different_entries_count_from_the_same_token(prompt, observe):
    """A later turn: one head has lost the row's last token, the distances are still to that one."""
    whole = observe(prompt(6), window=0)
    slots = torch.tensor([[[0, 2, 5], [-1, 1, 4]]])
    seen = replace(observe(prompt(3), window=0), slots=slots, valid=slots >= 0, candidates=slots >= 0)
    everything, found = scores(whole)[0], scores(seen)[0]
    assert torch.equal(found[0], everything[0, [0, 2, 5]])
    assert torch.equal(found[1, 1:], everything[1, [1, 4]])

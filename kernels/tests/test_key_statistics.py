import pytest
import torch
from mmkv_kernels import key_statistics

IMPLS = ["reference", "triton"]


def oracle(keys, values, valid=None):
    """Float64 by brute force: redundancy is the average over all pairs of different entries."""
    batch, heads, entries, _ = keys.shape
    key_norms, value_norms, cosines = torch.zeros(3, batch, heads, entries, dtype=torch.float64)
    mean_norm, redundancy = torch.zeros(2, batch, heads, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            held = (
                range(entries)
                if valid is None
                else valid[b, h if valid.shape[1] > 1 else 0].nonzero().flatten().tolist()
            )
            held = list(held)
            if not held:
                continue
            k, v = keys[b, h, held].double(), values[b, h, held].double()
            key_norms[b, h, held], value_norms[b, h, held] = k.norm(dim=-1), v.norm(dim=-1)
            unit = k / k.norm(dim=-1, keepdim=True)
            mean = unit.mean(0)
            mean_norm[b, h] = mean.norm()
            cosines[b, h, held] = torch.nn.functional.cosine_similarity(k, mean[None], dim=-1)
            if len(held) > 1:
                pairs = unit @ unit.T
                redundancy[b, h] = (pairs.sum() - pairs.trace()) / (len(held) * (len(held) - 1))
    return key_norms, value_norms, cosines, mean_norm, redundancy


def check(kit, keys, values, valid=None):
    result = kit.run(key_statistics, keys, values, valid=valid)
    for name, actual, expected in zip(result._fields, result, oracle(keys, values, valid), strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(
            actual.double(), expected, rtol=2e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    return result


@pytest.mark.parametrize(("entries", "size"), [(1, 128), (2, 16), (63, 72), (63, 128), (1000, 16), (1000, 128)])
def test_against_brute_force(kit, entries, size, dtype):
    bias = kit.randn(1, 3, 1, size, seed=2)
    keys = (kit.randn(1, 3, entries, size) + torch.tensor([0.0, 1, 4]).view(1, 3, 1, 1) * bias).to(dtype)
    check(kit, keys, kit.randn(1, 3, entries, size + 8, dtype=dtype, seed=1))


def test_more_chunks_than_are_joined_at_a_time(kit):
    keys = kit.randn(1, 1, 9000, 8) + torch.linspace(0, 3, 9000)[:, None]
    for got, wanted in zip(kit.run(key_statistics, keys, keys), key_statistics(keys, keys), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2])
def test_random_validity_over_nan(kit, heads):
    valid = (kit.randn(3, heads, 80, seed=2) > 0)[..., ::2]
    valid[1], valid[2, :, 1:] = False, False  # no entry, at most one
    keys, values = kit.randn(3, 2, 40, 8) + 1, kit.randn(3, 2, 40, 12, seed=1)
    hidden = ~valid[..., None].expand(-1, 2, -1, -1)
    result = check(kit, keys.masked_fill(hidden, torch.nan), values.masked_fill(hidden, torch.nan), valid)
    for field in result[:3]:
        assert not field.masked_select(~valid).any()
    assert not result.redundancy[1:].any()


@pytest.mark.parametrize("left", [True, False])
def test_padding_equals_the_row_alone(kit, left):
    keys, values = kit.randn(1, 2, 20, 8) + 0.5, kit.randn(1, 2, 20, 8, seed=1)
    pad = (0, 0, 9, 0) if left else (0, 0, 0, 9)
    padded = [torch.nn.functional.pad(x, pad, value=7.0) for x in (keys, values)]
    valid = torch.nn.functional.pad(torch.ones(1, 1, 20, dtype=torch.bool), pad[2:])
    alone, batch = kit.run(key_statistics, keys, values), kit.run(key_statistics, *padded, valid=valid)
    for x, y in zip(alone[:3], batch[:3], strict=True):
        torch.testing.assert_close(x, y[:, :, 9:] if left else y[:, :, :20], rtol=1e-6, atol=1e-6)
    for x, y in zip(alone[3:], batch[3:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [1.0, 3.0, 10.0, 70.0])
@pytest.mark.parametrize("seed", range(3))
def test_diversity_ranking_of_biased_keys(kit, bias, seed):
    """Keys that nearly all point one way (r up to .9998), where bfloat16 arithmetic leaves two distinct cosines."""
    common = kit.randn(1, 1, 1, 128, seed=seed)
    keys = (kit.randn(1, 1, 1000, 128, seed=seed + 10) + bias * common).to(
        torch.bfloat16 if bias < 70 else torch.float32
    )
    result = kit.run(key_statistics, keys, keys)
    exact = oracle(keys, keys)
    assert float(result.redundancy) == pytest.approx(float(exact[4]), abs=1e-6)
    assert float(result.redundancy) > {1.0: 0.45, 3.0: 0.88, 10.0: 0.98, 70.0: 0.9995}[bias]
    kept, wanted = ((-x[0, 0].double()).topk(32).indices.tolist() for x in (result.cosines, exact[2]))
    assert set(kept) == set(wanted)
    assert result.cosines.unique().numel() > 300


def test_zero_keys_and_cancelling_keys(kit):
    keys = kit.randn(1, 2, 6, 8)
    keys[0, 0, 2] = 0
    keys[0, 1, 3:] = -keys[0, 1, :3]
    keys[0, 1] = torch.tensor([[1.0], [-1.0]] * 3) * torch.eye(8)[0]
    result = kit.run(key_statistics, keys, keys)
    assert all(field.isfinite().all() for field in result)
    assert result.cosines[0, 0, 2] == 0
    assert result.mean_norm[0, 1] == 0
    assert not result.cosines[0, 1].any()
    assert float(result.redundancy[0, 1]) == pytest.approx(-1 / 5)


def test_identical_keys_are_fully_redundant(kit):
    keys = kit.randn(1, 1, 1, 64).expand(1, 1, 500, 64)
    result = kit.run(key_statistics, keys, keys)
    torch.testing.assert_close(result.redundancy, torch.ones(1, 1))
    torch.testing.assert_close(result.cosines, torch.ones(1, 1, 500))


def test_row_alone_is_bitwise_the_row_in_the_batch(kit, dtype):
    keys, values = kit.randn(3, 2, 65, 32, dtype=dtype), kit.randn(3, 2, 65, 32, dtype=dtype, seed=1)
    batch = kit.run(key_statistics, keys, values)
    for b in range(3):
        alone = kit.run(key_statistics, keys[b : b + 1].clone(), values[b : b + 1].clone())
        assert all(torch.equal(x, y[b : b + 1]) for x, y in zip(alone, batch, strict=True))


def test_no_entries_and_own_bytes(kit):
    empty = kit.run(key_statistics, kit.randn(2, 3, 0, 8), kit.randn(2, 3, 0, 8))
    assert empty.cosines.shape == (2, 3, 0)
    assert torch.equal(empty.redundancy, torch.zeros(2, 3))
    assert torch.equal(empty.mean_norm, torch.zeros(2, 3))
    keys = kit.randn(2, 11, 3, 8).transpose(1, 2)
    before = keys.clone()
    kit.owns_its_bytes(*kit.run(key_statistics, keys, keys, valid=torch.ones(2, 1, 11, dtype=torch.bool)))
    assert torch.equal(keys, before)


@pytest.mark.parametrize(
    ("keys", "values", "valid", "error"),
    [
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4), None, ValueError),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4).half(), None, TypeError),
        (torch.zeros(1, 2, 3, 4).int(), torch.zeros(1, 2, 3, 4).int(), None, TypeError),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.ones(1, 3, 3).bool(), ValueError),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3), TypeError),
    ],
)
def test_wrong_arguments(keys, values, valid, error):
    with pytest.raises(error):
        key_statistics(keys, values, valid=valid)

"""Which implementation runs, errors that say why not, and operators within torch.compile."""

import functools
import importlib.util

import pytest
import torch
from mmkv_kernels import (
    _checks,
    bacon_calibrate,
    compact_paged,
    gather_kv,
    head_topk,
    key_statistics,
    mixkv_mix,
    ragged_attention,
    window_attention,
)

OFFSETS = torch.tensor([0, 5, 9])


def inputs(kit, size=16, dtype=torch.float32):
    """Every operator with something to compute: (operator, tensors, options)."""
    keys, values = kit.randn(1, 2, 9, size, dtype=dtype), kit.randn(1, 2, 9, size, dtype=dtype, seed=1)
    queries = kit.randn(1, 4, 1, size, dtype=dtype, seed=2)
    columns = torch.arange(9) % 5
    seen = keys[..., 0].float(), keys[..., 1].float(), keys[..., 2].float()
    return {
        "key_statistics": (key_statistics, (keys, values), {}),
        "window_attention": (window_attention, (queries, keys), {"scaling": 0.3}),
        "gather_kv": (gather_kv, (keys, values, columns, OFFSETS), {}),
        "ragged_attention": (
            ragged_attention,
            (queries, keys[0, 0], values[0, 0], OFFSETS, keys, values),
            {"scaling": 0.3},
        ),
        "head_topk": (head_topk, (keys[..., 0], torch.tensor([[3, 2]])), {}),
        "bacon_calibrate": (bacon_calibrate, (*seen, torch.ones(1, 1, 9).bool(), torch.tensor([3])), {}),
        "mixkv_mix": (mixkv_mix, (*seen, seen[0][..., 0], seen[1][..., 0], torch.ones(1, 1, 9).bool()), {}),
        "compact_paged": (
            compact_paged,
            (keys.transpose(1, 2), values.transpose(1, 2), torch.tensor([[0]]), torch.tensor([9]), columns, OFFSETS),
            {},
        ),
    }


OF_CACHES = ["key_statistics", "window_attention", "gather_kv", "ragged_attention", "compact_paged"]
OF_SCORES = ["bacon_calibrate", "mixkv_mix"]
NAMES = [*OF_CACHES, "head_topk", *OF_SCORES]


def call(kit, name, impl, **changes):
    operator, tensors, options = inputs(kit, **changes)[name]
    return operator(*tensors, **options, impl=impl)


@pytest.mark.parametrize("name", NAMES)
def test_auto_takes_the_reference_on_cpus(kit, name):
    auto, reference = call(kit, name, "auto"), call(kit, name, "reference")
    assert (auto is None) == (reference is None) == (name == "compact_paged")
    if reference is not None:
        assert all(torch.equal(x, y) for x, y in zip(auto, reference, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_what_triton_cannot_do_is_an_error(kit, name, monkeypatch):
    with pytest.raises(ValueError, match="impl must be one of"):
        call(kit, name, "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ImportError, match=r"mmkv-kernels\[triton\]"):
        call(kit, name, "triton")
    monkeypatch.undo()
    triton = pytest.importorskip("triton", reason="needs triton: pip install 'mmkv-kernels[triton]'")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="runs on GPUs"):
        call(kit, name, "triton")
    monkeypatch.undo()
    if not torch.cuda.is_available():
        if name not in OF_SCORES:
            with pytest.raises(ValueError, match=r"got torch\.float64"):
                call(kit, name, "triton", dtype=torch.float64)
        if name in OF_CACHES:
            with pytest.raises(ValueError, match="from 1 to 256"):
                call(kit, name, "triton", size=257)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", NAMES)
def test_operators_are_one_node_of_a_graph(kit, name, backend):
    operator, tensors, options = inputs(kit, dtype=torch.float64)[name]
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(operator, **options), fullgraph=True, backend=backend, dynamic=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # head_topk's result is sized by the data
        results = compiled(*tensors)
    _, again, _ = inputs(kit, dtype=torch.float64)[name]
    wanted = operator(*again, **options)
    pairs = zip(tensors, again, strict=True) if wanted is None else zip(results, wanted, strict=True)
    assert all(torch.equal(got, expected) for got, expected in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_fakes_are_like_the_results(kit, name):
    _, tensors, _ = inputs(kit)[name]
    rest = {
        "key_statistics": (None,),
        "window_attention": (0.3, None, None, None, "mean"),
        "gather_kv": (None, None, None),
        "ragged_attention": (None, None, 0.3, None, True),
        "head_topk": (None, None),
        "bacon_calibrate": ("elt", 2, "padded", "own", 0.5, True),
        "mixkv_mix": (),
        "compact_paged": ("right",),
    }[name]
    torch.library.opcheck(getattr(torch.ops.mmkv_kernels, f"_{name}").default, (*tensors, *rest, "auto"))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_no_heads(implementation):
    if implementation == "triton":
        pytest.importorskip("triton", reason="needs triton: pip install 'mmkv-kernels[triton]'")
    device = "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"
    keys, nothing = torch.zeros(2, 0, 5, 8, device=device), torch.zeros(0, 8, device=device)
    none, offsets = (torch.zeros(n, dtype=torch.int64, device=device) for n in (0, 1))
    assert key_statistics(keys, keys, impl=implementation).redundancy.shape == (2, 0)
    assert gather_kv(keys, keys, none, offsets, impl=implementation).keys.shape == (0, 8)
    with pytest.raises(ValueError, match="multiple of KV heads"):
        window_attention(keys, keys, scaling=0.3, impl=implementation)
    with pytest.raises(ValueError, match="multiple of KV heads"):
        ragged_attention(keys, nothing, nothing, offsets, keys, keys, scaling=0.3, impl=implementation)


class Elsewhere(torch.Tensor):
    """A tensor as if on a GPU, which counts how often it is fetched."""

    is_cpu = False
    fetched = 0

    def tolist(self):
        Elsewhere.fetched += 1
        return self.as_subclass(torch.Tensor).tolist()


def test_offsets_on_gpus_are_fetched_once():
    """Fetching waits for the GPU, which would cost every decoding step more than its attention."""
    offsets = OFFSETS.clone().as_subclass(Elsewhere)
    Elsewhere.fetched = 0
    for _ in range(3):
        assert _checks.segment_lengths("cu_seqlens", offsets, 2, 9) == [5, 4]
    assert Elsewhere.fetched == 1
    offsets[1] = 10
    with pytest.raises(ValueError, match="rise from 0 to 9"):
        _checks.segment_lengths("cu_seqlens", offsets, 2, 9)
    assert Elsewhere.fetched == 2


@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_two_devices_are_refused(kit, name):
    operator, tensors, options = inputs(kit)[name]
    elsewhere = (*tensors[:-1], tensors[-1].to("meta"))
    with pytest.raises(ValueError, match="must be on the device of"):
        operator(*elsewhere, **options)

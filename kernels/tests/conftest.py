"""Shared by the tests of all operators: inputs, tolerances, and what a query row sees."""

import math
import os
from types import SimpleNamespace

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when kernels are defined
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.float32, seed=0):
    """Standard normal values, rounded to `dtype`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sees(valid, mask, b, h, row, rows, entries):
    """List of entries that query row `row` of batch row b sees in KV head h, straight from the specification."""
    held = [True] * entries if valid is None else valid[b, h if valid.shape[1] > 1 else 0].tolist()
    if mask is not None:
        allowed = mask[b, h if mask.shape[1] > 1 else 0, row].tolist()
        return [j for j in range(entries) if held[j] and allowed[j]]
    own = entries - rows + row
    if own < 0 or not held[own]:
        return []
    return [j for j in range(own + 1) if held[j]]


def probabilities(query, keys, seen, scaling, softcap=None):
    """Softmax in float64 of one query [D] over keys[seen], spread to [N]."""
    logits = torch.tensor([float(query.double() @ keys[j].double()) * scaling for j in seen], dtype=torch.float64)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    spread = torch.zeros(keys.shape[0], dtype=torch.float64)
    spread[seen] = torch.softmax(logits, 0)
    return spread


def attention(query, keys, values, seen, scaling, softcap=None):
    """Float64 attention of one query over `seen`: (out [Dv], lse)."""
    if not len(seen):
        return torch.zeros(values.shape[1], dtype=torch.float64), -math.inf
    logits = (keys[seen].double() @ query.double()) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.softmax(logits, 0) @ values[seen].double(), float(torch.logsumexp(logits, 0))


def close(actual, expected, dtype=torch.float32, scale=1.0):
    """Within a few roundings of `dtype` of a float64 oracle."""
    rounding = max(torch.finfo(dtype).eps, 2**-20)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2 * rounding, atol=2 * rounding * scale)


def owns_its_bytes(*tensors):
    """No tensor shares its storage or keeps more of it than it shows."""
    pointers = [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]
    assert len(set(pointers)) == len(pointers)
    for tensor in tensors:
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def close_lse(actual, expected, dtype):
    """As `close`; for halves the fused kernel takes a faster exponential, still far below their rounding."""
    assert actual.dtype == torch.float32
    close(actual, expected, scale=1.0 if dtype == torch.float32 else 32.0)


def device_of(impl):
    return DEVICE if impl == "triton" else "cpu"


def runner(impl):
    """`run(operator, ...)`: its results on CPU, in memory of their own, computed by `impl` on the device it is for.

    Memory an operator allocates holds NaN, or the greatest integer, until it is written.
    """
    device = device_of(impl)

    def there(value):
        if isinstance(value, tuple):
            return tuple(map(there, value))
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def run(operator, *arguments, **options):
        options = {name: there(value) for name, value in options.items()}
        torch.use_deterministic_algorithms(True)
        try:
            result = operator(*map(there, arguments), impl=impl, **options)
        finally:
            torch.use_deterministic_algorithms(False)
        owns_its_bytes(*result)
        return type(result)(*(tensor.cpu() for tensor in result))

    return run


def pytest_generate_tests(metafunc):
    """A module that says IMPLS runs every test that takes a kit with each of them."""
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", getattr(metafunc.module, "IMPLS", ["reference"]), scope="session")


def patch_once():
    """Halves the interpreter's time: it patches Triton's language for every call of a helper, not only of a kernel."""
    from triton.runtime.interpreter import InterpretedFunction

    call = InterpretedFunction.__call__

    def quick(helper, *arguments, **options):
        ours = helper.fn.__module__.startswith("mmkv_kernels")
        return helper.rewrite()(*arguments, **options) if ours else call(helper, *arguments, **options)

    InterpretedFunction.__call__ = quick


def pytest_collection_modifyitems(config, items):
    """The interpreter is slow: it gets about CASES of every test's, spread over its parameters; a GPU gets all."""
    cases = {}
    for item in items:
        if DEVICE == "cpu" and hasattr(item, "callspec") and item.callspec.params.get("impl") == "triton":
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    steps = {test: max(1, len(group) // CASES) | 1 for test, group in cases.items()}  # odd: pairs are not half seen
    dropped = {item for test, group in cases.items() for i, item in enumerate(group) if i % steps[test]}
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture(scope="session")
def kit(impl):
    if impl == "triton":
        pytest.importorskip("triton", reason="needs triton: pip install 'mmkv-kernels[triton]'")
        patch_once()
    return SimpleNamespace(
        impl=impl,
        device=device_of(impl),
        run=runner(impl),
        randn=randn,
        sees=sees,
        probabilities=probabilities,
        attention=attention,
        close=close,
        close_lse=close_lse,
        owns_its_bytes=owns_its_bytes,
    )


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param

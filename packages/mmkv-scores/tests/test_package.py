"""What holds for every scorer, and the package as its users see it."""

import re
import subprocess
import sys
from dataclasses import fields, replace

import mmkv_scores as package
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_scores import (
    BACON,
    AttentionScorer,
    KeyDiff,
    KNorm,
    LastQuery,
    MixKV,
    ObservedAttention,
    Random,
    Scorer,
    SnapKV,
    StreamingLLM,
    Trace,
    VNorm,
    WindowScorer,
)

SNAPKV = SnapKV(window=8)
SCORERS = {
    "snapkv": SNAPKV,
    "snapkv max": SnapKV(window=4, kernel=7, pooling="max", group="max"),
    "tova": LastQuery(),
    "tova per head": LastQuery(kernel=3, across_heads=False),
    "h2o": ObservedAttention(),
    "h2o raw": ObservedAttention(corrected=False),
    "streamingllm": StreamingLLM(),
    "knorm": KNorm(),
    "vnorm": VNorm(),
    "keydiff": KeyDiff(),
    "random": Random(),
    "bacon": BACON(SNAPKV),
    "bacon paper": BACON(SNAPKV, preset="paper"),
    "bacon rel": BACON(SNAPKV, preset="rel"),
    "mixkv": MixKV(SNAPKV),
    "mixkv bacon": MixKV(BACON(SNAPKV)),
    "mixkv h2o": MixKV(ObservedAttention()),
}
names = pytest.mark.parametrize("name", SCORERS)


@names
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_length_gives_finite_float32(prompt, observe, name, length, dtype):
    scorer, trace = SCORERS[name], Trace()
    for layer in range(2):
        prompts = [prompt(length, seed=i, heads=3, dtype=dtype) for i in range(2)]
        seen = observe(*prompts, window=scorer.window, columns=True, layer=layer)
        before = {f.name: getattr(seen, f.name) for f in fields(seen)}
        copies = {key: x.clone() for key, x in before.items() if isinstance(x, torch.Tensor)}
        scores = scorer(seen, torch.tensor([3, 3]), trace)
        for score in scores:
            assert score.shape == (2, 3, length)
            assert score.dtype == torch.float32
            assert bool(score.isfinite().all())
        assert all(torch.equal(before[key], x) for key, x in copies.items()), "an observation is read only"


@names
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_a_padded_row_is_the_row_alone(prompt, observe, name, data):
    """Padding of NaN on either side, other rows in the batch, three layers that share a trace."""
    scorer = SCORERS[name]
    length, other = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))
    left, extra = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    total = max(left + length, other) + extra
    pads = [(left, total - left - length), (total - other, 0)]
    capacity = data.draw(st.integers(1, 12))
    alone, batch = Trace(), Trace()
    for layer in range(3):
        one, two = prompt(length, seed=layer), prompt(other, seed=10 + layer)
        single = scorer(
            observe(one, window=scorer.window, recent=4, columns=True, layer=layer), torch.tensor([capacity]), alone
        )
        seen = observe(one, two, window=scorer.window, recent=4, columns=True, layer=layer, pads=pads)
        both = scorer(seen, torch.tensor([capacity, 3]), batch)
        for expected, found in zip(single, both, strict=True):
            torch.testing.assert_close(found[0, :, left : left + length], expected[0], rtol=2e-4, atol=2e-6)
            assert bool(found.isfinite().all())


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "random"])  # that one hashes the head's index
def test_permuting_kv_heads_permutes_the_scores(prompt, observe, name):
    scorer, order = SCORERS[name], torch.tensor([2, 0, 3, 1])
    one, two = Trace(), Trace()
    for layer in range(3):
        p = prompt(30, seed=layer, heads=4, group=2)
        queries = p.queries.unflatten(0, (4, 2))[order].flatten(0, 1)
        permuted = replace(p, queries=queries, keys=p.keys[order], values=p.values[order])
        plain, other = (
            scorer(observe(x, window=scorer.window, columns=True, layer=layer), torch.tensor([6]), trace)
            for x, trace in ((p, one), (permuted, two))
        )
        for expected, found in zip(plain, other, strict=True):
            torch.testing.assert_close(found, expected[:, order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("scorer", "setting", "value", "type_"),
    [
        (SnapKV, "window", 16.5, "int"),
        (SnapKV, "window", True, "int"),
        (SnapKV, "kernel", "5", "int"),
        (LastQuery, "kernel", 3.0, "int"),
        (LastQuery, "across_heads", "false", "bool"),
        (ObservedAttention, "corrected", "false", "bool"),
        (ObservedAttention, "corrected", 0, "bool"),
        (ObservedAttention, "corrected", None, "bool"),
        (StreamingLLM, "sinks", 1.5, "int"),
        (StreamingLLM, "sinks", False, "int"),
        (Random, "seed", 1.5, "int"),
        (BACON, "reach", 5.0, "int"),
        (BACON, "depth", "4", "int"),
        (BACON, "gamma", "high", "float"),
        (BACON, "rho", True, "float"),
        (BACON, "terms", 3, "str"),
        (BACON, "gate", 1, "bool | None"),
        (BACON, "gate", "no", "bool | None"),
    ],
)
def test_settings_of_another_type(scorer, setting, value, type_):
    message = f"{scorer.__name__}: {setting} must be {type_}, got {value!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        scorer(**{setting: value})


@names
def test_protocols(name):
    scorer = SCORERS[name]
    assert isinstance(scorer, Scorer)
    assert scorer.window >= 0
    assert hash(scorer) == hash(replace(scorer))
    is_attention = not name.startswith(("streaming", "knorm", "vnorm", "keydiff", "random", "mixkv"))
    assert getattr(scorer, "is_attention", False) is is_attention
    assert isinstance(scorer, WindowScorer) is name.startswith(("snapkv", "tova"))
    if is_attention:
        assert isinstance(scorer, AttentionScorer)


@names
def test_rows_of_different_capacity(prompt, observe, name):
    """Capacity is per row; a row that keeps everything does not disturb the others."""
    scorer = SCORERS[name]
    p = prompt(20, seed=1)
    both = scorer(observe(p, p, window=scorer.window, columns=True), torch.tensor([2, 500]), Trace())
    one = scorer(observe(p, window=scorer.window, columns=True), torch.tensor([2]), Trace())
    torch.testing.assert_close(both.rank[0], one.rank[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", sorted(package.__all__))
def test_everything_public_is_documented(name):
    assert getattr(package, name).__doc__


def test_imports_with_torch_alone():
    code = (
        "import sys, torch; before = {name.split('.')[0] for name in sys.modules}; import mmkv_scores;"
        "loaded = {name.split('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names);"
        "assert loaded == {'mmkv_scores', 'mmkv_kernels'}, loaded;"
        "assert not {'transformers', 'scipy', 'matplotlib'} & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

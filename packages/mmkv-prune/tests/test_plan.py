"""What an adapter relies on: plans, gathering, positions; and a small decoder that follows a plan."""

import re
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_prune import (
    ADSC,
    Attention,
    Evidence,
    FastV,
    PrunePlan,
    PyramidDrop,
    SparseVLM,
    UniformDrop,
    attention_rows,
    kept_columns,
    reindexed,
    spread,
)

quick = settings(deadline=None, max_examples=60)
LAYERS, HEADS, KV_HEADS, DIM, WIDTH = 5, 4, 2, 8, 32


@quick
@given(seed=st.integers(0, 10**6))
def test_kept_columns(seed):
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(3, seed % 9, generator=g) < 0.5
    found = kept_columns(kept)
    wanted = [row.nonzero().flatten().tolist() for row in kept]
    assert found.columns.shape == found.real.shape == (3, max(map(len, wanted)))
    for columns, real, row in zip(found.columns.tolist(), found.real.tolist(), wanted, strict=True):
        fill = len(columns) - len(row)
        assert columns[fill:] == row
        assert real == [False] * fill + [True] * len(row)
        assert len(set(columns)) == len(columns)


def test_reindexed():
    kept = torch.tensor([[False, False, True, False, True, True], [True, True, False, False, True, False]])
    assert reindexed(kept)[kept].tolist() == [0, 1, 2, 0, 1, 2]
    assert (reindexed(kept) >= 0).all()


def test_before_the_prompt_runs():
    plan = PrunePlan(SparseVLM(), 32)
    assert plan.layers == (3, 7, 16)
    assert plan.evidence == Evidence("previous", embeddings=True)
    assert plan.positions == "keep"
    assert PrunePlan(FastV(3), 4).layers == (3,)


@pytest.mark.parametrize(
    "method", [ADSC(), FastV(20), PyramidDrop((1, 2, 20)), SparseVLM((1, 2, 20)), UniformDrop((20,))]
)
def test_schedule_beyond_the_last_layer(method):
    PrunePlan(method, 21)
    with pytest.raises(ValueError, match="at the input of layer 20; this model's last layer is 19"):
        PrunePlan(method, 20)


class Wrong:
    """A third party's method with a mistake."""

    layers = (1,)
    positions = "keep"
    evidence: ClassVar = None

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, seen):
        return self.answer(seen)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda seen: seen.alive.long(), "what Wrong keeps must be bool"),
        (lambda seen: seen.alive[:, :2], "what Wrong keeps must be bool"),
        (lambda seen: seen.survivors, "Wrong may drop vision tokens and nothing else"),
        (lambda seen: torch.ones_like(seen.alive), "Wrong may drop vision tokens and nothing else"),
    ],
)
def test_answers_are_checked(answer, message, prompt):
    p = prompt([-2, 4, -1], [-1, 2, -1])
    with pytest.raises(ValueError, match=message):
        PrunePlan(Wrong(answer), 2).keep(1, p, p.valid)


def test_bad_calls(prompt):
    p = prompt([-2, 4, -1])
    for wrong in (object(), FastV, None):
        with pytest.raises(TypeError, match=f"such as ADSC\\(\\); {re.escape(repr(wrong))} is none"):
            PrunePlan(wrong, 4)
    wrong = Wrong(lambda seen: seen.alive)
    wrong.evidence = Evidence("own")
    with pytest.raises(TypeError, match="Wrong asks for evidence, so it needs rows"):
        PrunePlan(wrong, 4)
    plan = PrunePlan(FastV(), 4)
    with pytest.raises(ValueError, match=r"nothing is dropped at layer 1, only at \[2\]"):
        plan.keep(1, p, p.valid)
    with pytest.raises(ValueError, match="hand in what its `evidence`"):
        plan.keep(2, p, p.valid)
    with pytest.raises(ValueError, match="alive must be bool"):
        plan.keep(2, p, p.valid.long())
    with pytest.raises(ValueError, match="not known beforehand"):
        plan.survivors(p)
    real = torch.ones(1, 1, dtype=torch.bool)
    for weights in (torch.ones(1, 1, 6), torch.ones(1, 7), torch.ones(1, 2, 7)):
        with pytest.raises(ValueError, match="attention must be weights"):
            plan.keep(2, p, p.valid, Attention(weights, real))


@pytest.mark.parametrize("method", [FastV(1, 0.01), ADSC((1,), 4), UniformDrop((1,), (0.1,))])
def test_the_last_token_stays_even_if_it_is_vision(method, prompt):
    p = prompt([-2, 6], [-1, 3, -2])
    attention = Attention(torch.linspace(1, 0, 8).expand(2, 1, 8), torch.ones(2, 1, dtype=torch.bool))
    kept = PrunePlan(method, 2).keep(1, p, p.valid, attention)
    assert kept[:, -1].all()
    assert kept[0].sum() < 8


@pytest.mark.parametrize(
    "method", [ADSC((1, 2)), FastV(1), PyramidDrop((1, 2, 3)), SparseVLM((1,), (2,)), SparseVLM((1,))]
)
def test_text_only_rows_pass_through(method, prompt):
    p = prompt([-5], [-2, 4, -1], pads=[(2, 0), (0, 0)])
    plan, alive = PrunePlan(method, 4), p.valid
    attention = Attention(torch.rand(2, 1, 7), torch.tensor([[False], [True]]))
    for layer in plan.layers:
        alive = plan.keep(layer, p, alive, attention)
        assert alive[0].equal(p.valid[0])
    alone = prompt([-5])
    assert plan.keep(1, alone, alone.valid, Attention(torch.rand(1, 1, 5), torch.ones(1, 1, dtype=torch.bool))).all()


class Decoder:
    """A pre-norm decoder with GQA and rotations, whose layers keep a cache each; columns are positions."""

    def __init__(self, seed=0, dtype=torch.float64):
        g = torch.Generator().manual_seed(seed)

        def matrix(rows, columns):
            return torch.randn(rows, columns, generator=g, dtype=dtype) * rows**-0.5

        self.layers = [
            (
                matrix(WIDTH, HEADS * DIM),
                matrix(WIDTH, KV_HEADS * DIM),
                matrix(WIDTH, KV_HEADS * DIM),
                matrix(WIDTH, WIDTH),
            )
            for _ in range(LAYERS)
        ]

    def project(self, layer, x, positions):
        wq, wk, wv, _ = self.layers[layer]
        x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-9) * WIDTH**0.5
        q, k, v = (x @ w for w in (wq, wk, wv))
        q, k, v = (y.unflatten(-1, (-1, DIM)).transpose(1, 2) for y in (q, k, v))
        angle = positions[:, None, :, None] * 0.3 ** torch.arange(DIM // 2, dtype=x.dtype)
        return *(self.rotate(y, angle) for y in (q, k)), v

    @staticmethod
    def rotate(y, angle):
        a, b = y.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def attend(self, layer, x, q, k, v, visible):
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
        logits = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(~visible[:, None], -torch.inf)
        mixed = torch.nan_to_num(logits.softmax(-1)) @ v
        x = x + mixed.transpose(1, 2).flatten(2) @ self.layers[layer][3]
        return x + torch.tanh(x)


def causal(columns, real):
    return (columns[:, :, None] >= columns[:, None, :]) & real[:, None, :] & real[:, :, None]


def run_pruned(model, plan, p, x, asked=None):
    """As an adapter would: gathers at the layers' inputs. Returns the last hidden states, masks and keys per layer."""
    length = p.valid.shape[1]
    held, alive = kept_columns(torch.ones_like(p.valid)), p.valid
    real, before, kept, cache = p.valid, None, [], []
    rows = plan.rows(p, x)
    for layer in range(LAYERS):
        if layer in plan.layers:
            attention = None
            if rows is not None:
                source = before if plan.evidence.layer == "previous" else model.project(layer, x, held.columns)
                asking = kept_columns(rows.gather(1, held.columns) & real)
                q, k = source[0], source[1]
                q = q.gather(2, asking.columns[:, None, :, None].expand(-1, HEADS, -1, DIM))
                seen = causal(held.columns, real).gather(1, asking.columns[:, :, None].expand(-1, -1, k.shape[2]))
                weights = attention_rows(q, k, seen & asking.real[:, :, None], scaling=DIM**-0.5)
                attention = Attention(spread(weights, held.columns, real, length), asking.real)
            alive = plan.keep(layer, p, alive, attention)
            index = kept_columns(alive.gather(1, held.columns) & real)
            x = x.gather(1, index.columns[:, :, None].expand(-1, -1, WIDTH))
            held = held._replace(columns=held.columns.gather(1, index.columns))
            real = index.real
        before = model.project(layer, x, held.columns)
        x = model.attend(layer, x, *before, causal(held.columns, real))
        kept.append(alive)
        cache.append((before[1], before[2], held.columns, real))
    return x, kept, cache


def run_masked(model, p, x, kept):
    """Dense: dropped columns are masked as keys from the layer on where they are dropped."""
    columns = torch.arange(p.valid.shape[1]).expand(p.valid.shape)
    inputs = []
    for layer in range(LAYERS):
        inputs.append(x)
        x = model.attend(layer, x, *model.project(layer, x, columns), causal(columns, kept[layer]))
    return x, inputs


METHODS = [
    ADSC((1, 3), 2),
    ADSC((2, 4), (2, 3), layout="quincunx"),
    FastV(2, 0.5),
    PyramidDrop((1, 2, 4)),
    SparseVLM((1, 3), scale=0.9),
    SparseVLM((1, 3), keep=(0.5, 0.25)),
    UniformDrop((1,), (0.3,)),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_decoder_equals_a_masked_one(method, prompt):
    """Ragged rows, padding on both sides, several images, a row without any."""
    p = prompt([-3, (1, 4, 4), -5], [-2, (1, 3, 2), -1, (2, 2, 3), -2], [-9], pads=[(1, 0), (0, 2), (0, 0)])
    model, plan = Decoder(), PrunePlan(method, LAYERS)
    x = torch.randn(*p.valid.shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    pruned, kept, cache = run_pruned(model, plan, p, x)
    dense, _ = run_masked(model, p, x, kept)
    _, _, columns, real = cache[-1]
    wanted = dense.gather(1, columns[:, :, None].expand(-1, -1, WIDTH))
    torch.testing.assert_close(pruned[real], wanted[real], rtol=1e-9, atol=1e-9)
    plain, _ = run_masked(model, p, x, [p.valid] * LAYERS)
    assert (plain.gather(1, columns[:, :, None].expand(-1, -1, WIDTH)) - pruned)[real].abs().max() > 1e-3
    counts = plan.counts(p)
    if counts is not None:  # the cache of a layer holds what the plan said: n_l + text
        text = (p.valid & ~p.vision).sum(-1)
        assert [c[3].sum(-1).tolist() for c in cache] == (counts + text).tolist()
    for row in range(3):  # and each row chose what it would have chosen alone
        own = p.valid[row]
        alone_prompt = type(p)(p.valid[row : row + 1, own], p.image[row : row + 1, own], p.place[row : row + 1, own])
        _, alone, _ = run_pruned(model, plan, alone_prompt, x[row : row + 1, own])
        assert all(a[0].equal(k[row, own]) for a, k in zip(alone, kept, strict=True))


def test_layers_before_the_first_drop_are_untouched_and_stride_1_is_identity(prompt):
    p = prompt([-3, 12, -4])
    model, x = Decoder(), torch.randn(1, 19, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, _, whole = run_pruned(model, PrunePlan(ADSC((1,), 1), LAYERS), p, x)
    assert plain.equal(run_masked(model, p, x, [p.valid] * LAYERS)[0])
    _, _, cache = run_pruned(model, PrunePlan(ADSC((3,), 3), LAYERS), p, x)
    for layer in range(3):
        assert cache[layer][0].equal(whole[layer][0])
        assert cache[layer][1].equal(whole[layer][1])
    assert cache[3][0].shape[2] == 4 + 7  # the text at layer 3's input is the same, so are its keys
    text = [c for c, column in enumerate(cache[3][2][0].tolist()) if not p.vision[0, column]]
    assert cache[3][0][:, :, text].equal(whole[3][0][:, :, (~p.vision[0]).nonzero().flatten()])


def test_prefill_of_one_more_is_a_decode_step(prompt):
    model, plan = Decoder(), PrunePlan(ADSC((1, 3), 3), LAYERS)
    x = torch.randn(1, 20, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    longer, _, _ = run_pruned(model, plan, prompt([-3, 12, -5]), x)
    _, _, cache = run_pruned(model, plan, prompt([-3, 12, -4]), x[:, :-1])
    step, position = x[:, -1:], torch.tensor([[19]])
    for layer, (k, v, _, _) in enumerate(cache):
        q, new_k, new_v = model.project(layer, step, position)
        k, v = torch.cat((k, new_k), 2), torch.cat((v, new_v), 2)
        step = model.attend(layer, step, q, k, v, torch.ones(1, 1, k.shape[2], dtype=torch.bool))
    torch.testing.assert_close(step, longer[:, -1:], rtol=1e-9, atol=1e-9)


def test_gradients_flow(prompt):
    p = prompt([-3, 12, -4])
    x = torch.randn(1, 19, WIDTH, dtype=torch.float64, requires_grad=True)
    run_pruned(Decoder(), PrunePlan(ADSC((1, 3), 2), LAYERS), p, x)[0].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()  # dropped tokens speak through the layers they did reach

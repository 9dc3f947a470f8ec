"""What every adapter of mmkv must do, whatever engine it drives; for use in the adapter's own tests.

An adapter is wrapped in an object with one method, `run`. Each `check_*` raises an `AssertionError` that says what to
look at:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conformance(check):
        check(MyAdapter(), Case(family="qwen2_vl"))

Passing says that these properties hold on the tiny models tried, in float32; nothing about speed or quality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmkv_testkit.decode import greedy
from mmkv_testkit.families import TinyVLM, build
from mmkv_testkit.oracle import MaskedDense
from mmkv_testkit.prompts import Inputs, pad, unpadded


@dataclass(frozen=True, slots=True)
class Run:
    """What an adapter did with one batch."""

    tokens: Tensor
    """The new tokens [B, n], greedy."""
    kept: Mapping[int, Tensor]
    """Prompt columns each KV head of a compressed layer holds, wherever: bool [B, H, N], padding columns included."""
    bytes_held: int
    """Storage of all live tensors of the cache after the run (`memory.live_bytes`)."""
    logical_lengths: Sequence[int]
    """Tokens each row's cache says it has seen after the run, padding columns included."""


class Adapter(Protocol):
    """One engine with mmkv in it."""

    def run(self, model: str, inputs: Inputs, pipeline: str, budget: float, max_new_tokens: int) -> Run:
        """Compress and generate.

        Args:
            model: Name for `families.build(model)`: default seed, float32.
            inputs: As that function makes them, possibly padded on the left.
            pipeline: Text form of a pipeline.
            budget: int: KV pairs kept per KV head; float in (0, 1]: share of the prompt kept.
            max_new_tokens: Exactly as many are generated.
        """
        ...


@dataclass(frozen=True, slots=True)
class Case:
    """What the checks run."""

    family: str = "llava"
    pipeline: str = "snapkv"
    budget: int = 48
    recent: int = 32
    """Last tokens of each row the pipeline protects."""
    per_layer: bool = True
    """Whether each layer gets the budget; False: only all of them together, as with pyramids and tables."""
    new_tokens: int = 8

    def prompt(self) -> TinyVLM:
        """The model and two unpadded rows."""
        return build(self.family, batch=2)

    def padded(self) -> Inputs:
        """Two rows, the first with 7 padding columns on its left."""
        return pad(self.prompt().inputs, left=[7, 0])

    def run(self, adapter: Adapter, inputs: Inputs | None = None, budget: float | None = None) -> Run:
        """The adapter's run of this case."""
        inputs = self.prompt().inputs if inputs is None else inputs
        inputs = {name: value.clone() for name, value in inputs.items()}
        budget = self.budget if budget is None else budget
        return adapter.run(self.family, inputs, self.pipeline, budget, self.new_tokens)


def check_full_budget_is_identity(adapter: Adapter, case: Case = Case()) -> None:
    """A budget of everything changes nothing: the stock model's tokens, every real column kept."""
    vlm, inputs = case.prompt(), case.padded()
    expected = greedy(vlm.model, inputs, case.new_tokens).tokens
    for budget in (1.0, inputs["input_ids"].shape[1]):
        run = case.run(adapter, inputs, budget)
        for layer, kept in _text_layers(run, inputs):
            lost = _valid(inputs) & ~kept
            assert not lost.any(), f"budget {budget!r} is all, yet {_first(lost, layer)} was evicted"
        _same_tokens(run.tokens, expected, f"budget {budget!r}, nothing evicted, against the stock model")


def check_budget_totals(adapter: Adapter, case: Case = Case()) -> None:
    """Every layer holds exactly `budget * H` real columns per row, or all where the row has no more."""
    inputs = case.padded()
    run = case.run(adapter, inputs)
    valid, totals = _valid(inputs), []
    for layer, kept in _text_layers(run, inputs):
        padding = kept & ~valid
        assert not padding.any(), f"padding is held: {_first(padding, layer)}"
        have = kept.sum((1, 2))
        want = kept.shape[1] * valid.sum((1, 2)).clamp(max=case.budget)
        assert not case.per_layer or torch.equal(have, want), (
            f"layer {layer} holds {have.tolist()} KV pairs per row, budget {case.budget} x {kept.shape[1]} heads "
            f"allows {want.tolist()}: look at rounding, and at what becomes of a clamped head's share"
        )
        totals.append(have - want)
    surplus = torch.stack(totals).sum(0)
    assert not surplus.any(), f"all layers together are {surplus.tolist()} KV pairs per row off the budget"


def check_padding_invariance(adapter: Adapter, case: Case = Case()) -> None:
    """Each row of a padded batch keeps and says what the same row does alone and without padding."""
    inputs = case.padded()
    together, valid = case.run(adapter, inputs), _valid(inputs)
    for i in range(len(valid)):
        alone = case.run(adapter, unpadded(inputs, i))
        for layer, kept in _text_layers(together, inputs):
            differs = kept[i : i + 1, :, valid[i, 0]] != alone.kept[layer]
            assert not differs.any(), (
                f"row {i} of a padded batch keeps other columns than alone (counted without padding: "
                f"{_first(differs, layer)}): look for padding among the candidates, in pooling or in the budget"
            )
        _same_tokens(together.tokens[i : i + 1], alone.tokens, f"row {i} of a padded batch against the row alone")


def check_determinism(adapter: Adapter, case: Case = Case()) -> None:
    """A second run with the same inputs keeps the same columns and says the same: no state is left behind."""
    first, second = case.run(adapter), case.run(adapter)
    _same_kept(first.kept, second.kept, "a second run with the same inputs")
    _same_tokens(second.tokens, first.tokens, "a second run against the first")


def check_protected(adapter: Adapter, case: Case = Case()) -> None:
    """Every head holds the last `recent` real columns of its row."""
    inputs = case.padded()
    valid = _valid(inputs)
    protected = valid & (valid.flip(-1).cumsum(-1).flip(-1) <= case.recent)
    for layer, kept in _text_layers(case.run(adapter, inputs), inputs):
        lost = protected & ~kept
        assert not lost.any(), f"one of the last {case.recent} tokens was evicted: {_first(lost, layer)}"


def check_same_kept_set(adapter: Adapter, reference: Adapter, case: Case = Case()) -> None:
    """Two adapters keep the same columns of the same prompts."""
    inputs = case.padded()
    _same_kept(case.run(reference, inputs).kept, case.run(adapter, inputs).kept, "the reference against this adapter")


def check_masked_dense(adapter: Adapter, case: Case = Case()) -> None:
    """The tokens are those of a dense model that may not look at what the adapter says it evicted."""
    vlm, inputs = case.prompt(), case.padded()
    run = case.run(adapter, inputs)
    evicted = [bool((_valid(inputs) & ~kept).any()) for _, kept in _text_layers(run, inputs)]
    assert any(evicted), f"budget {case.budget} evicts nothing from these prompts: the check would be vacuous"
    with MaskedDense(vlm.model, run.kept, from_query=inputs["input_ids"].shape[1]):
        expected = greedy(vlm.model, inputs, case.new_tokens).tokens
    _same_tokens(run.tokens, expected, "this cache against a dense one masked to `kept`")


def check_logical_lengths(adapter: Adapter, case: Case = Case()) -> None:
    """Positions go on as if nothing had been evicted."""
    inputs = case.padded()
    run, columns = case.run(adapter, inputs), inputs["input_ids"].shape[1]
    allowed = (columns + case.new_tokens - 1, columns + case.new_tokens)  # the last token need not have been fed
    assert len(run.logical_lengths) == len(run.tokens), "logical_lengths needs one number per row"
    assert all(length in allowed for length in run.logical_lengths), (
        f"{list(run.logical_lengths)} tokens seen per row, expected one of {allowed}: is the physical length reported?"
    )


def check_bytes(adapter: Adapter, case: Case = Case()) -> None:
    """Freed means freed: little more is alive than the kept entries, their slots and offsets and the new tokens."""
    vlm = case.prompt()
    run, text = case.run(adapter), vlm.text_config
    if len(run.kept) != text.num_hidden_layers:
        raise ValueError(f"{case.family}: {len(run.kept)} of {text.num_hidden_layers} layers compressed; take llava")
    pair = 2 * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) * 4
    held = [int(kept.sum()) * (pair + 4) + 8 * (kept[..., 0].numel() + 1) for kept in run.kept.values()]
    tail = [kept[..., 0].numel() * case.new_tokens * pair for kept in run.kept.values()]
    limit = sum(held) + sum(tail)
    assert run.bytes_held <= limit, (
        f"{run.bytes_held} bytes alive, {limit} allowed: look for views of the dense prompt, kept scores and queries"
    )


CHECKS: tuple[Callable[[Adapter, Case], None], ...] = (
    check_full_budget_is_identity,
    check_budget_totals,
    check_padding_invariance,
    check_determinism,
    check_protected,
    check_masked_dense,
    check_logical_lengths,
    check_bytes,
)
"""The checks that need one adapter and nothing else."""


def _valid(inputs: Inputs) -> Tensor:
    return inputs["attention_mask"].bool()[:, None]


def _text_layers(run: Run, inputs: Inputs) -> list[tuple[int, Tensor]]:
    """Layers that hold the prompt's columns; Mllama's image layers hold others and are left out."""
    columns = inputs["input_ids"].shape[1]
    layers = [(layer, kept) for layer, kept in sorted(run.kept.items()) if kept.shape[-1] == columns]
    assert layers, f"`kept` has no layer with the prompt's {columns} columns"
    return layers


def _same_kept(expected: Mapping[int, Tensor], found: Mapping[int, Tensor], what: str) -> None:
    assert expected.keys() == found.keys(), f"{what}: layers {sorted(expected)} against {sorted(found)}"
    for layer, kept in sorted(expected.items()):
        assert kept.shape == found[layer].shape, f"{what}: layer {layer}, {kept.shape} against {found[layer].shape}"
        differs = kept != found[layer]
        assert not differs.any(), f"{what}: {int(differs.sum())} kept columns differ, first {_first(differs, layer)}"


def _same_tokens(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: tokens {tuple(found.shape)}, expected {tuple(expected.shape)}"
    differs = (found != expected).nonzero().tolist()
    assert not differs, f"{what}: row {differs[0][0]} differs from new token {differs[0][1]} on"


def _first(where: Tensor, layer: int) -> str:
    row, head, column = where.nonzero()[0].tolist()
    return f"layer {layer}, row {row}, head {head}, column {column}"

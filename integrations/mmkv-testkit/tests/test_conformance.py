"""One adapter that is right, and for each check one that is wrong in the way the check is there to find."""

import dataclasses
import itertools

import pytest
import torch
from mmkv_testkit.conformance import CHECKS, Case, Run, check_same_kept_set
from mmkv_testkit.decode import greedy
from mmkv_testkit.families import build
from mmkv_testkit.oracle import MaskedDense

CASE = Case(new_tokens=5)


class Correct:
    """Ragged eviction by a hash of the real position, played by the masked dense model."""

    recent = 32
    seed = 0

    def run(self, model, inputs, pipeline, budget, max_new_tokens):
        vlm = build(model)
        valid = inputs["attention_mask"].bool()
        kept = {i: self.keep(i, valid, budget) for i in range(vlm.text_config.num_hidden_layers)}
        used = self.used(kept)
        with MaskedDense(vlm.model, used):
            tokens = greedy(vlm.model, inputs, max_new_tokens).tokens
        return Run(tokens, kept, self.bytes(used, max_new_tokens), self.lengths(valid, used, max_new_tokens))

    def keep(self, layer, valid, budget):
        return torch.stack([self.keep_row(layer, row, budget) for row in valid])

    def keep_row(self, layer, valid, budget):
        n = int(self.candidates(valid).sum())
        total = self.total(budget if isinstance(budget, int) else round(budget * n), n)
        score = torch.rand(2, n, generator=torch.Generator().manual_seed(1000 * self.seed + layer))
        score[:, n - min(self.recent, n) :] = 2.0
        best = score.flatten().topk(total).indices
        kept = torch.zeros(2, len(valid), dtype=torch.bool)
        kept[:, self.candidates(valid)] = torch.zeros(2 * n, dtype=torch.bool).scatter(0, best, True).view(2, n)
        return kept

    def candidates(self, valid):
        return valid

    def total(self, budget, n):
        return 2 * min(budget, n)

    def used(self, kept):
        return kept

    def bytes(self, kept, new):
        return sum(int(k.sum()) * 132 + 8 * (2 * len(k) + 1) + 2 * len(k) * (new - 1) * 128 for k in kept.values())

    def lengths(self, valid, kept, new):
        return [valid.shape[1] + new - 1] * len(valid)


class EvictsAtFullBudget(Correct):
    def total(self, budget, n):
        return 2 * min(budget, n, 60)


class RoundsUp(Correct):
    def total(self, budget, n):
        return min(2 * budget + 1, 2 * n)


class CountsPadding(Correct):
    def candidates(self, valid):
        return torch.ones_like(valid)


class SeesPaddingInScores(Correct):
    def keep_row(self, layer, valid, budget):
        self.seed = int((~valid).sum())
        return super().keep_row(layer, valid, budget)


class RemembersLastRun(Correct):
    runs = itertools.count()

    def run(self, *arguments):
        self.seed = next(self.runs)
        return super().run(*arguments)


class ProtectsTooFew(Correct):
    recent = 20


class HoldsOtherThanItSays(Correct):
    def used(self, kept):
        return {i: k.flip(1) for i, k in kept.items()}


class ReportsPhysicalLength(Correct):
    def lengths(self, valid, kept, new):
        return [int(k.sum(-1).max()) + new - 1 for k in kept[0]]


class FreesNothing(Correct):
    def bytes(self, kept, new):
        return sum(k.numel() * 128 for k in kept.values())


class OtherScores(Correct):
    seed = 1


BROKEN = {
    "check_full_budget_is_identity": (EvictsAtFullBudget, "budget 1.0 is all, yet layer 0, row 0"),
    "check_budget_totals": (RoundsUp, r"layer 0 holds \[97, 97\] KV pairs per row, budget 48 x 2 heads"),
    "check_padding_invariance": (SeesPaddingInScores, "row 0 of a padded batch keeps other columns"),
    "check_determinism": (RemembersLastRun, "second run with the same inputs: .* kept columns differ"),
    "check_protected": (ProtectsTooFew, "one of the last 32 tokens was evicted"),
    "check_masked_dense": (HoldsOtherThanItSays, "this cache against a dense one masked to `kept`: row"),
    "check_logical_lengths": (ReportsPhysicalLength, "is the physical length reported"),
    "check_bytes": (FreesNothing, "bytes alive"),
}


def test_each_check_has_its_broken_adapter():
    assert [check.__name__ for check in CHECKS] == list(BROKEN)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_correct_adapter_passes(check):
    check(Correct(), CASE)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_correct_adapter_passes_with_a_small_budget_of_another_family(check):
    check(Correct(), dataclasses.replace(CASE, family="qwen2_vl", budget=40))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_finds_its_broken_adapter(check):
    broken, message = BROKEN[check.__name__]
    with pytest.raises(AssertionError, match=message):
        check(broken(), CASE)


def test_padding_that_is_held_is_found():
    by_name = {check.__name__: check for check in CHECKS}
    with pytest.raises(AssertionError, match="padding is held"):
        by_name["check_budget_totals"](CountsPadding(), CASE)
    with pytest.raises(AssertionError, match="row 0 of a padded batch"):
        by_name["check_padding_invariance"](CountsPadding(), CASE)


def test_totals_over_all_layers():
    class Pyramid(Correct):
        def keep_row(self, layer, valid, budget):
            return super().keep_row(layer, valid, budget + (3, 1, -1, -3)[layer])

    class Leaning(Correct):
        def keep_row(self, layer, valid, budget):
            return super().keep_row(layer, valid, budget + (layer == 0))

    totals = {check.__name__: check for check in CHECKS}["check_budget_totals"]
    with pytest.raises(AssertionError, match="layer 0 holds"):
        totals(Pyramid(), CASE)
    loose = dataclasses.replace(CASE, per_layer=False)
    totals(Pyramid(), loose)
    with pytest.raises(AssertionError, match=r"all layers together are \[2, 2\]"):
        totals(Leaning(), loose)


def test_same_kept_set():
    check_same_kept_set(Correct(), Correct(), CASE)
    with pytest.raises(AssertionError, match=r"the reference against this adapter: .* first layer 0, row 0, head 0"):
        check_same_kept_set(OtherScores(), Correct(), CASE)


def test_a_budget_that_evicts_nothing_is_no_proof():
    with pytest.raises(AssertionError, match="vacuous"):
        {check.__name__: check for check in CHECKS}["check_masked_dense"](
            Correct(), dataclasses.replace(CASE, budget=88)
        )

"""The suite that every adapter of mmkv runs."""

import pytest
import torch
from mmkv_hf import compress
from mmkv_testkit.conformance import CHECKS, Case, Run
from mmkv_testkit.decode import greedy
from mmkv_testkit.memory import live_bytes


class HFAdapter:
    """A session around stock generate."""

    def __init__(self, kit):
        self.kit = kit

    def run(self, model, inputs, pipeline, budget, max_new_tokens):
        network = self.kit.vlm(model).model
        with compress(network, pipeline, budget) as session:
            tokens = greedy(network, inputs, max_new_tokens).tokens
        cache = session.last
        lengths = [cache.get_seq_length()] * len(tokens)
        return Run(tokens, cache.kept_masks(), live_bytes(cache), lengths)


CASES = [
    Case(),
    Case(pipeline="adakv+mixkv+bacon"),
    Case(family="qwen2_5_vl", pipeline="adakv+mixkv+bacon+snapkv(window=8)", budget=30, recent=8),
    Case(family="internvl", pipeline="pyramidkv(beta=3)+snapkv(window=8)", budget=30, recent=8, per_layer=False),
    Case(family="mistral3", pipeline="h2o+select(recent=8)", budget=30, recent=8),
    Case(family="llama", pipeline="random+select(recent=4)", budget=20, recent=4),
]
RUNS = [(check, case) for case in CASES for check in CHECKS]


@pytest.mark.parametrize(
    ("check", "case"), RUNS, ids=[f"{case.family} {case.pipeline} {f.__name__}" for f, case in RUNS]
)
def test_conformance(kit, check, case):
    torch.manual_seed(0)
    check(HFAdapter(kit), case)

"""Shared by all tests: one quiet thread, and made-up runs whose figures are known."""

import pytest
import torch
import transformers
from mmkv_speed.endtoend import CEILING, jobs
from mmkv_speed.sides import NONE

torch.set_num_threads(1)
torch.set_grad_enabled(True)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

STEPS = {"none": 0.024, CEILING: 0.012}


def run(side, method, inside):
    """A request: decoding takes 18 ms with ours and 36 with kvpress's, where anything is compressed."""
    plain = method in (NONE, CEILING)
    step = STEPS.get(method, 0.018 if side == "ours" else 0.036)
    size = 64_000 if plain or side == "peer" else 32_200
    return {
        "prefill": 4.0 + inside, "inside": 0.0 if plain else inside, "first": 0.024, "steps": [step] * 4,
        "elsewhere": 0.0, "bytes": size, "attended": 100, "stored": 100, "logits": [0.5] * 8,
    }  # fmt: skip


def requests(mine=0.04, other=0.1, sides=("ours", "peer"), rounds=2):
    """Rounds in which ours spends `mine` seconds inside the compression and kvpress `other`."""
    cost = {"ours": mine, "peer": other}
    return [
        [
            {"side": side, "method": method, "removed": ratio, "run": run(side, method, cost[side])}
            for side, method, ratio in jobs(number, (0.5, 0.9), sides)
        ]
        for number in range(rounds)
    ]


@pytest.fixture
def made_up():
    return requests

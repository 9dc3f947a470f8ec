"""One side of the comparison, in whichever environment it is started with.

Reads one JSON job per line from stdin and answers each with one JSON line; the first line says hello. All times are CPU
seconds of the one thread that computes. Of this package, only what needs torch and transformers alone is imported.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers import logging as transformers_logging

from .machine import versions
from .model import fingerprint, make_model, make_prompt
from .sides import Side, measure_layer, measure_request


def side_class(name: str) -> Callable[[Any], Side]:
    """mmkv's or kvpress's, made with a model.

    Raises:
        ImportError: the library is not in this environment.
    """
    if name == "ours":
        from .ours import Ours

        return Ours
    from .peer import Peer

    return Peer


def serve(side: Side, ids: Tensor, answers: TextIO) -> None:
    """Answers jobs until stdin ends, after a prefill and a short compressed run that nobody measures."""
    side.model(input_ids=ids, past_key_values=DynamicCache(), logits_to_keep=1)
    measure_request(side, {"method": "adakv", "ratio": 0.5, "steps": 2, "length": 512}, ids)
    for line in sys.stdin:
        gc.collect()
        job = json.loads(line)
        answer = measure_layer(side, job) if job["kind"] == "layer" else measure_request(side, job, ids)
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "peer"])
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    transformers_logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    try:
        make_side = side_class(arguments.side)
    except ImportError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return
    model, ids = make_model(arguments.seed), make_prompt(arguments.seed, arguments.prompt)
    side = make_side(model)
    known = versions(("torch", "transformers", *side.packages))
    print(json.dumps({"versions": known, "fingerprint": fingerprint(model, ids)}), file=answers, flush=True)
    serve(side, ids, answers)


if __name__ == "__main__":
    main()

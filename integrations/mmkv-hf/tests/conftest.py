"""Shared by all tests: tiny models, decoding with the model's own logits, and the oracle's answer."""

from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import transformers
from mmkv_hf import compress
from mmkv_testkit.families import build, pad
from mmkv_testkit.oracle import MaskedDense

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
PIPELINE = "adakv+mixkv+bacon+snapkv(window=8)"
BUDGET = 30
STEPS = 6


@lru_cache(maxsize=8)
def vlm(name, batch=1, dtype=torch.float32, **settings):
    """A tiny model and its inputs; tests do not change them."""
    tiny = build(name, batch=batch, dtype=dtype, **settings)
    if dtype == torch.float64 and name == "qwen3_vl_moe":
        tiny.model.set_experts_implementation("eager")  # torch's grouped matrix product knows no float64
    return tiny


@lru_cache(maxsize=8)
def padded(name, dtype=torch.float32):
    """Two rows, the first with 9 padding columns on its left."""
    tiny = vlm(name, batch=2, dtype=dtype)
    return tiny.model, pad(tiny.inputs, left=[9, 0])


def decode(model, inputs, tokens=STEPS, **settings):
    """Greedy `generate`: new tokens [B, n] and logits [B, n, V] in the model's own dtype (`generate` narrows them).

    Args:
        model: The model.
        inputs: Of `generate`.
        tokens: How many to generate, or tokens [B, n] to feed whatever the model says.
        **settings: Handed to `generate`.
    """
    steps = tokens if isinstance(tokens, int) else tokens.shape[1]
    if not isinstance(tokens, int):
        settings["logits_processor"] = [_Force(tokens)]
    logits = []
    hook = model.register_forward_hook(lambda module, args, output: logits.append(output.logits[:, -1]))
    try:
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=steps, do_sample=False, **settings)
    finally:
        hook.remove()
    return SimpleNamespace(tokens=out[:, -steps:], sequences=out, logits=torch.stack(logits[-steps:], 1))


class _Force:
    """Logits processor that leaves one token to choose per row."""

    def __init__(self, tokens):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids, scores):
        chosen = self.tokens[:, self.step, None]
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


def compressed(model, inputs, tokens=STEPS, pipeline=PIPELINE, budget=BUDGET, **settings):
    """`decode` inside a session: what it gave, and the cache it left."""
    with compress(model, pipeline, budget) as session:
        out = decode(model, inputs, tokens, **settings)
    return out, session.last


def masked(model, inputs, tokens, keep, from_query=None, **settings):
    """`decode` on the stock cache with the evicted columns forbidden."""
    with MaskedDense(model, keep, from_query=from_query) as oracle:
        out = decode(model, inputs, tokens, **settings)
    assert oracle.masked_calls
    return out


def stock_or_skip(run):
    """What `run` gives, which is a test's generation on stock transformers; skips the test where that raises.

    For what some supported version of transformers cannot do with its own cache and sdpa. Say with an `assert` in `run`
    where stock answers wrongly instead.
    """
    try:
        return run()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return pytest.skip(f"stock transformers {transformers.__version__}: {reason}")


def conversation(inputs, answer, new):
    """Inputs of a second turn: the first one, the answer [B, n] and new tokens [B, m]; the cache holds the images."""
    ids = torch.cat([inputs["input_ids"], answer, new], 1)
    added = ids.shape[1] - inputs["input_ids"].shape[1]
    longer = {
        "input_ids": ids,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, added), value=1),
    }
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            longer[name] = torch.nn.functional.pad(inputs[name], (0, added))
    return longer


def without_image(inputs, row):
    """Two rows of llava, of which this one has words where its image was."""
    ids = inputs["input_ids"].clone()
    ids[row] = words(1, ids.shape[1])[0]
    return inputs | {"input_ids": ids, "pixel_values": inputs["pixel_values"][[1 - row]]}


def words(batch, count, seed=7):
    """Text tokens [B, n]."""
    return torch.randint(3, 400, (batch, count), generator=torch.Generator().manual_seed(seed))


def difference(a, b):
    """Largest difference of two tensors."""
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.fixture(scope="session")
def kit():
    return SimpleNamespace(
        PIPELINE=PIPELINE,
        BUDGET=BUDGET,
        STEPS=STEPS,
        vlm=vlm,
        padded=padded,
        decode=decode,
        compressed=compressed,
        masked=masked,
        stock_or_skip=stock_or_skip,
        conversation=conversation,
        words=words,
        without_image=without_image,
        difference=difference,
    )

"""Exact match and token accuracy of generated answers, with standard errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from .samples import Sample
from .vocabulary import EOS

Generate = Callable[[BatchFeature, int], Tensor]
"""(inputs of one batch, most new tokens) -> int64 `[B, prompt + new]`, as `model.generate` returns it."""


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float


def _estimate(values: NDArray[np.float64]) -> Estimate:
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(float(values.mean()), float(error))


@dataclass(frozen=True, slots=True)
class Result:
    """Scores of every sample, in the order given, so that two results can be compared in pairs.

    Attributes:
        answers: What was generated, up to the end token.
        exact: bool `[n]`, the whole answer is right, the end token included.
        tokens: float64 `[n]`, share of the answer's words that are right at their place. Answers are generated freely:
            after a wrong word the model goes on from that word.
    """

    answers: tuple[str, ...]
    exact: NDArray[np.bool_]
    tokens: NDArray[np.float64]

    @property
    def exact_match(self) -> Estimate:
        """Share of samples with `exact`."""
        return _estimate(self.exact.astype(np.float64))

    @property
    def token_accuracy(self) -> Estimate:
        """Mean of `tokens`; the standard error is over samples."""
        return _estimate(self.tokens)


def _word_share(answer: str, wanted: str) -> float:
    got, right = answer.split(), wanted.split()
    return sum(a == b for a, b in zip(got, right, strict=False)) / len(right)


def score(answers: Sequence[str], samples: Sequence[Sample]) -> Result:
    """Compares generated answers (text up to the end token) with the samples'."""
    pairs = [(answer, sample.answer) for answer, sample in zip(answers, samples, strict=True)]
    exact = np.array([answer.split() == wanted.split() for answer, wanted in pairs], dtype=np.bool_)
    return Result(tuple(answers), exact, np.array([_word_share(*pair) for pair in pairs]))


def batch_inputs(processor: ProcessorMixin, samples: Sequence[Sample]) -> BatchFeature:
    """Model inputs of several samples, padded on the left."""
    images, prompts = [list(sample.images) for sample in samples], [sample.prompt for sample in samples]
    return processor(images=images, text=prompts, padding=True, return_tensors="pt")


def _greedy(model: PreTrainedModel, inputs: BatchFeature, new_tokens: int) -> Tensor:
    out: Tensor = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return out


@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    *,
    generate: Generate | None = None,
    batch_size: int = 16,
) -> Result:
    """Generates an answer for every sample and scores it.

    Args:
        model: The model.
        processor: Its processor.
        samples: What to ask.
        generate: Replaces `model.generate(...)` with greedy decoding, e.g. to hand in a compressed cache.
        batch_size: Samples per call of `generate`.
    """
    generate = generate or partial(_greedy, model)
    answers: list[str] = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        inputs = batch_inputs(processor, part).to(model.device, model.dtype)
        longest = max(len(sample.answer.split()) for sample in part)
        out = generate(inputs, longest + 1)[:, inputs["input_ids"].shape[1] :]
        # An answer that never ended is kept whole, with a mark that makes it wrong.
        texts = processor.tokenizer.batch_decode(out)
        answers += [text.split(EOS)[0].strip() if EOS in text else f"{text} ..." for text in texts]
    return score(answers, samples)

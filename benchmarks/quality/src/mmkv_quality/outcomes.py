"""Which words of which answers are right: what every number of the page is computed from."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """The answers of one cell.

    Attributes:
        right: bool `[n, words + 1]`, whether each word is right at its place; the end token is the last column.
            Answers are generated freely: after a wrong word the model goes on from that word.
    """

    right: Bools

    @property
    def exact(self) -> Floats:
        """0 or 1 `[n]`: the whole answer, its end included."""
        whole: Floats = np.asarray(self.right.all(1), dtype=np.float64)
        return whole

    @property
    def tokens(self) -> Floats:
        """`[n]`, share of the answer's words that are right."""
        shares: Floats = np.asarray(self.right[:, :-1].mean(1))
        return shares

    def to_json(self) -> dict[str, Any]:
        """Shape, and the bits row by row: `numpy.packbits`, zlib, base64."""
        return {"shape": list(self.right.shape), "bits": packed(self.right)}

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Outcomes:
        """What `to_json` gave."""
        return cls(unpacked(data["bits"], data["shape"]))

    @classmethod
    def joined(cls, parts: Sequence[Outcomes]) -> Outcomes:
        """One after the other."""
        return cls(np.concatenate([part.right for part in parts]))


def packed(bits: Bools) -> str:
    """Any array of bools as text."""
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()


def unpacked(text: str, shape: Sequence[int]) -> Bools:
    """The array that `packed` made the text of."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    return np.unpackbits(raw, count=int(np.prod(shape))).reshape(shape).astype(np.bool_)


def judge(answers: Tensor, wanted: Tensor) -> Outcomes:
    """Compares generated tokens with the wanted ones.

    Args:
        answers: int64 `[n, t]`; a shorter answer is wrong where it has no token.
        wanted: int64 `[n, words + 1]`, the end token last.
    """
    short = wanted.shape[1] - answers.shape[1]
    padded = torch.nn.functional.pad(answers, (0, max(0, short)), value=-1)[:, : wanted.shape[1]]
    return Outcomes((padded == wanted).numpy())

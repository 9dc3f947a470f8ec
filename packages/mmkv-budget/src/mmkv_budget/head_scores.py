"""Tables of offline head scores, one per model."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

FORMAT = "mmkv-head-scores/1"
_PER_MODEL = "tables are measured per model: take, or measure, the one of this model"


@dataclass(frozen=True, slots=True)
class HeadScores:
    """How much each head of one model matters for one kind of work (reading images, retrieval), on any scale.

    As a file: JSON `{"format": "mmkv-head-scores/1", "model": "Qwen/Qwen2-VL-7B-Instruct", "kind": "visual",
    "scores": [[...], ...]}`, one list per layer with one number >= 0 per query head or per KV head. Other keys are
    ignored.

    Attributes:
        scores: One row per layer; kept as tuples.
        model: What they were measured on.
        kind: Which heads they find, "visual" or "retrieval" for instance.
        source: The path it was loaded from, as given; two tables are equal whatever their source.
    """

    scores: Sequence[Sequence[float]]
    model: str = "unnamed"
    kind: str = "unspecified"
    source: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Refuses a table that cannot weigh heads."""
        if not (isinstance(self.model, str) and isinstance(self.kind, str)):
            raise ValueError(f"model and kind of head scores must be strings, got {self.model!r} and {self.kind!r}")
        object.__setattr__(self, "scores", _rows(self.scores))

    @classmethod
    def of(cls, table: "Table") -> "HeadScores":
        """The table itself, nested numbers as a table, or the one stored at a path."""
        if isinstance(table, HeadScores):
            return table
        if isinstance(table, str | os.PathLike):
            return cls.load(table)
        if table is None:
            raise ValueError(f"no table of head scores given; {_PER_MODEL}")
        return cls(table.tolist() if isinstance(table, Tensor) else table)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HeadScores":
        """The table stored at `path`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a table of this format, or its numbers do not make one.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"no table of head scores at {os.fspath(path)!r}; {_PER_MODEL}") from None
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"{os.fspath(path)!r} is not a table of head scores: expected format {FORMAT!r}, found {found!r}"
            )
        missing = [key for key in ("model", "kind", "scores") if key not in data]
        if missing:
            raise ValueError(f"the table of head scores {os.fspath(path)!r} lacks {', '.join(missing)}")
        try:
            return cls(data["scores"], data["model"], data["kind"], os.fspath(path))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON, one layer per line."""
        head = [
            f'"{key}": {json.dumps(value)}'
            for key, value in (("format", FORMAT), ("model", self.model), ("kind", self.kind))
        ]
        rows = ",\n  ".join(json.dumps(list(row)) for row in self.scores)
        Path(path).write_text("{" + ",\n ".join(head) + ',\n "scores": [\n  ' + rows + "\n ]}\n", encoding="utf-8")

    def per_kv_head(self, num_layers: int, num_kv_heads: int) -> Tensor:
        """Scores `[L, H]` float64 on the CPU; those of query heads are summed over the group that shares a KV head.

        Raises:
            ValueError: The table does not fit a model of this shape.
        """
        layers, heads = len(self.scores), len(self.scores[0])
        if layers != num_layers or num_kv_heads < 1 or heads % num_kv_heads:
            raise ValueError(
                f"the table of head scores of {self.model!r} has {layers} layers of {heads} heads, needed are "
                f"{num_layers} layers of {num_kv_heads} KV heads (or a multiple, for query heads); {_PER_MODEL}"
            )
        return torch.tensor(self.scores, dtype=torch.float64).view(layers, num_kv_heads, -1).sum(-1)


Table: TypeAlias = HeadScores | Sequence[Sequence[float]] | Tensor | str | os.PathLike[str]
"""What table rules accept."""


def _rows(scores: object) -> tuple[tuple[float, ...], ...]:
    if isinstance(scores, str) or not isinstance(scores, Sequence) or not scores:
        raise ValueError(f"head scores must be a list of layers, each a list of numbers; got {scores!r}")
    rows = tuple(_row(row, layer) for layer, row in enumerate(scores))
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"every layer of head scores must have as many heads, got {[len(row) for row in rows]}")
    if not any(any(row) for row in rows):
        raise ValueError("all head scores are zero: they cannot weigh heads")
    return rows


def _row(row: object, layer: int) -> tuple[float, ...]:
    if isinstance(row, str) or not isinstance(row, Sequence) or not row:
        raise ValueError(f"layer {layer} of the head scores must be a list of numbers, got {row!r}")
    for head, score in enumerate(row):
        if isinstance(score, bool) or not isinstance(score, Real) or not math.isfinite(score) or score < 0:
            raise ValueError(f"the score of layer {layer}, head {head} must be a finite number >= 0, got {score!r}")
    return tuple(float(score) for score in row)

"""A pipeline: which score, which budgets, which entries are never dropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmkv_budget import Equal, HeadRule, LayerRule, TableRule, Uniform
from mmkv_scores import Scorer, SnapKV
from mmkv_select import Select
from torch import Tensor

from . import text
from .round import Round

Counts = Literal["equal", "static", "dynamic"]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One eviction method, put together from parts; immutable, so one object serves any number of requests.

    Attributes:
        score: how much each entry matters.
        layers: how a layer's capacity follows from the mean.
        heads: how a layer's capacity is shared by its KV heads; a table rule plans layers and heads together.
        select: what is always kept.
    """

    score: Scorer = field(default_factory=SnapKV)
    layers: LayerRule = field(default_factory=Uniform)
    heads: HeadRule | TableRule = field(default_factory=Equal)
    select: Select = field(default_factory=Select)

    def __post_init__(self) -> None:
        is_head = isinstance(self.heads, HeadRule | TableRule)
        is_layer = isinstance(self.layers, LayerRule) and not isinstance(self.layers, HeadRule | TableRule | Scorer)
        fits = {"score": isinstance(self.score, Scorer), "layers": is_layer, "heads": is_head}
        for name, ok in {**fits, "select": isinstance(self.select, Select)}.items():
            if not ok:
                raise TypeError(f"Pipeline({name}=...) does not take a {type(getattr(self, name)).__name__}")
        if isinstance(self.heads, TableRule) and not isinstance(self.layers, Uniform):
            raise ValueError(
                f"{type(self.heads).__name__} plans all layers from its table; {type(self.layers).__name__} would be "
                "lost. Use one of them"
            )

    @classmethod
    def parse(cls, source: str | Pipeline) -> Pipeline:
        """The pipeline named by e.g. "adakv+mixkv+bacon" or "pyramidkv(beta=10)+snapkv(window=16,kernel=7)".

        Names may stand in any order; what is not named takes its default. A Pipeline is returned as it is.

        Raises:
            ValueError: an unknown name or setting, two parts for one place, or parts that do not fit together.
        """
        if isinstance(source, Pipeline):
            return source
        return cls(**text.parse(source))

    def __str__(self) -> str:
        """The canonical text form; `Pipeline.parse(str(pipeline)) == pipeline` for registered parts.

        A table of head scores is shown as the path it was loaded from; one made in code as its numbers, without the
        names of its model and kind.
        """
        return text.render(self.score, self.layers, self.heads, self.select)

    @property
    def counts(self) -> Counts:
        """How kept counts vary: "equal" over heads and layers, "static" (known before the prompt), or "dynamic"."""
        if self.heads.counts == "equal" and not isinstance(self.layers, Uniform):
            return "static"
        return self.heads.counts

    @property
    def window(self) -> int:
        """Query rows an adapter has to keep."""
        return self.score.window

    @property
    def least_budget(self) -> int:
        """The smallest budget in tokens with which a longer prompt can be compressed: protected tokens and one more."""
        recent = self.score.window if self.select.recent is None else self.select.recent
        return max(1, recent) + self.select.sinks + 1

    def start(self, budget: Tensor, num_layers: int, lengths: Tensor) -> Round:
        """State for compressing one batch of prompts once.

        Args:
            budget: [B] int64, KV pairs kept per KV head, protected ones included.
            num_layers: how many layers will be compressed.
            lengths: [B] int64, real tokens each conversation has seen.
        """
        return Round(self, budget, num_layers, lengths)

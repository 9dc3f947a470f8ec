"""A pipeline: which score, which budgets, which entries are never dropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmkv_budget import Equal, HeadRule, LayerRule, PyramidKV, TableRule, Uniform
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
        protected = self._recent + self.select.sinks
        if isinstance(self.layers, PyramidKV) and not self.layers.exact and self.layers.window != protected:
            raise ValueError(
                f"PyramidKV(exact=False, window={self.layers.window}) compares the prompt, protected tokens included, "
                f"with the budget; this pipeline protects {protected}: use window={protected}"
            )

    @classmethod
    def parse(cls, source: str | Pipeline) -> Pipeline:
        """The pipeline named by e.g. "adakv+mixkv+bacon" or "pyramidkv(beta=10)+snapkv(window=16,kernel=7)".

        Names may stand in any order; what is not named takes its default. A Pipeline is returned as it is.

        Raises:
            TypeError: neither text nor a Pipeline.
            ValueError: an unknown name or setting, two parts for one place, or parts that do not fit together.
        """
        if isinstance(source, Pipeline):
            return source
        if not isinstance(source, str):
            raise TypeError(
                f"Pipeline.parse takes a text or a Pipeline, not {type(source).__name__}; from parts made in "
                "code, build Pipeline(score=...)"
            )
        return cls(**text.parse(source))

    def __str__(self) -> str:
        """The canonical text form, which `parse` reads back as an equal pipeline where the text form can say it.

        A table of head scores is shown as the path it was loaded from; one made in code as its numbers, without the
        names of its model and kind. Parts that are not registered, and scores that the text would not give back (wraps
        nested in another order than their registered one, settings without a literal), are shown by their `repr`, which
        `parse` does not read.
        """
        return text.render(self.score, self.layers, self.heads, self.select)

    @property
    def counts(self) -> Counts:
        """How kept counts vary: "equal" over heads and layers, "static" (known before the prompt), or "dynamic"."""
        if self.heads.counts == "equal":
            return getattr(self.layers, "capacities", "static")  # a plain function says nothing
        return self.heads.counts

    @property
    def window(self) -> int:
        """Query rows an adapter has to keep."""
        return self.score.window

    @property
    def least_budget(self) -> int:
        """The smallest budget in tokens with which a longer prompt can be compressed: protected tokens and one more."""
        return max(1, self._recent) + self.select.sinks + 1

    @property
    def _recent(self) -> int:
        return self.score.window if self.select.recent is None else self.select.recent

    def start(self, budget: Tensor, num_layers: int, lengths: Tensor, *, bytes_per_token: int | None = None) -> Round:
        """State for compressing one batch of prompts once.

        Args:
            budget: [B] int64, KV pairs kept per KV head, protected ones included.
            num_layers: how many layers will be compressed.
            lengths: [B] int64, real tokens each conversation has seen.
            bytes_per_token: given for a budget in bytes (see `Budget.per_head`), messages answer in bytes as well.
        """
        return Round(self, budget, num_layers, lengths, bytes_per_token)

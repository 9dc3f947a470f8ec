"""How many KV pairs may each layer and KV head keep?

A `Budget` says how much a request may keep; a layer rule (`Uniform`, `PyramidKV`) spreads it over the layers, a head
rule (`Equal`, `AdaKV`) over the KV heads of one layer; a table rule (`SparseMM`, `HeadKV`) does both at once from
`HeadScores` measured offline. Which tokens fill the counts is the business of other packages.
"""

from .adakv import AdaKV, adakv_counts
from .budget import Budget
from .equal import Equal, equal_counts
from .head_scores import HeadScores
from .headkv import HeadKV, headkv_counts
from .protocols import HeadRule, LayerRule, TableRule
from .pyramidkv import PyramidKV, pyramidkv_capacity
from .sparsemm import SparseMM, sparsemm_counts
from .uniform import Uniform, uniform_capacity

__all__ = [
    "AdaKV",
    "Budget",
    "Equal",
    "HeadKV",
    "HeadRule",
    "HeadScores",
    "LayerRule",
    "PyramidKV",
    "SparseMM",
    "TableRule",
    "Uniform",
    "adakv_counts",
    "equal_counts",
    "headkv_counts",
    "pyramidkv_capacity",
    "sparsemm_counts",
    "uniform_capacity",
]
__version__ = "0.1.0"

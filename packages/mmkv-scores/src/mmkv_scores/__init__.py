"""How much does each cached token matter? Scorers, their composition, and the evidence they look at."""

from .bacon import BACON
from .keydiff import KeyDiff
from .knorm import KNorm
from .last_query import LastQuery
from .mixkv import MixKV
from .observed import ObservedAttention
from .random import Random
from .snapkv import SnapKV
from .streaming import StreamingLLM
from .trace import Trace
from .types import AttentionScorer, Evidence, Observation, Scorer, Scores, WindowScorer
from .vnorm import VNorm

__all__ = [
    "BACON",
    "AttentionScorer",
    "Evidence",
    "KNorm",
    "KeyDiff",
    "LastQuery",
    "MixKV",
    "Observation",
    "ObservedAttention",
    "Random",
    "Scorer",
    "Scores",
    "SnapKV",
    "StreamingLLM",
    "Trace",
    "VNorm",
    "WindowScorer",
]

"""Which vision tokens never reach deeper layers?

Inside the LLM, a method (`ADSC`, `FastV`, `PyramidDrop`, `SparseVLM`, the controls `RandomDrop` and `UniformDrop`)
says at the input of which layers it drops vision tokens, what it has to see, and which stay; a `PrunePlan` puts it on a
model with so many layers. Before the LLM, a method (`PruMerge`, `PruMergePlus`, `VisionZip`, the controls `KeepRandom`
and `KeepUniform`) turns an encoded image into fewer tokens. Tensors in, masks and tensors out: whoever runs the model
does the gathering.
"""

from .accounting import Geometry, kv_entries, tokens_per_layer
from .adsc import ADSC, downsample
from .attention import attention_rows, last_rows, spread
from .curriculum import Curriculum
from .encoder import Encoded, Reduced, Reducer, TowerEvidence, tower_attention, tower_keys
from .fastv import FastV
from .gather import KeptColumns, kept_columns, reindexed
from .kept_tokens import KeepRandom, KeepUniform
from .plan import PrunePlan
from .prompt import Prompt
from .prumerge import PruMerge, PruMergePlus
from .pyramiddrop import PyramidDrop
from .random_drop import RandomDrop
from .sparsevlm import SparseVLM, rank_counts, select_raters
from .types import Attention, AttentionPruner, Evidence, Positions, Pruner, Seen
from .uniform_drop import UniformDrop, evenly_spaced
from .visionzip import VisionZip

__all__ = [
    "ADSC",
    "Attention",
    "AttentionPruner",
    "Curriculum",
    "Encoded",
    "Evidence",
    "FastV",
    "Geometry",
    "KeepRandom",
    "KeepUniform",
    "KeptColumns",
    "Positions",
    "Prompt",
    "PruMerge",
    "PruMergePlus",
    "PrunePlan",
    "Pruner",
    "PyramidDrop",
    "RandomDrop",
    "Reduced",
    "Reducer",
    "Seen",
    "SparseVLM",
    "TowerEvidence",
    "UniformDrop",
    "VisionZip",
    "attention_rows",
    "downsample",
    "evenly_spaced",
    "kept_columns",
    "kv_entries",
    "last_rows",
    "rank_counts",
    "reindexed",
    "select_raters",
    "spread",
    "tokens_per_layer",
    "tower_attention",
    "tower_keys",
]
__version__ = "0.1.0"

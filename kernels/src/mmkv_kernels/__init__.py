"""Tensor operators for KV-cache compression.

Shapes: B batch rows, Hq query heads, H KV heads, G = Hq/H query heads per KV head, D (Dv) dimension of a key (value), N
cached entries, W or n query rows. Keys are never expanded to query heads, and everything is computed in float32 of the
values as stored (attention of float64 in float64; probabilities that meet 16-bit values may be rounded to them). No
operator records gradients.

Operators with Triton kernels take `impl`: "auto" (Triton on GPUs where it is installed and takes the case, else plain
torch), "reference" (plain torch) or "triton" (or an error that says why not).
"""

from .bacon import Calibration, bacon_calibrate
from .columns import column_sums
from .dense import dense_attention
from .gather import Gathered, gather_kv
from .merge import AttentionOutput, merge_attention
from .mixkv import mixkv_mix
from .paged import compact_paged
from .ragged import ragged_attention
from .statistics import KeyStatistics, key_statistics
from .topk import HeadTopK, head_topk
from .window import WindowAttention, window_attention

__all__ = [
    "AttentionOutput",
    "Calibration",
    "Gathered",
    "HeadTopK",
    "KeyStatistics",
    "WindowAttention",
    "bacon_calibrate",
    "column_sums",
    "compact_paged",
    "dense_attention",
    "gather_kv",
    "head_topk",
    "key_statistics",
    "merge_attention",
    "mixkv_mix",
    "ragged_attention",
    "window_attention",
]

"""mmkv in lmms-eval: any of its transformers models generates from a compressed KV cache."""

from .meter import Held, Meter, metered
from .settings import Settings, read_settings

__version__ = "0.1.0"
__all__ = ["Held", "Meter", "Settings", "metered", "read_settings"]

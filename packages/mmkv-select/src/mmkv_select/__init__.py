"""Which cached tokens stay, and the compacted cache they make."""

from .kept import Kept
from .ragged import RaggedKV, compact
from .select import Select, select

__all__ = ["Kept", "RaggedKV", "Select", "compact", "select"]

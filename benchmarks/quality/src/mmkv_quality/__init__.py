"""What KV-cache compression costs in answers: every method of mmkv on small trained models, with standard errors."""

from .replay import Recording, answer, observed, record, replay

__version__ = "0.1.0"
__all__ = ["Recording", "answer", "observed", "record", "replay"]

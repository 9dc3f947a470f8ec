"""What KV-cache compression costs in time and memory: beside kvpress, beside the machine's limits, and on a GPU."""

__version__ = "0.1.0"  # nothing is imported here: workers run in environments that have torch and transformers alone

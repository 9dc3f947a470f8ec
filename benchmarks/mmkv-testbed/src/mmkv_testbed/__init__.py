"""A small trained vision-language model and the pages it reads: KV-cache compression measured offline on a CPU."""

from .evaluate import Estimate, Result, batch_inputs, exact_match
from .load import load, model_names, model_path
from .pages import Arrangement, Ink, Layout, Page, Record, draw, make_page
from .samples import Box, Sample, Task, make_sample, make_samples

__version__ = "0.1.0"
__all__ = [
    "Arrangement",
    "Box",
    "Estimate",
    "Ink",
    "Layout",
    "Page",
    "Record",
    "Result",
    "Sample",
    "Task",
    "batch_inputs",
    "draw",
    "exact_match",
    "load",
    "make_page",
    "make_sample",
    "make_samples",
    "model_names",
    "model_path",
]

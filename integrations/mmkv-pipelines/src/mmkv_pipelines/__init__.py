"""Puts scores, budgets and selection together into pipelines such as "adakv+mixkv+bacon"."""

from mmkv_budget import Budget

from .pipeline import Pipeline
from .registry import Method, find, methods, register
from .round import Round
from .stages import Stages

__all__ = ["Budget", "Method", "Pipeline", "Round", "Stages", "find", "methods", "register"]

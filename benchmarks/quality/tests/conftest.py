"""Shared by all tests: one quiet thread, and the small model that ships with the testbed."""

from functools import lru_cache

import pytest
import torch
import transformers
from mmkv_quality import worlds

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = "small-seed0"


@lru_cache(maxsize=1)
def loaded():
    folder = worlds.find(SMALL)
    return worlds.load(folder, folder / worlds.TABLE)


@pytest.fixture(scope="session")
def checkpoint():
    return loaded()

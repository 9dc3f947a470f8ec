"""The package as its users see it."""

import subprocess
import sys
from typing import get_origin

import mmkv_prune as package
import pytest
from mmkv_prune import ADSC, AttentionPruner, FastV, Pruner, PyramidDrop, RandomDrop, SparseVLM, UniformDrop


@pytest.mark.parametrize("name", sorted(package.__all__))
def test_everything_public_is_documented(name):
    part = getattr(package, name)
    assert part.__doc__ if get_origin(part) is None else name == "Positions"


@pytest.mark.parametrize("make", [ADSC, FastV, PyramidDrop, RandomDrop, SparseVLM, UniformDrop])
def test_protocols(make):
    method = make()
    assert isinstance(method, Pruner)
    assert isinstance(method, AttentionPruner) == (method.evidence is not None)
    assert hash(method) == hash(make())
    assert method == make()
    assert list(method.layers) == sorted(method.layers)


def test_imports_with_torch_alone():
    code = (
        "import sys, torch; before = {name.split('.')[0] for name in sys.modules}; import mmkv_prune;"
        "loaded = {name.split('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names);"
        "assert loaded == {'mmkv_prune'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

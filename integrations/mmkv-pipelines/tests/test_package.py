"""The package as its users see it."""

import subprocess
import sys

import mmkv_pipelines as package
import pytest


@pytest.mark.parametrize("name", sorted(package.__all__))
def test_everything_public_is_documented(name):
    assert getattr(package, name).__doc__


def test_imports_with_torch_alone():
    code = (
        "import sys, torch; before = {name.split('.')[0] for name in sys.modules}; import mmkv_pipelines;"
        "loaded = {name.split('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names);"
        "own = {'mmkv_pipelines', 'mmkv_scores', 'mmkv_budget', 'mmkv_select', 'mmkv_kernels', 'mmkv_prune',"
        "'mmkv_layershare'};"
        "assert loaded == own, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

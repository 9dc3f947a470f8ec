"""Tokens, KV entries and multiply-adds against published and derived figures."""

import pytest
from mmkv_prune import ADSC, FastV, Geometry, PyramidDrop, SparseVLM, kv_entries, tokens_per_layer

LLAVA = Geometry(hidden=4096, ffn=11008)
TOWER = 0.191e12 + 0.012e12  # ViT-L/14-336 and projector, not reduced
TEXT = 101


def saving(part, whole):
    return 100 * (1 - part / whole)


def test_adsc_kv():
    """The published 56.7 % at 101 text tokens, exactly by formula."""
    pruned, whole = tokens_per_layer(ADSC(), 32, 576), (576,) * 32
    assert kv_entries(pruned, TEXT) == 32 * (192 + TEXT)
    assert kv_entries(whole, TEXT) == 32 * (576 + TEXT)
    assert round(saving(kv_entries(pruned, TEXT), kv_entries(whole, TEXT)), 1) == 56.7
    assert kv_entries(whole) * 2 * 4096 * 2 == 576 * 2**19  # half a MiB per token


def test_adsc_macs():
    pruned = LLAVA.macs(tokens_per_layer(ADSC(), 32, 576), TEXT)
    whole = LLAVA.macs((576,) * 32, TEXT)
    assert saving(pruned, whole) == pytest.approx(57.2, abs=0.05)
    assert saving(pruned + TOWER, whole + TOWER) == pytest.approx(54.8, abs=0.1)


@pytest.mark.parametrize(("first", "second"), [(1, 29), (2, 26), (3, 23), (4, 20), (5, 17), (6, 14), (7, 11)])
def test_other_schedules_of_the_same_average(first, second):
    """Stride 3 twice with 3 d1 + d2 = 32: the default is one of them, so it cannot be told from these."""
    assert sum(tokens_per_layer(ADSC((first, second)), 32, 576)) == 32 * 192


@pytest.mark.parametrize("text", [1, 35, 101, 1000])
@pytest.mark.parametrize("method", [ADSC(), ADSC((1,), 2), FastV(), PyramidDrop(), SparseVLM.release(64)])
def test_macs_fall_at_least_as_far_as_kv(method, text):
    """Convexity: for any schedule, over the same tokens."""
    pruned, whole = tokens_per_layer(method, 32, 576), (576,) * 32
    macs = saving(LLAVA.macs(pruned, text), LLAVA.macs(whole, text))
    assert macs >= saving(kv_entries(pruned, text), kv_entries(whole, text)) > 0


def test_published_macs():
    """Vision tokens only: 3.82 T, and PyramidDrop's 1.78 T."""
    assert LLAVA.macs((576,) * 32) / 1e12 == pytest.approx(3.82, abs=0.005)
    assert LLAVA.macs(tokens_per_layer(PyramidDrop(), 32, 576)) / 1e12 == pytest.approx(1.78, abs=0.005)


def test_form():
    s, d, f, kv = 7, 64, 172, 16
    assert Geometry(d, f).layer_macs(s) == 4 * s * d * d + 2 * s * s * d + 3 * s * d * f
    assert Geometry(d, f, kv).layer_macs(s) == 2 * s * d * d + 2 * s * d * kv + 2 * s * s * d + 3 * s * d * f
    assert Geometry(d, f).layer_macs(0) == 0


def test_several_images():
    assert tokens_per_layer(ADSC((1,)), 2, 7, (2, 2, 2), 4) == (19, 3 + 3 + 2)
    assert tokens_per_layer(FastV(1), 2, 7, 4) == (11, 6)  # round half to even of 5.5
    assert tokens_per_layer(ADSC(), 32) == (0,) * 32
    with pytest.raises(ValueError, match="SparseVLM decides by content"):
        tokens_per_layer(SparseVLM(), 32, 576)
    with pytest.raises(ValueError, match="last layer is 9"):
        tokens_per_layer(ADSC(), 10, 576)
    with pytest.raises(ValueError, match="Geometry kv must be at least 1"):
        Geometry(64, 172, 0)

"""Pictures of kept tokens, checked on their pixels."""

import numpy as np
import pytest
import torch
from mmkv_hf import LayerReport, Report
from mmkv_hf.plot import plot_kept
from PIL import Image


def report(columns, kept):
    layers = [LayerReport(i, "self", [[1]], {}) for i in range(kept.shape[0])]
    return Report("snapkv", "8 tokens", 64, layers, 1, 2, [columns], [kept])


def brightness(path):
    return torch.from_numpy(np.array(Image.open(path).convert("L"))).float()


def test_a_kept_token_is_bright_where_it_stands(tmp_path):
    kept = torch.zeros(2, 16)
    kept[:, 3] = 1.0  # top right of a 4 x 4 grid
    light = brightness(plot_kept(report(list(range(5, 21)), kept), tmp_path / "kept.png"))
    dark = brightness(plot_kept(report(list(range(5, 21)), torch.zeros(2, 16)), tmp_path / "none.png"))
    where = ((light - dark) > 40).nonzero().float()
    changed = (light - dark).abs() > 40
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    assert len(where) > 0.9 * height * width, "one filled square"
    assert abs(height - width) <= 2
    assert rows[-1] < light.shape[0] / 2, "in the upper half"


def test_several_images_layers_and_a_background(tmp_path):
    columns = [*range(4), *range(10, 16)]
    made = plot_kept(
        report(columns, torch.rand(3, 10)),
        tmp_path / "kept.png",
        [Image.new("RGB", (20, 20), "white"), Image.new("RGB", (30, 20), "black")],
        per_layer=True,
        grids=[(2, 2), (2, 3)],
    )
    assert Image.open(made).size[1] > Image.open(made).size[0] * 1.1, "three rows of panels"


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ([], {}, "no vision tokens"),
        (list(range(16)), {"grids": [(3, 5)]}, "do not fit"),
        (list(range(16)), {"images": [Image.new("L", (4, 4))] * 2}, "1 images, 2 were given"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, columns, options, message):
    with pytest.raises(ValueError, match=message):
        plot_kept(report(columns, torch.rand(1, len(columns))), tmp_path / "kept.png", **options)

"""Pictures of kept tokens, checked on their pixels."""

import numpy as np
import pytest
import torch
from mmkv_hf import LayerReport, Report, compress
from mmkv_hf.plot import plot_kept
from PIL import Image


def report(columns, kept, grids=None, kind="self"):
    layers = [LayerReport(i, kind, [[1]], {}) for i in range(kept.shape[0])]
    return Report("snapkv", "8 tokens", 64, layers, 1, 2, [columns], [kept], grids)


def brightness(path):
    return torch.from_numpy(np.array(Image.open(path).convert("L"))).float()


def picture(rows, columns):
    return Image.new("RGB", (10 * columns, 10 * rows), "white")


def drawn(folder, made, **options):
    """Shapes of the heat maps that are drawn."""
    from matplotlib.axes import Axes

    shapes, original = [], Axes.imshow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Axes, "imshow", lambda self, x, **kw: (shapes.append(np.shape(x)), original(self, x, **kw))[1], raising=True
        )
        plot_kept(made, folder / "kept.png", **options)
    return [shape for shape in shapes if shape[0] * shape[1] < 100]


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
    ("sizes", "pictures", "grids"),
    [
        ([72], [picture(12, 6)], [(12, 6)]),  # a portrait
        ([72], [picture(6, 12)], [(6, 12)]),
        ([72], [picture(100, 90)], [(9, 8)]),
        ([12], [picture(2, 3), picture(3, 2)], [(2, 3), (3, 2)]),  # images that touch
        ([8, 4], [picture(2, 2)] * 3, [(2, 2)] * 3),
        ([6, 4], [picture(3, 2), picture(2, 2)], [(3, 2), (2, 2)]),
        ([16, 25], [], [(4, 4), (5, 5)]),
    ],
)
def test_the_grid_has_the_shape_of_the_image(tmp_path, sizes, pictures, grids):
    starts = [sum(sizes[:i]) + i for i in range(len(sizes))]
    columns = [c for start, size in zip(starts, sizes, strict=True) for c in range(start, start + size)]
    made = report(columns, torch.rand(1, len(columns)))
    assert drawn(tmp_path, made, images=pictures or None) == grids


def test_named_grids_may_cut_a_run_of_tiles(tmp_path):
    """LLaVA-NeXT: an overview of 4 x 4, then 8 rows of 8 tokens with a newline each."""
    made = report(list(range(88)), torch.rand(1, 88), grids=[[]])
    assert drawn(tmp_path, made, images=[picture(1, 1)] * 2, grids=[(4, 4), (8, 9)]) == [(4, 4), (8, 9)]


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (0, {}, "no vision tokens"),
        (16, {"grids": [(3, 5)]}, "do not fit"),
        (16, {"images": [picture(1, 1)] * 3}, r"3 images do not fit .* pass grids="),
        (16, {"images": [picture(1, 1)] * 2, "grids": [(4, 4)]}, "2 images were given for 1 grid"),
        (88, {"images": picture(1, 1)}, r"do not have the shape of an image .* grids="),
        (17, {"images": picture(1, 1)}, r"do not have the shape of an image .* grids="),
        (17, {}, r"shape of 17 vision tokens is not known; pass grids="),
        (72, {}, r"shape of 72 vision tokens is not known; pass grids="),
    ],
)
def test_wrong_arguments_are_named(tmp_path, size, options, message):
    with pytest.raises(ValueError, match=message):
        plot_kept(report(list(range(size)), torch.rand(1, size)), tmp_path / "kept.png", **options)


@pytest.mark.parametrize(
    ("name", "message"), [("kept.txt", "suffix"), ("kept", "suffix"), ("no/kept.png", "no folder")]
)
def test_a_file_that_cannot_be_written_is_named(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        plot_kept(report(list(range(16)), torch.rand(1, 16)), tmp_path / name)


# -- what a session knows


def session_report(kit, name, **settings):
    tiny = kit.vlm(name, **settings)
    with compress(tiny.model, kit.PIPELINE, kit.BUDGET) as session:
        kit.decode(tiny.model, tiny.inputs, 2, num_beams=2)
    return session.report()


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("qwen2_vl", (4, 6)),  # image_grid_thw (1, 8, 12), merged 2 x 2
        ("glm4v", (4, 6)),
        ("qwen3_vl", (4, 6)),
        ("llava", (4, 4)),  # 56 x 56 pixels
        ("internvl", (4, 4)),
        ("idefics3", (4, 4)),
        ("mistral3", (4, 4)),
        ("gemma3", (2, 2)),
    ],
)
def test_the_inputs_say_the_grid(tmp_path, kit, name, grid):
    made = session_report(kit, name, images=2, batch=2)
    assert made.vision_grids == [[grid] * 2] * 4, "two prompts, two beams each"
    assert drawn(tmp_path, made, images=[picture(*grid)] * 2, row=3) == [grid] * 2


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tiles_with_line_ends_are_no_grid(tmp_path, kit, name):
    made = session_report(kit, name)
    for image in (None, picture(1, 1), picture(8, 11)):
        with pytest.raises(ValueError, match=r"no plain grid .* pass grids="):
            plot_kept(made, tmp_path / "kept.png", image)


def test_a_cropped_image_is_not_stretched(tmp_path, kit):
    """LLaVA's processor cuts a square out of a wide image; the tokens are not spread over all of it."""
    with pytest.raises(ValueError, match="as the processor cropped it"):
        plot_kept(session_report(kit, "llava"), tmp_path / "kept.png", picture(2, 3))


def test_mllama_is_refused(tmp_path, kit):
    with pytest.raises(ValueError, match="cross-attention"):
        plot_kept(session_report(kit, "mllama"), tmp_path / "kept.png", picture(1, 1))

"""ADSC against the reconstruction's own words, in loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_prune import ADSC, Curriculum, Prompt, PrunePlan, tokens_per_layer
from mmkv_prune.adsc import grid_steps, quincunx

seeds = st.integers(0, 10**6)
quick = settings(deadline=None, max_examples=60)


def kept_columns(p, plan, layer, row):
    return (plan.survivors(p)[layer, row] & p.vision[row]).nonzero().flatten().tolist()


@quick
@given(seed=seeds, first=st.integers(1, 5), second=st.integers(1, 5), offset=st.integers(0, 4))
def test_raster(seed, first, second, offset, random_prompt, images):
    p = random_prompt(seed)
    offset = min(offset, first - 1, second - 1)
    plan = PrunePlan(ADSC((1, 3), (first, second), offset=offset), 4)
    for row in range(len(p.valid)):
        wanted = [[], []]
        for columns in images(p, row):
            for stage, stride in enumerate((first, second)):
                columns = columns[offset::stride] or columns[:1]
                wanted[stage] += columns
        assert kept_columns(p, plan, 0, row) == p.vision[row].nonzero().flatten().tolist()
        for layer, stage in ((1, 0), (2, 0), (3, 1)):
            assert kept_columns(p, plan, layer, row) == wanted[stage]


@quick
@given(
    seed=seeds,
    layout=st.sampled_from(["raster", "grid2d", "quincunx"]),
    first=st.integers(1, 4),
    second=st.integers(1, 4),
)
def test_text_stays_padding_goes_stages_nest(seed, layout, first, second, random_prompt):
    p = random_prompt(seed, grids=True)
    survivors = PrunePlan(ADSC((1, 2), (first, second), layout=layout), 3).survivors(p)
    text = p.valid & ~p.vision
    for before, after in itertools.pairwise(survivors):
        assert not (after & ~before).any()
        assert (after & ~p.vision).equal(text)
    assert survivors[0].equal(p.valid)


@quick
@given(seed=seeds, layout=st.sampled_from(["raster", "grid2d", "quincunx"]))
def test_no_image_vanishes_and_stride_1_is_identity(seed, layout, random_prompt):
    p = random_prompt(seed, grids=True)
    left = PrunePlan(ADSC((1,), 5, layout=layout, offset=4), 2).survivors(p)[1]
    assert ((p.image_sums(left) > 0) == p.vision).all()
    assert PrunePlan(ADSC((1,), 1, layout=layout), 2).survivors(p)[1].equal(p.valid)


@quick
@given(seed=seeds, first=st.integers(1, 4), second=st.integers(1, 4))
def test_strides_multiply(seed, first, second, random_prompt):
    p = random_prompt(seed)
    twice = PrunePlan(ADSC((1, 2), (first, second)), 3).survivors(p)[2]
    assert twice.equal(PrunePlan(ADSC((1,), first * second), 3).survivors(p)[2])


@pytest.mark.parametrize("number", [0, 1, 2, 3, 8, 100, 575, 576, 577])
@pytest.mark.parametrize("stride", [1, 2, 3, 7])
def test_closed_form(number, stride):
    """n_l = ceil(n / r) at each drop."""
    images = [number] if number else []
    once, twice = math.ceil(number / stride), math.ceil(math.ceil(number / stride) / stride)
    assert tokens_per_layer(ADSC((4, 20), stride), 32, *images) == (number,) * 4 + (once,) * 16 + (twice,) * 12


def test_raster_removes_columns_of_llava(prompt):
    """24 is divisible by 2: three drops keep columns 0, 8, 16 of every row."""
    p = prompt([-3, (1, 24, 24), -3])
    left = PrunePlan(ADSC((1, 2, 3), 2), 4).survivors(p)[3]
    places = p.place[left & p.vision][:, 1:].tolist()
    assert places == [[row, column] for row in range(24) for column in (0, 8, 16)]


def test_grid2d(prompt):
    p = prompt([-3, (1, 24, 24), -3])
    plan = PrunePlan(ADSC((1, 2), 3, layout="grid2d"), 3)
    once, twice = (plan.survivors(p)[layer] & p.vision for layer in (1, 2))
    assert p.place[once][:, 1:].tolist() == [[r, c] for r in range(24) for c in range(0, 24, 3)]
    assert p.place[twice][:, 1:].tolist() == [[r, c] for r in range(0, 24, 3) for c in range(0, 24, 3)]


@quick
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    strides=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    offset=st.integers(0, 6),
)
def test_grid2d_thins_the_grid_that_is_left(height, width, strides, offset, prompt):
    """Stage by stage with slices of the rows and columns left; a stage that would empty the image keeps its first."""
    offset = min(offset, min(strides) - 1)
    p = prompt([(1, height, width), -1])
    layers = tuple(range(1, len(strides) + 1))
    survivors = PrunePlan(ADSC(layers, tuple(strides), layout="grid2d", offset=offset), layers[-1] + 1).survivors(p)
    rows, columns, steps = range(height), range(width), (1, 1)
    for layer in layers:
        after = tuple(step for step, _ in grid_steps(tuple(strides[:layer]), 0))
        thin_rows, thin_columns = after[0] // steps[0], after[1] // steps[1]
        rows, columns = rows[offset // thin_columns :: thin_rows], columns[offset % thin_columns :: thin_columns]
        if not rows or not columns:
            assert (survivors[layer] & p.vision).sum() == 1
            break
        wanted = [[0, row, column] for row in rows for column in columns]
        assert p.place[survivors[layer] & p.vision].tolist() == wanted
        steps = after


@pytest.mark.parametrize("strides", [(1,), (2,), (6,), (7,), (12,), (3, 3), (2, 2, 2), (4, 3)])
def test_grid_steps_are_as_square_as_they_can(strides):
    (rows, _), (columns, _) = grid_steps(strides, 0)
    assert rows * columns == math.prod(strides)
    if len(strides) == 1:
        pairs = [(strides[0] // c, c) for c in range(1, strides[0] + 1) if strides[0] % c == 0]
        assert rows <= columns
        assert max(rows, columns) == min(max(pair) for pair in pairs)


@pytest.mark.parametrize("strides", [(2,), (3,), (4,), (5,), (8,), (13,), (3, 3), (2, 2), (2, 3, 2)])
@pytest.mark.parametrize("offset", [0, 1])
def test_quincunx_lattice(strides, offset, prompt):
    """Brute force over a torus: density 1/r, nested, and no sublattice of this family with a larger least distance."""
    p = prompt([-1, (1, 40, 40), -1])
    layers = tuple(range(1, len(strides) + 1))
    survivors = PrunePlan(ADSC(layers, strides, layout="quincunx", offset=offset), layers[-1] + 1).survivors(p)

    def least(points):
        mid = min(points, key=lambda x: (x[0] - 20) ** 2 + (x[1] - 20) ** 2)
        return min((a - mid[0]) ** 2 + (b - mid[1]) ** 2 for a, b in points if (a, b) != mid)

    points = {tuple(x[1:]) for x in p.place[survivors[-1] & p.vision].tolist()}
    modulus, shear = quincunx(strides)
    assert points == {(r, c) for r in range(40) for c in range(40) if (c + shear * r) % modulus == offset}
    assert modulus == math.prod(strides)
    _, before = quincunx(strides[:-1])
    step = modulus // strides[-1]
    rivals = [
        {(r, c) for r in range(40) for c in range(40) if (c + s * r) % modulus == 0}
        for s in range(modulus)
        if s % step == before % step
    ]
    assert least(points) == max(map(least, rivals))


def test_checkerboard(prompt):
    p = prompt([(2, 3, 3), -1])
    left = PrunePlan(ADSC((1,), 2, layout="quincunx"), 2).survivors(p)[1]
    frame = [[True, False, True], [False, True, False], [True, False, True]]
    assert left[0, :-1].view(2, 3, 3).tolist() == [frame, frame]


def test_content_and_batch_do_not_matter(prompt):
    """The same row alone, in a batch, and behind padding."""
    row = [-3, 11, -2, 7, -4]
    plan = PrunePlan(ADSC((1, 2), (2, 3)), 3)
    alone = plan.survivors(prompt(row))
    both = plan.survivors(prompt(row, [-2, 30, -9]))
    assert both[:, 0, -alone.shape[2] :].equal(alone[:, 0])
    assert ADSC.evidence is None
    assert plan.rows(prompt(row)) is None


def test_after_another_method(prompt):
    """Ranks count survivors, whoever left them."""
    p = prompt([-1, 8, -1])
    alive = p.valid.clone()
    alive[0, [2, 3]] = False
    kept = PrunePlan(ADSC((1,), 2), 2).keep(1, p, alive)
    assert kept[0].nonzero().flatten().tolist() == [0, 1, 5, 7, 9]


def test_layout_needs_grids(prompt):
    with pytest.raises(ValueError, match="layout='grid2d' needs the grid"):
        PrunePlan(ADSC(layout="grid2d"), 32).survivors(prompt([-1, 9, -1]))
    text = prompt([-5])
    assert PrunePlan(ADSC(layout="quincunx"), 32).survivors(text).all()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"stride": 0}, ValueError, "ADSC stride must be at least 1, got 0"),
        ({"stride": (3, 0)}, ValueError, r"ADSC stride\[1\] must be at least 1"),
        ({"stride": 2.0}, TypeError, "ADSC stride must be an int"),
        ({"stride": True}, TypeError, "ADSC stride must be an int"),
        ({"stride": (3, 3, 3)}, ValueError, "one for each of the 2 layers"),
        ({"layers": (4, 4)}, ValueError, "ADSC layers must be ascending"),
        ({"layers": (20, 4)}, ValueError, "ADSC layers must be ascending"),
        ({"layers": (0, 4)}, ValueError, r"ADSC layers\[0\] must be at least 1"),
        ({"layers": ()}, ValueError, "ADSC layers must not be empty"),
        ({"layers": 4}, TypeError, "ADSC layers must be a list or tuple"),
        ({"layers": "4,20"}, TypeError, "ADSC layers must be a list or tuple"),
        ({"layers": (4, 20.0)}, TypeError, r"ADSC layers\[1\] must be an int"),
        ({"layout": "grid"}, ValueError, "ADSC layout must be one of"),
        ({"offset": 3}, ValueError, "ADSC offset must be below the stride 3"),
        ({"offset": -1}, ValueError, "ADSC offset must be at least 0"),
        ({"positions": "new"}, ValueError, "ADSC positions must be one of"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        ADSC(**settings)


def test_lists_from_text_are_tuples():
    assert ADSC(layers=[4, 20], stride=[3, 3]) == ADSC(stride=(3, 3))
    assert hash(ADSC(layers=[4, 20])) == hash(ADSC())


def test_curriculum():
    reverse = Curriculum(ADSC(), steps=30)
    assert [reverse(step).strides for step in (0, 9, 10, 19, 20, 29, 30, 999)] == [
        *[(5, 5)] * 2,
        *[(4, 4)] * 2,
        *[(3, 3)] * 4,
    ]
    forward = Curriculum(ADSC(stride=(2, 3)), steps=3, order="forward")
    assert [forward(step).strides for step in range(4)] == [(1, 1), (1, 2), (2, 3), (2, 3)]
    assert Curriculum(ADSC(layout="grid2d"), 7)(0).layout == "grid2d"
    assert Curriculum(ADSC(offset=2), 7, order="forward")(0).strides == (3, 3)
    assert Curriculum(ADSC(), 1, levels=1)(0) == ADSC(stride=(3, 3))
    for bad in ({"steps": 0}, {"levels": 0}, {"order": "mixed"}):
        with pytest.raises(ValueError, match=f"Curriculum {next(iter(bad))}"):
            Curriculum(**{"target": ADSC(), "steps": 5} | bad)
    with pytest.raises(TypeError, match="Curriculum target"):
        Curriculum("adsc", 5)


@pytest.mark.parametrize("step", [float("nan"), float("inf"), -float("inf"), 2.5])
def test_a_step_that_is_no_whole_number_is_refused(step):
    with pytest.raises(ValueError, match="a step is a whole number"):
        Curriculum(ADSC(), steps=5)(step)


@pytest.mark.parametrize("step", [4.0, torch.tensor(4)])
def test_whole_numbers_of_other_types_are_steps(step):
    assert Curriculum(ADSC(), steps=5)(step) == ADSC(stride=(3, 3))


def test_default_schedule_averages_192():
    assert sum(tokens_per_layer(ADSC(), 32, 576)) == 192 * 32
    assert sorted(set(tokens_per_layer(ADSC(), 32, 576))) == [64, 192, 576]
    assert tokens_per_layer(ADSC(layout="quincunx"), 32, (1, 24, 24)) == tokens_per_layer(ADSC(), 32, 576)
    with pytest.raises(ValueError, match="last layer is 19"):
        PrunePlan(ADSC(), 20)
    assert Prompt.of(torch.zeros(1, 4, dtype=torch.bool)).counts.tolist() == [0]

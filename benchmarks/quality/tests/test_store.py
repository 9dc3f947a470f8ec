"""What is on disk survives interruptions, and results of different things are never mixed."""

from dataclasses import replace

import numpy as np
import pytest
from mmkv_quality.cells import Cell, Method, Setting
from mmkv_quality.measure import Block
from mmkv_quality.outcomes import Outcomes
from mmkv_quality.results import collect
from mmkv_quality.store import Made, Unit, WorkFolder, code_digest, versions, write_atomically

SETTING = Setting("m")
MADE = Made(1, 4, 2, {"torch": "2.13.0"}, "c0de", {"m": "w0"}, {})


def block(cell, fill, rows=2):
    right = np.full((rows, 3), fill, dtype=bool)
    return Block(cell.key, Outcomes(right), Outcomes(~right), held=10 * rows, full=100 * rows, seconds=1.0)


def test_cells_come_back(tmp_path):
    folder, unit = WorkFolder(tmp_path / "work"), Unit(SETTING, 0)
    assert folder.blocks(unit) == []
    folder.append(unit, block(Cell(SETTING), True))
    folder.append(unit, block(Cell(SETTING, Method(), 16), False))
    assert [b.cell for b in folder.blocks(unit)] == [
        "m/value/horizontal/suffix8/normal/after|full",
        *[Cell(SETTING, Method(), 16).key],
    ]
    assert folder.blocks(unit)[0].honest.right.all()
    assert folder.blocks(Unit(SETTING, 1)) == []


def test_a_line_that_was_cut_short_is_no_cell_and_does_not_spoil_the_next(tmp_path):
    folder, unit = WorkFolder(tmp_path), Unit(SETTING, 0)
    folder.append(unit, block(Cell(SETTING), True))
    file = tmp_path / "cells" / unit.file
    whole = file.read_text()
    file.write_text(whole + whole[: len(whole) // 2])
    assert len(folder.blocks(unit)) == 1
    folder.mend(unit)
    assert file.read_text() == whole
    folder.append(unit, block(Cell(SETTING, Method(), 16), True))
    assert len(folder.blocks(unit)) == 2
    file.write_text(whole[:7])
    folder.mend(unit)
    assert folder.blocks(unit) == []
    assert file.read_text() == ""


def test_batches_are_joined_and_unfinished_cells_are_missing(tmp_path):
    folder, cells = WorkFolder(tmp_path), [Cell(SETTING), Cell(SETTING, Method(), 16)]
    folder.append(Unit(SETTING, 0), block(cells[0], True, rows=3))
    folder.append(Unit(SETTING, 1), block(cells[0], False, rows=1))
    folder.append(Unit(SETTING, 0), block(cells[1], True))
    found = collect(folder, cells, range(2))
    assert found.keys() == {cells[0].key}
    result = found[cells[0].key]
    assert result.honest.exact.tolist() == [1, 1, 1, 0]
    assert result.usual.tolist() == [0, 0, 0, 1]
    assert (result.held, result.full, result.seconds) == (10, 100, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed: 1 then, 2 now"),
        ({"samples": 8}, "samples: 4 then, 8 now"),
        ({"block": 3}, "block: 2 then, 3 now"),
        ({"code": "d00d"}, "code: c0de then, d00d now"),
        ({"versions": {"torch": "2.14.0"}}, "versions of torch: 2.13.0 then, 2.14.0 now"),
        ({"weights": {"m": "w1"}}, "weights of m: w0 then, w1 now"),
    ],
)
def test_results_of_something_else_are_refused(tmp_path, change, message):
    folder = WorkFolder(tmp_path)
    folder.begin(MADE)
    folder.begin(MADE)
    with pytest.raises(ValueError, match=message):
        folder.begin(replace(MADE, **change))


def test_models_may_be_added(tmp_path):
    folder = WorkFolder(tmp_path)
    folder.begin(MADE)
    folder.begin(replace(MADE, weights={"n": "w9"}, tables={"n": "t9"}))
    assert folder.noted("made.json")["weights"] == {"m": "w0", "n": "w9"}
    assert folder.noted("made.json")["tables"] == {"n": "t9"}
    with pytest.raises(ValueError, match="tables of n"):
        folder.begin(replace(MADE, tables={"n": "other"}))


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to the results folder .*file"):
        WorkFolder(tmp_path / "file")


def test_writing_is_all_or_nothing(tmp_path):
    file = tmp_path / "page"
    write_atomically(file, "old")
    with pytest.raises(TypeError):
        write_atomically(file, 5)
    assert file.read_text() == "old"
    write_atomically(file, "new")
    assert file.read_text() == "new"


def test_the_code_is_what_measures():
    assert code_digest() == code_digest()
    assert len(code_digest()) == 64
    assert versions().keys() == {"torch", "transformers", "python"}

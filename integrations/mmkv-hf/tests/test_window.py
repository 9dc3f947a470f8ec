"""The last query rows, rolled over chunk borders, are those of one shot."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_hf.window import WindowRows


def model_mask(left, right, length, image):
    """[B, 1, N, N] as a model makes it: causal, no padding, and a block of columns that see each other."""
    column = torch.arange(length)
    real = (column >= torch.tensor(left)[:, None]) & (column < length - torch.tensor(right)[:, None])
    inside = (column >= image[0]) & (column < image[1])
    sees = (column <= column[:, None]) | (inside & inside[:, None])
    return (sees & real[:, None, :])[:, None], real


@st.composite
def cases(draw):
    length = draw(st.integers(1, 24))
    batch = draw(st.integers(1, 3))
    pads = [draw(st.integers(0, length - 1)) for _ in range(2 * batch)]
    left = pads[:batch]
    right = [min(r, length - 1 - p) for p, r in zip(left, pads[batch:], strict=True)]
    cuts = sorted(draw(st.sets(st.integers(1, length), max_size=6)) | {length})
    start = draw(st.integers(0, length))
    return length, left, right, cuts, draw(st.integers(1, 10)), (start, draw(st.integers(start, length)))


@given(cases(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_chunks_roll_to_the_same_rows_as_one_shot(case, masked):
    length, left, right, cuts, size, image = case
    if not masked:
        left, right, image = [0] * len(left), [0] * len(left), (0, 0)
    # Within a chunk a block sees itself as far as it has been read, so chunks are cut where no block is open.
    cuts = [cut for cut in cuts if not image[0] < cut < image[1]] or [length]
    mask, real = model_mask(left, right, length, image)
    queries = torch.arange(len(left) * length, dtype=torch.float32).view(len(left), 1, length, 1)
    rolled, begin = None, 0
    for cut in cuts:
        seen = mask[:, :, begin:cut, :cut]
        plain = not masked or bool((seen == torch.ones(cut, cut).tril()[begin:].bool()).all())
        new = WindowRows.of(queries[:, :, begin:cut], torch.arange(begin, cut)[None], None if plain else seen, size)
        rolled, begin = new if rolled is None else rolled.then(new, size), cut
    slots = torch.arange(length).expand(len(left), 1, -1)
    sees = rolled.sees(slots)
    for b in range(len(left)):
        wanted = real[b].nonzero()[:, 0][-size:].tolist()
        rows = [i for i, p in enumerate(rolled.positions[b].tolist()) if p >= 0]
        assert rolled.positions[b, rows].tolist() == wanted
        assert rows == list(range(rolled.positions.shape[1] - len(rows), rolled.positions.shape[1])), "right-aligned"
        assert rolled.queries[b, 0, rows, 0].tolist() == queries[b, 0, wanted, 0].tolist()
        assert torch.equal(sees[b, 0, rows], mask[b, 0, wanted])
        hidden = [i for i in range(rolled.positions.shape[1]) if i not in rows]
        assert not sees[b, 0, hidden].any()
    assert rolled.queries.shape[2] <= size
    assert rolled.queries.untyped_storage().nbytes() == rolled.queries.nbytes


def test_sees_follows_the_slots_of_each_head():
    rows = WindowRows.of(torch.zeros(1, 2, 3, 1), torch.arange(4, 7)[None], None, 2)  # positions 5 and 6
    slots = torch.tensor([[[-1, 0, 5, 6], [-1, -1, 2, 7]]])
    wanted = [[[0, 1, 1, 0], [0, 1, 1, 1]], [[0, 0, 1, 0], [0, 0, 1, 0]]]
    assert rows.sees(slots).int().tolist() == [wanted]
    explicit = WindowRows.of(
        torch.zeros(1, 2, 3, 1), torch.arange(4, 7)[None], torch.ones(1, 1, 3, 8).tril(4).bool(), 2
    )
    assert torch.equal(explicit.sees(slots), rows.sees(slots))


def test_a_view_of_a_larger_prompt_is_not_kept_alive():
    queries = torch.zeros(1, 2, 1000, 4)
    assert (
        WindowRows.of(queries, torch.arange(queries.shape[2])[None], None, 8).queries.untyped_storage().nbytes()
        == 2 * 8 * 4 * 4
    )

"""Prompts for the tests, as lists of segments."""

import random

import pytest
import torch
from mmkv_prune import Prompt

torch.set_num_threads(1)


def make_prompt(*rows, pads=None):
    """Each row a list of text lengths (negative ints) and images (ints or grids); pads: (left, right) of each row."""
    pads = pads or [(0, 0)] * len(rows)
    kinds = []
    for row, (left, right) in zip(rows, pads, strict=True):
        kind = ["pad"] * left
        for segment in row:
            if isinstance(segment, int) and segment < 0:
                kind += ["text"] * -segment
            else:
                size = segment if isinstance(segment, int) else segment[0] * segment[1] * segment[2]
                kind += ["vision"] * size
        kinds.append(kind + ["pad"] * right)
    length = max(map(len, kinds))
    kinds = [["pad"] * (length - len(kind)) + kind for kind in kinds]
    shapes = [[s for s in row if not isinstance(s, int) or s > 0] for row in rows]
    vision = torch.tensor([[k == "vision" for k in kind] for kind in kinds], dtype=torch.bool).view(len(rows), length)
    valid = torch.tensor([[k != "pad" for k in kind] for kind in kinds], dtype=torch.bool).view(len(rows), length)
    return Prompt.of(vision, valid=valid, shapes=shapes)


def make_images(prompt, row):
    """Columns of each image of a row, by plain loops."""
    images = {}
    for column, image in enumerate(prompt.image[row].tolist()):
        if image >= 0:
            images.setdefault(image, []).append(column)
    return [images[key] for key in sorted(images)]


@pytest.fixture(scope="session")
def prompt():
    return make_prompt


@pytest.fixture(scope="session")
def images():
    return make_images


@pytest.fixture(scope="session")
def random_prompt():
    """From a seed: one to three rows of text and images, some rows without images, padding on either side."""

    def make(seed, grids=False):
        rng = random.Random(seed)

        def image():
            if grids:
                return (rng.randint(1, 2), rng.randint(1, 5), rng.randint(1, 5))
            return rng.randint(1, 14)

        rows = []
        for _ in range(rng.randint(1, 3)):
            row = [-rng.randint(1, 3)]
            for _ in range(rng.randint(0, 3)):
                row += [image()] if rng.random() < 0.4 else [image(), -rng.randint(1, 3)]
            rows.append([*row, -rng.randint(1, 4)])
        return make_prompt(*rows, pads=[(rng.randint(0, 2), rng.randint(0, 2)) for _ in rows])

    return make

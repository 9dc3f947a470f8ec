"""Pages and the boxes of what is read from them, for `mmkv profile-heads`: `python -m mmkv_testbed.boxes --out boxes`.

A box holds one word of the answer. Other places where the page shows the same digit have none: a head that looks there
has not read the record it was asked about.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from .pages import Arrangement, Layout
from .samples import Sample, Task, make_sample

SEED: Final = 40_000
"""Neither that of `accuracy.py` nor the quality benchmark's, so that no page is profiled and measured."""


def write_pages(folder: Path, samples: Sequence[Sample]) -> Path:
    """Writes images and boxes.

    Args:
        folder: Made when it is not there.
        samples: What is asked.

    Returns:
        The JSON Lines file, for `--pages`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, sample in enumerate(samples):
        names = [f"page{number:03d}-{image}.png" for image in range(len(sample.images))]
        for name, image in zip(names, sample.images, strict=True):
            image.save(folder / name)
        lines.append(json.dumps({"images": names, "prompt": sample.prompt, "boxes": _boxes(sample)}))
    file = folder / "pages.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def _boxes(sample: Sample) -> list[dict[str, Any]]:
    return [
        {"text": word, "box": [box.left, box.top, box.right, box.bottom], "image": box.image}
        for word, box in zip(sample.answer.split(), sample.boxes, strict=True)
    ]


def calibration(count: int) -> list[Sample]:
    """Values to read aloud, which every model can, in one arrangement after the other."""
    layouts = [Layout(arrangement=arrangement) for arrangement in Arrangement]
    return [make_sample(SEED, index, Task.VALUE, 0, layouts[index % len(layouts)]) for index in range(count)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m mmkv_testbed.boxes", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for pages.jsonl and the images it names")
    parser.add_argument("--pages", type=int, default=96)
    options = parser.parse_args()
    print(f"wrote {write_pages(options.out, calibration(options.pages))}")


if __name__ == "__main__":
    main()

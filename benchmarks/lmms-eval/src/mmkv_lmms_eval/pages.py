"""A local task for lmms-eval made of generated pages: `python -m mmkv_lmms_eval.pages --out pages`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmkv_testbed import Sample

TASK = "mmkv_pages"
_IMAGE = "<image>"
_CUE = " answer :"  # closes every prompt of the testbed, and is what its chat template adds

_YAML = """\
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function mmkv_lmms_eval.pages.images
doc_to_text: question
doc_to_messages: !function mmkv_lmms_eval.pages.messages
doc_to_target: answer
process_results: !function mmkv_lmms_eval.pages.exact_match
generation_kwargs:
  max_new_tokens: {new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path, samples: Sequence[Sample]) -> Path:
    """Writes the pages and the task that asks about them.

    Args:
        folder: for lmms-eval's `--include_path`. The task holds its absolute path: a folder that moves is written anew.
        samples: what is asked.

    Returns:
        Path: of the task's YAML file.

    Raises:
        ValueError: there are no samples, or lmms-eval would take the folder for the task.
        ImportError: `datasets`, which comes with lmms-eval, is missing.
    """
    if not samples:
        raise ValueError("a task needs at least one sample")
    if folder.name == TASK:
        raise ValueError(f"choose another folder than {folder}: lmms-eval takes a folder of a task's name for the task")
    try:
        from datasets import Dataset, Features, Image, List, Value
    except ImportError as error:
        raise ImportError("pages are written with datasets; install mmkv-lmms-eval[lmms]") from error
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "images": [list(sample.images) for sample in samples],
        "question": [sample.prompt.removesuffix(_CUE) for sample in samples],
        "answer": [sample.answer for sample in samples],
    }
    types = Features({"images": List(Image()), "question": Value("string"), "answer": Value("string")})
    data = (folder / "pages.parquet").absolute()
    Dataset.from_dict(columns, features=types).to_parquet(str(data))
    longest = max(len(sample.answer.split()) for sample in samples)
    file = folder / f"{TASK}.yaml"
    file.write_text(_YAML.format(task=TASK, data=json.dumps(str(data)), new_tokens=longest + 1))
    return file


def images(page: Mapping[str, Any]) -> list[Any]:
    """The pages of one question, for lmms-eval's models in the simple form."""
    return list(page["images"])


def messages(page: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One turn with every page at its place, for lmms-eval's models in the chat form."""
    before, *texts = page["question"].split(_IMAGE)
    content = [{"type": "text", "text": before}] if before else []
    for image, text in zip(page["images"], texts, strict=True):
        content += [{"type": "image", "url": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def exact_match(page: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """1 if all words of the answer are right."""
    return {"exact_match": float(answers[0].split() == page["answer"].split())}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mmkv_lmms_eval.pages", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for lmms-eval's --include_path")
    parser.add_argument("--task", default="describe", help="what is asked, a task of mmkv-testbed")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--suffix", type=int, default=24, help="filler words after the question")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _main() -> None:
    try:
        from mmkv_testbed import make_samples
    except ImportError as error:
        raise ImportError("pages are made by mmkv-testbed; install mmkv-lmms-eval[pages]") from error
    options = _options()
    samples = make_samples(options.count, seed=options.seed, task=options.task, suffix=options.suffix)
    print(f"wrote {write_task(options.out, samples)}; run it with --tasks {TASK} --include_path {options.out}")


if __name__ == "__main__":
    _main()

import pytest
from mmkv_lmms_eval.pages import TASK, exact_match, images, messages, write_task
from mmkv_testbed import load, make_sample

TASKS = ["value", "describe", "images"]


def page(task):
    sample = make_sample(0, 0, task, suffix=3)
    return sample, {"images": sample.images, "question": sample.prompt.removesuffix(" answer :")}


@pytest.mark.parametrize("task", TASKS)
def test_the_chat_form_renders_the_prompt_of_the_sample(task):
    sample, doc = page(task)
    processor = load()[1]
    text = processor.apply_chat_template(messages(doc), tokenize=False, add_generation_prompt=True)
    assert text.split() == sample.prompt.split()


@pytest.mark.parametrize("task", TASKS)
def test_every_page_stands_once_in_both_forms(task):
    sample, doc = page(task)
    content = messages(doc)[0]["content"]
    assert [part["url"] for part in content if part["type"] == "image"] == list(sample.images) == images(doc)


@pytest.mark.parametrize(("answer", "score"), [("1 2", 1.0), (" 1  2 ", 1.0), ("1 3", 0.0), ("1 2 3", 0.0), ("", 0.0)])
def test_exact_match(answer, score):
    assert exact_match({"answer": "1 2"}, [answer]) == {"exact_match": score}


def test_a_folder_that_lmms_eval_takes_for_the_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match="choose another folder"):
        write_task(tmp_path / TASK, [make_sample(0, 0)])


def test_no_samples(tmp_path):
    with pytest.raises(ValueError, match="at least one sample"):
        write_task(tmp_path, [])


def test_the_task_keeps_the_pages_as_they_are(tmp_path):
    datasets = pytest.importorskip("datasets")
    sample = make_sample(0, 0)
    assert "max_new_tokens: 8" in write_task(tmp_path, [sample]).read_text()
    (kept,) = datasets.Dataset.from_parquet(str(tmp_path / "pages.parquet"), cache_dir=str(tmp_path))
    assert [image.tobytes() for image in kept["images"]] == [image.tobytes() for image in sample.images]
    assert kept["answer"] == sample.answer

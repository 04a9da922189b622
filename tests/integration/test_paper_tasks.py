"""The paper's thirteen tasks from end to end, offline: eleven on public data, two on passages of our own."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate

from conftest import SHARED
from sirius import Engine
from sirius.demo.embedded import FOLDER
from sirius.evaluation.catalogue import TASKS, task_of
from sirius.evaluation.lm import SiriusLM
from sirius.evaluation.suite import check_tasks, suite_folder, task_manager

SUBJECT = "mmlu_flan_cot_fewshot_anatomy"  # one of 57
CODE = {"humaneval", "mbpp_plus"}
STORY = (
    "The lighthouse on the northern cliff was built by two brothers. Ada, who keeps it now, paints the door red every "
    "spring. Ships come in on Mondays, and Ada counts them from the gallery."
)
COQA = {
    "id": "one",
    "story": STORY,
    "questions": {"input_text": ["Who keeps the lighthouse?", "What colour is its door?"], "turn_id": [1, 2]},
    "answers": {"input_text": ["Ada", "red"], "turn_id": [1, 2]},
    "additional_answers": {"0": {"input_text": ["Ada", "it is red"], "turn_id": [1, 2]}},
}
NEWS = {"id": "two", "article": STORY, "highlights": "Ada keeps the lighthouse .\nShe counts ships on Mondays ."}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of all sets: links to the public ones, and our own passages for the other two."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the evaluation data is not on this machine")
    folder = tmp_path_factory.mktemp("data")
    for path in (SHARED / "data").iterdir():
        os.symlink(path, folder / path.name)
    (folder / "coqa.jsonl").write_text(json.dumps(COQA) + "\n")
    (folder / "cnn_dailymail.jsonl").write_text(json.dumps(NEWS) + "\n")
    return folder


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(str(FOLDER), dtype="float32", device="cpu")


def evaluate(engine: Engine, task: str, data: Path) -> dict:
    with suite_folder(data) as folder:
        manager = task_manager(folder, [task])
        check_tasks([task], data, manager)
        setting = {"preset": "paper", "tree_width": 1}
        return simple_evaluate(
            model=SiriusLM(engine, quiet=True, batch_size=2, **setting),
            tasks=[task],
            limit=2,
            task_manager=manager,
            bootstrap_iters=0,
            gen_kwargs={"max_gen_toks": 16},
            confirm_run_unsafe_code=task in CODE,
        )


@pytest.mark.parametrize(
    "task", [SUBJECT, *(name for name in TASKS if name != "mmlu_flan_cot_fewshot" and "demo" not in name)]
)
def test_a_task_runs_from_its_data_to_its_score(task, engine, data):
    found = evaluate(engine, task, data)
    known = task_of(task)
    assert 0 <= found["results"][task][known.metric] <= 1
    samples = {each["doc_id"]: each for each in found["samples"][task]}
    assert len(samples) == (1 if task in ("coqa", "cnn_dailymail") else 2)
    assert all(each["resps"][0][0] is not None for each in samples.values())
    assert found["config"]["sirius_tasks"][task]["threshold"] == known.threshold


@pytest.mark.parametrize(
    ("task", "shots"),
    [("aqua_rat_cot", 4), ("csqa_cot", 5), ("strategyqa_cot", 5), ("date_cot", 5), ("sports_cot", 5)],
)
def test_a_worked_task_shows_its_examples_and_grades_the_right_answer_as_right(task, shots, data):
    with suite_folder(data) as folder:
        found = task_manager(folder, [task]).load([task])["tasks"][task]
    found.set_fewshot_seed(1234)
    found.build_all_requests(limit=1, rank=0, world_size=1)
    (request,) = found.instances
    prompt, options = request.args
    assert prompt.count("So the answer is") == shots == prompt.count("\nA: ")
    assert prompt.endswith(f"Q: {request.doc['question']}\nA:")
    assert options["until"] == ["Q:"]
    answer = request.doc["answer"]
    for said, score in ((f" Thus. So the answer is ({answer}).", 1.0), (" So the answer is (none).", 0.0), ("", 0.0)):
        assert found.process_results(request.doc, [said])["exact_match"] == score


RIGHT = {  # what a right text says of each other task, once lm-eval's filters have read it
    "gsm8k": lambda doc: doc["answer"].split("#### ")[1],
    "gsm8k_cot": lambda doc: doc["answer"].split("#### ")[1],
    SUBJECT: lambda doc: "(" + "ABCD"[doc["answer"]] + ")",
    "truthfulqa_gen": lambda doc: doc["correct_answers"][0],
    "coqa": lambda doc: doc["answers_of_people"][0],
    "cnn_dailymail": lambda doc: doc["highlights"],
}
WRONG = {"truthfulqa_gen": lambda doc: doc["incorrect_answers"][0]}
FULL = {"coqa": 0.75}  # each person's answer is left out in turn, and one of two overlaps with the other by half


@pytest.mark.parametrize("task", RIGHT)
def test_a_records_own_answer_is_right_and_another_one_is_not(task, data):
    with suite_folder(data) as folder:
        found = task_manager(folder, [task]).load([task])["tasks"][task]
    doc = next(iter(found.eval_docs))
    metric = task_of(task).metric.split(",")[0]
    assert found.process_results(doc, [RIGHT[task](doc)])[metric] == FULL.get(task, 1)
    wrong = WRONG.get(task, lambda doc: "(none)")(doc)
    assert found.process_results(doc, [wrong])[metric] < 0.5


def test_stock_tasks_show_the_numbers_of_examples_of_the_paper(data):
    for task, shots in (("gsm8k", 5), ("gsm8k_cot", 8), (SUBJECT, 4)):
        with suite_folder(data) as folder:
            found = task_manager(folder, [task]).load([task])["tasks"][task]
        found.set_fewshot_seed(1234)
        found.build_all_requests(limit=1, rank=0, world_size=1)
        prompt, _ = found.instances[0].args
        assert prompt.count("\nQuestion: " if task == "gsm8k" else "\nQ: ") == shots

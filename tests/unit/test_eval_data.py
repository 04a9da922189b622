"""Data of the paper's tasks: the hub's records and local files of them come to the same questions."""

import gzip
import json

import pytest

from conftest import SHARED
from sirius.errors import ConfigError, FileError
from sirius.evaluation import data
from sirius.evaluation.catalogue import TASKS

SETS = ["gsm8k", "aqua_rat_cot", "csqa_cot", "strategyqa_cot", "date_cot", "sports_cot", "humaneval", "mbpp_plus"]
SETS += ["truthfulqa_gen", "mmlu_flan_cot_fewshot_anatomy", "mmlu_flan_cot_fewshot"]


def put(folder, name: str, *records: dict) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


@pytest.mark.parametrize("task", SETS)
def test_the_local_files_of_eleven_sets_are_read(task):
    if not (SHARED / "data").is_dir():
        pytest.skip("the evaluation data is not on this machine")
    splits = data.local_splits(task, SHARED / "data")
    first = next(iter(splits.values()))
    assert len(first) > 100
    assert any(name in first[0] for name in ("question", "prompt"))


def test_records_of_the_hub_and_of_the_authors_come_to_the_same(tmp_path):
    pairs = {
        "csqa_cot": (
            {"question": "Where?", "choices": {"label": ["A", "B"], "text": ["here", "there"]}, "answerKey": "B"},
            {"question": "Where?", "choices": ["here", "there"], "answer": "B"},
        ),
        "sports_cot": (
            {
                "inputs": "Determine whether the following statement or statements are plausible or implausible:\n"
                "Statement: Ada took a corner kick\nPlausible/implausible?",
                "targets": ["plausible"],
            },
            {"input": "Ada took a corner kick", "target": "plausible"},
        ),
        "date_cot": (
            {"inputs": "Q: What is the date?\nA:", "targets": ["05/01/2021"]},
            {"input": "What is the date?", "target": "05/01/2021"},
        ),
        "gsm8k": (
            {"question": "How many?", "answer": "1 + 1 = 2\n#### 2"},
            {"question": "How many?", "answer": "1 + 1 = 2", "final": "2"},
        ),
    }
    for task, (hub, authors) in pairs.items():
        assert data.CONVERT[task](hub) == data.CONVERT[task](authors)


def test_questions_that_are_shown_as_worked_examples_are_not_asked(tmp_path):
    shown = {"set": "date", "question": "What is the date?", "rationale": "It is.", "answer": "01/01/2001"}
    put(tmp_path, "cot_prompts", shown)
    put(
        tmp_path,
        "date_understanding",
        {"input": "What is  the date", "target": "01/01/2001"},
        {"input": "And tomorrow?", "target": "01/02/2001"},
    )
    found = data.load(sirius_task="date_cot", sirius_folder=str(tmp_path))
    assert [each["question"] for each in found["test"]] == ["And tomorrow?"]
    assert found["examples"][0]["worked"] == "It is. So the answer is 01/01/2001."


@pytest.mark.parametrize("task", data.EXAMPLES)
def test_our_own_worked_examples_stand_in_where_a_folder_has_none(task, tmp_path):
    found = data.worked_examples(task, tmp_path)
    assert len(found) == (4 if task == "aqua_rat_cot" else 5)
    assert all("So the answer is" in each["worked"] for each in found)


def test_a_task_without_a_local_form_is_refused_beside_local_data(tmp_path):
    with pytest.raises(ConfigError, match="has no local form"):
        data.check_files("arc_easy", tmp_path)


def test_the_examples_of_gsm8k_are_needed_too(tmp_path):
    put(tmp_path, "gsm8k_test", {"question": "How many?", "answer": "#### 2"})
    with pytest.raises(FileError, match="gsm8k_train"):
        data.check_files("gsm8k", tmp_path)
    data.check_files("gsm8k_cot", tmp_path)


def test_a_missing_file_names_the_file_and_the_way_out(tmp_path):
    for task in (name for name, known in TASKS.items() if known.files):
        with pytest.raises(FileError, match=r"leave out --data"):
            data.check_files(task, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json\n", "must be JSONL"),
        ('{"question": "Where?"}\n\n{"question"\n', "line 3 of .*csqa_dev.jsonl"),
        ("\n", "at least one"),
        ("[1]\n", "a JSON object on each line"),
        ('{"question": "Where?"}\n', "does not fit its task"),
        ('{"question": "Where?", "choices": 7, "answer": "A"}\n', "does not fit its task"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path, text, said):
    data.read_records.cache_clear()
    (tmp_path / "csqa_dev.jsonl").write_text(text)
    with pytest.raises(FileError, match=said):
        data.local_splits("csqa_cot", tmp_path)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw[:20] + b"\xff" * 8 + raw[28:]])
def test_a_damaged_file_of_gzip_is_refused(tmp_path, damage):
    whole = gzip.compress(b'{"question": "Where?", "choices": ["here"], "answer": "A"}\n')
    (tmp_path / "csqa_dev.jsonl.gz").write_bytes(damage(whole))
    with pytest.raises(FileError, match="cannot read"):
        data.local_splits("csqa_cot", tmp_path)


@pytest.mark.parametrize(
    ("task", "name", "record"),
    [
        ("gsm8k_cot", "gsm8k_test", {"question": "How many?", "answer": "Two of them."}),
        ("strategyqa_cot", "strategyqa", {"question": "Is it?", "answer": "no"}),
        ("mmlu_flan_cot_fewshot_anatomy", "mmlu_test", {"subject": "anatomy", "question": "Which?", "answer": ""}),
        ("mmlu_flan_cot_fewshot_anatomy", "mmlu_test", {"subject": "anatomy", "question": "Which?", "answer": "BC"}),
        ("mmlu_flan_cot_fewshot_anatomy", "mmlu_test", {"subject": "anatomy", "question": "Which?", "answer": 4}),
    ],
)
def test_a_record_without_a_usable_answer_is_refused(tmp_path, task, name, record):
    data.read_records.cache_clear()
    put(tmp_path, name, record)
    with pytest.raises(FileError, match="does not fit its task"):
        data.local_splits(task, tmp_path)


def test_a_file_without_a_record_of_the_subject_is_named(tmp_path):
    data.read_records.cache_clear()
    put(tmp_path, "mmlu_test", {"subject": "botany", "question": "Which?", "answer": "A"})
    with pytest.raises(FileError, match="no record of mmlu_flan_cot_fewshot_anatomy"):
        data.local_splits("mmlu_flan_cot_fewshot_anatomy", tmp_path)


def test_problems_of_the_embedded_model_and_their_examples_never_meet():
    for task in ("reasoning", "understanding"):
        found = data.demo_splits(task)
        assert not {each["question"] for each in found["test"]} & {each["question"] for each in found["examples"]}

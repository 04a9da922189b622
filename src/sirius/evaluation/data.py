"""The data of the paper's tasks, from local files or from the hub, in the form that the tasks expect.

A local file is JSONL, as it is or compressed by gzip. Records may have the fields of the hub's sets, or those of the
sets' authors with the choices as a plain list.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sirius.demo.problems import make_problem
from sirius.errors import ConfigError, FileError
from sirius.evaluation.catalogue import EXEMPLARS, SUBJECTS, TASKS, task_of

Doc = dict[str, Any]
ENDINGS = (".jsonl", ".jsonl.gz")
SHOTS = 5  # worked examples before a question, as in the paper
DEMO_PROBLEMS, DEMO_EXAMPLES = 2000, 200

HUB: dict[str, tuple[str, str | None, dict[str, str]]] = {  # id, configuration, and the hub's names of the splits
    "aqua_rat_cot": ("deepmind/aqua_rat", "raw", {"test": "test", "validation": "validation"}),
    "csqa_cot": ("tau/commonsense_qa", None, {"validation": "validation"}),
    "strategyqa_cot": ("ChilleD/StrategyQA", None, {"test": "test"}),
    "date_cot": ("hails/bigbench", "date_understanding_zero_shot", {"test": "default"}),
    "sports_cot": ("hails/bigbench", "sports_understanding_zero_shot", {"test": "default"}),
    "coqa": ("EleutherAI/coqa", None, {"validation": "validation"}),
    "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0", {"test": "test"}),
}


def load(*, sirius_task: str, sirius_folder: str | None = None, **_: Any) -> dict[str, Any]:
    """Return the splits of a task, as lm-eval's `custom_dataset` gives them.

    sirius_task    a name of `TASKS`, or of a subject of MMLU
    sirius_folder  where the local files are; None takes the hub's

    Raises FileError of a file that is missing or broken.
    """
    from datasets import Dataset, load_dataset

    if sirius_task.startswith("demo_"):
        splits = demo_splits(sirius_task.removeprefix("demo_"))
    elif sirius_folder is not None:
        splits = local_splits(sirius_task, Path(sirius_folder))
    else:
        place, name, names = HUB[sirius_task]
        convert = CONVERT[sirius_task]
        splits = {
            own: [convert(dict(each)) for each in load_dataset(place, name, split=hub)] for own, hub in names.items()
        }
    if sirius_task in EXAMPLES:
        splits = with_examples(sirius_task, splits, None if sirius_folder is None else Path(sirius_folder))
    return {name: Dataset.from_list(docs) for name, docs in splits.items()}


def local_splits(task: str, folder: Path) -> dict[str, list[Doc]]:
    """Return the splits of a task that lie in a folder; raise FileError where a needed one is missing."""
    known = task_of(task)
    assert known is not None, f"{task} is no task of the paper"
    convert = CONVERT.get(SUBJECTS if task.startswith(SUBJECTS) else task, dict)
    subject = task.removeprefix(f"{SUBJECTS}_")
    splits = {}
    for split, name in known.files.items():
        path = find_file(folder, name)
        if path is None and split in known.needed:
            raise _missing(task, folder, name)
        if path is not None:
            kept = (each for each in read_records(path) if subject == task or each.get("subject") == subject)
            splits[split] = [_converted(convert, each, path) for each in kept]
            if split in known.needed and not splits[split]:
                raise FileError(f"{path} has no record of {task}; give a file that has some, or leave out --data")
    return splits


def check_files(task: str, folder: Path) -> None:
    """Raise FileError where a folder lacks a file of a task, ConfigError of a task that is not the paper's."""
    known = task_of(task)
    if known is None:
        raise ConfigError(f"{task} has no local form; leave out --data, or name tasks of the paper: {', '.join(TASKS)}")
    for split, name in known.files.items():
        if split in known.needed and find_file(folder, name) is None:
            raise _missing(task, folder, name)


def find_file(folder: Path, name: str) -> Path | None:
    """Return the file of a name in a folder, with one of `ENDINGS`."""
    found = (folder / f"{name}{ending}" for ending in ENDINGS)
    return next((each for each in found if each.is_file()), None)


@cache
def read_records(path: Path) -> list[Doc]:
    """Return the records of a JSONL file; raise FileError where it cannot be read."""
    number = 0
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        records = []
        for number, line in enumerate(raw.decode().split("\n"), start=1):  # noqa: B007 - the error names it
            records += [json.loads(line)] if line.strip() else []
    except (OSError, ValueError, EOFError, zlib.error) as error:
        where = f"line {number} of {path}" if number else str(path)
        raise FileError(f"cannot read {where}: {error}; it must be JSONL, with or without gzip") from error
    if not records or not all(isinstance(each, dict) for each in records):
        raise FileError(f"{path} must hold a JSON object on each line, at least one")
    return records


def with_examples(task: str, splits: Mapping[str, list[Doc]], folder: Path | None) -> dict[str, list[Doc]]:
    """Return splits with the worked examples as a split of their own; a question that is an example is left out."""
    examples = worked_examples(task, folder)
    shown = {_bare(each["question"]) for each in examples}
    asked = {name: [each for each in docs if _bare(each["question"]) not in shown] for name, docs in splits.items()}
    return {**asked, "examples": examples}


def worked_examples(task: str, folder: Path | None) -> list[Doc]:
    """Return the worked examples of a task: those of a local file of them, otherwise our own."""
    path = None if folder is None else find_file(folder, EXEMPLARS)
    if path is None:
        path = Path(__file__).parent / "tasks" / "examples.jsonl"
    name = EXAMPLES[task]
    found = [each for each in read_records(path) if each.get("set") == name][:SHOTS]
    if not found:
        raise FileError(f"{path} has no worked example of the set {name!r}")
    return [_example(task, each) for each in found]


def _example(task: str, record: Doc) -> Doc:
    answer = f"({record['answer']})" if task in LETTERS else record["answer"]
    question = record["question"].removeprefix("Yes or no: ")
    return {
        "question": question,
        "answer": record["answer"],
        "worked": f"{record['rationale']} So the answer is {answer}.",
    }


def demo_splits(task: str) -> dict[str, list[Doc]]:
    """Return problems of the embedded model's streams; examples and questions never meet."""

    def docs(numbers: Iterable[int]) -> list[Doc]:
        problems = (make_problem(task, "test", 0, number) for number in numbers)
        return [{"question": each.question, "worked": each.answer, "answer": each.final} for each in problems]

    last = DEMO_PROBLEMS + DEMO_EXAMPLES
    return {"test": docs(range(DEMO_PROBLEMS)), "examples": docs(range(DEMO_PROBLEMS, last))}


# --- what becomes of a record


def _gsm8k(record: Doc) -> Doc:
    answer = record["answer"]
    return {
        "question": record["question"],
        "answer": answer if "####" in answer else f"{answer.rstrip()}\n#### {record['final']}",
    }


def _choices(question: str, choices: Iterable[str]) -> str:
    listed = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCDEFGH", choices, strict=False))
    return f"{question} Answer Choices: {listed}"


def _csqa(record: Doc) -> Doc:
    choices = record["choices"]
    texts = choices["text"] if isinstance(choices, Mapping) else choices
    answer = record.get("answerKey") or record["answer"]
    return {"question": _choices(record["question"], texts), "answer": answer}


def _aqua(record: Doc) -> Doc:
    texts = [option.split(")", 1)[1].strip() for option in record["options"]]
    return {"question": _choices(record["question"], texts), "answer": record["correct"]}


def _strategyqa(record: Doc) -> Doc:
    answer = record["answer"]
    if not isinstance(answer, bool):
        raise ValueError(f"the answer is true or false; got {answer!r}")
    return {"question": record["question"], "answer": "yes" if answer else "no"}


def _bigbench(record: Doc) -> tuple[str, str]:
    """Return input and right answer of a record of BIG-bench, by the hub's names or the authors'."""
    if "inputs" not in record:
        return record["input"], record["target"]
    lines = [line.strip() for line in str(record["inputs"]).split("\n")]
    for mark in ("Statement: ", "Q: "):
        if marked := [line.removeprefix(mark) for line in lines if line.startswith(mark)]:
            return marked[-1], record["targets"][0]
    raise ValueError("inputs has no line that begins with Statement: or Q:")


def _date(record: Doc) -> Doc:
    question, answer = _bigbench(record)
    return {"question": question, "answer": answer}


def _sports(record: Doc) -> Doc:
    sentence, answer = _bigbench(record)
    if "plausible" not in answer:
        raise ValueError(f"the answer is plausible or implausible; got {answer!r}")
    question = f'Is the following sentence plausible? "{sentence.strip()}"'
    return {"question": question, "answer": "yes" if answer == "plausible" else "no"}


def _mmlu(record: Doc) -> Doc:
    answer = record["answer"]
    number = "ABCD".index(answer) if isinstance(answer, str) and len(answer) == 1 else answer
    if type(number) is not int or number not in range(4):
        raise ValueError(f"the answer is a letter from A to D or its number from 0; got {answer!r}")
    return {**record, "answer": number}


def _summary(record: Doc) -> Doc:
    return {"article": record["article"], "highlights": record["highlights"]}


def _passage(record: Doc) -> Doc:
    """Return a conversation about a passage, whose last question is asked."""
    asked, said = record["questions"]["input_text"], record["answers"]["input_text"]
    others = [each["input_text"][len(asked) - 1] for each in (record.get("additional_answers") or {}).values()]
    turns = [f"Q: {question}\n\nA: {answer}\n\n" for question, answer in zip(asked[:-1], said, strict=False)]
    question = f"{record['story']}\n\n{''.join(turns)}Q: {asked[-1]}\n\nA:"
    answers = dict.fromkeys([said[len(asked) - 1], *others])
    return {"question": question, "answers_of_people": list({each.lower(): each for each in answers}.values())}


CONVERT: dict[str, Callable[[Doc], Doc]] = {
    "gsm8k": _gsm8k,
    "gsm8k_cot": _gsm8k,
    "aqua_rat_cot": _aqua,
    "csqa_cot": _csqa,
    "strategyqa_cot": _strategyqa,
    "date_cot": _date,
    "sports_cot": _sports,
    SUBJECTS: _mmlu,
    "cnn_dailymail": _summary,
    "coqa": _passage,
}
EXAMPLES = {  # the set of worked examples that a task shows
    "aqua_rat_cot": "aqua",
    "csqa_cot": "csqa",
    "strategyqa_cot": "strategyqa",
    "date_cot": "date",
    "sports_cot": "sports",
}
LETTERS = {"aqua_rat_cot", "csqa_cot"}  # tasks whose answer is the letter of a choice


def _converted(convert: Callable[[Doc], Doc], record: Doc, path: Path) -> Doc:
    try:
        return convert(record)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise FileError(f"{path} has a record that does not fit its task ({error!r}): {record!r:.120}") from error


def _missing(task: str, folder: Path, name: str) -> FileError:
    return FileError(f"{task} needs {folder / name}{ENDINGS[0]} (or {ENDINGS[1]}); leave out --data to take the hub's")


def _bare(question: str) -> str:
    """Return the letters and digits of a question, to tell whether two are one."""
    return "".join(filter(str.isalnum, question.lower()))

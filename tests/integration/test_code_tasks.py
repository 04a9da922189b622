"""HumanEval and MBPP+ through lm-eval: prompts of its own tasks, programs graded in the sandbox."""

import gzip
import json
from pathlib import Path

import pytest

from conftest import SHARED
from sirius.errors import SandboxError
from sirius.evaluation import sandbox
from sirius.evaluation.tasks import code

pytestmark = pytest.mark.integration

TASKS = Path(code.__file__).parent
SUM = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Add two numbers."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}
DOUBLE = {
    "task_id": 1,
    "code": "def double(n):\n    return 2 * n\n",
    "prompt": "Write a function that doubles a number.",
    "source_file": "",
    "test_imports": ["import math"],
    "test_list": ["assert double(1) == 2", "assert double(2) == 4", "assert double(3) == 6"],
    "test": "import numpy as np\nfor n in (1, 2, 3, 0.5, -7, math.pi):\n    assert double(n) == np.add(n, n)\n",
}
WRONG = ["", "\ud800", "\0", "    return (", "import sys; sys.exit(0)", "    return 'a' * 10**12\n", "\n" + "(" * 5000]


@pytest.fixture(autouse=True)
def contained():
    """Skip where the machine cannot contain programs: grading refuses there."""
    try:
        sandbox.check()
    except SandboxError as error:
        pytest.skip(str(error))


def records(name: str) -> list[dict]:
    path = SHARED / "data" / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no problems: {path} is missing")
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def settings(path: Path) -> dict:
    loader = pytest.importorskip("lm_eval.tasks._yaml_loader")
    return loader.load_yaml(path, resolve_func=False)


def test_a_right_completion_scores_one_and_any_other_zero():
    completions = [SUM["canonical_solution"], *WRONG]
    reasons = code.run_humaneval([completions, ["    return a + b"]], [SUM, SUM])
    assert [reason == "passed" for reason in reasons[0]] == [True] + [False] * len(WRONG)
    assert code.score_humaneval(SUM, [reasons[0]]) == {"pass@1": 1 / len(completions)}
    assert code.score_humaneval(SUM, [reasons[1]]) == {"pass@1": 1.0}


def test_mbpp_plus_is_graded_by_all_of_its_tests():
    only_the_shown = "def double(n):\n    return {1: 2, 2: 4, 3: 6}[n]\n"
    completions = [[DOUBLE["code"]], [only_the_shown], *([each] for each in WRONG)]
    reasons = code.run_mbpp_plus(completions, [DOUBLE] * len(completions))
    assert [code.score_mbpp_plus(DOUBLE, [each])["pass_at_1"] for each in reasons] == [1.0] + [0.0] * (len(WRONG) + 1)


@pytest.mark.slow
def test_a_slow_published_solution_gives_more_time(monkeypatch):
    """It takes 1 of the 1 seconds that are usual, so that any other may take twice its time."""
    monkeypatch.setattr(code, "USUAL", sandbox.Limits(cpu_seconds=1))
    monkeypatch.setattr(code, "SLOWER_THAN_REFERENCE", 2)
    work = "import time\nwhile time.process_time() < {}: pass\n"
    slow = {**DOUBLE, "code": work.format(1.0) + DOUBLE["code"]}
    late = work.format(1.5) + DOUBLE["code"]
    assert code.run_mbpp_plus([[late], [late]], [slow, DOUBLE]) == [["passed"], ["timed out"]]


@pytest.mark.parametrize("name", ["humaneval", "mbpp_plus"])
def test_prompts_and_stops_are_lm_evals(name):
    lm_eval = pytest.importorskip("lm_eval")
    folder = Path(lm_eval.__file__).parent / "tasks" / name.removesuffix("_plus")
    ours, theirs = settings(TASKS / f"{name}.yaml"), settings(folder / f"{name}.yaml")
    same = {"doc_to_text", "doc_to_target", "target_delimiter", "generation_kwargs", "num_fewshot", "dataset_path"}
    for key in same | {"task", "test_split", "output_type", "unsafe_code", "repeats"}:
        assert ours.get(key) == theirs.get(key), key


def test_the_exemplars_are_lm_evals_and_no_hub_is_asked():
    pytest.importorskip("lm_eval")
    exemplars = code.mbpp_exemplars()
    assert [each["task_id"] for each in exemplars] == [2, 3, 4]
    assert all({"text", "code", "test_list", "is_fewshot"} <= each.keys() for each in exemplars)


@pytest.mark.parametrize(
    ("name", "doc", "field", "metric"),
    [
        ("humaneval", SUM, "canonical_solution", "pass@1,create_test"),
        ("mbpp_plus", DOUBLE, "code", "pass_at_1,none"),
    ],
)
def test_lm_eval_runs_the_task(name, doc, field, metric, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    class Scripted(LM):
        """It answers the first question rightly, and any other wrongly."""

        def generate_until(self, requests):
            self.prompts = [request.args[0] for request in requests]
            return [doc[field] if i == 0 else "    return None" for i in range(len(requests))]

        def loglikelihood(self, requests):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for _ in range(4)))
    data = {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")}
    model = Scripted()
    results = lm_eval.simple_evaluate(
        model,
        tasks=[{**load_yaml(TASKS / f"{name}.yaml"), "dataset_path": "json", "dataset_kwargs": data}],
        task_manager=TaskManager(include_defaults=False),
        confirm_run_unsafe_code=True,
        bootstrap_iters=0,
    )
    assert results["results"][name][metric] == 0.25
    assert [each["filtered_resps"] for each in results["samples"][name]] == [[["passed"]], *[[["failed"]]] * 3]
    assert model.prompts[0].count("[BEGIN]") == (4 if name == "mbpp_plus" else 0)


def test_every_published_solution_of_humaneval_passes():
    docs = records("humaneval")
    reasons = code.run_humaneval([[doc["canonical_solution"]] for doc in docs], docs)
    assert [doc["task_id"] for doc, mine in zip(docs, reasons, strict=True) if mine != ["passed"]] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_published_solution_of_mbpp_plus_passes():
    docs = records("mbppplus")
    reasons = code.run_mbpp_plus([[doc["code"]] for doc in docs], docs)
    assert [doc["task_id"] for doc, mine in zip(docs, reasons, strict=True) if mine != ["passed"]] == []

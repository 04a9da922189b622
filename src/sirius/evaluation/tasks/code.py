"""HumanEval and MBPP+: from completions to programs, run in the sandbox, to scores.

`humaneval.yaml` and `mbpp_plus.yaml` name these functions. A doc has the fields of the set on its hub:

openai/openai_humaneval  task_id, prompt, canonical_solution, test, entry_point
evalplus/mbppplus        task_id, code, prompt, source_file, test_imports, test_list, test
"""

import ast
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from sirius.errors import FileError
from sirius.evaluation.sandbox import Limits, Reason, check, run, run_all

Doc = Mapping[str, Any]
Docs = TypeVar("Docs")
USUAL = Limits()
SLOWEST = Limits(wall_seconds=600.0, cpu_seconds=200)  # one of the published solutions takes 50
MOST_WORKERS = 8  # each program may use gigabytes
SLOWER_THAN_REFERENCE = 4  # as EvalPlus allows
FEWSHOT = "tasks/mbpp/utils.py"


def humaneval_program(doc: Doc, completion: str) -> str:
    """Return the prompt, the completion and the published tests as one program."""
    return f"{doc['prompt']}{completion}\n{doc['test']}\ncheck({doc['entry_point']})"


def mbpp_plus_program(doc: Doc, completion: str) -> str:
    """Return the completion and EvalPlus's tests, which include those of MBPP, as one program."""
    return "\n".join([completion, *doc["test_imports"], doc["test"]])


def run_humaneval(resps: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[list[Reason]]:
    """Run the completions of each doc and return how each ended; lm-eval calls it as a filter."""
    return _run_completions(humaneval_program, resps, docs)


def run_mbpp_plus(resps: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[list[Reason]]:
    """Run the completions of each doc and return how each ended; lm-eval calls it as a filter.

    A completion may use 10 seconds of processor time, or 4 times what the published solution takes if that is more.
    """
    reasons = _run_completions(mbpp_plus_program, resps, docs)
    for doc, mine, completions in zip(docs, reasons, resps, strict=True):
        if "timed out" in mine and (limits := _longer(doc)):
            late = [i for i, reason in enumerate(mine) if reason == "timed out"]
            outcomes = run_all((mbpp_plus_program(doc, completions[i]) for i in late), _workers(), limits)
            for i, outcome in zip(late, outcomes, strict=True):
                mine[i] = outcome.reason
    return reasons


def _longer(doc: Doc) -> Limits | None:
    """Return the limits of a doc whose published solution is slow, or nothing for any other."""
    reference = run(mbpp_plus_program(doc, doc["code"]), SLOWEST)
    seconds = math.ceil(SLOWER_THAN_REFERENCE * reference.seconds)
    if not reference.passed or seconds <= USUAL.cpu_seconds:
        return None
    return Limits(wall_seconds=seconds + USUAL.wall_seconds, cpu_seconds=seconds)


def _run_completions(
    program_of: Callable[[Doc, str], str], resps: Sequence[Sequence[str]], docs: Sequence[Doc]
) -> list[list[Reason]]:
    programs = [[program_of(doc, each) for each in mine] for mine, doc in zip(resps, docs, strict=True)]
    outcomes = iter(run_all(chain(*programs), _workers(), USUAL))
    return [[next(outcomes).reason for _ in mine] for mine in programs]


def _workers() -> int:
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def score_humaneval(doc: Doc, results: Sequence[Sequence[Reason]]) -> dict[str, float]:
    """Return the share of a doc's completions that passed, under lm-eval's name for it."""
    return {"pass@1": _share_passed(results[0])}


def score_mbpp_plus(doc: Doc, results: Sequence[Sequence[Reason]]) -> dict[str, float]:
    """Return the share of a doc's completions that passed, under lm-eval's name for it."""
    return {"pass_at_1": _share_passed(results[0])}


def _share_passed(reasons: Sequence[Reason]) -> float:
    return sum(reason == "passed" for reason in reasons) / len(reasons)


def contained(docs: Docs) -> Docs:
    """Return the docs as they are; raises SandboxError, before any text is generated, where none could be graded."""
    check()
    return docs


def mbpp_exemplars() -> list[dict[str, Any]]:
    """Return lm-eval's three solved problems; they are read from its source, since its import loads from a hub."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        raise FileError("MBPP's exemplars are part of lm-eval, which is not installed: pip install lm-eval==0.4.13")
    path = Path(found.origin).parent / FEWSHOT
    for node in ast.walk(ast.parse(path.read_text())) if path.is_file() else ():
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples":
            returned = node.body[-1]
            assert isinstance(returned, ast.Return) and returned.value is not None
            return ast.literal_eval(returned.value)
    raise FileError(f"no exemplars of MBPP in {path}; install the lm-eval that has them: pip install lm-eval==0.4.13")

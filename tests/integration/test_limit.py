"""How many problems a limit takes, where a task is a group of subtasks."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")

from sirius import Engine
from sirius.demo.embedded import FOLDER
from sirius.evaluation.grid import Grid
from sirius.evaluation.suite import STOCK, STOCK_FOLDERS, suite_folder, task_manager, tell_limit
from sirius.evaluation.sweep import Sweep, in_order, load_parts

MMLU = "mmlu_flan_cot_fewshot"
LARGE = "anatomy"  # the one subject of several questions here


def task(count: int) -> SimpleNamespace:
    return SimpleNamespace(eval_docs=range(count))


def test_the_first_problems_of_a_group_take_from_each_part_its_share():
    order = in_order({"large": task(60), "middle": task(30), "small": task(10)})
    assert Counter(name for name, _ in order[:10]) == {"large": 6, "middle": 3, "small": 1}
    assert [number for name, number in order if name == "large"] == list(range(60))
    assert len(set(order)) == 100


def test_the_order_of_a_single_task_is_its_own():
    assert in_order({"one": task(7)}) == [("one", number) for number in range(7)]


def test_lm_evals_limit_of_a_group_is_told_with_the_number_of_problems():
    said = tell_limit("group", {"a": task(100), "b": task(3)}, 4)
    assert said is not None and "2 subtasks" in said and "7 problems in all" in said
    assert tell_limit("one", {"one": task(100)}, 4) is None
    assert tell_limit("group", {"a": task(100), "b": task(3)}, None) is None


@pytest.fixture
def data(tmp_path) -> Path:
    """Return a folder of MMLU with one question of each subject, but eight of one."""
    names = [path.stem.removeprefix("mmlu_") for path in (STOCK / STOCK_FOLDERS[-1]).glob("mmlu_*.yaml")]
    assert len(names) == 57
    records = [
        {"question": f"{name} {i}?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": name}
        for name in names
        for i in range(8 if name == LARGE else 1)
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    for kind in ("mmlu_test", "mmlu_dev"):
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


def test_a_sweep_limits_mmlu_as_a_whole_and_never_tests_what_it_chooses_on(data, tmp_path):
    grid = Grid((MMLU,), ({"sparsity": "coarse", "correct": False, "keep": {"choose": [0.5, 1.0]}},), 4, 3)
    with suite_folder(data) as folder:
        parts = load_parts(grid, task_manager(folder, grid.tasks), allowed=False)
    engine = Engine.load(str(FOLDER), dtype="float32", device="cpu")
    sweep = Sweep(grid, engine, parts, tmp_path / "out", "embedded")
    sweep.lm.max_gen_toks = 4
    assert sweep.plan() == f"problems tested: {MMLU} 4 of 64 from 1 of 57 subtasks"
    (tested,) = (json.loads(path.read_text()) for path in sweep.run())
    others = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").iterdir()]
    held = {each["id"] for other in others if other["split"] == "validation" for each in other["samples"]}
    assert [each["id"] for each in tested["samples"]] == [f"{MMLU}_{LARGE}:{number}" for number in range(4)]
    assert len(held) == 3 and f"{MMLU}_{LARGE}:4" not in {each["id"] for each in tested["samples"]}
    assert held.isdisjoint(each["id"] for each in tested["samples"])

"""Sweeps: a killed one goes on as if nothing had happened, several processes come to the results of one."""

import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import sweeping

from conftest import SHARED

PROCESSES = get_context("forkserver")  # which imports torch and lm-eval once for all processes
PROCESSES.set_forkserver_preload(["sirius.evaluation.sweep"])


def start(folder: Path, rank: int = 0, size: int = 1) -> BaseProcess:
    """Start the sweep as process `rank` of `size`."""
    process = PROCESSES.Process(target=sweeping.process, args=(folder, rank, size))
    process.start()
    return process


def end(process: BaseProcess) -> int | None:
    """Wait for a process and return its exit code."""
    process.join(timeout=300)
    return process.exitcode


def saved(folder: Path, rank: int | str = "*") -> int:
    """Return how many samples all processes, or one of them, have saved."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(f"completions/rank{rank}.jsonl"))


def kill_after(process: BaseProcess, folder: Path, samples: int, rank: int = 0) -> None:
    """Kill process `rank` as soon as it has saved so many samples."""
    while saved(folder, rank) < samples:
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.join()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    sweeping.run(folder)
    return folder


def test_a_sweep_saves_every_sample_and_chooses_on_items_that_it_does_not_test(undisturbed):
    found = sweeping.results(undisturbed).values()
    assert 0 <= sweeping.SAMPLES - saved(undisturbed) <= 3 * 2  # a chosen setting may be one that is tested anyway
    chosen = [each for each in found if each["choice"] and each["split"] == "test"]
    tried = [each for each in found if each["split"] == "validation"]
    assert (len(found), len(chosen), len(tried)) == (2 * 2 + 2 + 2 * 2, 2, 2 * 2)
    assert {sample["id"] for each in tried for sample in each["samples"]} == {3, 4}
    assert {sample["id"] for each in chosen for sample in each["samples"]} == {0, 1, 2}
    assert len({each["problems"] for each in found}) == 2 * 2  # of two tasks: those tested, and those to choose on
    for each in found:
        assert sum(sample["tokens"] for sample in each["samples"]) == each["stats"]["tokens"]
        assert sum(sample["accepted"] for sample in each["samples"]) == each["stats"]["accepted"]
    for each in chosen:
        mine = [other for other in tried if other["task"] == each["task"]]
        best = max(other["metrics"][other["metric"]]["value"] for other in mine)
        used = next(other for other in mine if other["setting"] == each["setting"])
        assert used["metrics"][used["metric"]]["value"] == best
    assert next(each for each in chosen if each["task"] == "demo_reasoning")["setting"]["keep"] == 0.9


def test_a_sweep_that_is_done_decodes_nothing_again(undisturbed):
    before = sweeping.results(undisturbed), saved(undisturbed)
    sweeping.run(undisturbed)
    assert (sweeping.results(undisturbed), saved(undisturbed)) == before


def test_a_sweep_killed_half_way_comes_to_the_results_of_an_undisturbed_one(undisturbed, tmp_path):
    kill_after(start(tmp_path), tmp_path, sweeping.SAMPLES // 2)
    before = saved(tmp_path)
    assert end(start(tmp_path)) == 0
    assert sweeping.results(tmp_path) == sweeping.results(undisturbed)
    assert saved(tmp_path) == saved(undisturbed) >= before  # what was saved was not decoded again


def test_three_processes_come_to_the_results_of_one_though_one_of_them_is_killed(undisturbed, tmp_path):
    last = start(tmp_path, 2, 3)
    while not (tmp_path / "completions" / "rank2.alive").exists():
        assert last.is_alive()
        time.sleep(0.01)
    others = [start(tmp_path, rank, 3) for rank in range(2)]
    kill_after(last, tmp_path, 3, rank=2)
    assert [end(each) for each in others] == [0, 0]
    assert sweeping.results(tmp_path) == sweeping.results(undisturbed)
    assert (
        saved(tmp_path, 0) < saved(undisturbed) <= saved(tmp_path)
    )  # what the killed one had saved was not decoded again


@pytest.mark.slow
def test_two_processes_share_the_work_and_come_to_the_results_of_one(undisturbed, tmp_path):
    both = [start(tmp_path, rank, 2) for rank in range(2)]
    assert [end(each) for each in both] == [0, 0]
    assert sweeping.results(tmp_path) == sweeping.results(undisturbed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("table9",), "there is no grid"),
        (("period", "--tasks", "gsm9k", "--dry-run"), "there is no task 'gsm9k'"),
        (("period", "--tasks", "gsm8k"), "cannot be loaded"),
        (("period", "--data", "{folder}"), "gsm8k needs"),
        (("period", "--data", "{folder}/none"), "is a folder"),
        (("period", "--limit", "0"), "limit is a whole number"),
        (("period", "--tasks", "demo_reasoning"), "give --chat"),
        (("table2", "--tasks", "humaneval", "--data", "{shared}"), "--confirm-run-unsafe-code"),
    ],
)
def test_what_cannot_be_swept_is_told_in_one_line_before_a_model_is_loaded(arguments, said, sirius_command, tmp_path):
    if "{shared}" in arguments and not (SHARED / "data").is_dir():
        pytest.skip("the evaluation data is not on this machine")
    given = [each.format(folder=tmp_path, shared=SHARED / "data") for each in arguments]
    code, _, err = sirius_command("sweep", *given, "--output", tmp_path / "out", "--model", "none")
    assert code == 2
    assert said in " ".join(err.split())
    assert "Traceback" not in err


def test_an_output_that_is_a_file_is_told_before_a_model_is_loaded(sirius_command, tmp_path):
    (tmp_path / "out").write_text("")
    given = ("table1", "--tasks", "demo_reasoning", "--chat", "--model", "none", "--output", tmp_path / "out")
    code, _, err = sirius_command("sweep", *given)
    assert code == 2
    assert "cannot write" in err and "none" not in err

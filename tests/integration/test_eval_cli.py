"""`sirius eval` and `sirius export` on the command line."""

import json

import pytest

from conftest import SHARED

pytest.importorskip("lm_eval")


def test_lm_evals_options_are_passed_through_and_our_figures_stored(sirius_command, tmp_path):
    own = ("--sparsity", "coarse", "--preset", "paper", "--tree-width", "1", "--dtype", "float32", "--threads", "1")
    theirs = ("--limit", "3", "--apply_chat_template", "--output_path", tmp_path, "--log_samples")
    code, printed, _ = sirius_command("eval", "--tasks", "demo_reasoning", *own, *theirs)
    assert code == 0
    assert "demo_reasoning" in printed and "exact_match" in printed
    (results,) = tmp_path.rglob("results_*.json")
    figures = json.loads(results.read_text())["config"]["sirius_tasks"]["demo_reasoning"]
    assert (figures["tree_width"], figures["keep"], figures["lossless"]) == (1, 0.4, False)
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    assert len(samples.read_text().splitlines()) == 3


def test_tasks_may_be_named_by_a_pattern(sirius_command):
    own = ("--sparsity", "none", "--dtype", "float32", "--threads", "1")
    code, printed, _ = sirius_command("eval", "--tasks", "demo_*", *own, "--limit", "1", "--apply_chat_template")
    assert code == 0
    assert "demo_reasoning" in printed and "demo_understanding" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tasks", "demo_reason"), "there is no task 'demo_reason'; close names are"),
        (("--tasks", "demo_reasoning", "--sparsity", "coarse", "--keep", "7"), "keep is the fraction"),
        (("--tasks", "demo_reasoning", "--sparsity", "none", "--keep", "0.3"), "--keep would change nothing"),
        (("--tasks", "demo_reasoning", "--limt", "3"), "unrecognized arguments: --limt"),
        (("--tasks", "demo_reasoning", "--model_args", "keep=1"), "--model_args would undo"),
        (("--tasks", "demo_reasoning", "-t", "gsm8k"), "-t would undo"),
        (("--tasks", "demo_reasoning", "--device", "cuda:0"), "device 'cuda:0' cannot be used here"),
        (("--tasks", "csqa_cot", "--num_fewshot", "300", "--data", "{shared}"), "5 worked examples; got 300"),
        (("--tasks", "demo_reasoning", "--log_samples"), "lm-eval refuses the options: Specify --output_path"),
        (("--tasks", "gsm8k", "--data", "nowhere"), "is a folder of local files"),
        (("--tasks", "demo_reasoning", "--sparsity", "finer"), "finer"),
        (("--tasks", "demo_reasoning"), "demo_reasoning: a conversation needs --apply_chat_template"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line_before_a_model_is_loaded(sirius_command, arguments, said):
    if "{shared}" in arguments and not (SHARED / "data").is_dir():
        pytest.skip("the evaluation data is not on this machine")
    given = [each.format(shared=SHARED / "data") for each in arguments]
    code, _, err = sirius_command("eval", *given, "--model", "a/folder/that/is/none")
    assert code == 2
    assert said in " ".join(err.split())
    assert "Traceback" not in err


def test_a_folder_is_exported_with_its_setting_and_lossy_ones_are_called_so(sirius_command, tmp_path):
    code, printed, _ = sirius_command("export", tmp_path, "--preset", "paper")
    assert code == 0
    assert "LOSSY" in printed
    assert "threshold" in (tmp_path / "custom_generate" / "generate.py").read_text()
    code, printed, _ = sirius_command("export", tmp_path, "--period", "4")
    assert code == 0
    assert "LOSSY" not in printed


def test_a_folder_of_samples_that_is_a_file_is_told_before_a_model_is_loaded(sirius_command, tmp_path):
    (tmp_path / "out").write_text("")
    code, _, err = sirius_command("eval", "--tasks", "demo_reasoning", "--completions", tmp_path / "out")
    assert code == 2
    assert "cannot write" in err

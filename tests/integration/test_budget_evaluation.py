"""Evaluation and traces of a model under a memory budget: the results are those of the model in memory."""

import json
import re

import pytest
import torch
from budgets import saved, streamed, unmeasured

pytest.importorskip("lm_eval")

from conftest import tiny_model
from sirius.core import SparsityConfig
from sirius.engine import Engine
from sirius.errors import ConfigError
from sirius.evaluation.fingerprint import fingerprint
from sirius.evaluation.grid import Grid
from sirius.evaluation.lm import SiriusLM
from sirius.evaluation.within import budget_for_settings, budget_for_tasks
from sirius.model.prepared import prepared_of

pytestmark = pytest.mark.integration

EXACT = "--dtype", "float32", "--threads", "1"
TASKS = ("gsm8k", "csqa_cot")  # which keep half, and 4 of 10 neurons
COARSE = {"sparsity": "coarse", "period": 4}


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch):
    unmeasured(monkeypatch)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_streamed_model_has_the_fingerprint_of_the_model_in_memory(family, dtype, tmp_path):
    engine = streamed(saved(tmp_path, family, dtype=dtype), draft=SparsityConfig("none"))
    assert any(each.is_meta for each in engine.model.parameters())
    before = fingerprint(engine.model)
    assert before == fingerprint(Engine.load(tmp_path).model)
    last = engine.model.get_output_embeddings().weight
    last.data[-1, -1] += 1
    assert fingerprint(engine.model) != before


def test_the_fingerprint_of_a_model_stays_what_earlier_folders_of_samples_say():
    assert [fingerprint(tiny_model(dtype=each)) for each in (torch.float32, torch.bfloat16)] == [
        "73441ea6fda6f34a",
        "e9c5e737c8d1f741",
    ]


def least(sirius_command, *arguments: object) -> int:
    """Return the bytes of the smallest budget that a command can work with."""
    code, _, err = sirius_command(*arguments, "--memory-budget", "1")
    assert code == 2
    found = re.search(r"give at least (\d+) bytes", " ".join(err.split()))
    assert found is not None and "Traceback" not in err
    return int(found[1])


def test_eval_takes_a_budget_and_shows_its_plan(sirius_command, tmp_path):
    asked = ("eval", "--tasks", "demo_reasoning", "--limit", "4", "--apply_chat_template", "--log_samples", *EXACT)
    asked = (*asked, "--sparsity", "coarse", "--period", "4")
    code, whole, _ = sirius_command(*asked, "--output_path", tmp_path / "whole")
    assert code == 0
    budget = ("--memory-budget", least(sirius_command, *asked, "--output_path", tmp_path))
    code, within, err = sirius_command(*asked, *budget, "--output_path", tmp_path / "within")
    assert code == 0
    assert "over the link" in err and "0 bytes a full pass" not in err
    responses = [
        [json.loads(line)["resps"] for line in path.read_text().splitlines()]
        for name in ("whole", "within")
        for path in (tmp_path / name).rglob("samples_*.jsonl")
    ]
    assert len(responses[0]) == 4 and responses[0] == responses[1]
    assert whole.splitlines()[-4:] == within.splitlines()[-4:]


@pytest.mark.slow
def test_a_sweep_takes_a_budget_and_goes_on_in_a_folder_that_it_began_without(sirius_command, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(json.dumps({"tasks": ["demo_reasoning"], "chat": True, "grids": [{"sparsity": "none"}, COARSE]}))
    asked = ("sweep", grid, *EXACT, "--batch-size", "2")
    code, *_ = sirius_command(*asked, "--limit", "1", "--output", tmp_path / "out")
    assert code == 0
    size = least(sirius_command, *asked, "--limit", "2", "--output", tmp_path / "out")
    for folder in ("out", "anew"):
        given = ("--limit", "2", "--output", tmp_path / folder, "--memory-budget", size)
        code, printed, err = sirius_command(*asked, *given)
        assert (code, "2 results" in printed, "over the link" in err) == (0, True, True)
    lines = [(tmp_path / each / "completions" / "rank0.jsonl").read_text().splitlines() for each in ("out", "anew")]
    assert len(lines[0]) == len(lines[1]) == 4
    texts = [{each["key"]: each["text"] for each in map(json.loads, found)} for found in lines]
    assert texts[0] == texts[1]


def test_a_trace_takes_a_budget(sirius_command):
    asked = ("trace", "Tina has 30 coins.", "--json", "--max-new-tokens", "8", *EXACT, "--sparsity", "none")
    code, whole, _ = sirius_command(*asked)
    assert code == 0
    code, within, err = sirius_command(*asked, "--memory-budget", least(sirius_command, *asked))
    assert code == 0 and "over the link" in err
    texts = [[json.loads(each)[name] for name in ("text", "kept", "parameters")] for each in (whole, within)]
    assert texts[0] == texts[1]


def test_a_file_of_prompts_is_decoded_side_by_side_within_a_budget(sirius_command, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(f'{{"prompt": "{n} + {n} ="}}\n' for n in range(12)))
    asked = ("generate", "--input", tmp_path / "in.jsonl", "--json", "--max-new-tokens", "6", *EXACT)
    code, whole, _ = sirius_command(*asked)
    assert code == 0
    code, within, err = sirius_command(*asked, "--memory-budget", least(sirius_command, *asked))
    assert code == 0 and "over the link" in err
    texts = [{each["id"]: each["text"] for each in map(json.loads, found.splitlines())} for found in (whole, within)]
    assert len(texts[0]) == 12 and texts[0] == texts[1]


def test_log_probabilities_are_those_of_the_model_in_memory():
    options = {"device": "cpu", "dtype": "float32", "quiet": True, "sparsity": "none"}
    with pytest.raises(ConfigError, match="too small") as error:
        SiriusLM(memory_budget=1, **options)
    least = re.search(r"at least (\d+)", str(error.value))
    assert least is not None
    within = SiriusLM(memory_budget=least[1], **options)
    assert prepared_of(within.engine.model).plan
    pairs = [(("", ""), [5, 6, 7], [8, 9]), (("", ""), [5, 6, 7], [8, 10]), (("", ""), [11] * 20, [12])]
    assert within._loglikelihood_tokens(pairs) == SiriusLM(**options)._loglikelihood_tokens(pairs)


@pytest.mark.parametrize(
    ("grids", "draft"),
    [
        ([{"sparsity": "none"}], SparsityConfig("none")),
        ([{"sparsity": "none"}, {"accept": "lossless"}], None),
        ([{"draft_bits": 4, "period": 8}], SparsityConfig("none", draft_bits=4)),
        ([{"draft_bits": 8, "period": [4, 8]}, {"sparsity": "none"}], SparsityConfig("none", draft_bits=8)),
        ([{**COARSE, "keep": [0.3, 0.6]}, {"sparsity": "none"}], SparsityConfig("coarse", 0.6)),
        ([{"sparsity": "coarse", "preset": "paper"}], SparsityConfig("coarse", 0.5)),
        ([{**COARSE, "keep": {"choose": [0.2, 0.7]}}], SparsityConfig("coarse", 0.7)),
    ],
)
def test_a_sweep_is_planned_for_the_one_draft_of_its_settings(grids, draft):
    grid = Grid(TASKS, tuple(grids), limit=2, validation=2)
    budget = budget_for_settings("8GiB", grid.settings(), rows=3)
    assert (budget.size, budget.draft, budget.rows) == ("8GiB", draft, 3)


@pytest.mark.parametrize(
    "grids",
    [
        [{**COARSE, "sparsity": ["coarse", "fine"]}],
        [COARSE, {"draft_bits": 4, "period": 8}],
        [COARSE, {"accept": "lossless"}],
        [{"draft_bits": [4, 8], "period": 8}],
    ],
)
def test_a_sweep_whose_settings_need_different_drafts_is_refused_by_name(grids):
    with pytest.raises(ConfigError, match=r"planned for one draft, .* need 2 different ones \(.*; .*\); run them as"):
        budget_for_settings("8GiB", Grid(TASKS, tuple(grids)).settings(), rows=8)


def test_a_sweep_that_needs_several_drafts_is_refused_before_a_model_is_loaded(sirius_command, tmp_path):
    options = ("--tasks", "demo_reasoning", "--chat", "--output", tmp_path, "--memory-budget", "8GiB")
    code, _, err = sirius_command("sweep", "table1", *options, "--model", "a/folder/that/is/none")
    assert code == 2
    assert "one draft, and these settings need 2 different ones (coarse 0.5; fine 0.5)" in " ".join(err.split())


def test_a_task_s_budget_is_planned_for_the_draft_that_options_name():
    assert budget_for_tasks(5, {}, 8).draft is None
    assert budget_for_tasks(5, {"sparsity": "none"}, 8).draft == SparsityConfig("none")
    assert budget_for_tasks(5, {"draft_bits": 4}, 8).draft == SparsityConfig("none", draft_bits=4)
    paper = budget_for_tasks("50%", {"preset": "paper"}, 8)
    assert (paper.draft, paper.window, paper.rows) == (SparsityConfig("coarse", 0.5), 8 * 15, 8)

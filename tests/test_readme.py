"""Documents cannot rot: their Python runs, and the commands that they show are there."""

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import greedy, tiny_model
from sirius import Engine, prepare, sparsity
from sirius.cli import app
from sirius.decoding import accept
from sirius.sparsity import base

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
PROMPT = [5, 17, 3, 42, 8]


def blocks(document: str, language: str) -> str:
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL))


def test_the_readmes_python_runs(capsys):
    exec(compile(blocks("README.md", "python"), "README.md", "exec"), {})
    assert "The answer is" in capsys.readouterr().out


def test_the_method_of_the_guide_runs(monkeypatch):
    from sirius.demo.embedded import FOLDER

    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))
    monkeypatch.setattr(accept, "_RULES", dict(accept._RULES))
    exec(compile(blocks("docs/adding-a-method.md", "python"), "adding-a-method.md", "exec"), {"__name__": "guide"})
    assert "mean-magnitude" in sparsity.known()
    done = Engine.load(str(FOLDER)).generate([1, 2, 30, 3], max_new_tokens=20, sparsity="mean-magnitude")
    assert 0 < done.stats.density < 1


def test_the_kind_of_weights_of_the_guide_runs_and_counts_the_bytes_that_a_text_reads():
    """Its count is that of the figures: every row of every layer in full passes, half of the MLPs' rows in drafts."""
    guide: dict[str, Any] = {}
    exec(compile(blocks("docs/adding-a-matrix.md", "python"), "adding-a-matrix.md", "exec"), guide)
    model = tiny_model(eos_token_id=None, intermediate_size=44)
    want, per_token = greedy(model, PROMPT, 30), {}
    prepare(model, matrix=guide["counting"])
    engine = Engine(model)
    for correction in 1, None, 4:
        guide["Counting"].read = 0
        done = engine.generate(PROMPT, max_new_tokens=30, sparsity="coarse", correction=correction)
        assert correction is None or list(done.token_ids) == want
        per_token[correction] = guide["Counting"].read, done.stats
    weights = sum(each.nbytes for name, each in model.named_parameters() if each.ndim == 2 and "embed" not in name)
    assert per_token[1][0] == 30 * weights
    read, stats = per_token[None]
    assert read == weights + 29 * (weights - 2 * 3 * 22 * 36 * 4)
    read, stats = per_token[4]
    assert read == weights * (1 + stats.rounds) + stats.drafted * (weights - 2 * 3 * 22 * 36 * 4)


def test_every_option_that_the_readme_names_exists():
    named = set(re.findall(r"(--[a-z][a-z_-]*)", (ROOT / "README.md").read_text()))
    shown = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).output
    for command in ([], ["demo"], ["eval"], ["sweep"], ["report"], ["trace"], ["bench", "decode"]):
        shown += CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"}).output
    assert named and not {option for option in named if option not in shown}


def test_every_file_that_a_document_links_to_exists():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        prose = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)  # a lambda of C++ looks like a link
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            assert target.startswith("http") or (document.parent / target).exists(), f"{document.name}: {target}"

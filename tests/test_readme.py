"""Documents cannot rot: their Python runs, and the commands that they show are there."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sirius import sparsity
from sirius.cli import app
from sirius.sparsity import base

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]


def blocks(document: str, language: str) -> str:
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL))


def test_the_readmes_python_runs(capsys):
    exec(compile(blocks("README.md", "python"), "README.md", "exec"), {})
    assert "The answer is" in capsys.readouterr().out


def test_the_method_of_the_guide_runs(monkeypatch):
    from sirius.demo.embedded import FOLDER
    from sirius.engine import Engine

    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))
    exec(compile(blocks("docs/adding-a-method.md", "python"), "adding-a-method.md", "exec"), {"__name__": "guide"})
    assert "mean-magnitude" in sparsity.known()
    done = Engine.load(str(FOLDER)).generate([1, 2, 30, 3], max_new_tokens=20, sparsity="mean-magnitude")
    assert 0 < done.stats.density < 1


def test_every_option_that_the_readme_names_exists():
    named = set(re.findall(r"(--[a-z][a-z-]*)", (ROOT / "README.md").read_text()))
    shown = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).output
    for command in ([], ["demo"], ["bench", "decode"]):
        shown += CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"}).output
    assert named and not {option for option in named if option not in shown}


def test_every_file_that_a_document_links_to_exists():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        prose = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)  # a lambda of C++ looks like a link
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            assert target.startswith("http") or (document.parent / target).exists(), f"{document.name}: {target}"

"""`sirius report`: from folders of results to Markdown and a page, or one line that says what is wrong."""

import json
import subprocess
import sys
from functools import partial

import pytest

from made_cells import oracle, record, studies, write

pytestmark = pytest.mark.integration


@pytest.fixture
def report(sirius_command):
    """Run `sirius report` with these arguments."""
    return partial(sirius_command, "report")


def test_markdown_is_printed_where_no_file_is_asked_for(report, tmp_path):
    code, out, err = report(write(tmp_path, *studies()))
    assert (code, err) == (0, "")
    assert out.startswith("# Results of Sirius sweeps\n\n")
    assert out.endswith(".\n")
    assert "## meta/tiny-llama" in out


def test_files_are_written_and_hold_the_same(report, tmp_path):
    folder, page, text = write(tmp_path / "a", *studies()), tmp_path / "r.html", tmp_path / "r.md"
    _, printed, _ = report(folder)
    code, out, err = report(folder, "--output", page, "--markdown", text)
    assert (code, out) == (0, "")
    assert str(page) in err and str(text) in err
    assert text.read_text() == printed
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_sweeps_of_several_folders_are_one_report(report, tmp_path):
    first = write(tmp_path / "a", record(), record(sparsity="coarse", preset="paper", period=4))
    second = write(tmp_path / "b", record(sparsity="coarse", preset="paper", period=8))
    _, alone, _ = report(first)
    _, both, _ = report(first, second)
    assert "### Period K" not in alone
    assert "### Period K" in both


def test_a_page_without_matplotlib_is_refused_by_name_and_markdown_is_not(report, tmp_path, monkeypatch):
    folder = write(tmp_path / "a", record(), *(oracle("coarse", bar) for bar in (0.1, 0.5)))
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = report(folder, "--output", tmp_path / "r.html")
    assert code == 2
    assert "matplotlib" in err and "pip install 'sirius-llm[plot]'" in err
    assert not (tmp_path / "r.html").exists()
    assert report(folder)[0] == 0


def test_neither_torch_nor_transformers_is_loaded(tmp_path):
    folder = write(tmp_path / "a", *studies())
    program = (
        "import sys; from sirius.cli import main; "
        f"sys.argv = ['sirius', 'report', {str(folder)!r}, '--output', {str(tmp_path / 'r.html')!r}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'lm_eval', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "r.html").exists()


def test_folders_without_results_say_how_to_get_some(report, tmp_path):
    code, _, err = report(tmp_path)
    assert code == 2 and "sirius sweep" in err and str(tmp_path) in err
    code, _, err = report(tmp_path / "nowhere")
    assert code == 2 and "there is no folder" in err


def test_validation_alone_is_no_result(report, tmp_path):
    code, _, err = report(write(tmp_path, record(split="validation")))
    assert code == 2 and "validation" in err


BROKEN = {
    "no JSON": (lambda made: "{", "Expecting"),
    "no object": (lambda made: "[]", "no JSON object"),
    "no task": (lambda made: json.dumps({k: v for k, v in made.items() if k != "task"}), "task is missing"),
    "no items": (lambda made: json.dumps({**made, "samples": []}), "samples is empty"),
    "an item without its score": (
        lambda made: json.dumps({**made, "samples": [{"id": 0, "scores": {}}]}),
        "exact_match,strict-match is missing",
    ),
    "a text for a number": (
        lambda made: json.dumps({**made, "stats": {**made["stats"], "density": "half"}}),
        "density is 'half'",
    ),
    "no number": (lambda made: json.dumps({**made, "chance": float("nan")}), "chance is nan"),
    "a number for truth": (lambda made: json.dumps({**made, "lossless": 1}), "lossless is 1"),
    "no counts": (
        lambda made: json.dumps({**made, "stats": {**made["stats"], "acceptance_histogram": [1, -1]}}),
        "acceptance_histogram",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_in_one_line(report, tmp_path, case):
    folder = write(tmp_path, record())
    [path] = (folder / "cells").iterdir()
    spoil, said = BROKEN[case]
    path.write_text(spoil(record()))
    code, _, err = report(folder)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert str(path) in err and said in err


@pytest.mark.parametrize(
    ("option", "name"), [("--output", "r.md"), ("--markdown", "r.html"), ("--output", "nowhere/r.html")]
)
def test_files_of_another_kind_or_place_are_refused_before_anything_is_read(report, tmp_path, option, name):
    code, _, err = report(tmp_path / "unread", option, tmp_path / name)
    assert code == 2
    assert option in err

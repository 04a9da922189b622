"""Acceptance on real questions, measured on the embedded model: what an interrupted run leaves in the record."""

import gzip
import json

import acceptance
import pytest
from record import append

from sirius.demo.embedded import FOLDER

pytestmark = pytest.mark.integration

LESS = ["--tokens", "8", "--draft", "int4", "int8+coarse", "--period", "4"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    with gzip.open(tmp_path / "gsm8k_test.jsonl.gz", "wt") as file:
        for count in (2, 3, 4):
            file.write(json.dumps({"question": f"Tom has {count} apples. How many apples does Tom have?"}) + "\n")
    record = tmp_path / "real.jsonl"
    asked = ["acceptance.py", str(FOLDER), "--task", "gsm8k", "--data", str(tmp_path), "--output", str(record), *LESS]

    def measured(*options: str) -> list[dict]:
        monkeypatch.setattr("sys.argv", [*asked, *options])
        try:
            acceptance.main()
        finally:
            lines = [json.loads(line) for line in record.read_text().splitlines()]
        return lines

    return measured


def test_a_model_is_one_line_of_the_record_with_a_row_for_each_setting(run):
    [line] = run("--prompts", "3", "--theirs")
    assert line["prompts"] == 3 and [row["texts"] for row in line["rows"]] == [3] * 5
    assert [row.get("draft_bits") for row in line["rows"]] == [0, 4, 8, None, None]
    assert all(row["lossless"] for row in line["rows"][:3])
    assert len(run("--prompts", "1")) == 2


def test_a_run_that_is_cut_off_keeps_the_questions_that_it_finished(run, tmp_path, monkeypatch, capsys):
    append(tmp_path / "real.jsonl", {"model": "another"}, [])
    generate, calls = acceptance.Engine.generate, []

    def cut_off(*args, **options):
        calls.append(args)
        if len(calls) > 3 + 3 * 2 + 1:  # a warm-up, two questions, and a setting of the third
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(acceptance.Engine, "generate", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run("--prompts", "3")
    another, line = [json.loads(text) for text in (tmp_path / "real.jsonl").read_text().splitlines()]
    assert another["model"] == "another" and [row["texts"] for row in line["rows"]] == [2] * 3
    assert str(line["rows"][0]["tokens_per_second"]) in capsys.readouterr().out

"""`sirius generate` under a memory budget: its texts, its plan, and its line where a disk fails."""

import errno
import os
import re
from pathlib import Path

import pytest
from streaming import (  # noqa: F401 - fixtures
    NEW,
    failing,
    folder,
    known_speed,
    shards,
)

from sirius.offload.ring import ThreadMover

pytestmark = pytest.mark.integration


@pytest.fixture
def spoken(folder, tmp_path, tokenizer) -> Path:
    """A copy of the checkpoint with a tokenizer."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


ASKED = ("--max-new-tokens", NEW, "--period", 4, "abc")


@pytest.fixture
def budgeted(sirius_command, spoken, known_speed):
    """Run `sirius generate` on the tiny model; gives the exit code and what was printed, out and err."""

    def run(*arguments: object, budget: object = "6MB") -> tuple[int, str, str]:
        return sirius_command("generate", "--model", spoken, "--memory-budget", budget, *arguments)

    return run


def one_line(printed: tuple[int, str, str]) -> str:
    code, _, err = printed
    lines = [line for line in err.splitlines() if "; in memory of 3 blocks: " not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("draft", ["unsaid", "coarse"])
def test_the_command_writes_what_it_writes_without_a_budget(budgeted, spoken, sirius_command, draft):
    asked = (*(("--sparsity", draft, "--period", 4) if draft == "coarse" else ()), "--max-new-tokens", NEW, "abc")
    code, text, _ = sirius_command("generate", "--model", spoken, *asked)
    assert code == 0 and budgeted(*asked)[:2] == (0, text)
    least = re.search(r"give at least (\d+) bytes", one_line(budgeted(*asked, budget=1000)))[1]
    assert budgeted(*asked, budget=least)[:2] == (0, text)


def test_the_command_names_a_truncated_and_a_missing_file(budgeted, spoken):
    last = shards(spoken)[-1]
    os.truncate(last, last.stat().st_size - 7)
    assert f"{last} is cut off: it has" in one_line(budgeted(*ASKED))
    last.unlink()
    assert f"lacks 1 of {len(shards(spoken)) + 1} files of weights, first {last.name}" in one_line(budgeted(*ASKED))


def test_the_command_plans_a_draft_of_the_period_that_it_is_given(budgeted):
    least = one_line(budgeted("--period", 4, "--max-new-tokens", NEW, "abc", budget=1000))
    budget = re.search(r"give at least (\d+) bytes", least)[1]
    code, text, err = budgeted("--period", 4, "--max-new-tokens", NEW, "abc", budget=budget)
    assert code == 0 and text and "(a window of 4 taken to bring " in err


def test_the_command_plans_the_default_draft_where_it_decodes_alone(budgeted, spoken, sirius_command):
    asked = ("--no-correct", "--max-new-tokens", NEW, "abc")
    least = re.search(r"give at least (\d+) bytes", one_line(budgeted(*asked, budget=1000)))[1]
    inside = sirius_command("generate", "--model", spoken, *asked, "--draft-bits", 4)  # the bits that are planned for
    assert inside[0] == 0 and budgeted(*asked, budget=least)[:2] == inside[:2]


TIGHT = ("--sparsity", "none", "--max-new-tokens", NEW)


@pytest.fixture
def least(budgeted) -> str:
    """The smallest budget of plain decoding, with which every pass reads files."""
    return re.search(r"give at least (\d+) bytes", one_line(budgeted(*TIGHT, "abc", budget=9)))[1]


@pytest.fixture
def late(monkeypatch):
    """Let a call of the system fail in one round of decoding."""

    def arrange(number: int, call: tuple[object, str], error: BaseException) -> None:
        from sirius import batch

        done, rounds = batch.next_round, [0]

        def fail(*_):
            raise error

        def counted(*arguments):
            rounds[0] += 1
            with pytest.MonkeyPatch.context() as broken:
                if rounds[0] == number:
                    broken.setattr(*call, fail)
                return done(*arguments)

        monkeypatch.setattr(batch, "next_round", counted)

    return arrange


READING, BROKEN = (os, "preadv"), OSError(errno.EIO, "Input/output error")


def test_the_command_has_printed_what_was_written_before_a_read_error(budgeted, least, late):
    whole = budgeted(*TIGHT, "abc", budget=least)[1].strip("\n")
    late(5, READING, BROKEN)
    printed = budgeted(*TIGHT, "abc", budget=least)
    assert re.search(r"cannot read .*safetensors at byte \d+: Input/output error", one_line(printed))
    assert printed[1].endswith("\n"), "the error has a line of its own"
    text = printed[1].strip("\n")
    assert whole.startswith(text) and 4 <= len(text) < len(whole)


def test_the_command_goes_on_with_other_lines_and_takes_up_those_that_failed(budgeted, least, late, tmp_path):
    jobs, output = tmp_path / "jobs.jsonl", tmp_path / "done.jsonl"
    jobs.write_text("".join(f'{{"id": "{name}", "prompt": "{name}"}}\n' for name in ("ab", "cd", "ef")))
    asked = ("--input", jobs, "--output", output, "--batch-size", 1, *TIGHT)

    def told(printed: tuple[int, str, str]) -> list[str]:
        return [line for line in printed[2].splitlines() if line.startswith("error: ")]

    late(14, READING, BROKEN)  # of the second line
    code, _, _ = printed = budgeted(*asked, budget=least)
    failed, count = told(printed)
    assert code == 2 and failed.startswith(f"error: {jobs} line 2: cannot read ")
    assert count == f"error: 1 of 3 lines of {jobs} could not be decoded"
    assert [line.split('"')[3] for line in output.read_text().splitlines()] == ["ab", "ef"]
    assert budgeted(*asked, budget=least)[0] == 0
    assert [line.split('"')[3] for line in output.read_text().splitlines()] == ["ab", "ef", "cd"]


def test_the_command_ends_at_ctrl_c(budgeted, least, late):
    late(4, (ThreadMover, "wait"), KeyboardInterrupt())
    code, text, err = budgeted(*TIGHT, "abc", budget=least)
    assert code == 130 and len(text) >= 3 and "interrupted" in err and "Traceback" not in err


@pytest.mark.parametrize("draft", [("--draft-bits", 4), ("--sparsity", "coarse")], ids=["4 bits", "coarse"])
def test_the_command_names_the_folder_of_a_full_disk(budgeted, draft, monkeypatch):
    asked = (*draft, *ASKED)
    least = int(re.search(r"give at least (\d+) bytes", one_line(budgeted(*asked, budget=9)))[1])
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    assert "No space left on device; set TMPDIR to a folder with more room" in one_line(budgeted(*asked, budget=least))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--memory-budget", "lots", "abc"), "a memory budget is a number of bytes above 0, such as 8GiB"),
        (("--sparsity", "fine", "abc"), "a model that is streamed cannot be drafted with fine"),
        (("--max-context", 0, "abc"), "max_context counts tokens"),
        (("--compile", "abc"), "leave compile out"),
    ],
    ids=["lots", "fine", "context", "compile"],
)
def test_the_command_refuses_in_one_line(budgeted, arguments, words):
    assert words in one_line(budgeted(*arguments))

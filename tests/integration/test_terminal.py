"""The command in a terminal as users have it: narrow, in another encoding, or one that cannot be written."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from letters import make_tokenizer
from rich.console import Console

from conftest import tiny_model
from sirius import __version__, cli
from sirius.benchmark import show as bench_show
from sirius.benchmark.ceiling import Ceiling
from sirius.benchmark.decode import DecodeFigures
from sirius.cli import terminal
from sirius.cli.streams import guarded
from sirius.demo import show
from sirius.demo.showcase import DemoFigures

pytestmark = pytest.mark.integration

SIRIUS = (sys.executable, "-m", "sirius")
SHORT = ("abc", "--max-new-tokens", "30")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random model whose tokens are letters, many of them not of ASCII."""
    path = tmp_path_factory.mktemp("model")
    tiny_model(eos_token_id=None).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def generate_on(monkeypatch, folder):
    """Run `sirius generate` with a standard output; gives the exit code."""

    def run(stdout: io.TextIOWrapper, *arguments: object) -> int:
        monkeypatch.setattr("sys.stdout", stdout)
        monkeypatch.setattr("sys.argv", ["sirius", "generate", "--model", folder, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    return run


@pytest.fixture
def printed(generate_on):
    """Run `sirius generate` on a standard output of some encoding; gives the exit code and the bytes."""

    def run(encoding: str, *arguments: object) -> tuple[int, bytes]:
        raw = io.BytesIO()
        return generate_on(io.TextIOWrapper(raw, encoding=encoding, newline="\n"), *arguments), raw.getvalue()

    return run


# --- encodings


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_character_that_a_terminal_has_not_is_replaced_and_the_others_are_shown(printed, encoding):
    code, whole = printed("utf-8", *SHORT)
    text = whole.decode()
    assert not text.isascii(), "the case tells nothing"
    assert code == 0 and printed(encoding, *SHORT) == (code, text.encode(encoding, "replace"))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_json_loses_no_character_in_any_encoding(printed, encoding, tmp_path):
    jobs = tmp_path / "in.jsonl"
    jobs.write_text('{"prompt": "abc"}\n{"id": "ü🌲", "prompt": "abd"}\n', encoding="utf-8")
    _, whole = printed("utf-8", "--input", jobs, *SHORT[1:], "--json")
    code, raw = printed(encoding, "--input", jobs, *SHORT[1:], "--json")
    assert code == 0 and raw.isascii()
    texts = [{record["id"]: record["text"] for record in map(json.loads, each.splitlines())} for each in (whole, raw)]
    assert texts[0] == texts[1] and "ü🌲" in texts[0] and not "".join(texts[0].values()).isascii()


def test_an_output_file_is_utf_8_whatever_the_terminal_is(printed, tmp_path):
    jobs, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    jobs.write_text('{"prompt": "abc"}\n')
    assert printed("ascii", "--input", jobs, "--output", out, *SHORT[1:]) == (0, b"")
    assert not json.loads(out.read_text(encoding="utf-8"))["text"].isascii()


def test_the_line_beside_a_text_has_signs_that_the_terminal_has(printed, capsys, monkeypatch):
    stderr = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr("sys.stderr", stderr)
    printed("utf-8", *SHORT)
    stderr.flush()
    assert b"tok/s - " in stderr.buffer.getvalue()  # type: ignore[attr-defined]


# --- standard input and threads


def test_a_prompt_may_come_from_standard_input(printed, monkeypatch):
    _, want = printed("utf-8", *SHORT)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abc\n")))
    assert printed("utf-8", "-", *SHORT[1:]) == (0, want)


def test_lines_may_come_from_standard_input_and_go_to_a_device(printed, monkeypatch, capsys):
    lines = b'{"prompt": "abc"}\n{"prompt": 5}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    code, _ = printed("utf-8", "--input", "-", "--output", os.devnull, *SHORT[1:])
    told = capsys.readouterr().err
    assert code == 2
    assert "error: standard input line 2: prompt must be" in told and "1 of 2 lines of standard input" in told


def test_a_prompt_of_spaces_is_decoded_where_it_has_tokens(printed):
    code, raw = printed("utf-8", "  ", *SHORT[1:], "--json")
    assert code == 0 and json.loads(raw)["usage"]["prompt_tokens"] == 2


def test_threads_are_torchs(printed):
    before = torch.get_num_threads()
    try:
        assert printed("utf-8", *SHORT, "--threads", "2")[0] == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- an output that fails


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SIRIUS, *arguments], stderr=subprocess.PIPE, text=True, check=False, **options)


FAILING = [("-h",), ("generate", "--help"), ("--version",)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", FAILING, ids=" ".join)
def test_a_full_output_is_one_line_and_no_success(arguments):
    with open("/dev/full", "w") as full:
        done = run(*arguments, stdout=full)
    assert done.returncode == 2
    assert done.stderr == "error: cannot write to standard output: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize("arguments", FAILING, ids=" ".join)
def test_a_closed_output_is_one_line_and_no_success(arguments):
    shell = ["sh", "-c", '"$@" >&-', "sh", *SIRIUS, *arguments]
    done = subprocess.run(shell, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: cannot write to standard output: Bad file descriptor\n"


@pytest.mark.skipif(os.name != "posix", reason="needs pipes that break")
@pytest.mark.parametrize("arguments", FAILING, ids=" ".join)
def test_a_pipe_that_no_one_reads_ends_the_command_quietly(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = run(*arguments, stdout=writing)
    os.close(writing)
    assert done.returncode in (1, 141)
    assert done.stderr == ""


class Failing(io.FileIO):
    """A device that fails at each write."""

    error = OSError(28, "No space left on device")

    def write(self, data: object, /) -> int:
        raise self.error


class Unread(Failing):
    """A pipe that no one reads."""

    error = BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize(
    ("kind", "codes", "said"),
    [
        (Failing, {2}, "error: cannot write to standard output: No space left on device\n"),
        (Unread, {1, 141}, ""),
    ],
)
def test_a_text_that_cannot_be_written_ends_there(generate_on, capsys, tmp_path, kind, codes, said):
    stdout = io.TextIOWrapper(io.BufferedWriter(kind(tmp_path / "spare", "w")), encoding="utf-8")
    assert generate_on(stdout, *SHORT) in codes
    assert capsys.readouterr().err == said


# --- help


def test_the_short_forms_and_the_module_are_the_command():
    assert run("-V", stdout=subprocess.PIPE).stdout == f"sirius {__version__}\n"
    for arguments in (["-h"], ["generate", "-h"], ["demo", "-h"], ["eval", "-h"], ["bench", "decode", "-h"]):
        shown = run(*arguments, stdout=subprocess.PIPE).stdout
        assert shown.startswith(f"Usage: {' '.join(['sirius', *arguments[:-1]])} ") and "-h, --help" in shown


def test_completion_for_shells_is_there_and_shown_by_the_root_alone():
    assert "--install-completion" in run("--help", stdout=subprocess.PIPE).stdout
    assert "--install-completion" not in run("generate", "--help", stdout=subprocess.PIPE).stdout
    answer = {"_SIRIUS_COMPLETE": "complete_bash", "COMP_WORDS": "sirius gen", "COMP_CWORD": "1"}
    done = run(stdout=subprocess.PIPE, env={**os.environ, **answer})
    assert done.stdout.split() == ["generate"]


# --- narrow ones


def shown(renderable: object, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize("width", [30, 40, 60, 75, 80, 120])
def test_tables_are_whole_at_any_width(width):
    row = DemoFigures("coarse + correction", 0.4, "reasoning", 40, 0.995, 0.01, 13.78, 0.548, 0.621, 163, False)
    text = shown(show.table([row, replace(row, task="understanding")]), width)
    assert all(part in text for part in ("coarse + correction", "0.995 ± 0.010", "13.78", "effective", "lossy"))
    timed = DecodeFigures("coarse 0.5, tree 4", 12.67, 1, 1, 9, 12.3, 12.34, 12.34, 12.34, 12 * 10**9, 0.8, 0.1, 0.1)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text + shown(
        bench_show.decoding([timed], Ceiling(10, 10), "AAL 3, given"), width
    )


@pytest.mark.parametrize("width", [40, 80])
def test_a_progress_bar_names_what_it_counts_and_how_far_it_is(monkeypatch, width):
    file = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(width=width, file=file))
    with terminal.progress("training", 8000) as advance:
        advance(to=1234, now="training, loss 1.234")
    assert "training, loss 1.234" in file.getvalue() and "1234/8000" in file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in file.getvalue()


def test_a_long_name_of_a_line_is_shown_whole(printed, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    jobs, name = tmp_path / "in.jsonl", "a name that is longer than the terminal is wide"
    jobs.write_text(json.dumps({"id": name, "prompt": "abc"}))
    code, raw = printed("utf-8", "--input", jobs, *SHORT[1:])
    assert code == 0 and name in raw.decode()


def test_other_streams_are_left_as_they_were(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    with guarded():
        sys.stdout.write("ü")
    assert sys.stdout is stdout and stdout.errors == "strict"
    assert stdout.buffer.getvalue() == b"?"  # type: ignore[attr-defined]

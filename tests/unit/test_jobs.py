"""Files of jobs: every line is a job or a reason, and a cut-off output is gone on with where it stopped."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sirius.core import CorrectionConfig, Round, SamplingConfig
from sirius.errors import FileError
from sirius.jobs import STDIN, BadLine, Job, Output, read_jobs, to_line
from sirius.stats import DENSE, Basis, Parameters, summarise
from sirius.texts import Completion

SETTINGS = {"model": "here", "stop": ["\n"], "sparsity": {"method": "coarse", "keep": 0.5}}
BREAKS = "\u2028 \u2029 \x85 \x0b \x0c \x1c"  # `str.splitlines` breaks a line at each of them
STATS = summarise(
    [Round((5,)), Round((6, 7), ("draft", "bonus"), draft=(6,), accepted=1, steps=1, period=2)],
    Basis(Parameters(9, 9, 1, 1, 1, 1), DENSE, CorrectionConfig(2), False),
    0.5,
)
DONE = Completion("two\nlines", (5, 6, 7), "length", ("full", "draft", "bonus"), (-0.5, -0.25, -1.0), STATS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.jsonl"


def jobs_of(path: Path, *lines: object) -> list[Job | BadLine]:
    """Write lines (objects as JSON, text as it is) and read them as jobs."""
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return list(read_jobs(path))


def write(path: Path, *jobs: Job) -> None:
    output = Output(path, SETTINGS)
    for job in jobs:
        output.write(job, replace(DONE, text=f"done {job.prompt}"), 2)
    output.close()


def resume(path: Path, **changes: object) -> set[str | int]:
    output = Output(path, {**SETTINGS, **changes})
    output.close()
    return set(output.done)


def test_a_line_is_a_text_a_chat_or_token_ids(path):
    chat = [{"role": "user", "content": "hi"}]
    lines = (
        {"prompt": "hi"},
        {"id": "b", "prompt": chat},
        {"id": 7, "prompt_ids": [1, 2]},
        {"messages": chat, "id": None},
    )
    assert jobs_of(path, *lines) == [Job(1, 1, "hi"), Job(2, "b", chat), Job(3, 7, [1, 2]), Job(4, 4, chat)]


def test_blank_lines_are_passed_over_and_counted(path):
    assert jobs_of(path, "", {"prompt": "a"}, "  ", {"prompt": "b"}, "") == [Job(2, 2, "a"), Job(4, 4, "b")]


def test_line_ends_and_byte_order_mark_of_windows_are_read(path):
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert list(read_jobs(path)) == [Job(1, 1, "a"), Job(2, 2, "b")]


@pytest.mark.parametrize("ascii_only", [True, False])
def test_unicode_line_breaks_inside_a_string_break_no_line(path, ascii_only):
    line = json.dumps({"prompt": BREAKS, "id": BREAKS}, ensure_ascii=ascii_only)
    assert jobs_of(path, line, {"prompt": "next"}) == [Job(1, BREAKS, BREAKS), Job(2, 2, "next")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
        ("9" * 5000, "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a"]', 'not an object: ["a"]'),
        ({"id": 1}, "give one of prompt, messages, prompt_ids; got none"),
        ({"prompt": "a", "prompt_ids": [1]}, "got prompt and prompt_ids"),
        ({"messages": "a"}, 'messages must be a list of {"role": ..., "content": ...}'),
        ({"messages": []}, "at least one"),
        (
            {"prompt": "a", "answer": 5, "n": 1},
            "unknown answer, n; a line may have id, prompt, messages, prompt_ids, max_",
        ),
        (
            {"prompt": "a", "accept": "x", "tree_width": 2},
            "option of the whole command, not of a line: --accept, --tree-",
        ),
        ({"prompt": "a", "sparsity": "fine"}, "an option of the whole command, not of a line: --sparsity"),
        (
            {"prompt": "a", "top_p": 0.5, "seed": 1},
            "top_p, seed would change nothing at temperature 0, which is greedy",
        ),
        ({"prompt": "a", "top_k": 5, "temperature": 0}, "top_k would change nothing"),
        ({"prompt": 5}, "prompt must be a string or a list"),
        ({"prompt": [{"role": "user"}]}, "prompt must be a string or a list"),
        ({"prompt_ids": "12"}, "prompt_ids must be a list of whole numbers"),
        ({"prompt_ids": [1, 2.5]}, "prompt_ids must be a list of whole numbers"),
        ({"prompt": "a", "id": True}, "got True"),
        ({"prompt": "a", "id": [1]}, "got [1]"),
        ('{"prompt": "\\ud83d"}', "surrogate"),
        ({"prompt": "a", "temperature": -1}, "temperature is 0 (greedy)"),
        ({"prompt": "a", "seed": "x"}, "seed must be"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"prompt": "a", "stop": ["x", 5]}, "stop takes strings"),
    ],
)
def test_a_broken_line_is_named_with_its_reason_and_the_others_are_read(path, line, reason):
    first, broken, last = jobs_of(path, {"prompt": "a"}, line, {"prompt": "b"})
    assert (first, last) == (Job(1, 1, "a"), Job(3, 3, "b"))
    assert isinstance(broken, BadLine)
    assert broken.line == 2
    assert reason in broken.reason


def test_an_id_that_stands_twice_is_broken_the_second_time(path):
    jobs = jobs_of(path, "", {"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}, {"prompt": "c", "id": 5})
    assert [jobs[0], jobs[2]] == [Job(2, "x", "a"), Job(4, 5, "c")]
    assert jobs[1] == BadLine(3, "id 'x' was used before, by line 2; give each line an id of its own")


def test_a_line_number_taken_for_an_id_may_not_stand_before_or_after_it(path):
    after, before = (
        jobs_of(path, {"prompt": "a", "id": 2}, {"prompt": "b"})[1],
        jobs_of(path, {"prompt": "a"}, {"prompt": "b", "id": 1})[1],
    )
    assert isinstance(after, BadLine) and isinstance(before, BadLine)
    assert after.reason.startswith("id 2 was used before, by line 1; this line gives none, so its number is its id; ")
    assert before.reason.startswith("id 1 was used before, by line 1, whose number it is, as that line gives no id; ")


def test_a_lines_sampling_options_may_rest_on_the_commands_temperature(path):
    path.write_text('{"prompt": "a", "top_p": 0.5}\n{"prompt": "b", "top_p": 0.5, "temperature": 0}')
    first, second = read_jobs(path, temperature=0.7)
    assert first == Job(1, 1, "a", {"top_p": 0.5})
    assert isinstance(second, BadLine) and "top_p would change nothing" in second.reason


def test_standard_input_is_read_like_a_file_and_named_where_it_cannot_be(path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO('{"prompt": "ü"}\r\n'.encode()), encoding="ascii"))
    assert list(read_jobs(STDIN)) == [Job(1, 1, "ü")]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(FileError, match=r"cannot read standard input: byte 0xff in line 1"):
        list(read_jobs(STDIN))
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(FileError, match="cannot read standard input: it is closed"):
        list(read_jobs(STDIN))


def test_a_line_may_have_options_of_its_own_and_a_digest_with_them(path):
    plain, own = jobs_of(
        path,
        {"prompt": "a", "id": 1, "seed": None},
        {"prompt": "a", "temperature": 0.5, "seed": 3, "stop": "x", "max_new_tokens": 7},
    )
    common = {"stop": ("y",), "sampling": SamplingConfig(0.5, seed=1), "max_new_tokens": 9}
    assert plain.over(common) == {"sampling": common["sampling"]}
    assert own.over(common) == {"stop": "x", "max_new_tokens": 7, "sampling": SamplingConfig(0.5, seed=3)}
    assert plain.digest == Job(1, 1, "a").digest != own.digest


def test_a_number_and_the_same_number_as_text_are_two_ids(path):
    assert jobs_of(path, {"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}) == [Job(1, 1, "a"), Job(2, "1", "b")]


def test_input_that_cannot_be_read_is_told_with_its_name(path):
    with pytest.raises(FileError, match=r"cannot read .*file\.jsonl: No such file"):
        list(read_jobs(path))
    path.write_bytes(b'{"prompt": "a"}\r\n{"prompt": "\xff"}')
    with pytest.raises(FileError, match=r"cannot read .*file\.jsonl: byte 0xff in line 2 is not UTF-8"):
        list(read_jobs(path))


def test_a_result_holds_the_completion_its_id_and_the_settings(path):
    write(path, Job(1, "first", "a"))
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record == {
        "id": "first",
        "text": "done a",
        "token_ids": [5, 6, 7],
        "finish_reason": "length",
        "stats": json.loads(json.dumps(STATS.__dict__)) | {"acceptance_rate": 1.0, "mean_acceptance_length": 2.0},
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
        "prompt_sha256": Job(1, "first", "a").digest,
        "settings": SETTINGS,
    }
    assert record["stats"]["aal"] == 2.0


def test_a_result_is_in_the_file_before_the_next_job_begins(path):
    output = Output(path, SETTINGS)
    output.write(Job(1, 1, "a"), DONE, 2)
    assert path.read_text(encoding="utf-8").count("\n") == 1
    output.close()


def test_an_output_is_gone_on_with_where_it_stopped(path):
    write(path, Job(1, 1, "a"), Job(2, "two", "b"))
    before = path.read_bytes()
    assert resume(path) == {1, "two"}
    assert path.read_bytes() == before
    write(path, Job(3, 3, "c"))
    assert path.read_bytes().startswith(before)
    assert resume(path) == {1, "two", 3}


@settings(max_examples=60, derandomize=True, deadline=None)
@given(data=st.data())
def test_an_output_cut_off_at_any_byte_keeps_its_whole_lines(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    jobs = [Job(1, 1, "a"), Job(2, 2, f"ünïcode 🌲 {BREAKS}"), Job(3, 3, "c")]
    write(path, *jobs)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    left = [job for job in jobs if job.id not in resume(path)]
    write(path, *left)
    assert path.read_bytes() == whole


def test_other_settings_are_refused_by_name_and_the_file_is_left_alone(path):
    write(path, Job(1, 1, "a"))
    path.write_bytes(path.read_bytes() + b'{"id": 2')
    before = path.read_bytes()
    with pytest.raises(FileError, match=r"^.*file\.jsonl was made with other settings \(model, stop\); choose another"):
        resume(path, model="there", stop=[])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "line", ["{", "[]", "7", '{"id": 1}', '{"id": [1], "settings": {}}', '{"id": 1, "settings": "all"}', "", "\udcff"]
)
def test_a_file_of_something_else_is_refused_with_the_line_and_left_alone(path, line):
    write(path, Job(1, 1, "a"))
    path.write_bytes(path.read_bytes() + line.encode(errors="surrogateescape") + b"\n")
    before = path.read_bytes()
    with pytest.raises(FileError, match=r"^\S*file\.jsonl line 2 is no result of sirius; choose another output$"):
        resume(path)
    assert path.read_bytes() == before


def test_output_that_cannot_be_written_is_told_with_its_name(tmp_path):
    with pytest.raises(FileError, match=r"cannot write .*/missing/out\.jsonl: No such file"):
        Output(tmp_path / "missing" / "out.jsonl", SETTINGS)
    with pytest.raises(FileError, match=r"cannot write .*: Is a directory"):
        Output(tmp_path, SETTINGS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that have a name")
def test_a_pipe_or_a_device_takes_lines_and_holds_none(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write(pipe, Job(1, 1, "a"), Job(2, 2, "b"))
    reader.join()
    assert [json.loads(line)["id"] for line in got[0].splitlines()] == [1, 2]
    write(Path(os.devnull), Job(1, 1, "a"))
    assert resume(Path(os.devnull)) == set()


def test_a_line_of_json_keeps_what_no_encoding_can_show(path):
    for text in ("ü🌲", "\udcff"):
        for encoding in ("utf-8", "cp1252", "ascii"):
            line = to_line({"text": text}, encoding)
            assert json.loads(line.encode(encoding).decode(encoding)) == {"text": text}
    assert to_line({"text": "ü"}) == '{"text": "ü"}\n'
    output = Output(path, {"model": "\udcff"})
    output.write(Job(1, 1, "a"), DONE, 2)
    output.close()
    assert json.loads(path.read_text(encoding="utf-8"))["settings"] == {"model": "\udcff"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_and_the_job_is_not_done():
    output = Output(Path("/dev/full"), SETTINGS)
    with pytest.raises(FileError, match=r"cannot write /dev/full: No space left"):
        output.write(Job(1, 1, "a"), DONE, 2)
    output.close()
    assert not output.done


def test_a_file_that_ends_in_something_else_is_left_alone(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes, with no line break")
    with pytest.raises(FileError, match="no result of sirius"):
        Output(notes, SETTINGS)
    assert notes.read_text() == "my notes, with no line break"


def test_another_prompt_under_a_known_id_is_refused(path):
    write(path, Job(1, 1, "a"))
    output = Output(path, SETTINGS)
    assert output.has(Job(1, 1, "a")) and not output.has(Job(2, 2, "b"))
    with pytest.raises(FileError, match="holds 1 with another prompt or options than line 3"):
        output.has(Job(3, 1, "b"))
    output.close()

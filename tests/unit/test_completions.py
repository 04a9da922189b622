"""Finished samples in files: nothing that was saved is lost, nothing half written is taken."""

import time

import pytest

from sirius.errors import FileError
from sirius.evaluation import completions
from sirius.evaluation.completions import Completions, key_of


def test_samples_of_every_process_are_found_again(tmp_path):
    first, second = Completions(tmp_path, 0), Completions(tmp_path, 1)
    first.add("a", {"text": "é\n"})
    second.add("b", {"text": "two"})
    first.read()
    assert {key: each["text"] for key, each in first.found.items()} == {"a": "é\n", "b": "two"}
    assert Completions(tmp_path, 2).found.keys() == {"a", "b"}


def test_a_line_that_a_killed_process_left_unfinished_is_dropped(tmp_path):
    Completions(tmp_path).add("a", {"text": "whole"})
    path = tmp_path / "rank0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key": "b", "te')
    again = Completions(tmp_path)
    assert again.found.keys() == {"a"}
    again.add("c", {"text": "after"})
    assert Completions(tmp_path).found.keys() == {"a", "c"}


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "rank0.jsonl").write_text("hello\n")
    with pytest.raises(FileError, match="is no sample"):
        Completions(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        Completions(tmp_path / "file")


def test_prompts_options_and_settings_have_keys_of_their_own():
    options = {"max_new_tokens": 4, "stop": ["."]}
    keys = {
        key_of((1, 2), options, {"keep": 0.5}),
        key_of((1, 3), options, {"keep": 0.5}),
        key_of((1, 2), {**options, "stop": []}, {"keep": 0.5}),
        key_of((1, 2), options, {"keep": 0.4}),
    }
    assert len(keys) == 4


def test_samples_of_other_weights_under_one_name_are_refused(tmp_path):
    Completions(tmp_path).check_model("mine", "one")
    Completions(tmp_path).check_model("mine", "one")
    Completions(tmp_path).check_model("another", "two")
    with pytest.raises(FileError, match="other weights under mine"):
        Completions(tmp_path).check_model("mine", "two")


def test_a_damaged_list_of_models_is_named(tmp_path):
    Completions(tmp_path).check_model("mine", "one")
    (tmp_path / "models.json").write_text("{")
    with pytest.raises(FileError, match=r"models.json is damaged"):
        Completions(tmp_path).check_model("mine", "one")


def test_a_process_is_seen_by_others_while_it_is_at_work(tmp_path, monkeypatch):
    first, second = Completions(tmp_path, 0), Completions(tmp_path, 1)
    assert not second.others_alive()
    with first.alive():
        assert second.others_alive() and not first.others_alive()
    assert not second.others_alive()
    monkeypatch.setattr(completions, "BEAT", 0.01)
    with first.alive(), first.resting():
        time.sleep(0.1)
        assert not second.others_alive()  # or two that wait for a third, killed one would wait for each other
    (tmp_path / "rank0.alive").touch()  # as a killed one leaves it
    assert second.others_alive()
    monkeypatch.setattr(completions, "PATIENCE", 0.0)
    assert not second.others_alive()

"""The benchmark of memory budgets at toy size: figures that fit together, right texts, and bad input as one line."""

import json
import os
import re
from functools import partial

import pytest
import torch

from conftest import slow, tiny_config, tiny_model
from sirius.benchmark import apart, checkpoint, offload, offload_turn
from sirius.benchmark.offload_turn import OffloadSetting, Turn
from sirius.core import LONGEST, SparsityConfig
from sirius.errors import ConfigError, ModelError
from sirius.model.limits import MOST_READ
from sirius.offload import budget, measure
from sirius.offload.amounts import parse_budget
from sirius.offload.plan import smallest_budget
from sirius.offload.sizes import draft_of, sizes_of

pytestmark = pytest.mark.integration

BLOCKS = 24
ROWS = ["full", "coarse 0.5 corrected", "4 bits corrected", "accelerate"]
SMALL = ("--dtype", "float32", "--device", "cpu", "--threads", 1, "--context", 8, "--period", 4, "--tokens", 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Save a tiny model of many blocks."""
    path = tmp_path_factory.mktemp("model")
    tiny_model(num_hidden_layers=BLOCKS).save_pretrained(path)
    return path


@pytest.fixture
def inside(monkeypatch):
    """Run turns in this process, whose own memory does not count, and measure speeds quickly."""
    monkeypatch.setattr(offload, "run_apart", lambda call, *arguments: call(*arguments))
    for module in budget, offload_turn:
        monkeypatch.setattr(module, "reserved", lambda: 0)
    monkeypatch.setattr(measure, "SECONDS", 0.02)
    monkeypatch.setattr(measure, "READ", 1 << 20)


@pytest.fixture
def measured(bench, model, inside):
    """Run the benchmark on the tiny model under the smallest budget with which all settings work, and a little more."""
    drafts = [SparsityConfig("none"), SparsityConfig("coarse"), SparsityConfig("none", draft_bits=4)]
    config = tiny_config("llama", num_hidden_layers=BLOCKS)
    sizes = [(sizes_of(config, torch.float32, draft, LONGEST + 21, MOST_READ), draft_of(draft)) for draft in drafts]
    budget = max(smallest_budget(*each) for each in sizes) + 20_000
    return partial(bench, "offload", "--model", model, *SMALL, "--memory-budget", budget)


def needed(err: str) -> int:
    [found] = re.findall(r"give at least (\d+) bytes", err)
    return int(found)


def test_a_record_holds_every_setting_with_figures_that_fit_together(measured):
    code, out, _ = measured("--aal", 3, "--windows", 2, "--cycles", 2, "--json")
    assert code == 0
    record = json.loads(out)
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ROWS and record["left_out"] == {} and record["same_text"] is True
    for name, row in rows.items():
        corrected = "corrected" in name
        assert row["p10"] <= row["seconds_per_token"] <= row["p90"]
        assert row["ratio_to_full"] == pytest.approx(row["seconds_per_token"] / rows["full"]["seconds_per_token"])
        assert row["ratio_to_accelerate"] == pytest.approx(
            row["seconds_per_token"] / rows["accelerate"]["seconds_per_token"]
        )
        assert row["aal"] == pytest.approx(3 if corrected else 1)
        assert (row["draft_seconds"] is not None) == corrected
        assert row["streamed_per_round"] == 3 * corrected * row["draft_streamed"] + row["full_streamed"] > 0
        assert len(row["links"]) == 2 and row["share_of_floor"] > 0 and row["peak_bytes"] > 0
        assert (row["predicted"] is None) == (name == "accelerate")
    assert {"machine", "commit", "torch", "threads", "command", "acceptance"} <= record.keys()


def test_full_decoding_moves_what_was_planned(measured):
    code, out, _ = measured("--aal", 3, "--windows", 1, "--json")
    [full] = [row for row in json.loads(out)["rows"] if row["name"] == "full"]
    assert code == 0 and full["moved_per_round"] == pytest.approx(full["full_streamed"], rel=0.01)


def test_weights_in_the_hosts_memory_come_at_the_links_speed(measured):
    code, out, _ = measured("--aal", 3, "--windows", 1, "--link-gbps", 0.01, "--json")
    record = json.loads(out)
    rows = {row["name"]: row for row in record["rows"]}
    assert code == 0 and list(rows) == ROWS[:3] and "--link-gbps" in record["left_out"]["accelerate"]
    full = rows["full"]
    assert full["host_bytes"] >= full["full_streamed"]
    assert all(speed < 0.02e9 for row in rows.values() for link in row["links"] for speed in link)
    assert full["seconds_per_token"] >= 0.9 * full["full_streamed"] / 0.01e9
    assert full["predicted"] == pytest.approx(full["full_streamed"] / 0.01e9, rel=0.01)


def test_the_table_fits_a_terminal_and_tells_what_was_left_out(measured):
    code, out, _ = measured("--aal", 3, "--windows", 1, "--link-gbps", 0.1)
    assert code == 0 and "\N{HORIZONTAL ELLIPSIS}" not in out
    assert "s/token" in out and "accelerate is left out: its copies cannot be throttled" in out
    assert "the text of full is that of the model in memory" in out


def test_a_missing_package_is_told_in_a_line(measured, monkeypatch):
    monkeypatch.setattr(offload, "find_spec", lambda name: None)
    code, out, _ = measured("--aal", 3, "--windows", 1)
    assert code == 0 and "accelerate is left out: the package accelerate is not installed" in out


def test_a_setting_for_which_the_budget_is_too_small_is_left_out(bench, model, inside):
    options = ("offload", "--model", model, *SMALL, "--aal", 3, "--windows", 1)
    code, out, err = bench(*options, "--memory-budget", 1)
    assert code == 2 and out == "" and err.startswith("error: a memory budget of 1 bytes")
    code, out, _ = bench(*options, "--memory-budget", needed(err), "--json")
    record = json.loads(out)
    assert code == 0 and record["rows"][0]["name"] == "full"
    assert "give at least" in record["left_out"]["4 bits corrected"]


def test_a_budget_with_room_for_everything_streams_nothing(bench, model, inside):
    options = ("offload", "--model", model, *SMALL, "--aal", 3, "--windows", 1)
    code, out, _ = bench(*options, "--memory-budget", "1GB")
    assert code == 0 and "full: the whole model fits in the budget, so nothing is streamed" in " ".join(out.split())
    code, out, _ = bench(*options, "--memory-budget", "1GB", "--json")
    rows = json.loads(out)["rows"]
    assert code == 0 and {row["full_streamed"] for row in rows} == {0}
    assert {row["share_of_floor"] for row in rows} == {None}


def test_a_wrong_text_ends_the_benchmark(measured, monkeypatch):
    monkeypatch.setattr(offload, "decode_in_memory", lambda workload: (0,) * 5)
    code, out, err = measured("--aal", 3, "--windows", 1, "--link-gbps", 1)
    assert code == 2 and out == "" and "at place 0 of its text, and 0 in memory" in err and len(err.splitlines()) == 1
    code, _, _ = measured("--aal", 3, "--windows", 1, "--link-gbps", 1, "--no-check")
    assert code == 0


def test_a_shape_is_written_once_and_found_again(bench, shape, inside, tmp_path):
    options = ("offload", "--shape", shape, *SMALL, "--aal", 3, "--windows", 1, "--memory-budget", "1GB", "--json")
    folder = tmp_path / "weights"
    assert bench(*options, "--folder", folder)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert before and bench(*options, "--folder", folder)[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    code, _, err = bench(*options, "--folder", folder, "--layers", 1)
    assert code == 2 and "holds another model: " in err and "num_hidden_layers" in err


def test_a_shape_without_a_folder_is_gone_in_the_end(bench, shape, inside, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, _ = bench("offload", "--shape", shape, *SMALL, "--aal", 3, "--windows", 1, "--memory-budget", "1GB")
    assert code == 0 and not [path for path in tmp_path.iterdir() if path.name.startswith("sirius-")]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(checkpoint.FileError, match="has room for 1 kB, and the model takes"):
        checkpoint.write_checkpoint(tiny_config("llama"), torch.float32, 0, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--memory-budget", "much"), "a memory budget is a number of bytes"),
        (("--link-gbps", 0), "--link-gbps is a finite number"),
        (("--shape", "llama-3.2-1b"), "give one of them"),
        (("--layers", 1), "belong to --shape"),
        (("--aal", 9), "from 1 to 4 on average; got 9"),
        (("--aal", 3, "--replay", "argmax-int4"), "give one of them"),
        (("--draft-bits", 3), "draft_bits are 4, 8"),
        (("--draft-bits", 0), "--draft-bits is 4 or 8; got 0"),
        (("--keep", 0), "keep is the fraction"),
        (("--context", 999), "pass the model's limit of 512"),
        (("--dtype", "int8"), "dtype is auto, float32"),
        (("--model", "nowhere"), "there is none at nowhere"),
    ],
)
def test_a_wrong_option_is_one_line(bench, model, inside, options, says):
    code, out, err = bench("offload", "--model", model, *SMALL, "--memory-budget", "1GB", *options)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and says in err and len(err.splitlines()) == 1


def test_shares_and_ratios_are_of_the_speed_in_the_same_turn():
    settings = [OffloadSetting("full", SparsityConfig("none")), OffloadSetting("drafted", None, (0.0, 1.0))]
    full = [Turn([2.0], streamed=(0, 100), links=(50.0, 150.0)), Turn([4.0], streamed=(0, 100), links=(50.0, 50.0))]
    drafted = [Turn([3.0], drafts=[1.0], checks=[2.0], streamed=(10, 100), links=(100.0, 100.0), peak=7)]
    one, two = offload.make_rows(settings, {"full": full, "drafted": drafted}, budget=6)
    assert (one.seconds_per_token, one.floor, one.share_of_floor) == (3.0, 1.5, 0.5)
    assert (two.aal, two.seconds_per_token, two.floor, two.ratio_to_full) == (2.0, 1.5, 0.55, 0.5)
    assert (two.draft_seconds, two.full_seconds, two.within_budget) == (1.0, 2.0, False)


def test_a_process_of_its_own_gives_its_result_or_its_error():
    assert apart.run_apart(max, 3, 5) == 5
    with pytest.raises(ConfigError, match="got 'much'"):
        apart.run_apart(parse_budget, "much", 1)
    with pytest.raises(ModelError, match="ended with code 3 and no result"):
        apart.run_apart(os._exit, 3)


@pytest.mark.parametrize("link", [slow(()), slow(("--link-gbps", 0.5))], ids=["disk", "link"])
def test_a_model_larger_than_its_budget_stays_within_it(bench, tmp_path, link):
    """Each setting runs in a process of its own, whose memory is measured; the model has 0.5 GB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "head_dim": 64}
    tiny_model(**sizes, num_attention_heads=16, num_key_value_heads=4).save_pretrained(tmp_path)
    options = ("offload", "--model", tmp_path, *SMALL, "--aal", 3, "--windows", 2, *link)
    code, _, err = bench(*options, "--memory-budget", 1)
    assert code == 2
    code, out, _ = bench(*options, "--memory-budget", needed(err) + (120 << 20), "--json")
    record = json.loads(out)
    assert code == 0 and record["same_text"] is True
    assert [row["name"] for row in record["rows"]] == ROWS[: 3 if link else 4]
    assert all(row["within_budget"] and row["swapped_bytes"] == 0 for row in record["rows"])
    assert all(row["full_streamed"] > 0 for row in record["rows"])

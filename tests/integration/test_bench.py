"""The benchmark at toy size: every figure is there, follows from the others, and bad input is one line."""

import io
import json
from functools import cache
from statistics import mean

import pytest
import torch
from rich.console import Console

from conftest import slow, tiny_config, tiny_model
from sirius.benchmark import ceiling as ceiling_module
from sirius.benchmark import memory, show
from sirius.benchmark.ceiling import Ceiling
from sirius.benchmark.decode import DecodeFigures, TimedSetting, Times, bytes_per_token
from sirius.benchmark.kernels import Size, count
from sirius.benchmark.models import SHAPES, make_config, make_model
from sirius.core import CorrectionConfig, SparsityConfig
from sirius.engine import Engine
from sirius.kernels import cpu
from sirius.model.limits import cache_bytes
from sirius.model.prepare import count_parameters
from sirius.offload.plan import acceptance

pytestmark = pytest.mark.integration


SMALL = ("--dtype", "float32", "--device", "cpu", "--context", 8, "--tokens", 30, "--cycles", 1, "--period", 4)


@pytest.fixture(autouse=True)
def ceiling(monkeypatch):
    """Measure the machine's bandwidth once for all of these tests."""
    monkeypatch.setattr(ceiling_module, "measure_ceiling", measured)


measured = cache(ceiling_module.measure_ceiling)


def test_a_record_holds_every_setting_with_figures_that_fit_together(bench, shape):
    code, out, _ = bench("decode", "--shape", shape, *SMALL, "--aal", 3, "--tree-width", 1, "--tree-width", 2, "--json")
    assert code == 0
    record = json.loads(out)
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == [
        "transformers",
        "full",
        "coarse 0.5",
        "fine 0.5",
        "fine 0.25",
        "int4",
        "coarse 0.5 corrected",
        "fine 0.5 corrected",
        "int4 corrected",
        "coarse 0.5 corrected, tree 2",
        "fine 0.5 corrected, tree 2",
        "int4 corrected, tree 2",
    ]
    bar = max(record["ceiling"].values())
    for name, row in rows.items():
        corrected = "corrected" in name
        assert row["p10"] <= row["ms_per_token"] <= row["p90"]
        assert row["ratio_to_full"] == pytest.approx(row["ms_per_token"] / rows["full"]["ms_per_token"], abs=0.02)
        assert row["share_of_ceiling"] == pytest.approx(row["gb_per_s"] / bar, abs=0.02)
        assert row["aal"] == pytest.approx(3 if corrected else 1)
        assert (row["draft"] is not None) == corrected
        if corrected:
            assert row["draft"] + row["verify"] + row["rest"] == pytest.approx(1, abs=0.01)
    assert {"machine", "commit", "torch", "threads", "kernels", "command"} <= record.keys()


def test_the_table_fits_a_terminal(bench, shape):
    code, out, _ = bench("decode", "--shape", shape, *SMALL, "--aal", 3)
    assert code == 0
    assert "ceiling: " in out and "coarse 0.5 corrected" in out and "\N{HORIZONTAL ELLIPSIS}" not in out


@pytest.mark.slow
def test_a_setting_that_is_asked_for_twice_is_timed_once(bench, shape):
    code, out, _ = bench("decode", "--shape", shape, *SMALL, "--aal", 3, *["--fine-keep", 0.3] * 2, "--json")
    assert code == 0
    names = [row["name"] for row in json.loads(out)["rows"]]
    assert names.count("fine 0.3") == 1 and len(set(names)) == len(names)


def test_heads_that_share_unevenly_are_refused(bench, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**tiny_config("llama").to_dict(), "num_attention_heads": 4, "num_key_value_heads": 3}))
    code, out, err = bench("decode", "--shape", path, *SMALL)
    assert code == 2 and out == "" and "4 attention heads on 3" in err and len(err.splitlines()) == 1


def test_a_folders_config_is_its_shape(tmp_path):
    tiny_config("phi3").save_pretrained(tmp_path)
    assert make_config(str(tmp_path)).to_dict() == make_config(str(tmp_path / "config.json")).to_dict()


def test_guesses_stand_as_often_as_published_in_windows_of_any_period(bench, shape):
    code, out, _ = bench("decode", "--shape", shape, *SMALL, "--json")
    assert code == 0
    row = next(row for row in json.loads(out)["rows"] if row["name"] == "coarse 0.5 corrected")
    assert row["aal"] == pytest.approx(sum(acceptance(15.22, 16) ** i for i in range(4)), abs=2e-3)


def test_the_widest_figures_fit_a_terminal_too():
    row = DecodeFigures(
        "coarse 0.5 corrected, tree 4", 12345.67, 1, 1, 9, 12.3, 12.34, 12.34, 12.34, 12 * 10**9, 0.85, 0.16, -0.01
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(show.decoding([row], Ceiling(10, 10), "AAL 3, given"))
    text = console.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text and all(part in text for part in ("85/", "16/", "-1"))


def test_the_acceptance_of_a_published_draft_may_be_played_back(bench, shape):
    small = [each for each in SMALL if each not in ("--period", 4)]
    code, out, err = bench("decode", "--shape", shape, *small, "--replay", "argmax-int4", "--period", 4)
    assert code == 2 and out == "" and "argmax-int4 is of period 16; got --period 4" in err
    code, out, _ = bench(
        "decode", "--shape", shape, *small, "--replay", "argmax-int4", "--period", 16, "--tokens", 90, "--json"
    )
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert code == 0 and rows["int4 corrected"]["aal"] == pytest.approx(12.7, abs=0.05)
    assert "published trace" in json.loads(out)["workload"]["acceptance"]


def test_a_histogram_that_cannot_be_read_is_refused(bench, shape):
    code, out, err = bench("decode", "--shape", shape, *SMALL, "--replay", "none.json")
    assert code == 2 and out == "" and "none.json" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("within", [slow(False), True], ids=["figures", "a completion"])
def test_a_histogram_may_be_played_back(bench, shape, tmp_path, within):
    path, figures = tmp_path / "stats.json", {"acceptance_histogram": [0, 1, 1, 0]}
    path.write_text(json.dumps({"text": "", "stats": figures} if within else figures))
    code, out, _ = bench("decode", "--shape", shape, *SMALL, "--replay", path, "--json")
    assert code == 0
    assert json.loads(out)["rows"][-1]["aal"] == 2.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--shape", "llama-9"), "--shape is one of llama-3.2-1b"),
        (("--layers", 3), "--layers is at most 2, all that"),
        (("--tokens", 8), "need 21 tokens a turn; got 8"),
        (("--aal", 9), "from 1 to 4 on average; got 9"),
        (("--replay", "none.json"), "give one of them"),
        (("--dtype", "int8"), "dtype is"),
        (("--keep", 0), "keep is the fraction"),
        (("--context", 999_999), "pass the model's limit of"),
        (("--compile",), "leave compile out"),
    ],
)
def test_a_wrong_option_is_one_line(bench, shape, options, says):
    code, out, err = bench("decode", "--shape", shape, *SMALL, "--aal", 3, *options)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and says in err and len(err.splitlines()) == 1


def test_kernels_are_measured_at_every_density_and_batch(bench):
    code, out, _ = bench("kernels", "--neurons", 40, "--hidden", 33, "--dtype", "float32", "--device", "cpu", "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    kernels = cpu.library() is not None
    want = 5 * ((3 if kernels else 4) * 6 + 2 + kernels)  # at six densities, gate, largest and attention at one
    assert len(rows) == want == count(Size(40, 33, torch.float32, "cpu"))
    assert all(row["kernel_ms"] > 0 and row["reference_ms"] > 0 for row in rows)
    assert not kernels or {row["operation"] for row in rows} == {
        "linear",
        "finish",
        "project",
        "gate",
        "largest",
        "attend",
    }


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_have_their_published_sizes(name):
    billions = {
        "llama-3.2-1b": 1.236,
        "llama-3.2-3b": 3.213,
        "llama-3-8b": 8.030,
        "llama-2-7b": 6.738,
        "llama-2-13b": 13.016,
        "llama-3-70b": 70.554,
    }
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(name))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions[name], abs=0.001)


def test_random_weights_are_those_of_their_seed_and_keep_the_norms_at_one():
    config = tiny_config("llama")
    one, same = (make_model(config, torch.float32, "cpu", seed=1) for _ in range(2))
    other = make_model(config, torch.float32, "cpu", seed=2)
    for name, weight in one.named_parameters():
        assert torch.equal(weight, same.get_parameter(name))
        assert weight.isfinite().all()
        assert torch.equal(weight, other.get_parameter(name)) == name.endswith("norm.weight")
    assert Engine(one).generate([1, 2, 3], max_new_tokens=5).token_ids


def test_the_bytes_of_a_token_are_those_of_its_passes():
    model = tiny_model("llama")
    parameters = count_parameters(Engine(model).model)
    whole = parameters.counted("streamed")
    assert whole == 4 * sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    text = model.config
    held = cache_bytes(text, 10, torch.float32)
    assert held == 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 10 * 4
    times = Times(density=0.5, aal=3.0)
    alone = TimedSetting("alone", SparsityConfig("coarse"))
    corrected = TimedSetting("corrected", SparsityConfig("coarse"), CorrectionConfig(4))
    assert bytes_per_token(alone, times, parameters, held) == 0.5 * whole + held
    passes = [0.5 * whole + held] * 3 + [whole + held]
    assert bytes_per_token(corrected, times, parameters, held) == pytest.approx(4 * mean(passes) / 3)


def test_peaks_that_the_system_does_not_tell_are_left_out(bench, shape, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "nowhere" / "clear_refs")
    code, out, _ = bench("decode", "--shape", shape, *SMALL, "--aal", 3, "--json")
    assert code == 0
    assert {row["peak_bytes"] for row in json.loads(out)["rows"]} == {None}


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "not json",
        '{"model_type": "no such"}',
        '{"model_type": "llama", "hidden_size": 33, "num_attention_heads": 5}',
        '{"model_type": "llama", "hidden_size": "x"}',
        '{"model_type": "llama", "num_hidden_layers": 0}',
        '{"model_type": "llama", "num_key_value_heads": 0, "hidden_size": 32, "num_attention_heads": 4}',
        '{"model_type": "llama", "hidden_act": "nope", "hidden_size": 32, "num_attention_heads": 4}',
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path, bench, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    code, out, err = bench("decode", "--shape", path, *SMALL, "--aal", 3)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and "onfig" in err


@pytest.mark.parametrize("weights", ["[1, NaN, 1, 1]", "[1, Infinity, 1, 1]", "[0, 0, 0, 0]", "[1, -1, 1, 1]", "[1]"])
def test_a_histogram_that_is_none_is_refused(bench, shape, tmp_path, weights):
    path = tmp_path / "stats.json"
    path.write_text(f'{{"acceptance_histogram": {weights}}}')
    code, out, err = bench("decode", "--shape", shape, *SMALL, "--replay", path)
    assert code == 2 and out == "" and "--period 4 needs as many weights, finite, at least 0" in err

"""`sirius plan`: the figures of a 70B model on paper, and bad input as one line."""

import json

import pytest

from conftest import tiny_config

pytestmark = pytest.mark.integration

BIG = ("--shape", "llama-3-70b", "--link-gbps", 25)
ROWS = [
    "full, every block streamed",
    "full",
    "coarse corrected, everything streamed",
    "coarse corrected",
    "4 bits corrected",
]


@pytest.fixture
def plan(sirius_command):
    def run(*arguments: object) -> tuple[int, str, str]:
        return sirius_command("plan", *arguments)

    return run


def rows_of(out: str) -> dict[str, dict]:
    return {row["name"]: {**row, **row["plan"]} for row in json.loads(out)["rows"]}


def test_a_70b_model_takes_what_the_papers_setting_took(plan):
    """Published: 5.72 s a token in full and 3.57 s a sparse pass, 96% and 90% of what the link gives at best."""
    code, out, _ = plan(*BIG, "--memory-budget", "24GiB", "--json")
    rows = rows_of(out)
    assert code == 0 and list(rows) == ROWS
    whole, paper = rows["full, every block streamed"], rows["coarse corrected, everything streamed"]
    assert whole["full_streamed"] == pytest.approx(136.9e9, rel=1e-3)
    assert whole["seconds_per_token"] == pytest.approx(5.48, rel=0.05)
    assert paper["draft_streamed"] == pytest.approx(80.5e9, rel=1e-3)
    assert paper["draft_seconds"] == pytest.approx(3.22, rel=0.01)
    assert paper["aal"] == pytest.approx(15.22)
    assert paper["seconds_per_token"] / whole["seconds_per_token"] == pytest.approx(0.647, abs=0.005)


def test_plans_keep_to_the_budget_and_are_faster_than_streaming_everything(plan):
    _, out, _ = plan(*BIG, "--memory-budget", "24GiB", "--json")
    rows = rows_of(out)
    assert all(rows[name]["used"] <= 24 * 2**30 for name in ("full", "coarse corrected", "4 bits corrected"))
    assert rows["full"]["ratio"] == 1
    assert rows["full"]["seconds_per_token"] < rows["full, every block streamed"]["seconds_per_token"]
    assert rows["4 bits corrected"]["ratio"] < rows["coarse corrected"]["ratio"] < 1
    assert rows["4 bits corrected"]["aal"] == pytest.approx(12.7, abs=0.05)


def test_rounded_weights_that_fit_leave_the_link_to_the_full_pass(plan):
    _, out, _ = plan(*BIG, "--memory-budget", "48GB", "--json")
    row = rows_of(out)["4 bits corrected"]
    assert all(row["rounded"]) and row["draft_streamed"] == 0 and row["switch_seconds"] == 0
    assert row["ratio"] < 0.15
    _, out, _ = plan(*BIG, "--memory-budget", "48GB")
    assert "5.42 s (1.711 GB of it during drafts)" in out


def test_a_model_that_fits_streams_nothing(plan):
    _, out, _ = plan(*BIG, "--memory-budget", "300GB", "--json")
    rows = rows_of(out)
    assert all(rows[name]["buffers"] == 0 for name in ("full", "coarse corrected", "4 bits corrected"))
    assert rows["full"]["seconds_per_token"] == pytest.approx(0.139, abs=0.001)  # 139 GB read at 1000 GB/s


def test_the_table_shows_the_arithmetic(plan, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = plan(*BIG, "--memory-budget", "24GiB")
    assert code == 0
    assert all(row in out for row in ROWS)
    assert "full 136.9 GB / 25 GB/s = 5.48 s" in out and "draft 80.53 GB / 25 GB/s = 3.22 s" in out
    assert "the paper's under a lossy rule" in out and "a published trace of 4 bits" in out


def test_other_periods_and_bits_say_what_is_assumed(plan):
    code, out, _ = plan(*BIG, "--memory-budget", "48GB", "--period", 8, "--draft-bits", 8, "--layers", 8)
    assert code == 0
    assert "8 bits corrected" in out and "taken for 8 bits too; at 8 with the same chance per guess" in out
    code, out, _ = plan(*BIG, "--memory-budget", "48GB", "--aal", 10, "--layers", 8)
    assert code == 0 and "tokens of a round: 10 of 16, given" in out


def test_a_share_of_the_devices_memory_is_a_budget(plan, shape):
    code, out, _ = plan("--shape", shape, "--memory-budget", "50%", "--link-gbps", 1, "--json")
    assert code == 0 and json.loads(out)["budget"] > 2**27


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--shape": "llama-9"}, "--shape is one of llama-3.2-1b"),
        ({"--memory-budget": "much"}, "such as 8GiB, 8GB"),
        ({"--memory-budget": "2GiB"}, "is too small: embedding, head, norms and biases 4.205 GB"),
        ({"--link-gbps": 0}, "the link's bandwidth is a finite number"),
        ({"--memory-gbps": "nan"}, "the memory's bandwidth is a finite number"),
        ({"--draft-bits": 0}, "--draft-bits is 4 or 8; got 0"),
        ({"--draft-bits": 3}, "draft_bits are 4, 8"),
        ({"--keep": 0}, "keep is the fraction of neurons kept"),
        ({"--keep": 0.00001}, "keeps none"),
        ({"--aal": 17}, "from 1 to 16 tokens on average; got 17"),
        ({"--dtype": "int8"}, "dtype is float32"),
        ({"--layers": 81}, "--layers is at most 80"),
    ],
    ids=lambda value: " ".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line(plan, options, message):
    given = {"--shape": "llama-3-70b", "--memory-budget": "24GiB", "--link-gbps": 25, **options}
    code, out, err = plan(*(each for option in given.items() for each in option))
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and message in err


def test_the_least_budget_that_is_named_works_for_every_row(plan):
    code, _, err = plan(*BIG, "--memory-budget", "2GiB", "--draft-bits", 8)
    assert code == 2 and "the draft's head 1.051 GB" in err
    least = int(err.split("give at least ")[1].split()[0])
    assert plan(*BIG, "--memory-budget", least - 1, "--draft-bits", 8)[0] == 2
    assert plan(*BIG, "--memory-budget", least, "--draft-bits", 8)[0] == 0


def test_a_model_without_gated_mlps_is_refused(plan, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    code, out, err = plan("--shape", tmp_path, "--memory-budget", "1GB", "--link-gbps", 1)
    assert code == 2 and out == "" and "has no gated MLP" in err and len(err.splitlines()) == 1


def test_a_folder_of_a_model_is_a_shape(plan, tmp_path):
    tiny_config("phi3").save_pretrained(tmp_path)
    code, out, _ = plan("--shape", tmp_path, "--memory-budget", "1GB", "--link-gbps", 1, "--json")
    assert code == 0 and len(json.loads(out)["rows"]) == 5

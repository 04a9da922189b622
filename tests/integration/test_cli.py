"""The command: what it prints, what it writes, and how it tells a user's mistake in one line."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import tiny_model
from sirius import __version__, cli
from sirius.cli import terminal
from sirius.engine import Engine
from sirius.jobs import Output
from sirius.sparsity import base, fine

pytestmark = pytest.mark.integration

WORDS = ["<s>", "</s>", "<user>", "<bot>", *(f"w{i}" for i in range(96))]
CONTEXT = 64
TEMPLATE = "<s>{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
SHORT = ("--max-new-tokens", "6")


class Printed(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random model whose tokens are words, with its tokenizer."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    words.add_special_tokens(WORDS[:4])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    path = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": len(WORDS), "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 1}
    tiny_model(**sizes, pad_token_id=None).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def sirius(monkeypatch, capsys):
    """Run the command with these arguments."""

    def run(*arguments: object) -> Printed:
        monkeypatch.setattr(sys, "argv", ["sirius", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return Printed(code, *capsys.readouterr())

    return run


@pytest.fixture
def generate(sirius, folder):
    return lambda *arguments: sirius("generate", "--model", folder, *arguments)


def write_jobs(path: Path, *jobs: object) -> Path:
    path.write_text("".join((job if isinstance(job, str) else json.dumps(job)) + "\n" for job in jobs))
    return path


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same(record: dict[str, Any]) -> dict[str, Any]:
    """Return a result without its prompt's fingerprint and the figures of time, which no two runs share."""
    stats = {name: value for name, value in record["stats"].items() if name not in ("seconds", "tokens_per_second")}
    return {**{k: v for k, v in record.items() if k != "prompt_sha256"}, "stats": stats}


# --- one prompt


def test_a_prompts_text_goes_to_stdout_and_nothing_else(generate, folder):
    printed = generate("w5 w6", *SHORT)
    want = Engine.load(folder).generate("w5 w6", max_new_tokens=6)
    assert printed.out == want.text + "\n"
    assert printed.code == 0
    assert "error" not in printed.err


def test_json_holds_the_fields_that_are_promised(generate, folder):
    [record] = generate("w5 w6", *SHORT, "--json", "--period", "4").records
    assert list(record) == ["text", "token_ids", "finish_reason", "stats", "usage", "settings"]
    assert len(record["token_ids"]) == record["stats"]["tokens"] == 6
    assert record["finish_reason"] == "length"
    assert record["stats"].keys() >= set(
        "rounds drafted accepted corrections tokens aal aal_complete period density effective_density "
        "acceptance_histogram seconds tokens_per_second lossless".split()
    )
    assert len(record["stats"]["acceptance_histogram"]) == record["stats"]["period"] == 4
    assert record["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
    assert record["stats"]["acceptance_rate"] == record["stats"]["accepted"] / record["stats"]["drafted"]
    assert record["stats"]["mean_acceptance_length"] == record["stats"]["aal"]
    assert record["settings"]["model"] == folder
    assert record["settings"]["correction"]["period"] == 4
    assert record["settings"]["sparsity"].items() >= {"method": "none", "draft_bits": "auto"}.items()
    assert record["stats"]["draft_bits"] == 8


@pytest.mark.parametrize("method", ["coarse", "griffin", "fine", "cats"])
def test_argmax_gives_the_text_of_the_full_model(generate, method):
    full = generate("w5 w6", "--max-new-tokens", "24", "--sparsity", "none", "--json").records[0]
    corrected = generate(
        "w5 w6", "--max-new-tokens", "24", "--sparsity", method, "--keep", "0.2", "--period", "6", "--json"
    ).records[0]
    assert corrected["token_ids"] == full["token_ids"]
    assert corrected["stats"]["lossless"] and full["stats"]["lossless"]
    assert corrected["stats"]["density"] < full["stats"]["density"] == 1
    assert corrected["stats"]["corrections"] > 0


def test_without_correction_the_sparse_model_writes_alone(generate):
    full = generate("w5 w6", *SHORT, "--sparsity", "none", "--json").records[0]
    alone = generate("w5 w6", *SHORT, "--sparsity", "coarse", "--keep", "0.1", "--no-correct", "--json").records[0]
    assert alone["token_ids"] != full["token_ids"]
    assert alone["settings"]["correction"] is None
    assert (alone["stats"]["drafted"], alone["stats"]["aal"], alone["stats"]["lossless"]) == (0, None, False)


def test_a_stop_string_ends_the_text_before_it(generate):
    free = generate("w5 w6", *SHORT, "--json").records[0]
    third = WORDS[free["token_ids"][2]]
    assert third not in [WORDS[token] for token in free["token_ids"][:2]]
    stopped = generate("w5 w6", *SHORT, "--stop", "never", "--stop", third, "--json").records[0]
    assert stopped["text"] == free["text"].partition(third)[0]
    assert stopped["token_ids"] == free["token_ids"][:3]
    assert stopped["finish_reason"] == "stop"


def test_the_checkpoints_stop_strings_end_a_text_where_none_are_given(generate, folder, tmp_path):
    [whole] = generate("w5 w6", "--json", *SHORT).records
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "generation_config.json").read_text())
    word = whole["text"][-2:]
    (copy / "generation_config.json").write_text(json.dumps({**config, "stop_strings": [word]}))
    [stopped] = generate("w5 w6", "--json", *SHORT, "--model", copy).records
    assert stopped["text"] == whole["text"].partition(word)[0] and stopped["finish_reason"] == "stop"
    [other] = generate("w5 w6", "--json", *SHORT, "--model", copy, "--stop", "nothing of the kind").records
    assert other["text"] == whole["text"]


def test_chat_puts_the_prompt_in_the_template(generate, folder):
    want = Engine.load(folder).generate([{"role": "user", "content": " w5 w6 "}], max_new_tokens=6)
    chat = generate(" w5 w6 ", *SHORT, "--chat", "--json").records[0]
    plain = generate(" w5 w6 ", *SHORT, "--json").records[0]
    assert tuple(chat["token_ids"]) == want.token_ids != tuple(plain["token_ids"])
    assert (chat["settings"]["chat"], plain["settings"]["chat"]) == (True, False)


def test_the_budget_is_the_room_left_where_none_is_given(generate):
    record = generate("w5 " * 50, "--json").records[0]
    assert (len(record["token_ids"]), record["finish_reason"]) == (CONTEXT - 50, "length")


def test_a_larger_context_than_the_models_own_may_be_asked_for(generate):
    printed = generate("w5 w6", "--json", "--max-new-tokens", 70, "--max-context", 80)
    [record] = printed.records
    assert record["settings"]["max_context"] == 80 and record["finish_reason"] in ("stop", "length")
    printed = generate("w5 w6", "--max-context", 20, "--max-new-tokens", 19)
    assert printed.code == 2 and "limit of 20; set max_new_tokens to at most 18, or raise max_context" in printed.err


def test_version_and_help_are_printed(sirius):
    assert sirius("--version") == Printed(0, f"sirius {__version__}\n", "")
    printed = sirius("generate", "--help")
    assert printed.code == 0
    for option in ("--sparsity", "--keep", "--period", "--accept", "--stop"):
        assert option in printed.out


# --- files


def test_every_line_of_a_file_is_decoded_as_it_would_be_alone(generate, tmp_path):
    jobs = write_jobs(tmp_path / "in.jsonl", {"prompt": "w5 w6"}, {"id": "b", "prompt_ids": [9, 10]})
    out = tmp_path / "out.jsonl"
    printed = generate("--input", jobs, "--output", out, *SHORT)
    assert (printed.code, printed.out) == (0, "")
    assert f"2 completions in {out}" in printed.err
    first, second = read_results(out)
    alone = generate("w5 w6", *SHORT, "--json").records[0]
    assert same(first) == {"id": 1, **same(alone)}
    assert list(first) == ["id", "text", "token_ids", "finish_reason", "stats", "usage", "prompt_sha256", "settings"]
    assert first["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
    assert second["id"] == "b"


def test_without_an_output_completions_are_printed(generate, tmp_path):
    jobs = write_jobs(tmp_path / "in.jsonl", {"id": "[/b]:x:", "prompt": "w5 w6"}, {"prompt": "w7"})
    records = generate("--input", jobs, *SHORT, "--json").records
    assert {record["id"] for record in records} == {"[/b]:x:", 2}
    shown = generate("--input", jobs, *SHORT).out
    assert "[/b]:x:" in shown
    assert all(record["text"] in shown for record in records)


def test_a_second_run_adds_nothing_and_a_longer_input_only_what_is_new(generate, tmp_path):
    out, lines = tmp_path / "out.jsonl", [{"prompt": "w5"}, {"prompt": "w6"}]
    jobs = write_jobs(tmp_path / "in.jsonl", *lines)
    assert generate("--input", jobs, "--output", out, *SHORT).code == 0
    before = out.read_bytes()
    assert generate("--input", jobs, "--output", out, *SHORT).code == 0
    assert out.read_bytes() == before
    write_jobs(jobs, *lines, {"prompt": "w7"})
    assert "3 completions" in generate("--input", jobs, "--output", out, *SHORT).err
    assert out.read_bytes().startswith(before)
    assert sorted(record["id"] for record in read_results(out)) == [1, 2, 3]


def test_an_interrupted_run_keeps_what_is_finished_and_is_gone_on_with(generate, tmp_path, monkeypatch):
    jobs = write_jobs(tmp_path / "in.jsonl", {"prompt": "w5"}, {"prompt": "w6"}, {"prompt": "w7"})
    out, whole, write = tmp_path / "out.jsonl", tmp_path / "whole.jsonl", Output.write
    alone = (*SHORT, "--preset", "paper")  # lossy, and yet the same in any company
    generate("--input", jobs, "--output", whole, *alone)

    def interrupted(self, job, done, prompt_tokens):
        if self.done:
            raise KeyboardInterrupt
        write(self, job, done, prompt_tokens)

    monkeypatch.setattr(Output, "write", interrupted)
    printed = generate("--input", jobs, "--output", out, *alone)
    assert printed.code == 130
    assert "error: what was finished is saved; run the same command again" in printed.err
    [first] = read_results(out)
    cut = b'{"id": 2, "text": "w'
    out.write_bytes(out.read_bytes() + cut)
    monkeypatch.setattr(Output, "write", write)
    assert generate("--input", jobs, "--output", out, "--batch-size", "2", *alone).code == 0
    results = read_results(out)
    assert results[0] == first
    assert sorted((same(r) for r in results), key=_id) == sorted((same(r) for r in read_results(whole)), key=_id)


def _id(record: dict[str, Any]) -> int:
    return record["id"]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_file_gives_each_prompt_the_text_that_it_has_alone(generate, tmp_path, size):
    prompts = [f"w{i} w{i + 1}" for i in range(5, 12)]
    jobs = write_jobs(tmp_path / "in.jsonl", *({"prompt": prompt} for prompt in prompts))
    options = ("--accept", "argmax", "--tree-width", "3", "--period", "4", "--max-new-tokens", "20", "--json")
    together = {record["id"]: record for record in generate("--input", jobs, "--batch-size", size, *options).records}
    for number, prompt in enumerate(prompts, start=1):
        assert together[number]["token_ids"] == generate(prompt, *options).records[0]["token_ids"]


def test_a_seed_gives_the_same_sample_whatever_the_draft(generate):
    options = ("--temperature", "0.9", "--seed", "3", "--accept", "sampling", "--max-new-tokens", "20", "--json")
    plain, other = (generate("w5 w6", *options, "--sparsity", "none", *more).records[0] for more in ((), ("--seed", 4)))
    assert plain["token_ids"] != other["token_ids"]
    for more in (("--tree-width", 4), ("--period", "auto"), ("--sparsity", "fine", "--keep", 0.2)):
        record = generate("w5 w6", *options, *more).records[0]
        assert record["token_ids"] == plain["token_ids"] and record["stats"]["lossless"]


def test_logprobs_come_with_the_origin_of_each_token(generate):
    record = generate("w5 w6", *SHORT, "--json", "--logprobs").records[0]
    assert len(record["logprobs"]) == len(record["origins"]) == 6
    assert record["origins"][0] == "full" and all(value <= 0 for value in record["logprobs"])


def test_a_line_is_decoded_by_its_own_options_where_it_has_some(generate, tmp_path):
    own = {"max_new_tokens": 2, "temperature": 1.0, "seed": 3}
    jobs = write_jobs(tmp_path / "in.jsonl", {"prompt": "w5"}, {"prompt": "w5", **own}, {"prompt": "w5", "id": None})
    lossless = ("--accept", "sampling")
    first, second, third = generate("--input", jobs, "--json", *lossless, *SHORT).records
    by_id = {record["id"]: record for record in (first, second, third)}
    [alone] = generate("w5", "--json", *lossless, "--temperature", "1", "--seed", "3", "--max-new-tokens", "2").records
    assert by_id[2]["token_ids"] == alone["token_ids"] and by_id[2]["options"] == own
    assert by_id[1]["token_ids"] == by_id[3]["token_ids"] and len(by_id[1]["token_ids"]) == 6


def test_other_settings_do_not_go_on_with_an_output(generate, tmp_path):
    jobs, out = write_jobs(tmp_path / "in.jsonl", {"prompt": "w5"}), tmp_path / "out.jsonl"
    generate("--input", jobs, "--output", out, *SHORT)
    before = out.read_bytes()
    for changed in (
        ("--logprobs",),
        ("--sparsity", "coarse"),
        ("--draft-bits", "8"),
        ("--period", "3"),
        ("--dtype", "float64"),
        ("--chat",),
    ):
        message = mistake(generate("--input", jobs, "--output", out, *SHORT, *changed))
        assert "was made with other settings (" in message
    assert out.read_bytes() == before


def test_the_size_of_a_batch_counts_as_a_setting_where_a_text_depends_on_its_company(generate, tmp_path):
    jobs = write_jobs(tmp_path / "in.jsonl", {"prompt": "w5"})
    for number, (options, counts) in enumerate(
        (((), False), (("--preset", "paper"), False), (("--preset", "paper", "--shared-set"), True))
    ):
        out = tmp_path / f"out{number}.jsonl"
        generate("--input", jobs, "--output", out, *SHORT, *options)
        printed = generate("--input", jobs, "--output", out, *SHORT, *options, "--batch-size", "3")
        assert ("was made with other settings (" in printed.err) is counts


def test_broken_lines_are_named_and_the_others_decoded(generate, tmp_path):
    jobs = write_jobs(
        tmp_path / "in[1].jsonl",
        {"prompt": "w5"},
        '{"prompt": ',
        {"prompt": "w6 " * CONTEXT},
        {"prompt_ids": [5, len(WORDS)]},
        {"prompt": ""},
        {"prompt": "w7"},
    )
    out = tmp_path / "out[b].jsonl"
    printed = generate("--input", jobs, "--output", out, *SHORT)
    assert printed.code == 2
    assert sorted(record["id"] for record in read_results(out)) == [1, 6]
    *told, done, total = [line for line in printed.err.splitlines() if "error: " in line or "completions" in line]
    for line, (number, reason) in zip(
        told,
        [(2, "not JSON"), (3, f"{CONTEXT} tokens"), (4, f"from 0 to {len(WORDS) - 1}; got {len(WORDS)}"), (5, "empty")],
        strict=True,
    ):
        assert f"error: {jobs} line {number}: " in line
        assert reason in line
    assert done == f"2 completions in {out}"
    assert total == f"error: 4 of 6 lines of {jobs} could not be decoded"


# --- mistakes


def mistake(printed: Printed) -> str:
    """Return the one line on stderr that a mistake is told in."""
    assert printed.code == 2
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sparsity", "wool"], "no sparsity method 'wool'; known are cats, coarse, fine, griffin, none"),
        (
            ["--sparsity", "coarse", "--keep", "0"],
            "keep is the fraction of neurons kept, above 0 and at most 1; got 0",
        ),
        (["--sparsity", "coarse", "--keep", "1.5"], "got 1.5"),
        (["--sparsity", "coarse", "--keep", "nan"], "got nan"),
        (["--sparsity", "coarse", "--keep", "0.01"], "keep 0.01 of 45 neurons keeps none"),
        (
            ["--keep", "0.4"],
            "--keep would change nothing without a sparsity method, where every neuron is kept",
        ),
        (["--draft-bits", "3"], "draft_bits are 4, 8, 'auto', or 0 for the model's own weights; got 3"),
        (["--draft-bits", "four"], "--draft-bits is a whole number or auto; got 'four'"),
        (["--draft-ngram", "1"], "draft_ngram is a number of tokens, 2 to 16, or 0 (off); got 1"),
        (["--draft-confidence", "1"], "draft_confidence is a probability, from 0 (off) to below 1; got 1.0"),
        (["--draft-confidence", "0.5", "--tree-width", "2"], "draft_confidence 0.5 ends chains, and tree_width is 2"),
        (["--draft-ngram", "3", "--ablate", "rewrite"], "so a lossy text would depend on time"),
        (["--sparsity", "fine", "--sparsity-threshold", "-1"], "at least 0; got -1.0"),
        (["--threshold", "-1"], "threshold is a probability, from 0 to 1; got -1.0"),
        (["--threshold", "2"], "threshold is a probability, from 0 to 1; got 2.0"),
        (["--accept-temperature", "0", "--tree-width", "2"], "accept_temperature must be a positive number; got 0.0"),
        (["--period", "0"], "period counts the tokens of a check, at least 1 (plain decoding); got 0"),
        (
            ["--accept", "anything"],
            "accept is one of lossless, argmax, sampling, threshold, relative, typical; got 'anything'",
        ),
        (["--max-new-tokens", "-3"], "max_new_tokens must be at least 1; got -3"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1; got 0"),
        (["--max-new-tokens", "63"], "prompt 2 + max_new_tokens 63 = 65 tokens pass the limit of 64; set"),
        (["--stop", ""], "none of them empty"),
        (["--dtype", "int3"], "dtype is auto, float32, float64, bfloat16, float16; got 'int3'"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--input", "in.jsonl"], "give one of a prompt and --input FILE.jsonl"),
        (["--output", "out.jsonl"], "--output goes with --input"),
        (["--no-correct", "--tree-width", "4"], "--tree-width would change nothing without correction"),
        (["--top-p", "0.5", "--top-k", "3"], "--top-p, --top-k would change nothing at temperature 0"),
        (["--threshold", "0.3"], "threshold 0.3 would change nothing: accept 'lossless' accepts only"),
        (["--preset", "papers"], "--preset is paper; got 'papers'"),
        (["--preset", "paper", "--no-correct"], "--preset would change nothing without correction"),
        (["--output", "-"], "--output goes with --input"),
        (["--tree-width", "10000000"], "makes 310000000 guesses, and a check reads at most 1024"),
        (["--threads", "0"], None),
    ],
)
def test_a_wrong_option_is_one_line(generate, options, words):
    printed = generate("w5 w6", *options)
    if words is None:  # typer says it
        assert printed.code == 2 and "--threads" in printed.err
    else:
        assert words in mistake(printed)


IDLE = [
    ("--logprobs", "in plain text; give --json"),
    ("--prune 0.1", "in a chain, which is one branch; give --tree-width"),
    ("--accept-temperature 0.7", "in a chain under a lossless rule; give --tree-width, or a lossy --accept"),
    ("--per-branch --sparsity fine", "in a chain"),
    ("--per-branch --tree-width 2 --sparsity coarse", "with --sparsity coarse, which keeps a fixed fraction for a"),
    ("--refresh 0.1 --sparsity fine", "with --sparsity fine, which has a set for each token; use coarse"),
    ("--refresh 0.1 --no-correct --sparsity coarse", "without correction; leave out --no-correct"),
    ("--sparsity-threshold 0.1 --sparsity coarse", "with --sparsity coarse"),
    ("--keep 0.4 --sparsity-threshold 0.1 --sparsity fine", "beside --sparsity-threshold; give one of them"),
    *((f"{option} --period 1", "at --period 1, which drafts nothing") for option in (
        "--tree-width 4", "--ablate rewrite", "--refresh 0.1 --sparsity coarse", "--preset paper",
        "--threshold 0.2 --accept relative", "--accept typical")),
    *((f"{option} --sparsity none", "without a sparsity method, where every neuron is kept") for option in (
        "--keep 0.4", "--sparsity-threshold 0.1", "--per-branch", "--shared-set", "--refresh 0.1")),
    *((f"{option} --draft-bits 0", "with --sparsity none and --draft-bits 0, where no model drafts") for option in (
        "--tree-width 2", "--draft-confidence 0.5", "--ablate rewrite")),
    *((f"{option} --sparsity none", "with --sparsity none and no bits, where nothing is drafted") for option in (
        "--period 4", "--accept typical")),
    ("--draft-ngram 3 --period 1", "at --period 1, which drafts nothing"),
    *((option, "with one prompt; give --input") for option in ("--shared-set --sparsity coarse", "--batch-size 3")),
    *((option, "at temperature 0, which is greedy") for option in ("--seed 3", "--top-k 5", "--min-p 0.1")),
    ("--revision v2", "with a model that is on this machine; it is of a hub id"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), IDLE)
def test_an_option_that_would_change_nothing_is_refused_by_name_with_a_way_out(generate, options, words):
    message = mistake(generate("w5 w6", *options.split()))
    assert message.startswith(f"{options.split()[0]} would change nothing ") and words in message


def test_options_of_a_hub_are_refused_beside_the_embedded_model(sirius):
    for option in (["--revision", "v2"], ["--trust-remote-code"]):
        message = mistake(sirius("generate", "hi", *option))
        assert message == f"{option[0]} would change nothing with the embedded model; give --model"


@pytest.mark.parametrize(
    "options",
    [
        "--logprobs --json",
        "--tree-width 2 --prune 0.1 --accept-temperature 0.7",
        "--accept relative --accept-temperature 0.7",
        "--preset paper --accept-temperature 0.7",
        "--sparsity fine --tree-width 2 --per-branch --sparsity-threshold 0.1",
        "--refresh 0.1 --period 4 --sparsity coarse",
        "--draft-bits 8 --period 4",
        "--sparsity coarse --draft-bits auto --period 4",
        "--sparsity none --draft-ngram 3",
        "--draft-confidence 0.4 --period 4",
        "--seed 3 --temperature 0.5 --top-k 5",
        "--sparsity none --draft-ngram 3 --period 4",
        "--period 1 --accept argmax",
    ],
)
def test_an_option_that_changes_something_is_taken(generate, options):
    assert generate("w5 w6", *SHORT, *options.split()).code == 0


def test_a_third_partys_method_takes_what_options_it_will(generate, monkeypatch):
    factory = lambda config, neurons: fine.FineSparsity(config, neurons)  # noqa: E731 - a factory that is no class
    monkeypatch.setitem(base._METHODS, "mine", factory)
    assert generate("w5", *SHORT, "--sparsity", "mine", "--keep", "0.4", "--sparsity-threshold", "0.1").code == 0


def test_sampling_options_of_a_file_need_a_temperature_of_the_command_or_a_line(generate, tmp_path):
    cold = write_jobs(tmp_path / "cold.jsonl", {"prompt": "w5"})
    assert "--seed would change nothing, as neither" in mistake(generate("--input", cold, "--seed", 3, *SHORT))
    hot = write_jobs(tmp_path / "hot.jsonl", {"prompt": "w5"}, {"prompt": "w5", "temperature": 1.0})
    assert generate("--input", hot, "--seed", 3, *SHORT).code == 0


def test_a_prompt_that_cannot_be_decoded_is_one_line(generate):
    assert "the prompt is empty" in mistake(generate(""))
    assert "the prompt is empty" in mistake(generate("", "--chat"))
    assert "the prompt is empty" in mistake(generate("  "))
    message = mistake(generate("w5 " * CONTEXT))
    assert f"the prompt has {CONTEXT} tokens and the model's context holds {CONTEXT}" in message


def test_neither_prompt_nor_input_is_one_line(generate):
    assert mistake(generate()) == "give one of a prompt and --input FILE.jsonl"


def test_a_missing_model_is_one_line(sirius, tmp_path):
    path = tmp_path / "[b]no:x:model"
    assert mistake(sirius("generate", "w5", "--model", path)) == f"there is no model folder {path}"


def test_files_that_cannot_be_used_are_one_line(generate, tmp_path):
    jobs = write_jobs(tmp_path / "in.jsonl", {"prompt": "w5"})
    assert "cannot read nowhere.jsonl: No such file" in mistake(generate("--input", "nowhere.jsonl"))
    out = tmp_path / "missing" / "out.jsonl"
    assert f"cannot write {out}: No such file" in mistake(generate("--input", jobs, "--output", out))
    assert f"cannot write {tmp_path}: Is a directory" in mistake(generate("--input", jobs, "--output", tmp_path))
    message = mistake(generate("--input", jobs, "--output", jobs))
    assert message == f"{jobs} line 1 is no result of sirius; choose another output"
    assert jobs.read_text() == '{"prompt": "w5"}\n'


# --- the line beside a text


def line(printed: Printed) -> str:
    """Return the one line on stderr that is said of a text."""
    assert printed.code == 0
    [told] = printed.err.splitlines()
    return told


@pytest.mark.parametrize(
    ("options", "drafting", "faith"),
    [
        ("", r"nothing drafted: it did not promise to be faster", "text of the full model"),
        ("--period 1", "nothing drafted", "text of the full model"),
        ("--sparsity none", "nothing drafted", "text of the full model"),
        (
            "--period 4",
            r"drafted: [\d.]+ of [\d.]+ guesses accepted, \d+% of the weights read per token.*",
            "text of the .*",
        ),
        ("--no-correct", "draft model alone", r"LOSSY: .* \(--no-correct\); the defaults give that"),
        ("--preset paper", "drafted: .*", r"LOSSY: .* \(threshold 0\.1\); the defaults give that"),
        ("--period 4 --ablate rollback", "drafted: .*", r"LOSSY: .* \(--ablate rollback\); the defaults give that"),
    ],
)
def test_one_line_beside_a_text_says_how_fast_it_came_and_whose_it_is(generate, options, drafting, faith):
    printed = generate("w5 w6", *SHORT, *options.split())
    assert re.fullmatch(rf"[\d.]+ tok/s \N{{MIDDLE DOT}} {drafting} \N{{MIDDLE DOT}} {faith}", line(printed))
    assert "tok/s" not in printed.out


def test_each_text_of_a_file_has_its_line_and_json_has_none(generate, tmp_path):
    jobs = write_jobs(tmp_path / "in.jsonl", {"prompt": "w5 w6"}, {"prompt": "w7"})
    assert generate("--input", jobs, *SHORT).err.count("tok/s") == 2
    assert generate("--input", jobs, *SHORT, "--json").err == generate("w5", *SHORT, "--json").err == ""


def test_a_text_that_rounding_may_change_is_told_apart_from_a_lossy_one(generate, monkeypatch):
    monkeypatch.setattr("sirius.kernels.cpu.library", lambda: None)
    assert line(generate("w5 w6", *SHORT)).endswith("text of the full model")
    told = line(generate("w5 w6", *SHORT, "--dtype", "bfloat16", "--sparsity", "coarse"))
    assert "not certain to be the full model's text" in told and "LOSSY" not in told
    assert line(generate("w5 w6", *SHORT, "--dtype", "bfloat16", "--period", "1")).endswith("text of the full model")


START = """
import sys
sys.argv = ["sirius", *{arguments}]
from sirius import cli
try:
    cli.main()
except SystemExit as end:
    assert end.code == {code}, end.code
print(*sorted({{name.split(".")[0] for name in sys.modules}}))
"""


def started(*arguments: str, code: int) -> set[str]:
    """Return the packages that the command has imported when it ends with a code."""
    start = START.format(arguments=arguments, code=code)
    run = subprocess.run([sys.executable, "-c", start], check=True, capture_output=True, text=True)
    return set(run.stdout.splitlines()[-1].split())


def test_help_imports_nothing_that_takes_long():
    heavy = {"torch", "transformers", "numpy", "huggingface_hub", "tokenizers", "jinja2"}
    assert not heavy & started("--help", code=0)
    assert not heavy & started("generate", "--help", code=0)


def test_a_wrong_option_is_told_without_transformers():
    assert not {"transformers", "huggingface_hub"} & started("generate", "hi", "--sparsity", "dense", code=2)


def test_garbage_is_looked_for_again_when_modules_are_imported():
    with pytest.raises(ImportError), terminal.uncollected():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    with terminal.uncollected(), terminal.uncollected():
        pass
    assert gc.isenabled()


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_that_wait_sleep_soon_unless_a_user_says_how_they_wait(given, monkeypatch, capsys):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["sirius", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    wanted = given or {"GOMP_SPINCOUNT": "100"}
    assert {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ} == wanted


def test_an_export_with_a_checkpoint_is_not_written_over_another_checkpoint(sirius, folder, tmp_path):
    target = tmp_path / "exported"
    for count in (0, 1):
        printed = sirius("export", target, "--model", folder)
        assert printed.code == (2 if count else 0), printed.err
    assert "holds a checkpoint already; choose another folder" in " ".join(printed.err.split())
    assert sirius("export", target, "--period", 4).code == 0

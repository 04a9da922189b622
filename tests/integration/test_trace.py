"""A generation as a page: it holds the text and nothing can break it; the command writes it where it may."""

import json
import re
import sys
from base64 import b64encode
from dataclasses import asdict, replace
from hashlib import sha256
from html.parser import HTMLParser
from typing import NamedTuple

import pytest
import torch

from conftest import tiny_model
from sirius import cli
from sirius.cli import terminal
from sirius.demo.embedded import FOLDER
from sirius.demo.problems import few_shot
from sirius.engine import Engine
from sirius.trace.collect import Trace, TracedToken, collect, to_json
from sirius.trace.page import to_html

pytestmark = pytest.mark.integration

HOSTILE = "</script><script>alert(1)</script> & <!-- &amp; \" ' \u2028\r\n\t x"
VOID = {"meta", "br", "img", "input", "link", "hr"}
QUESTION = "Tom has 12 apples. He buys 3 bags with 4 apples in each. How many apples does Tom have now?"


class Printed(NamedTuple):
    code: int
    out: str
    err: str


class Page(HTMLParser):
    """A page taken apart as a browser would: its tokens, its scripts; its elements must be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, str]] = []  # class and text
        self.marks: list[dict[str, str | None]] = []
        self.contents: list[tuple[str, dict[str, str | None], str]] = []  # of scripts and styles
        self.prompt = self.words = ""
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    @property
    def data(self):
        [content] = [text for name, attributes, text in self.contents if attributes.get("type") == "application/json"]
        return json.loads(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if [each[1].get("id") for each in self.open[-1:]] == ["text"]:
            self.tokens.append((dict(attrs)["class"] or "", ""))
            self.marks.append(dict(attrs))
        if tag in ("script", "style"):
            self.contents.append((tag, dict(attrs), ""))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        ids = [attributes.get("id") for _, attributes in self.open]
        if self.open and self.open[-1][0] in ("script", "style"):
            tag, attributes, text = self.contents[-1]
            self.contents[-1] = tag, attributes, text + data
        elif "text" in ids:
            kind, text = self.tokens[-1]
            self.tokens[-1] = kind, text + data
        elif "prompt" in ids:
            self.prompt += data
        else:
            self.words += data


@pytest.fixture(scope="module")
def engine():
    return Engine.load(str(FOLDER))


@pytest.fixture(scope="module")
def prompt():
    return few_shot("reasoning", "test", 0, 0)[0]


@pytest.fixture(scope="module")
def drafted(engine, prompt) -> Trace:
    return collect(engine, prompt, correction=8, sparsity={"keep": 0.2})


@pytest.fixture
def run(monkeypatch, capsys):
    def command(*arguments: object) -> Printed:
        monkeypatch.setattr(sys, "argv", ["sirius", "trace", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Printed(code, *capsys.readouterr())

    return command


@pytest.fixture
def unloaded(monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(terminal, "load", load)


# --- the data


def test_a_lossless_trace_is_the_text_of_generate(engine, prompt, drafted):
    done = engine.generate(prompt, correction=1)
    assert tuple(token.id for token in drafted.tokens) == done.token_ids
    assert drafted.text == done.text == "".join(token.text for token in drafted.tokens)
    assert (drafted.faith, drafted.finish_reason) == ("lossless", "stop")
    assert drafted.prompt == engine.decode(engine.encode(prompt))
    assert drafted.tokens[0].origin == "full" and {"draft", "correction"} <= {t.origin for t in drafted.tokens}


def test_the_rounds_add_up_to_the_figures(drafted):
    stats, rounds = drafted.stats, drafted.rounds
    assert sum(each.accepted for each in rounds) == stats["accepted"] > 0
    assert sum(len(each.rolled_back) for each in rounds) == stats["rolled_back"] > 0
    assert sum(each.tokens for each in rounds) == stats["tokens"] == len(drafted.tokens)
    assert sum(each.steps for each in rounds) == stats["drafted"]
    assert len(rounds) == stats["rounds"] + 1
    counted = [sum(token.round == index for token in drafted.tokens) for index in range(len(rounds))]
    assert counted == [each.tokens for each in rounds]
    assert stats["acceptance_rate"] == stats["accepted"] / stats["drafted"]


@pytest.mark.parametrize("width", [1, 3])
def test_rolled_back_guesses_have_the_full_models_probability(engine, prompt, width):
    found = collect(engine, prompt, correction={"period": 6, "tree_width": width}, sparsity={"keep": 0.2})
    read, end, seen = list(engine.encode(prompt)), 0, 0
    for each in found.rounds:
        end += each.tokens
        before = read + [token.id for token in found.tokens[: end - 1]]
        ids = [guess.id for guess in each.rolled_back]
        if not ids:
            continue
        with torch.inference_mode():
            logs = engine.model(torch.tensor([before + ids])).logits[0].float().log_softmax(-1)
        want = [logs[len(before) + place - 1, token].item() for place, token in enumerate(ids)]
        assert [guess.logprob for guess in each.rolled_back] == pytest.approx(want, abs=1e-3)
        assert ids[0] != found.tokens[end - 1].id
        seen += len(ids)
    assert seen == found.stats["rolled_back"] > 0


def test_the_sparse_model_alone_is_named_as_the_writer(engine, prompt):
    found = collect(engine, prompt, max_new_tokens=8, correction=None, sparsity={"keep": 0.2})
    assert [token.origin for token in found.tokens] == ["full"] + ["sparse"] * 7
    page = Page(to_html(found))
    assert "LOSSY" in page.words and "draft model alone" in page.words
    assert page.data["rule"] == "None: the draft model decoded alone."


def test_layers_have_the_shares_of_their_neurons(engine, prompt, drafted):
    coarse = Engine(tiny_model(intermediate_size=44)).generate(
        [5, 6], max_new_tokens=9, correction=4, sparsity="coarse"
    )
    assert coarse.setting.kept == (0.5, 0.5)
    assert len(drafted.kept) == engine.model.config.num_hidden_layers and len(set(drafted.kept)) == 1
    assert drafted.kept[0] == pytest.approx(0.2, abs=0.01) and drafted.gate == drafted.kept[0]
    fine = engine.generate(prompt, max_new_tokens=20, correction=4, sparsity={"method": "fine", "threshold": 0.1})
    kept = fine.setting.kept  # measured, of layers of one size
    assert len(set(kept)) > 1 and sum(kept) / len(kept) == pytest.approx(fine.setting.touched.up)
    even = engine.generate(prompt, max_new_tokens=9, correction=4, sparsity={"method": "fine", "keep": 0.4})
    assert even.setting.kept == pytest.approx([even.setting.touched.up] * len(kept))
    assert engine.generate(prompt, max_new_tokens=2, sparsity="none").setting.kept == ()


def test_a_model_without_a_tokenizer_has_tokens_without_text():
    found = collect(Engine(tiny_model()), [5, 6], max_new_tokens=6, correction=3)
    assert found.text == "" and found.prompt == "" and found.prompt_tokens == 2
    assert [mark["data-mark"] for mark in Page(to_html(found)).marks] == [f"#{token.id}" for token in found.tokens]


def test_a_stop_string_is_shown_apart(engine, prompt, drafted):
    stop = drafted.text[15:18]
    found = collect(engine, prompt, stop=stop, correction=8)
    assert found.text == drafted.text.partition(stop)[0] == "".join(token.text for token in found.tokens)
    assert stop in found.text[-2:] + "".join(token.unused for token in found.tokens)
    assert "".join(text for _, text in Page(to_html(found)).tokens) == found.text


def test_json_has_every_field(drafted):
    found = json.loads(to_json(drafted))
    assert found == json.loads(json.dumps(asdict(drafted)))
    assert next(iter(found)) == "kind" and found["kind"] == "sirius trace"


# --- the page


def test_the_page_holds_every_token_once_in_order(drafted):
    page = Page(to_html(drafted))
    assert page.tokens == [(token.origin, token.text) for token in drafted.tokens]
    assert "".join(text for _, text in page.tokens) == drafted.text
    assert [row[0] for row in page.data["tokens"]] == [token.id for token in drafted.tokens]
    assert [row[3] for row in page.data["tokens"]] == [token.round for token in drafted.tokens]
    assert page.prompt == drafted.prompt
    assert [len(row[5]) for row in page.data["rounds"]] == [len(each.rolled_back) for each in drafted.rounds]


@pytest.mark.parametrize(
    ("correction", "words"),
    [
        ({"period": 8}, "Lossless. "),
        ("paper", "LOSSY. "),
        ({"period": 8, "accept": "typical"}, "LOSSY. "),
        ({"period": 8, "ablate": ("rollback",)}, "LOSSY. "),
        (None, "LOSSY. "),
    ],
)
def test_the_page_says_whose_text_it_is(engine, correction, words):
    page = Page(to_html(collect(engine, QUESTION, max_new_tokens=4, correction=correction)))
    assert " ".join(page.words.split()).count(words) == 1
    assert ("LOSSY" in page.words) == (words == "LOSSY. ")


def test_the_rule_is_told_with_its_threshold(engine):
    def rule(**options):
        return Page(to_html(collect(engine, QUESTION, max_new_tokens=3, correction=options))).data["rule"]

    assert "at temperature 0.6 is at least 0.1," in rule(period=8, accept="threshold")
    assert "at temperature 0.7 is at least 0.3," in rule(
        period=8, accept="threshold", threshold=0.3, accept_temperature=0.7
    )
    assert "0.1 times the largest" in rule(period=8, accept="relative")
    assert "0.316 times exp(-entropy)" in rule(period=8, accept="typical")
    assert rule(period=8).startswith("lossless: ") and rule(period=1) == "None: nothing is drafted."
    assert "Left out of the method: rewrite." in rule(period=8, ablate=("rewrite",))


def hostile_trace(drafted: Trace) -> Trace:
    """Return a trace in which everything that a model or a user may write is hostile."""
    token = drafted.tokens[1]
    texts = [HOSTILE, "", "😀", "", "\n\n", "a\r\nb"]
    tokens = [replace(token, id=n, text=text, name=HOSTILE, unused=HOSTILE) for n, text in enumerate(texts)]
    tokens[3] = replace(tokens[3], part=2, parts=2, unused="")
    rejected = next(each for each in drafted.rounds if each.rolled_back)
    guess = replace(rejected.rolled_back[0], text=HOSTILE, name=HOSTILE)
    rounds = (drafted.rounds[0], replace(rejected, tokens=len(texts), rolled_back=(guess,)))
    return replace(drafted, model=HOSTILE, prompt=HOSTILE, text="".join(texts), tokens=tuple(tokens), rounds=rounds)


def test_hostile_text_cannot_break_the_page(drafted):
    found = hostile_trace(drafted)
    page, plain = Page(to_html(found)), Page(to_html(drafted))
    assert page.tokens == [(token.origin, token.text) for token in found.tokens]
    assert page.prompt == HOSTILE
    assert page.tags.count("script") == plain.tags.count("script") == 2 and "img" not in page.tags
    assert page.data["tokens"][0][1] == page.data["rounds"][1][5][0][1] == HOSTILE
    assert page.marks[0]["data-unused"] == HOSTILE
    assert page.marks[3]["data-mark"] == "\u2025"  # the second token of a character
    assert "Trace of " + HOSTILE in page.words and page.words.count("Model " + HOSTILE) == 1


def test_a_prompt_may_be_hostile(engine):
    found = collect(engine, HOSTILE, max_new_tokens=5)
    assert Page(to_html(found)).prompt == found.prompt
    assert "</script>" in found.prompt


def test_line_breaks_and_tabs_are_made_visible_beside_the_text(drafted):
    page = to_html(hostile_trace(drafted))
    assert page.count("<i></i>\n") == 5  # of the prompt and the tokens
    assert page.count('<i class="tab"></i>\t') == 2


def test_the_page_needs_nothing_else(drafted):
    source = to_html(drafted)
    page = Page(source)
    assert not {"src", "href", "action", "style"} & {name for name, _ in page.attributes}
    assert not [value for name, value in page.attributes if name.startswith("on")]
    assert not re.search(r"https?:|@import|\bfetch\b|XMLHttpRequest|innerHTML", source)
    [policy] = [value for name, value in page.attributes if value and value.startswith("default-src 'none'")]
    for tag, attributes, content in page.contents:
        if "type" not in attributes:
            digest = b64encode(sha256(content.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_can_be_used_without_sight_or_colour(drafted):
    source = to_html(drafted)
    page = Page(source)
    assert ("lang", "en") in page.attributes and page.tags.count("h1") == page.tags.count("title") == 1
    ids = {value for name, value in page.attributes if name == "id"}
    assert {value for name, value in page.attributes if name in ("aria-labelledby", "aria-describedby")} <= ids
    assert ("role", "img") in page.attributes and ("aria-live", "polite") in page.attributes
    css = next(content for tag, _, content in page.contents if tag == "style")
    marks = [
        re.search(rf"#text \.{kind}, .*? {{ (border.*?);", css) for kind in ("full", "draft", "bonus", "correction")
    ]
    shapes = [mark and re.sub(r"var\(.*?\)", "", mark[1]) for mark in marks]
    assert None not in shapes and len(set(shapes)) == 4
    assert "prefers-color-scheme: dark" in css and ":focus-visible" in css


def test_a_thousand_tokens_weigh_less_than_200_kilobytes(drafted):
    size, rounds = len(drafted.tokens), len(drafted.rounds)
    copies = range(-(-1000 // size))
    tokens = [replace(token, round=token.round + n * rounds) for n in copies for token in drafted.tokens]
    long = replace(drafted, text=drafted.text * len(copies), tokens=tuple(tokens), rounds=drafted.rounds * len(copies))
    source = to_html(long)
    assert len(Page(source).tokens) >= 1000
    assert len(source.encode()) < 200_000 * len(tokens) / 1000


# --- the command


def test_the_command_writes_a_page(run, tmp_path):
    path = tmp_path / "page.html"
    printed = run(
        QUESTION, "--max-new-tokens", 12, "--period", 4, "--sparsity", "coarse", "--keep", 0.3, "--output", path
    )
    assert (printed.code, printed.out) == (0, "")
    assert printed.err.startswith(f"12 tokens in {path} (")
    page = Page(path.read_bytes().decode())
    assert len(page.tokens) == 12 and QUESTION in page.prompt
    assert "Model embedded, 3,085,824 parameters in float32, sparsity coarse with keep 0.3, period 4" in page.words


def test_json_is_the_data_in_place_of_the_page(run, tmp_path, engine):
    options = (QUESTION, "--max-new-tokens", 6, "--period", 4, "--json")
    printed = json.loads(run(*options).out)
    want = collect(engine, [{"role": "user", "content": QUESTION}], max_new_tokens=6, correction=4)
    assert printed["tokens"] == json.loads(to_json(want))["tokens"]
    assert printed["model"] == "embedded"
    for _ in range(2):  # an earlier one is overwritten
        assert run(*options, "--output", tmp_path / "trace.json").code == 0
    assert json.loads((tmp_path / "trace.json").read_text())["tokens"] == printed["tokens"]
    assert TracedToken(**printed["tokens"][0]) == want.tokens[0]


def test_a_text_that_was_not_drafted_comes_with_a_hint(run, tmp_path):
    printed = run(QUESTION, "--max-new-tokens", 3, "--output", tmp_path / "page.html")
    assert "nothing was drafted; give --period 16" in printed.err
    plain = run(QUESTION, "--max-new-tokens", 3, "--sparsity", "none", "--output", tmp_path / "page.html")
    assert plain.code == 0 and "--period" not in plain.err


def test_what_cannot_be_written_is_refused_before_a_model_is_loaded(run, tmp_path, unloaded):
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    for path, words in [
        (tmp_path / "none" / "page.html", f"there is no folder {tmp_path / 'none'}"),
        (tmp_path, "it is a folder"),
        (other, "no trace of sirius; choose another file, or give --force"),
        ("-", "leave it out and give --json"),
    ]:
        printed = run(QUESTION, "--output", path)
        assert printed.code == 2 and words in " ".join(printed.err.split())
    assert other.read_text() == "mine"
    for arguments, words in [
        ((), "--output is missing; give --output PAGE.html"),
        (("--json", "--force"), "--force would change nothing without a file to write over"),
        (("--json", "--seed", 1), "--seed would change nothing at temperature 0"),
        (("--json", "--accept", "threshold", "--period", 1), "--accept would change nothing at --period 1"),
        (("--json", "--sparsity", "nope"), "there is no sparsity method 'nope'"),
    ]:
        printed = run(QUESTION, *arguments)
        assert printed.code == 2 and words in " ".join(printed.err.split())


def test_another_file_is_overwritten_by_force_alone(run, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    assert run(QUESTION, "--max-new-tokens", 2, "--output", path).code == 2
    assert run(QUESTION, "--max-new-tokens", 2, "--output", path, "--force").code == 0
    assert len(Page(path.read_text()).tokens) == 2


def test_the_options_are_those_of_generate():
    from typer.main import get_command

    commands = get_command(cli.app).commands
    generate, trace = ({each.name: each for each in commands[name].params} for name in ("generate", "trace"))
    assert trace.keys() - generate.keys() == {"force"}
    assert generate.keys() - trace.keys() == {"input", "shared_set", "batch_size", "compile", "logprobs"}
    for name in trace.keys() & generate.keys() - {"prompt", "output", "json"}:
        assert (trace[name].help, trace[name].default) == (generate[name].help, generate[name].default)

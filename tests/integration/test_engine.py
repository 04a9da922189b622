"""What an engine takes for a prompt, and what it refuses."""

import pydoc
import re
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import greedy, tiny_model
from sirius.core import CorrectionConfig, SparsityConfig
from sirius.decoding import accept, register
from sirius.decoding.period import Period
from sirius.engine import LOSSLESS, Engine, end_tokens
from sirius.errors import ConfigError, ModelError, RequestError

pytestmark = pytest.mark.integration

TEMPLATE = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    "{{ messages[0].content }}"
)


@pytest.fixture(scope="module")
def engine():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE)
    return Engine(tiny_model(eos_token_id=None, max_position_embeddings=40), tokenizer)


def test_a_prompt_is_a_text_token_ids_or_a_chat(engine):
    want = (5, 9, 7)
    for prompt in ("w5 w9 w7", [5, 9, 7], (5, 9, 7), [{"role": "user", "content": "w5 w9 w7"}]):
        assert engine.encode(prompt) == want


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "empty"),
        ([], "empty"),
        ("   ", "the prompt is empty"),
        ([5, 131], "from 0 to 130; got 131"),
        ([5, -1], "got -1"),
        ([5, "w5"], "got 'w5'"),
        ([True], "got True"),
        ("w5 \udcff", "not text that can be encoded"),
        ([{"role": "system", "content": "w5"}], "begin with the user"),
        (list(range(3, 43)), "the prompt has 40 tokens and the model's context holds 40"),
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode(),
)
def test_a_prompt_that_cannot_be_decoded_is_refused(engine, prompt, says):
    with pytest.raises(RequestError, match=says):
        engine.generate(prompt)


def test_a_chat_that_is_no_text_is_an_error_of_the_prompt(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ messages[0].content }}")
    with pytest.raises(RequestError, match="not text that can be encoded"):
        engine.encode([{"role": "user", "content": "w5 \udcff"}])


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ messages[7].content.x }}", "UndefinedError"),
        ("{% for m in messages %}{{ m.content", "TemplateSyntaxError"),
        ("{{ {}['key'].x }}", "UndefinedError"),
        ("{{ range(10, 0, 0) | list }}", "ValueError"),
        ("{{ raise_exception('begin anew') }}", r"TemplateError\('begin anew'\)"),
    ],
)
def test_whatever_a_chat_template_raises_is_an_error_of_the_prompt(engine, template, says, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    with pytest.raises(RequestError, match=f"the model's chat template refuses these messages: {says}"):
        engine.generate([{"role": "user", "content": "w5"}])


@pytest.mark.parametrize("prompts", [[5, 6], (5,), torch.tensor([5, 6])], ids=str)
def test_token_ids_are_not_taken_for_prompts(engine, prompts):
    with pytest.raises(RequestError, match="token ids: put them in a list"):
        engine.generate_many(prompts)


def test_the_room_is_exact_by_one_token(engine):
    prompt = list(range(3, 13))
    assert engine.room(prompt) == 30
    assert len(engine.generate(prompt, max_new_tokens=30).token_ids) == 30
    assert len(engine.generate(prompt).token_ids) == 30
    with pytest.raises(
        RequestError, match=r"10 \+ max_new_tokens 31 = 41 tokens .* 40; set max_new_tokens to at most 30"
    ):
        engine.generate(prompt, max_new_tokens=31)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "at least 1; got 0"),
        ({"stop": ["w1", ""]}, "none of them empty"),
        ({"stop": 5}, r"stop takes strings.*got \[5\]"),
        ({"stop": ""}, "none of them empty"),
        ({"sparsity": "dense"}, "known are cats, coarse, fine, griffin, none"),
        ({"sparsity": SparsityConfig("coarse", keep=0.001)}, "keeps none"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_before_anything_is_decoded(engine, options, says):
    with pytest.raises(ConfigError, match=says):
        engine.stream([5, 6], **options)  # not iterated


@pytest.mark.parametrize(
    "change",
    [
        {"period": 0},
        {"accept": "threshold", "threshold": -0.1},
        {"accept": "threshold", "threshold": 1.1},
        {"accept_temperature": 0.0},
    ],
    ids=str,
)
def test_a_correction_out_of_range_is_refused(change):
    with pytest.raises(ConfigError, match=str(next(iter(change.values())))):
        CorrectionConfig(**change)


def test_a_rule_that_nobody_registered_is_refused_before_anything_is_decoded(engine):
    unknown = CorrectionConfig(accept="sampled")
    for decode in (engine.stream, lambda prompt, **options: engine.generate_many([prompt], **options)):
        with pytest.raises(ConfigError, match=r"accept is one of lossless, .*threshold.*; got 'sampled'"):
            decode([5, 6], correction=unknown)  # not iterated


OPTIONS = ("max_new_tokens", "stop", "sampling", "sparsity", "correction")


@pytest.mark.parametrize("name", ["generate", "stream", "generate_many"])
def test_help_names_every_option(name):
    page = pydoc.render_doc(getattr(Engine, name), renderer=pydoc.plaintext)
    for option in OPTIONS:
        assert re.search(rf"\b{option}: .* = ", page), option


def test_the_help_of_generate_says_what_each_option_does():
    page = pydoc.render_doc(Engine.generate, renderer=pydoc.plaintext)
    for option in ("prompt", *OPTIONS):
        assert re.search(rf"^ +{option}  +\w", page, re.MULTILINE), option


@pytest.mark.parametrize("name", ["generate", "stream", "generate_many", "batch", "text"])
def test_a_misspelt_option_is_refused(engine, name):
    first = {"batch": (), "generate_many": ([[5]],)}.get(name, ([5],))
    with pytest.raises(TypeError, match="perod"):
        getattr(engine, name)(*first, perod=3)


def test_a_misspelt_option_of_one_prompt_is_its_own_error(engine):
    each = [{"max_new_token": 3}, {"max_new_tokens": 3}, {"sparsity": "none"}]
    done = dict(engine.generate_many([[5, 6], [5, 6], [5, 6]], each=each, max_new_tokens=5))
    assert len(done[1].token_ids) == 3
    for index, name in ((0, "max_new_token"), (2, "sparsity")):
        assert isinstance(done[index], ConfigError)
        assert str(done[index]) == f"each takes max_new_tokens, stop, sampling; got {name}"


@pytest.fixture
def third_party():
    """Register a rule that passes every guess but one token, and forget it afterwards."""
    seen = []

    @register("anything-but-five")
    def accept_all_but_five(check, *, threshold, temperature):
        seen.append((threshold, temperature))
        return check.own() | (check.tree.tokens != 5)

    yield seen
    del accept._RULES["anything-but-five"]


def test_a_rule_of_a_third_party_decodes(engine, third_party):
    correction = {"period": 4, "accept": "anything-but-five", "threshold": 0.3, "accept_temperature": 0.9}
    done = engine.generate([5, 6, 7], max_new_tokens=21, sparsity={"keep": 0.1}, correction=correction)
    full = engine.generate([5, 6, 7], max_new_tokens=21, sparsity="none")
    assert done.stats.acceptance_histogram[3] == done.stats.rounds > 0 and done.token_ids != full.token_ids
    assert not done.stats.lossless and set(third_party) == {(0.3, 0.9)}


def decoded(batch, engine):
    batch.add(engine.text([5, 6, 7], max_new_tokens=13))
    while batch.busy:
        for update in batch.step():
            done = update.completion
    return done


def test_a_batch_takes_a_rule_of_the_callers_own(engine):
    def nothing(check):
        return torch.zeros_like(check.own())

    done = decoded(engine.batch(sparsity="coarse", correction=4, rule=nothing), engine)
    assert done.stats.accepted == 0 < done.stats.drafted and not done.stats.lossless
    done = decoded(engine.batch(sparsity="coarse", correction=4, rule=accept.accept_own), engine)
    assert done.stats.lossless


def test_a_batch_takes_a_period_of_the_callers_own(engine):
    class Alternating(Period):
        def choose(self, rows):
            self.now = 5 - self.now
            return self.now

    done = decoded(engine.batch(sparsity={"keep": 1.0}, correction=4, period=Alternating(1)), engine)
    none, *_, whole = done.stats.acceptance_histogram
    assert none > 0 and whole > 0  # rounds that drafted nothing, and those of four tokens
    assert done.token_ids == engine.generate([5, 6, 7], max_new_tokens=13, sparsity="none").token_ids


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"correction": None, "rule": accept.accept_own}, "without a correction there are none"),
        ({"correction": None, "period": Period(4)}, "begins at 4 tokens a check, and the correction allows at most 1"),
        ({"correction": 3, "period": Period(4)}, "begins at 4 tokens a check, and the correction allows at most 3"),
    ],
    ids=["rule alone", "period alone", "too long"],
)
def test_a_rule_or_period_that_fits_no_correction_is_refused(engine, options, says):
    with pytest.raises(ConfigError, match=says):
        engine.batch(**options)


@pytest.mark.parametrize("correction", [LOSSLESS, 4, None], ids=str)
def test_a_rule_or_period_where_no_model_drafts_is_refused_by_name(engine, correction):
    own = {"rule": accept.accept_own, "period": Period(1)}
    for names in (("rule",), ("period",), ("rule", "period")):
        with pytest.raises(ConfigError, match=rf"^{' and '.join(names)} would change nothing .*name a sparsity method"):
            engine.batch(sparsity="none", correction=correction, **{name: own[name] for name in names})


def test_a_model_without_a_tokenizer_takes_ids_and_gives_ids():
    bare = Engine(tiny_model(eos_token_id=None))
    done = bare.generate([5, 6, 7], max_new_tokens=9, sparsity="none")
    assert list(done.token_ids) == greedy(bare.model, [5, 6, 7], 9) and done.text == ""
    for options, says in (({"prompt": "w5"}, "no tokenizer"), ({"prompt": [5], "stop": ["x"]}, "no tokenizer|none")):
        with pytest.raises(RequestError, match=says):
            bare.generate(**options)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_damaged_model_ends_in_an_error_of_ours(temperature):
    model = tiny_model()
    torch.nn.init.constant_(model.get_input_embeddings().weight, float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        Engine(model).generate([5, 6, 7], sampling=temperature)


@pytest.mark.parametrize(("given", "ends"), [(2, {2}), ([2, 9], {2, 9}), (None, {2})])
def test_end_tokens_come_from_the_generation_config_then_from_the_model(given, ends):
    model = tiny_model(eos_token_id=2)
    model.generation_config.eos_token_id = given
    assert end_tokens(model) == ends


def test_a_closed_stream_leaves_the_model_ordinary(engine):
    want = greedy(engine.model, [5, 6, 7], 20)
    stream = engine.stream([5, 6, 7], max_new_tokens=30)
    next(stream), next(stream)
    stream.close()
    assert greedy(engine.model, [5, 6, 7], 20) == want


def test_figures_name_what_is_lossy(engine):
    def lossless(**options):
        return engine.generate([5, 6, 7], max_new_tokens=12, **options).stats.lossless

    assert lossless(sparsity="none") and lossless(sparsity="none", correction=None)
    assert lossless(correction=CorrectionConfig(accept="argmax")) and lossless(
        correction=CorrectionConfig(accept="threshold", threshold=0.51)
    )
    assert lossless() and not lossless(correction="paper") and not lossless(correction=None)


def test_a_checkpoints_repetition_penalty_is_applied_as_transformers_applies_it():
    model = tiny_model(eos_token_id=None)
    free = greedy(model, [5, 6, 7], 30)
    model.generation_config.repetition_penalty = 1.8
    want = greedy(model, [5, 6, 7], 30)
    got = Engine(model).generate([5, 6, 7], max_new_tokens=30, correction=CorrectionConfig(5, accept="argmax"))
    assert list(got.token_ids) == want != free


@pytest.mark.parametrize("kind", [str, list])
def test_a_checkpoints_stop_strings_end_a_text_unless_others_are_given(engine, kind, monkeypatch):
    whole = engine.generate([5, 6, 7], max_new_tokens=20)
    word = engine.decode([next(token for token in whole.token_ids if token < 60)])
    stored = word if kind is str else [word, "no such word"]
    monkeypatch.setattr(engine.model.generation_config, "stop_strings", stored, raising=False)
    again = Engine(engine.model, engine.tokenizer)
    want = engine.generate([5, 6, 7], max_new_tokens=20, stop=word)
    assert want.finish_reason == "stop" and len(want.token_ids) < 20
    for options in {}, {"stop": None}:
        assert again.generate([5, 6, 7], max_new_tokens=20, **options).token_ids == want.token_ids
        [(_, done)] = again.generate_many([[5, 6, 7]], max_new_tokens=20, **options)
        assert done.token_ids == want.token_ids
    for stop in (), [], "no such word":
        assert again.generate([5, 6, 7], max_new_tokens=20, stop=stop).token_ids == whole.token_ids
    with pytest.raises(RequestError, match=r"need a tokenizer, and this model has none; set stop to \(\)"):
        Engine(engine.model).generate([5, 6, 7])
    assert Engine(engine.model).generate([5, 6, 7], max_new_tokens=20, stop=()).token_ids == whole.token_ids


def test_configs_may_be_mappings_of_their_fields(engine):
    options = {"sparsity": {"method": "fine", "keep": 0.3}, "correction": {"period": 4}}
    assert engine.generate([5, 6], max_new_tokens=9, **options).stats.period == 4


def test_no_sampling_is_greedy(engine):
    assert engine.generate([5, 6], max_new_tokens=5, sampling=None).token_ids == tuple(greedy(engine.model, [5, 6], 5))


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 2.5},
        {"max_new_tokens": "5"},
        {"sparsity": {"keeps": 1}},
        {"sparsity": {"keep": "0.5"}},
        {"correction": {"period": 2.5}},
        {"correction": {"threshold": "x"}},
        {"correction": False},
        {"correction": []},
        {"sampling": "x"},
        {"stop": [3]},
    ],
    ids=str,
)
def test_options_of_another_kind_are_refused(engine, options):
    with pytest.raises(ConfigError):
        engine.generate([5, 6], **options)


@pytest.mark.parametrize("prompt", [None, 7, [{"role": "user", "content": 5}], [{"role": "user"}, 3]], ids=str)
def test_prompts_of_another_kind_are_refused(engine, prompt):
    with pytest.raises(RequestError):
        engine.generate(prompt)


def test_the_callers_pauses_are_not_timed(engine):
    done = None
    for update in engine.stream([5, 6], max_new_tokens=6, sparsity="none"):
        time.sleep(0.2)
        done = update.completion
    assert done and done.stats.seconds < 0.2 * 5


def test_a_rule_or_period_of_a_batch_that_is_none_is_refused():
    engine = Engine(tiny_model())
    for options, words in (
        ({"rule": 5}, "rule is a function"),
        ({"period": "auto"}, "period is a .*Period; got 'auto'"),
    ):
        with pytest.raises(ConfigError, match=words):
            engine.batch(**options)

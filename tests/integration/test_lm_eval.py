"""The lm-eval model `sirius`, against lm-eval's own model of transformers on the same weights."""

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from conftest import tiny_model
from sirius import ConfigError, Engine
from sirius.demo.embedded import FOLDER
from sirius.evaluation.completions import Completions
from sirius.evaluation.lm import SiriusLM, fingerprint
from sirius.evaluation.suite import OWN, task_manager

PROMPTS = [
    "Tina has 30 coins. She sells 8 coins. How many coins does Tina have now?",
    "Olga lives in Dublin. Mia drives a green car. What colour is the car of Mia?",
    "Adam has 4 bags.",
]


@pytest.fixture(scope="module")
def theirs() -> HFLM:
    return HFLM(str(FOLDER), device="cpu", dtype="float32", batch_size=2)


@pytest.fixture(scope="module")
def ours() -> SiriusLM:
    return SiriusLM(device="cpu", dtype="float32", batch_size=2, accept="argmax", period=4, quiet=True)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, index, metadata=("a task", index, 1)) for index, each in enumerate(arguments)]


def test_texts_are_those_of_lm_evals_own_model(ours, theirs):
    chats = [ours.apply_chat_template([{"role": "user", "content": each}]) for each in PROMPTS]
    for until in (["."], ["So", " 8"], []):
        asked = [(chat, {"until": until, "do_sample": False, "max_gen_toks": 40}) for chat in chats]
        got = ours.generate_until(requests("generate_until", asked), disable_tqdm=True)
        assert got == theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
        assert not any(stop in text for stop in until for text in got)


def test_texts_end_where_the_tokenizer_says_though_the_model_does_not(ours, theirs):
    engine = Engine(ours.engine.model, ours.engine.tokenizer)
    engine.ends = frozenset()
    chat = ours.apply_chat_template([{"role": "user", "content": PROMPTS[0]}])
    asked = [(chat, {"until": [], "do_sample": False, "max_gen_toks": 60})]
    got = SiriusLM(engine, quiet=True).generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert got == theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert engine.ends == frozenset()


def test_copies_that_lm_eval_fills_up_the_shorter_rank_with_are_counted_once(ours):
    lm = SiriusLM(ours.engine, quiet=True, accept="argmax", period=4)
    options = {"until": [], "do_sample": False, "max_gen_toks": 5}
    asked = requests("generate_until", [(prompt, options) for prompt in PROMPTS[:2]])
    lm.generate_until([*asked, asked[-1]], disable_tqdm=True)
    (figures,) = lm.get_model_info()["sirius_tasks"].values()
    assert figures["tokens"] == 10


def test_samples_of_a_model_with_other_end_tokens_are_not_taken_for_its_own(ours, tmp_path):
    options = {"until": [], "do_sample": False, "max_gen_toks": 5}
    asked = requests("generate_until", [(PROMPTS[0], options)])
    for ends in (ours.engine.ends, frozenset()):
        engine = Engine(ours.engine.model, ours.engine.tokenizer)
        engine.ends = ends
        SiriusLM(engine, quiet=True, completions=str(tmp_path)).generate_until(asked, disable_tqdm=True)
    assert len(Completions(tmp_path).found) == 2


def test_log_probabilities_are_those_of_lm_evals_own_model(ours, theirs):
    pairs = [(PROMPTS[0], " 22"), (PROMPTS[0], " 38 coins"), ("", "Tina"), (f"{PROMPTS[2]} ", "He sells 2.")]
    pairs.append((" ".join(PROMPTS * 20), " He has 4 bags."))  # longer than the context
    got = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    want = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert [each[0] for each in got] == pytest.approx([each[0] for each in want], abs=1e-3)
    assert [each[1] for each in got] == [each[1] for each in want]


def test_rolling_log_probabilities_are_those_of_lm_evals_own_model(ours, theirs):
    texts = [(PROMPTS[1],), (" ".join(PROMPTS * 20),)]  # the second is longer than the context
    got = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    want = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert got == pytest.approx(want, rel=1e-4)


def test_copies_of_a_sampled_prompt_are_texts_of_their_own(ours):
    asked = [(PROMPTS[2], {"until": [], "do_sample": True, "temperature": 1.5, "max_gen_toks": 12})] * 3
    lossless = SiriusLM(ours.engine, quiet=True)
    texts = lossless.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert len(set(texts)) == 3
    [request] = requests("generate_until", asked[:1])  # as lm-eval asks for several texts of one problem
    assert len(set(lossless.generate_until([request] * 3, disable_tqdm=True))) == 3
    assert texts == lossless.generate_until(requests("generate_until", asked), disable_tqdm=True)


def test_a_prompt_that_is_too_long_loses_its_beginning_as_in_lm_evals_own_model(ours, theirs):
    asked = [(" ".join(PROMPTS * 20), {"until": [], "do_sample": False, "max_gen_toks": 8})]
    got = ours.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert got == theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"typical_p": 0.5}, "typical_p"),
        ({"num_beams": 4}, "beam search"),
        ({"max_gen_toks": 600}, "no room"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 7}, "top_p"),
    ],
)
def test_options_that_are_not_honoured_are_refused_by_name(ours, options, said):
    with pytest.raises(ConfigError, match=said):
        ours.generate_until(requests("generate_until", [(PROMPTS[0], {"until": [], **options})]), disable_tqdm=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kept": 0.3}, "kept"),
        ({"keep": 3}, "keep"),
        ({"batch_size": "many"}, "batch_size"),
    ],
)
def test_arguments_that_fit_nothing_are_refused_before_a_model_is_loaded(arguments, said):
    with pytest.raises(ConfigError, match=said):
        SiriusLM("a/folder/that/is/none", **arguments)


def test_simple_evaluate_finds_the_model_and_stores_its_figures(tmp_path):
    options = {
        "tasks": ["demo_reasoning"],
        "limit": 3,
        "apply_chat_template": True,
        "task_manager": task_manager(OWN, ["demo_reasoning"]),
        "bootstrap_iters": 0,
    }
    setting = {"sparsity": "coarse", "preset": "paper", "threads": 1, "completions": str(tmp_path)}
    found = simple_evaluate(model="sirius", model_args={"quiet": True, **setting}, **options)
    scores = [each["exact_match"] for each in found["samples"]["demo_reasoning"]]
    assert len(scores) == 3 and found["results"]["demo_reasoning"]["exact_match,none"] == sum(scores) / 3
    figures = found["config"]["sirius_tasks"]["demo_reasoning"]
    assert (figures["keep"], figures["threshold"], figures["tree_width"], figures["lossless"]) == (0.4, 0.1, 8, False)
    assert 1 < figures["aal"] <= 16
    assert len(Completions(tmp_path).found) == 3

    texts = [each["resps"] for each in found["samples"]["demo_reasoning"]]
    again = simple_evaluate(model="sirius", model_args={"quiet": True, **setting}, **options)
    assert [each["resps"] for each in again["samples"]["demo_reasoning"]] == texts
    assert again["config"]["sirius_tasks"]["demo_reasoning"] == figures  # seconds too: nothing was decoded again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_changed_number_anywhere_changes_the_fingerprint_of_a_model(dtype):
    model = tiny_model(dtype=dtype)
    before = fingerprint(model)
    assert before == fingerprint(tiny_model(dtype=dtype))
    last = list(model.parameters())[-1]
    for weight in (model.get_input_embeddings().weight, last):
        number = weight.data.view(-1)[-1].clone()
        weight.data.view(-1)[-1] += 1
        assert fingerprint(model) != before
        weight.data.view(-1)[-1] = number
    assert fingerprint(model) == before

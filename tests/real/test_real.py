"""Trained models on real questions: under the argmax rule each text is transformers' own, token for token.

`make models` fetches the models; without them, or without the questions, these tests are skipped.
"""

import os
from dataclasses import dataclass
from functools import cache
from itertools import islice

import pytest
import torch
from models import DEFAULTS, KNOWN, MODELS
from prompts import DATA, FILES, as_prompt, questions
from transformers import AutoModelForCausalLM

from conftest import greedy
from sirius.engine import Engine
from sirius.kernels import cpu

pytestmark = pytest.mark.real

QUESTIONS, BATCH = 30, 6
NEW_TOKENS = int(os.environ.get("SIRIUS_REAL_TOKENS", "48"))
NARROW_QUESTIONS = int(os.environ.get("SIRIUS_REAL_QUESTIONS", "24"))  # of the test in bfloat16
TASKS = tuple(FILES)


@dataclass(frozen=True)
class Real:
    """A model, and what transformers makes of prompts with the same weights."""

    engine: Engine
    texts: dict[str, list[tuple[list[int], list[int]]]]


def folder(name: str):
    if not (MODELS / name).is_dir():
        pytest.skip(f"no model {name}; fetch it: python runs/models.py {name}")
    return MODELS / name


@cache
def load(name: str) -> Real:
    """Return a model with transformers' texts for all questions; one at a time fits into little memory."""
    engine = Engine.load(folder(name), dtype="float32", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32).eval()
    texts = {}
    for task in TASKS:
        asked = [list(engine.encode(as_prompt(engine, each))) for each in questions(task, QUESTIONS)]
        texts[task] = [(prompt, greedy(theirs, prompt, NEW_TOKENS)) for prompt in asked]
    return Real(engine, texts)


@pytest.fixture(params=DEFAULTS)
def real(request) -> Real:
    folder(request.param)
    if missing := [DATA / file for file in FILES.values() if not (DATA / file).is_file()]:
        pytest.skip(f"no questions: {missing[0]} is missing")
    return load(request.param)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", ["coarse", "fine"])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.timeout(1800)
def test_a_corrected_text_is_transformers_own(real, task, method, width):
    rule = {"period": 8, "accept": "argmax", "tree_width": width}
    sparsity = {"method": method, "keep": 0.5}
    prompts, wanted = zip(*real.texts[task], strict=True)
    options = {"max_new_tokens": NEW_TOKENS, "sparsity": sparsity, "correction": rule}
    done = dict(real.engine.generate_many(prompts, batch_size=BATCH, **options))
    other = [i for i, want in enumerate(wanted) if list(done[i].token_ids) != want]
    assert other == [], real.engine.decode(prompts[other[0]])
    assert any("draft" in each.origins for each in done.values())  # the sparse model did have a part in it


@cache
def narrow() -> tuple[Engine, list[list[int]], list[tuple[int, ...]]]:
    """Return SmolLM2 in bfloat16 with prompts, and what its full decoding writes of each alone."""
    if not (DATA / FILES["gsm8k"]).is_file():
        pytest.skip(f"no questions: {DATA / FILES['gsm8k']} is missing")
    engine = Engine.load(folder("smollm2-135m"), dtype="bfloat16", device="cpu")
    asked = [list(engine.encode(as_prompt(engine, each))) for each in questions("gsm8k", NARROW_QUESTIONS)]
    plain = {"max_new_tokens": NEW_TOKENS, "sparsity": "none"}
    return engine, asked, [engine.generate(prompt, **plain).token_ids for prompt in asked]


@pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize(
    "rule", [{"period": 16}, {"period": 8, "tree_width": 4}, {"period": "auto"}], ids=["chain", "tree", "auto"]
)
@pytest.mark.timeout(1800)
def test_in_bfloat16_texts_are_full_decodings_in_any_company_interrupted_and_gone_on_with(rows, rule):
    engine, prompts, wanted = narrow()
    options = {"max_new_tokens": NEW_TOKENS, "batch_size": rows, "correction": rule}
    began = engine.generate_many(prompts, **options)
    done = dict(islice(began, len(prompts) // 2))
    began.close()
    left = [index for index in range(len(prompts)) if index not in done]
    for place, text in engine.generate_many([prompts[index] for index in left], **options):
        done[left[place]] = text
    assert [index for index, want in enumerate(wanted) if done[index].token_ids != want] == []
    assert all(each.stats.lossless for each in done.values())


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_tokens_that_end_a_text_are_those_of_the_model(name):
    engine = Engine.load(folder(name))
    ends = {engine.tokenizer.convert_tokens_to_ids(token) for token in KNOWN[name].ends}
    assert engine.ends == ends
    assert None not in ends


@pytest.mark.parametrize("name", [name for name in DEFAULTS if "<|im_end|>" in KNOWN[name].ends])
def test_an_instructed_model_answers_and_ends_its_turn(name):
    engine = Engine.load(folder(name))
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    done = engine.generate(asked, max_new_tokens=40, correction={"period": 8, "accept": "argmax"})
    assert "Paris" in done.text
    assert "<|" not in done.text
    assert done.finish_reason == "stop"

"""Threads that share an engine, or a model: their texts are what they are alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import sirius
from conftest import greedy, slow, tiny_model
from sirius.engine import Engine

pytestmark = pytest.mark.integration

PROMPTS = [[5, 17, 93, 41, 8], [60, 22], [7, 8, 9, 10], [3], [99, 100, 101], [12, 13, 14, 15, 16, 17, 18]]
NEW = 30


@pytest.mark.parametrize("correction", [5, {"period": 4, "tree_width": 3}, "auto"], ids=["chain", "tree", "auto"])
@pytest.mark.parametrize("method", ["coarse", slow("fine")])
def test_texts_of_threads_are_what_they_are_alone(method, correction):
    model = tiny_model(eos_token_id=None)
    wanted = [greedy(model, prompt, NEW) for prompt in PROMPTS]
    engine = Engine(model)

    def decode(index: int) -> list[int]:
        options = {"max_new_tokens": NEW, "sparsity": method, "correction": correction}
        if index % 2:
            return list(engine.generate(PROMPTS[index], **options).token_ids)
        *_, last = engine.stream(PROMPTS[index], **options)
        return list(last.completion.token_ids)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(decode, [*range(len(PROMPTS))] * 3)) == wanted * 3


def test_threads_share_a_model_through_transformers():
    model = tiny_model(eos_token_id=None)
    wanted = [greedy(model, prompt, NEW) for prompt in PROMPTS]

    def decode(prompt: list[int]) -> list[int]:
        options = {"max_new_tokens": NEW, "do_sample": False, "custom_generate": sirius.decode, "correction": 5}
        return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(decode, PROMPTS * 2)) == wanted * 2


def test_a_model_may_be_prepared_while_another_thread_decodes_with_it():
    engine = Engine(tiny_model(eos_token_id=None))
    want = engine.generate(PROMPTS[0], max_new_tokens=NEW, correction=5).token_ids
    with ThreadPoolExecutor(1) as pool:
        texts = [pool.submit(engine.generate, PROMPTS[0], max_new_tokens=NEW, correction=5) for _ in range(10)]
        while not all(text.done() for text in texts):
            Engine(engine.model)
    assert all(text.result().token_ids == want for text in texts)


def test_two_engines_whose_models_share_a_configuration_decode_in_two_threads():
    first, second = tiny_model(eos_token_id=None), tiny_model(eos_token_id=None, seed=1)
    for module in second.modules():
        if hasattr(module, "config"):
            module.config = first.config
    wanted = [[greedy(model, prompt, NEW) for prompt in PROMPTS] for model in (first, second)]
    assert wanted[0] != wanted[1]

    def decode(engine: Engine) -> list[list[int]]:
        options = {"max_new_tokens": NEW, "sparsity": "fine", "correction": 5}
        return [list(engine.generate(prompt, **options).token_ids) for prompt in PROMPTS * 3]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(decode, map(Engine, (first, second)))) == [texts * 3 for texts in wanted]


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float64)], ids=str)
def test_a_model_may_be_called_by_one_thread_while_another_decodes_with_it(dtype):
    model, ids = tiny_model(dtype=dtype, eos_token_id=None), torch.tensor([PROMPTS[0]])
    engine = Engine(model)
    options = {"max_new_tokens": NEW, "sparsity": "coarse", "correction": 5}
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        want, text = model(ids).logits, engine.generate(PROMPTS[0], **options).token_ids
        texts = [pool.submit(engine.generate, PROMPTS[0], **options) for _ in range(10)]
        calls = 0
        while not all(each.done() for each in texts):
            torch.testing.assert_close(model(ids).logits, want)
            calls += 1
    assert calls > 3
    assert all(each.result().token_ids == text for each in texts)

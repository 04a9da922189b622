"""Log-probabilities of given tokens, against transformers' own scores."""

import pytest
import torch

from conftest import FAMILIES, VOCABULARY, tiny_model
from sirius import ConfigError, Engine, RequestError


def wanted(model, prompt: list[int], following: list[int]) -> list[float]:
    with torch.inference_mode():
        scores = model(torch.tensor([prompt + following])).logits[0].log_softmax(-1)
    return [float(scores[len(prompt) + i - 1, token]) for i, token in enumerate(following)]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_model_whatever_is_read_beside_them(family):
    model, plain = tiny_model(family), tiny_model(family)
    texts = [
        ([5, 9, 11], [7]),
        ([5, 9, 11], [8]),
        ([3], [4, 5, 6, 7]),
        ([20 + i for i in range(17)], [9, 9]),
        ([2], [2]),
    ]
    for batch_size in (1, 4):
        found = Engine(model).score(texts, batch_size=batch_size)
        for (prompt, following), each in zip(texts, found, strict=True):
            want = wanted(plain, prompt, following)
            assert each.logprobs == pytest.approx(want, abs=2e-4)
            assert each.total == pytest.approx(sum(want), abs=1e-3)


def test_greedy_tokens_are_told_from_others():
    model = tiny_model()
    with torch.inference_mode():
        best = int(model(torch.tensor([[5, 9, 11]])).logits[0, -1].argmax())
    found = Engine(model).score([([5, 9, 11], [best]), ([5, 9, 11], [(best + 1) % VOCABULARY])])
    assert [each.greedy for each in found] == [(True,), (False,)]


def test_texts_are_tokenised_together(tokenizer):
    engine = Engine(tiny_model(), tokenizer)
    assert engine.score([("abc", "de")]) == engine.score([(engine.encode("abc"), engine.encode("de"))])


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (([5], []), "at least one"),
        (([5], "a"), "a continuation is a text where its prompt is one"),
        (([5], [VOCABULARY]), "whole numbers from 0"),
        (([], [5]), "the prompt is empty"),
        (([5] * 500, [5] * 14), "513 tokens pass the model's context of 512"),
    ],
)
def test_a_pair_that_cannot_be_read_is_refused(pair, said, tokenizer):
    with pytest.raises(RequestError, match=said):
        Engine(tiny_model(), tokenizer).score([pair])


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_a_batch_size_below_one_is_refused(batch_size):
    with pytest.raises(ConfigError, match="batch_size is a whole number of texts, at least 1; got"):
        Engine(tiny_model()).score([([5, 9], [7])], batch_size=batch_size)

"""Decoding over the toy model: nothing here needs transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Toy
from sirius.core import Mode
from sirius.decoding.accept import accept_argmax
from sirius.decoding.loop import Plan, decode
from sirius.errors import ModelError

PROMPT = [3, 1, 4]


def dense_greedy(toy: Toy, prompt: list[int], new_tokens: int, process=None) -> list[int]:
    tokens = list(prompt)
    for _ in range(new_tokens):
        scores = toy.scores(tokens, Mode.DENSE)
        scores = process(torch.tensor([tokens]), scores[None])[0] if process else scores
        tokens.append(int(scores.argmax()))
    return tokens[len(prompt) :]


def run(toy: Toy, plan: Plan, prompt: list[int] = PROMPT):
    return list(decode(toy, torch.tensor([prompt]), plan))


def text(rounds) -> list[int]:
    return [token for r in rounds for token in r.tokens]


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0], ids=["perfect", "usual", "hopeless"])
@pytest.mark.parametrize("period", [1, 2, 5, 16, 40])
def test_the_draft_changes_speed_never_text(period, noise):
    rounds = run(Toy(noise), Plan(60, period))
    assert text(rounds) == dense_greedy(Toy(), PROMPT, 60)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=6), st.integers(1, 50), st.integers(1, 20), st.floats(0, 1))
def test_the_budget_is_met_to_the_token(prompt, new_tokens, period, noise):
    rounds = run(Toy(noise), Plan(new_tokens, period), prompt)
    assert text(rounds) == dense_greedy(Toy(), prompt, new_tokens)


def test_a_perfect_draft_is_always_accepted():
    windows = run(Toy(noise=0.0), Plan(1 + 3 * 5, period=5))[1:]
    assert [w.accepted for w in windows] == [4, 4, 4]


def test_after_each_round_the_cache_holds_all_but_the_newest_token_written_by_the_full_model():
    toy, tokens = Toy(noise=0.5), list(PROMPT)
    for r in decode(toy, torch.tensor([PROMPT]), Plan(50, period=6)):
        tokens += r.tokens
        assert [token for token, _ in toy.slots] == tokens[:-1]
        assert Mode.SPARSE not in {mode for _, mode in toy.slots}


def test_the_cache_never_holds_more_than_the_text_will():
    toy, most = Toy(noise=0.0), 0
    read = toy.read

    def watched(tokens, mode, last=None):
        nonlocal most
        scores = read(tokens, mode, last)
        most = max(most, len(toy.slots))
        return scores

    toy.read = watched
    run(toy, Plan(20, period=16))
    assert most == len(PROMPT) + 20 - 1


def test_neurons_are_selected_once_after_the_prompt():
    toy = Toy()
    run(toy, Plan(30, period=4))
    assert toy.selected == 1


def test_a_draft_goes_no_further_than_an_end_of_text():
    free = dense_greedy(Toy(), PROMPT, 30)
    end = free[4]
    windows = run(Toy(noise=0.0), Plan(30, period=10, ends=frozenset({end})))[1:]
    assert all(end not in w.draft[:-1] for w in windows)
    assert windows[0].draft == tuple(free[1 : free.index(end, 1) + 1])


def test_a_sparse_judge_decodes_with_the_sparse_model_alone():
    toy = Toy(noise=1.0)
    rounds = run(toy, Plan(20, judge=Mode.SPARSE))
    tokens = PROMPT + text(rounds)
    want = [int(toy.scores(tokens[:n], Mode.SPARSE).argmax()) for n in range(len(PROMPT) + 1, len(tokens))]
    assert text(rounds)[1:] == want


@pytest.mark.parametrize("period", [1, 4, 9])
def test_a_processor_sees_every_prefix_of_both_models(period):
    def forbid_repeats(tokens, scores):
        return scores.scatter(1, tokens[:, -3:], -float("inf"))

    rounds = run(Toy(noise=0.4), Plan(40, period, process=forbid_repeats))
    assert text(rounds) == dense_greedy(Toy(), PROMPT, 40, forbid_repeats)


def test_kept_scores_are_those_of_the_full_model_token_by_token():
    rounds = run(Toy(noise=0.5), Plan(30, period=5, keep_scores=True))
    tokens = PROMPT + text(rounds)
    got = torch.cat([r.scores for r in rounds])
    want = torch.stack([Toy().scores(tokens[:n], Mode.DENSE) for n in range(len(PROMPT), len(tokens))])
    assert torch.equal(got, want)


def test_the_rule_decides_what_is_kept():
    def nothing(draft, scores):
        return type(accept_argmax(draft, scores))(0, int(scores[0].argmax()))

    windows = run(Toy(noise=0.0), Plan(12, period=5, rule=nothing))[1:]
    assert [len(w.tokens) for w in windows] == [1] * 11


def test_scores_that_are_not_numbers_end_in_an_error_of_ours():
    toy = Toy()
    toy.scores = lambda tokens, mode: torch.full((11,), float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        run(toy, Plan(3))

"""A probe over the toy model: what it tells is what drafting would have met, and nothing is changed by it."""

from copy import deepcopy

import pytest

from conftest import Toy, begin
from sirius.core import CorrectionConfig, Mode
from sirius.decoding.accept import make_rule
from sirius.decoding.loop import Plan, Row, next_round
from sirius.decoding.period import Period
from sirius.decoding.probe import probe
from sirius.decoding.sampling import Noise

PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5]]
COUNT = 12


def decoded(plan: Plan, noise: float = 0.5, seed: int | None = None) -> tuple[Toy, list[Row]]:
    """Return a toy and rows that have been decoded plainly for some tokens."""
    toy = Toy(noise)
    rows = [Row(list(prompt), 60, 80, noise=None if seed is None else Noise(seed)) for prompt in PROMPTS]
    for row in rows:
        begin(toy, row)
    for _ in range(COUNT + 4):
        next_round(toy, rows, plan)
    return toy, rows


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_it_counts_the_guesses_that_are_the_full_models_tokens(noise):
    plan = Plan(Period(1))
    toy, rows = decoded(plan, noise)
    want = 0
    for row in rows:
        for place in range(len(row.tokens) - COUNT, len(row.tokens)):
            want += int(toy.scores(row.tokens[:place], Mode.SPARSE).argmax()) == row.tokens[place]
    found = probe(toy, rows, plan, COUNT)
    assert (found.rows, found.tokens, found.judged, found.kept) == (3, COUNT, 3 * COUNT, want)
    assert found.seconds > 0


@pytest.mark.parametrize("seed", [None, 7], ids=["greedy", "sampled"])
@pytest.mark.parametrize("accept", ["lossless", "relative"])
def test_texts_and_cache_stay_as_they_are_and_go_on_as_if_nothing_had_been(seed, accept):
    config = CorrectionConfig(1, accept)
    plan = Plan(Period(1), make_rule(config))
    (toy, rows), (_, want) = decoded(plan, seed=seed), decoded(plan, seed=seed)
    held, tokens = deepcopy(toy.held), [list(row.tokens) for row in rows]
    probe(toy, rows, plan, COUNT)
    assert toy.held == held and [row.tokens for row in rows] == tokens
    other, _ = decoded(plan, seed=seed)
    for _ in range(10):
        next_round(toy, rows, plan)
        next_round(other, want, plan)
    assert [row.tokens for row in rows] == [row.tokens for row in want]


def test_the_draft_of_a_sampled_text_is_asked_with_the_texts_noise():
    plan = Plan(Period(1))
    toy, rows = decoded(plan, noise=0.0, seed=3)
    assert probe(toy, rows, plan, COUNT).kept == 3 * COUNT


def test_in_a_tree_any_of_the_likeliest_tokens_may_stand():
    toy, rows = decoded(Plan(Period(1)), noise=1.0)
    alone, wide = (probe(toy, rows, Plan(Period(1), width=width), COUNT).kept for width in (1, 11))
    assert alone < wide == 3 * COUNT  # eleven of eleven tokens


def test_under_a_lossy_rule_what_is_likely_enough_stands_too():
    toy, rows = decoded(Plan(Period(1)), noise=1.0)
    strict, lax = (CorrectionConfig(1, "threshold", bar, accept_temperature=1.0) for bar in (1.0, 0.0))
    kept = [probe(toy, rows, Plan(Period(1), make_rule(config)), COUNT).kept for config in (strict, lax)]
    assert kept[0] < kept[1] == 3 * COUNT

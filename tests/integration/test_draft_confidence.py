"""Chains that end after a guess that the draft doubts: the same texts from fewer guesses."""

import pytest
from drafts import FOLLOWED, NEW, PROMPT, chain, rounded

from conftest import greedy, tiny_model
from sirius.core import CorrectionConfig, SamplingConfig
from sirius.engine import Engine
from sirius.stats import Stats

pytestmark = pytest.mark.integration


def some_ended_early(stats: Stats, period: int) -> bool:
    """Tell whether chains ended early; fewer than `period` windows lack room for a whole chain."""
    return stats.rounds - stats.rounds_complete >= period


def test_a_chain_ends_after_a_guess_that_its_draft_doubts():
    model = tiny_model(eos_token_id=None, initializer_range=0.7)  # sure of some guesses
    want, engine = greedy(model, PROMPT, NEW), Engine(model)
    lengths = []
    for confidence in (0.0, 0.5, 0.999):
        correction = chain(8, draft_confidence=confidence)
        got = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=rounded(8), correction=correction)
        assert list(got.token_ids) == want
        lengths.append(got.stats.drafted / got.stats.rounds)
    assert lengths[0] > lengths[1] > lengths[2] > 0


def test_a_sampled_text_is_its_seeds_own_whatever_ends_its_chains():
    engine = Engine(tiny_model(eos_token_id=None))
    options = {"max_new_tokens": NEW, "sampling": SamplingConfig(temperature=1.0, seed=5)}
    want = engine.generate(FOLLOWED, sparsity="none", **options).token_ids
    for confidence, ngram in ((0.0, 0), (0.3, 0), (0.9, 0), (0.9, 3)):
        correction = CorrectionConfig(8, draft_confidence=confidence, draft_ngram=ngram)
        got = engine.generate(FOLLOWED, correction=correction, **options)
        assert got.token_ids == want and got.stats.lossless
        assert some_ended_early(got.stats, 8) == (confidence > 0) and bool(got.stats.looked_up) == (ngram > 0)

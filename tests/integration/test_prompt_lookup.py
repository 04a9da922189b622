"""Guesses from the text itself: the same texts, their figures, and where they are refused."""

import pytest
import torch
from drafts import FOLLOWED, NEW, PROMPT, chain

from conftest import greedy, tiny_model
from sirius.core import DRAFT, CorrectionConfig, SamplingConfig, SparsityConfig
from sirius.decoding.period import Period
from sirius.decoding.tree import Tree
from sirius.engine import Engine
from sirius.errors import ConfigError

pytestmark = pytest.mark.integration

LOOPING = [7, 30, 41, 52, 63, 74, 7, 30, 41, 52, 63, 74, 7, 30, 41]


def repeating_model(**changes):
    """A model that writes each token many times."""
    return tiny_model(seed=2, tie_word_embeddings=True, initializer_range=0.1, **{"eos_token_id": None, **changes})


@pytest.mark.parametrize("sparsity", ["none", DRAFT, "coarse"], ids=str)
@pytest.mark.parametrize("width", [1, 3])
def test_guesses_from_the_text_change_no_token(sparsity, width):
    for model, prompt in ((repeating_model(), LOOPING), (tiny_model(eos_token_id=None), FOLLOWED)):
        want = greedy(model, prompt, NEW)
        got = Engine(model).generate(
            prompt, max_new_tokens=NEW, sparsity=sparsity, correction=chain(6, width, draft_ngram=3)
        )
        assert list(got.token_ids) == want and got.stats.lossless and got.stats.looked_up


def test_a_text_that_repeats_itself_is_written_without_draft_passes():
    model = repeating_model()
    got = Engine(model).generate(
        LOOPING, max_new_tokens=40, sparsity="none", correction=CorrectionConfig(draft_ngram=3)
    )
    assert list(got.token_ids) == greedy(model, LOOPING, 40)
    assert got.stats.rounds < 30 and got.stats.accepted and got.stats.draft_bytes_per_token == 0


def test_an_end_of_text_inside_looked_up_guesses_ends_the_text():
    changes = {"seed": 3, "initializer_range": 0.05}  # a model that comes to repeat three tokens
    text = greedy(tiny_model(eos_token_id=None, **changes), PROMPT, 17)
    prompt, end = [*PROMPT, *text[:14]], text[16]
    model = tiny_model(eos_token_id=end, **changes)
    model.generation_config.eos_token_id = end
    got = Engine(model).generate(prompt, max_new_tokens=40, sparsity="none", correction=CorrectionConfig(draft_ngram=3))
    assert list(got.token_ids) == greedy(model, prompt, 40) == text[14:]
    assert got.finish_reason == "stop" and got.stats.looked_up
    assert got.origins[-1] == "draft", "a guess was the end"


def test_guesses_from_the_text_that_a_rule_of_its_own_accepts_are_not_called_lossless():
    """A draft with every neuron guesses as the full model writes; the text itself does not."""
    engine = Engine(tiny_model(eos_token_id=None))
    options = {"sparsity": SparsityConfig("coarse", keep=1.0), "rule": lambda check: torch.ones_like(check.own())}
    for ngram, lossless in ((0, True), (3, False)):
        batch = engine.batch(rows=1, correction=CorrectionConfig(8, draft_ngram=ngram), **options)
        batch.add(engine.text(LOOPING, max_new_tokens=NEW))
        done = [update.completion for _ in range(NEW) if batch.busy for update in batch.step() if update.completion]
        assert [each.stats.lossless for each in done] == [lossless]


def test_a_rule_judges_guesses_from_the_text_where_no_model_drafts():
    asked, engine = [], Engine(repeating_model())

    def nothing(check):
        asked.append(check.tree.tokens.shape[1] - 1)
        return torch.zeros_like(check.own())

    options = {"sparsity": "none", "correction": CorrectionConfig(8, draft_ngram=3)}
    batch = engine.batch(rows=1, rule=nothing, **options)
    batch.add(engine.text(LOOPING, max_new_tokens=NEW))
    [done] = [update.completion for _ in range(NEW) if batch.busy for update in batch.step() if update.completion]
    assert max(asked) > 0 and done.stats.accepted == 0 and not done.stats.lossless
    assert list(done.token_ids) == greedy(engine.model, LOOPING, NEW)
    with pytest.raises(ConfigError, match=r"^period would change nothing"):
        engine.batch(period=Period(1), **options)


def test_figures_tell_looked_up_guesses_apart():
    got = Engine(repeating_model()).generate(
        LOOPING, max_new_tokens=60, sparsity="none", correction=CorrectionConfig(16, draft_ngram=3)
    )
    stats = got.stats
    assert stats.looked_up == stats.drafted > 0
    assert sum(stats.acceptance_histogram) < stats.rounds, "plain steps are no windows"
    assert stats.aal and stats.aal > 2 and stats.density == 1
    assert stats.effective_density == pytest.approx(stats.rounds / (stats.tokens - 1)), "guesses cost nothing"


def test_guesses_of_rows_with_little_room_stand_where_a_drafts_would():
    """Where a position past a limit would scale those of the whole pass anew."""
    tree = Tree.chain(torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]), torch.tensor([4, 2]))
    assert tree.depths.tolist() == [[0, 1, 2, 3], [0, 1, 1, 1]]
    assert tree.alive.tolist() == [[True] * 4, [True, True, False, False]]
    assert tree.seen[1, 3].tolist() == [True, False, False, True]


@pytest.mark.parametrize("options", [{"accept": "threshold"}, {"ablate": ("rewrite",)}], ids=str)
def test_prompt_lookup_is_refused_where_a_lossy_text_would_depend_on_time(options):
    with pytest.raises(ConfigError, match="a lossy text would depend on time"):
        CorrectionConfig(8, draft_ngram=3, **options)


def test_a_sampled_text_is_its_seeds_own_whatever_is_looked_up():
    engine = Engine(tiny_model(eos_token_id=None))
    options = {"max_new_tokens": NEW, "sampling": SamplingConfig(temperature=1.0, seed=5)}
    want = engine.generate(FOLLOWED, sparsity="none", **options).token_ids
    for ngram in (2, 3):
        got = engine.generate(FOLLOWED, correction=CorrectionConfig(8, draft_ngram=ngram), **options)
        assert got.token_ids == want and got.stats.lossless and got.stats.looked_up


def test_what_lookup_learnt_serves_later_texts_of_the_same_setting():
    engine = Engine(tiny_model())
    found = [
        engine.batch(rows=rows, correction=CorrectionConfig(8, draft_ngram=ngram), sparsity="none").plan.lookup
        for rows, ngram in ((1, 3), (1, 3), (2, 3), (1, 4), (1, 0))
    ]
    assert found[0] is found[1] and len({id(each) for each in found[:-1]}) == 3
    assert found[-1] is None

"""The contract: with the argmax rule the text is the full model's, and the cache is what a fresh prefill would hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import FAMILIES, SHARED, VOCABULARY, greedy, tiny_model
from sirius.core import CorrectionConfig, Mode, Request, SparsityConfig
from sirius.decoding.loop import Plan
from sirius.engine import Engine, Generation
from sirius.model.prepare import prepare
from sirius.model.session import Session

pytestmark = pytest.mark.integration

PERIODS = (1, 2, 5, 16, 40)
PROMPT = [5, 17, 93, 41, 8, 60, 22]
NEW = 48


def argmax(period: int) -> CorrectionConfig:
    return CorrectionConfig(period=period, accept="argmax")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("method", ["coarse", "fine"])
@pytest.mark.parametrize("family", FAMILIES)
def test_argmax_rule_gives_the_full_models_greedy_text(family, method, keep):
    model = tiny_model(family, eos_token_id=None)
    want = greedy(model, PROMPT, NEW)
    engine = Engine(model)
    for period in PERIODS:
        got = engine.generate(
            PROMPT, max_new_tokens=NEW, sparsity=SparsityConfig(method, keep), correction=argmax(period)
        )
        assert list(got.token_ids) == want, f"period {period}"
        assert got.stats.lossless
        assert keep > 0.1 or period == 1 or got.stats.corrections, "a draft that is never wrong shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_text_falls_on_the_exact_token(family):
    free = greedy(tiny_model(family, eos_token_id=None), PROMPT, NEW)
    for place in (0, 1, 7, 20):
        ends = sorted({free[place], VOCABULARY - 1})
        model = tiny_model(family, eos_token_id=ends)
        model.generation_config.eos_token_id = ends
        want = greedy(model, PROMPT, NEW)
        for period in PERIODS:
            got = Engine(model).generate(PROMPT, max_new_tokens=NEW, correction=argmax(period))
            assert list(got.token_ids) == want, f"end at {place}, period {period}"
            assert got.finish_reason == ("stop" if want[-1] in ends else "length")


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    prompt=st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=30),
    method=st.sampled_from(["coarse", "fine"]),
    keep=st.floats(0.05, 1.0),
    period=st.integers(1, 24),
    new_tokens=st.integers(1, 40),
    seed=st.integers(0, 3),
)
def test_any_prompt_period_budget_and_sparsity_give_the_greedy_text(prompt, method, keep, period, new_tokens, seed):
    model = tiny_model(seed=seed)
    want = greedy(model, prompt, new_tokens)
    got = Engine(model).generate(
        prompt, max_new_tokens=new_tokens, sparsity=SparsityConfig(method, keep), correction=argmax(period)
    )
    assert list(got.token_ids) == want


@pytest.mark.parametrize("correction", [argmax(5), CorrectionConfig(period=5, threshold=0.05)], ids=["argmax", "lossy"])
@pytest.mark.parametrize("method", ["coarse", "fine"])
@pytest.mark.parametrize("family", FAMILIES)
def test_after_every_round_the_cache_equals_a_fresh_prefill(family, method, correction):
    model = tiny_model(family, dtype=torch.float64)
    request = Request(tuple(PROMPT), NEW, (), SparsityConfig(method, 0.1), correction)
    generation = Generation(model, request, Plan(NEW))
    tokens, rejected = list(PROMPT), 0
    for step in generation.rounds():
        tokens += step.tokens
        rejected += len(step.draft) - step.accepted
        _assert_fresh(generation.session, tokens[:-1])
    assert rejected, "no draft was ever rejected, so this run shows nothing"


def _assert_fresh(session: Session, tokens: list[int]) -> None:
    eager = session.mask_dtype is not None
    bound = 1e-5 if eager else 1e-9  # transformers' eager attention takes its softmax in float32
    fresh = Session(session.model, session.mlps, None, slots=len(tokens))
    fresh.read(torch.tensor([tokens]), Mode.DENSE)
    assert session.cache.lengths.tolist() == [len(tokens)]
    session.cache.check_integrity()
    for ours, theirs in zip(session.cache.slot_layers, fresh.cache.slot_layers, strict=True):
        for got, want in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert got is not None and want is not None
            torch.testing.assert_close(got[:, : len(tokens)], want, rtol=bound, atol=bound / 100)


@pytest.mark.parametrize("method", ["coarse", "fine"])
def test_keep_one_reproduces_the_full_model_for_any_rule(method):
    model = tiny_model(eos_token_id=None)
    want = greedy(model, PROMPT, NEW)
    for correction in (None, argmax(7), CorrectionConfig(period=7, threshold=0.0), CorrectionConfig(threshold=0.9)):
        got = Engine(model).generate(
            PROMPT, max_new_tokens=NEW, sparsity=SparsityConfig(method, keep=1.0), correction=correction
        )
        assert list(got.token_ids) == want
        assert got.stats.lossless and got.stats.corrections == 0


@pytest.mark.parametrize("method", ["coarse", "fine"])
def test_threshold_zero_accepts_everything(method):
    engine = Engine(tiny_model(eos_token_id=None))
    correction = CorrectionConfig(period=6, threshold=0.0)
    got = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=SparsityConfig(method, 0.2), correction=correction)
    assert got.stats.accepted == got.stats.drafted > 0
    assert not got.stats.lossless


def test_period_one_is_plain_decoding():
    model = tiny_model(eos_token_id=None)
    want = greedy(model, PROMPT, NEW)
    got = Engine(model).generate(PROMPT, max_new_tokens=NEW, correction=CorrectionConfig(period=1, threshold=0.0))
    assert list(got.token_ids) == want
    assert got.stats.drafted == 0 and got.stats.effective_density == 1.0 and got.stats.lossless


@pytest.mark.parametrize("method", ["coarse", "fine"])
def test_without_correction_the_sparse_model_writes_the_text(method):
    """Greedy decoding with the MLPs masked by hand, in transformers' own loop, must give the same tokens."""
    model = tiny_model(eos_token_id=None)
    got = Engine(model).generate(PROMPT, max_new_tokens=NEW, sparsity=SparsityConfig(method, 0.3), correction=None)
    assert list(got.token_ids) == _masked_greedy(model, method, keep=0.3)
    assert not got.stats.lossless and got.stats.aal is None
    assert got.stats.effective_density == pytest.approx(got.stats.density)


def _masked_greedy(model, method: str, keep: float) -> list[int]:
    """Decode with every MLP masked by hand: coarse by the prompt's scores, fine by each token's gate."""
    masks = {}

    def forward(mlp, x):
        gated = mlp.activation(mlp.gate_proj(x))
        z = gated * mlp.up_proj(x)
        if x.shape[1] > 1:
            score = (z[0] / z[0].norm(dim=-1, keepdim=True)).norm(dim=0)
            masks[mlp] = torch.zeros_like(score).scatter(0, score.topk(int(keep * len(score))).indices, 1.0)
        elif method == "coarse":
            z = z * masks[mlp]
        else:
            drop = int((1 - keep) * z.shape[-1])
            z = z.scatter(-1, gated.abs().topk(drop, largest=False).indices, 0.0)
        return mlp.down_proj(z)

    for mlp in prepare(model):
        mlp.forward = forward.__get__(mlp)
    return greedy(model, PROMPT, NEW)


def test_a_drafted_end_of_text_that_is_rejected_changes_nothing():
    """The published code ends here: after a rejected drafted end its text is padding."""
    model = tiny_model(eos_token_id=None)
    free = greedy(model, PROMPT, NEW)
    sparse = SparsityConfig("fine", 0.1)
    rounds = [u.round for u in Engine(model).stream(PROMPT, max_new_tokens=NEW, sparsity=sparse, correction=argmax(5))]
    guessed = {token for r in rounds for token in r.draft[r.accepted :]} - set(free)
    ends = sorted(guessed)
    model.generation_config.eos_token_id = ends
    updates = list(Engine(model).stream(PROMPT, max_new_tokens=NEW, sparsity=sparse, correction=argmax(5)))
    assert any(u.round.draft and u.round.draft[-1] in ends for u in updates), "no end was ever drafted"
    assert updates[-1].completion is not None and list(updates[-1].completion.token_ids) == free


def test_a_lossy_text_ends_at_its_first_end_of_text():
    model = tiny_model(eos_token_id=None)
    lossy = CorrectionConfig(period=7, threshold=0.0)
    free = Engine(model).generate(PROMPT, max_new_tokens=NEW, correction=lossy).token_ids
    for place in (0, 3, 6, 7, 8, 20):
        model.generation_config.eos_token_id = free[place]
        got = Engine(model).generate(PROMPT, max_new_tokens=NEW, correction=lossy)
        assert got.token_ids == free[: free.index(free[place]) + 1] and got.finish_reason == "stop"


def test_a_fixed_threshold_of_fine_is_exact_and_its_density_measured():
    model = tiny_model(eos_token_id=None)
    config = SparsityConfig("fine", threshold=0.4)
    got = Engine(model).generate(PROMPT, max_new_tokens=NEW, sparsity=config, correction=argmax(6))
    assert list(got.token_ids) == greedy(model, PROMPT, NEW)
    assert got.stats.corrections and 0.4 < got.stats.density < 1


def test_rows_of_different_lengths_share_a_session():
    """Each row's scores equal those of the row alone, through a real model, cut back and read again."""
    model = tiny_model(dtype=torch.float64)
    rows = torch.tensor([[5, 6, 7, 8, 9], [15, 16, 17, 18, 19]])
    session = Session(model, prepare(model), None, slots=12, rows=2)
    session.read(rows, Mode.DENSE)
    session.truncate(torch.tensor([5, 2]))
    got = session.read(torch.tensor([[30, 31], [40, 41]]), Mode.DENSE)
    assert session.cache.lengths.tolist() == [7, 4]
    for row, tokens in enumerate(([5, 6, 7, 8, 9, 30, 31], [15, 16, 40, 41])):
        want = model(torch.tensor([tokens])).logits[0, -2:]
        torch.testing.assert_close(got[row], want, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not (SHARED / "models").exists(), reason="no models trained elsewhere beside this checkout")
@pytest.mark.parametrize("name", ["stories260K", "babyllama-chars"])
def test_models_trained_elsewhere_keep_their_greedy_text(name):
    engine = Engine.load(str(SHARED / "models" / name))
    prompts = [[1], [1, 7, 30, 31, 32], [1, *range(40, 60)]]
    for prompt in prompts:
        want = greedy(engine.model, prompt, 60)
        for method in ("coarse", "fine"):
            for period in PERIODS:
                got = engine.generate(prompt, max_new_tokens=60, sparsity=method, correction=argmax(period))
                assert list(got.token_ids) == want

"""The contract: with the argmax rule the text is the full model's, and the cache is what a fresh prefill would hold."""

from collections.abc import Iterator
from functools import cache
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import make_tokenizer
from transformers import PreTrainedTokenizerFast

from conftest import FAMILIES, SHARED, VOCABULARY, check_integrity, greedy, slow, tiny_model
from sirius.batch import Batch
from sirius.core import CorrectionConfig, Mode, SparsityConfig, Window
from sirius.decoding import accept
from sirius.decoding.period import AutoPeriod, Probed
from sirius.decoding.tree import Tree
from sirius.engine import Engine
from sirius.kernels import cpu
from sirius.model.prepare import prepare
from sirius.runtime.session import Session, ordinary
from sirius.texts import Update

pytestmark = pytest.mark.integration

PERIODS = (1, 2, 5, 16, 40)
WIDTHS = (1, 2, 3, 4, 8)
PROMPT = [5, 17, 93, 41, 8, 60, 22]
PROMPTS = [PROMPT, [9, 9], [70, 3, 12, 88, 41, 6, 19, 101, 55, 20, 33]]
NEW = 24
BUDGET = 40  # the most that hypothesis asks for


class Wandering(AutoPeriod):
    """Any period after any other, and probes at any time, in place of those that time on this machine would bring."""

    draw: Random

    def choose(self, rows: int) -> int:
        return self.draw.choice((1, 2, 3, 6, 16))

    def probes(self, rows: int, new: int) -> int:
        return min(new - 1, self.draw.choice((0, 0, 2, 9)))

    def learn_probe(self, probed: Probed) -> None:
        assert 0 <= probed.kept <= probed.judged == probed.tokens * probed.rows


@pytest.fixture(autouse=True)
def periods_wander(monkeypatch):
    monkeypatch.setattr(Wandering, "draw", Random(0), raising=False)
    monkeypatch.setattr("sirius.learnt.AutoPeriod", Wandering)


def argmax(period: int | str, width: int = 1, **options) -> CorrectionConfig:
    return CorrectionConfig(period=period, accept="argmax", tree_width=width, **options)


@cache
def drawn_model(seed: int):
    return tiny_model(seed=seed, dtype=torch.float64, eos_token_id=None)


@cache
def drawn_text(seed: int, prompt: tuple[int, ...]) -> list[int]:
    """Return transformers' greedy text; that of a smaller budget is its beginning."""
    return greedy(drawn_model(seed), list(prompt), BUDGET)


GRID = [
    (family, keep) if family == "llama" or keep == 0.5 else slow(family, keep)
    for family in FAMILIES
    for keep in (0.1, 0.5, 0.9)
]


@pytest.mark.parametrize("method", ["coarse", "fine"])
@pytest.mark.parametrize(("family", "keep"), GRID)
def test_argmax_rule_gives_the_full_models_greedy_text(family, method, keep):
    model = tiny_model(family, eos_token_id=None)
    want = greedy(model, PROMPT, NEW)
    engine = Engine(model)
    for period in PERIODS if family == "llama" else (2, 16):
        got = engine.generate(
            PROMPT, max_new_tokens=NEW, sparsity=SparsityConfig(method, keep), correction=argmax(period)
        )
        assert list(got.token_ids) == want, f"period {period}"
        assert got.stats.lossless
        assert keep > 0.1 or period == 1 or got.stats.corrections, "a draft that is never wrong shows nothing"


@pytest.mark.parametrize("method", ["coarse", "fine"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_and_a_period_of_its_own_choice_give_it_too(family, method):
    model = tiny_model(family, eos_token_id=None)
    want = greedy(model, PROMPT, NEW)
    engine = Engine(model)
    all_kinds = argmax("auto", 4), argmax(6, 4), argmax(2, 4), argmax("auto")
    for correction in all_kinds if family == "llama" else all_kinds[:2]:
        got = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=SparsityConfig(method, 0.3), correction=correction)
        assert list(got.token_ids) == want, str(correction)
        assert got.stats.lossless and got.stats.drafted


@pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.bfloat16) for family in FAMILIES),
        ("llama", torch.float16),
        ("gemma3", torch.float16),
        *(slow(family, torch.float16) for family in FAMILIES if family not in ("llama", "gemma3")),
    ],
    ids=str,
)
def test_in_16_bits_a_chain_writes_what_our_full_decoding_writes(family, dtype):
    engine = Engine(tiny_model(family, dtype, eos_token_id=None))
    want = engine.generate(PROMPT, max_new_tokens=NEW, sparsity="none", correction=None)
    for method, period in (("coarse", 5), ("fine", 16)):
        got = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=method, correction=argmax(period))
        assert got.token_ids == want.token_ids and got.stats.drafted


TOKENS = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=20).map(tuple)
NARROW = [torch.bfloat16, torch.float16]


@cache
def narrow_model(family: str, dtype: torch.dtype):
    return tiny_model(family, dtype, eos_token_id=None)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    st.sampled_from(["llama", "gemma2", "qwen3"]),
    st.sampled_from(NARROW),
    st.integers(1, 200).flatmap(lambda most: st.tuples(st.integers(1, min(most, 16)), st.just(most))),
    st.integers(0, 2**16),
)
@pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")
@ordinary()
def test_in_16_bits_a_token_gets_the_same_scores_in_passes_of_any_size(family, dtype, sizes, seed):
    """Rows of a pass from 1 to 200, against each row alone and a token at a time."""
    rows, most = sizes
    count, generator = max(most // rows, 1), torch.Generator().manual_seed(seed)
    model = narrow_model(family, dtype)
    prompts = [torch.randint(3, VOCABULARY, (1 + row,), generator=generator) for row in range(rows)]
    tokens = torch.randint(3, VOCABULARY, (rows, count), generator=generator)
    together = Session(model, prepare(model))
    for prompt in prompts:
        together.open(prompt, len(prompt) + count)
    got = together.read(tokens, Mode.DENSE, Tree.chain(tokens).window())
    for row in (0, rows - 1):
        alone = Session(model, prepare(model))
        alone.open(prompts[row], len(prompts[row]) + count)
        for place, token in enumerate(tokens[row]):
            one = token.view(1, 1)
            assert torch.equal(alone.read(one, Mode.DENSE, Tree.chain(one).window())[0, 0], got[row, place])
            alone.keep(torch.tensor([[0]]), torch.tensor([1]))


@settings(max_examples=3, derandomize=True, deadline=None)
@given(
    st.sampled_from(NARROW),
    st.lists(TOKENS, min_size=9, max_size=16),
    st.sampled_from([1, 3, 8, 16]),
    st.sampled_from([argmax(16), argmax("auto"), argmax(8, 4)]),
    st.sampled_from([SparsityConfig("coarse"), SparsityConfig("fine"), SparsityConfig("coarse", shared_set=True)]),
)
@pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")
def test_in_16_bits_texts_of_large_batches_and_trees_are_those_of_full_decoding_alone(
    dtype, prompts, rows, correction, sparsity
):
    engine = Engine(narrow_model("llama", dtype))
    options = {"max_new_tokens": NEW, "sparsity": sparsity, "correction": correction}
    done = dict(engine.generate_many(prompts, batch_size=rows, **options))
    for index, prompt in enumerate(prompts):
        want = engine.generate(prompt, max_new_tokens=NEW, sparsity="none", correction=1)
        assert done[index].token_ids == want.token_ids and done[index].stats.lossless


def test_no_text_is_called_lossless_where_rounding_depends_on_company(monkeypatch):
    """As on a GPU, and in 16 bits without the compiled kernels."""
    wide, narrow = (Engine(tiny_model(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))

    def lossless(engine: Engine, **options) -> bool:
        return engine.generate(PROMPT, max_new_tokens=3, **options).stats.lossless

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "library", lambda: None)
        assert lossless(wide) and not lossless(narrow, sparsity="coarse")
        assert lossless(narrow), "the default drafts nothing without kernels, and the text is alone"
        assert lossless(narrow, sparsity="none"), "nothing is drafted, and the text is alone"
        [(_, done)] = narrow.generate_many([PROMPT], batch_size=2, max_new_tokens=3, sparsity="none")
        assert not done.stats.lossless
    if cpu.library() is not None:
        assert lossless(narrow)


@pytest.mark.parametrize(
    "corrections", [(argmax(5), argmax(5, 4)), slow((*map(argmax, PERIODS), argmax(5, 4)))], ids=["few", "all"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_text_falls_on_the_exact_token(family, corrections):
    free = greedy(tiny_model(family, eos_token_id=None), PROMPT, NEW)
    for place in (0, 1, 7, 20) if family == "llama" else (1, 7):
        ends = sorted({free[place], VOCABULARY - 1})
        model = tiny_model(family, eos_token_id=ends)
        model.generation_config.eos_token_id = ends
        want = greedy(model, PROMPT, NEW)
        for correction in corrections:
            got = Engine(model).generate(PROMPT, max_new_tokens=NEW, correction=correction)
            assert list(got.token_ids) == want, f"end at {place}, {correction}"
            assert got.finish_reason == ("stop" if want[-1] in ends else "length")


KEEPS = st.floats(0.05, 1.0)
BITS = st.sampled_from([0, 4, 8])
SPARSITIES = st.one_of(
    st.builds(
        SparsityConfig,
        st.just("coarse"),
        KEEPS,
        shared_set=st.booleans(),
        refresh=st.sampled_from([0.0, 0.3, 1.0]),
        draft_bits=BITS,
    ),
    st.builds(SparsityConfig, st.just("fine"), KEEPS, per_branch=st.booleans(), draft_bits=BITS),
    st.builds(SparsityConfig, st.just("fine"), threshold=st.floats(0, 2), per_branch=st.booleans(), draft_bits=BITS),
    st.builds(SparsityConfig, st.just("none"), draft_bits=BITS),
)
PERIOD = st.one_of(st.integers(2, 24), st.just("auto"))
NGRAMS = st.sampled_from([0, 2, 3])
CORRECTIONS = st.one_of(
    st.builds(CorrectionConfig, period=st.just(1), accept=st.just("argmax"), tree_width=st.sampled_from(WIDTHS)),
    st.builds(
        CorrectionConfig,
        period=PERIOD,
        accept=st.just("argmax"),
        tree_width=st.sampled_from(WIDTHS),
        prune=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
        accept_temperature=st.sampled_from([0.1, 0.6, 5.0]),
        draft_ngram=NGRAMS,
    ),
    st.builds(
        CorrectionConfig,
        period=PERIOD,
        accept=st.just("argmax"),
        draft_confidence=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
        draft_ngram=NGRAMS,
    ),
)
ROWS = st.sampled_from([1, 3, 8])
PROMPTED = ROWS.flatmap(lambda n: st.lists(TOKENS, min_size=n, max_size=n))
ASKED = ROWS.flatmap(lambda n: st.lists(st.tuples(TOKENS, st.integers(1, BUDGET)), min_size=n, max_size=n))


@settings(max_examples=10, derandomize=True, deadline=None)
@given(SPARSITIES, CORRECTIONS, PROMPTED, st.data())
def test_any_sparsity_tree_period_and_batch_give_each_prompt_its_greedy_text(sparsity, correction, prompts, data):
    seed, budget = data.draw(st.integers(0, 2)), data.draw(st.integers(1, BUDGET))
    rows = data.draw(st.integers(1, len(prompts)))
    done = Engine(drawn_model(seed)).generate_many(
        prompts, batch_size=rows, max_new_tokens=budget, sparsity=sparsity, correction=correction
    )
    texts = {index: list(got.token_ids) for index, got in done}
    assert texts == {index: drawn_text(seed, prompt)[:budget] for index, prompt in enumerate(prompts)}


@settings(max_examples=7, derandomize=True, deadline=None)
@given(SPARSITIES, CORRECTIONS, ASKED, st.data())
def test_each_row_keeps_its_own_budget_end_of_text_and_stop_string(sparsity, correction, asked, data):
    tokenizer, seed = make_tokenizer(), data.draw(st.integers(0, 2))
    places = data.draw(st.tuples(*[st.integers(0, 30)] * 3))
    first, last = drawn_text(seed, asked[0][0]), drawn_text(seed, asked[-1][0])
    stop = tokenizer.decode(last[places[1] : places[1] + 1 + places[2] % 3])
    engine = Engine(drawn_model(seed), tokenizer)
    engine.ends = frozenset({first[places[0]]})
    batch = engine.batch(rows=data.draw(st.integers(1, len(asked))), sparsity=sparsity, correction=correction)
    tickets = [batch.add(engine.text(list(p), max_new_tokens=budget, stop=stop)) for p, budget in asked]
    done = {update.ticket: update.completion for update in steps(batch) if update.completion}
    for ticket, (prompt, budget) in zip(tickets, asked, strict=True):
        want = cut(drawn_text(seed, prompt)[:budget], engine.ends, stop, tokenizer)
        assert list(done[ticket].token_ids) == want
        assert done[ticket].text == tokenizer.decode(want).partition(stop)[0]


@pytest.mark.slow
@settings(max_examples=150, derandomize=True, deadline=None)
@given(SPARSITIES, CORRECTIONS, PROMPTED, st.data())
def test_so_do_many_more_of_them(sparsity, correction, prompts, data):
    once = test_any_sparsity_tree_period_and_batch_give_each_prompt_its_greedy_text
    once.hypothesis.inner_test(sparsity, correction, prompts, data)


@pytest.mark.slow
@settings(max_examples=150, derandomize=True, deadline=None)
@given(SPARSITIES, CORRECTIONS, ASKED, st.data())
def test_so_do_many_more_rows(sparsity, correction, asked, data):
    once = test_each_row_keeps_its_own_budget_end_of_text_and_stop_string
    once.hypothesis.inner_test(sparsity, correction, asked, data)


def steps(batch: Batch) -> Iterator[Update]:
    while batch.busy:
        yield from batch.step()


def cut(tokens: list[int], ends: frozenset[int], stop: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return a greedy text up to its first end of text or whole stop string; a token is a character."""
    for count in range(1, len(tokens)):
        if tokens[count - 1] in ends or stop in tokenizer.decode(tokens[:count]):
            return tokens[:count]
    return tokens


FRESH = {
    "chain": argmax(5),
    "lossy chain": CorrectionConfig(5, "threshold", 0.05),
    "tree": argmax(4, 4),
    "auto": argmax("auto"),
    "lossy tree": CorrectionConfig(period=5, accept="relative", threshold=0.3, tree_width=3, prune=0.01),
}


@pytest.mark.parametrize(
    ("family", "method", "name"),
    [
        (family, method, name) if family == "llama" or name in few else slow(family, method, name)
        for family in FAMILIES
        for method, few in (("coarse", ("lossy chain", "tree")), ("fine", ("lossy tree",)))
        for name in FRESH
    ],
)
def test_after_every_round_the_cache_equals_a_fresh_prefill(family, method, name):
    correction = FRESH[name]
    engine = Engine(tiny_model(family, dtype=torch.float64, eos_token_id=None))
    batch = engine.batch(rows=2, sparsity=SparsityConfig(method, 0.1), correction=correction)
    for prompt, budget in zip(PROMPTS, (16, 6, 10), strict=True):
        batch.add(engine.text(prompt, max_new_tokens=budget))
    rejected = 0
    for _ in iter(lambda: batch.busy, False):
        rejected += sum(len(update.round.draft) - update.round.accepted for update in batch.step())
        for index, entry in enumerate(batch.active):
            assert_fresh(batch.session, index, entry.row.tokens[:-1])
    assert rejected, "no draft was ever rejected, so this run shows nothing"


def assert_fresh(session: Session, row: int, tokens: list[int]) -> None:
    check_integrity(session.cache)
    assert int(session.cache.lengths[row]) == len(tokens)
    eager = session.mask_dtype is not None
    assert staleness(session, row, tokens) < (1e-5 if eager else 1e-9)  # eager attention's softmax is in float32


@ordinary()
def staleness(session: Session, row: int, tokens: list[int]) -> float:
    """Return how far a row's keys and values are from those of a fresh dense prefill, relative to the largest."""
    fresh = Session(session.model, session.mlps)
    fresh.open(torch.tensor(tokens), slots=len(tokens))
    furthest = 0.0
    for ours, theirs in zip(session.cache.slot_layers, fresh.cache.slot_layers, strict=True):
        for got, want in zip(ours.stores, theirs.stores, strict=True):
            distance = (got[row, : len(tokens)] - want[0]).abs().max() / want.abs().max()
            furthest = max(furthest, float(distance))
    return furthest


def test_a_correction_read_at_the_wrong_node_is_caught(monkeypatch):
    """The published code's mistake: on a rejection the scores are taken from the rejected node, not its parent."""
    right = accept.longest_branches

    def wrong(check, passed):
        found = right(check, passed)
        rejected = (found.tip & ~found.kept).int().argmax(1)  # the first of them, 0 where there is none
        at = torch.where(rejected > 0, rejected, found.end)
        return found._replace(next=check.choice.gather(1, at[:, None])[:, 0])

    model = tiny_model(eos_token_id=None)
    want = greedy(model, PROMPT, NEW)
    monkeypatch.setattr(accept, "longest_branches", wrong)
    for width in WIDTHS:
        got = Engine(model).generate(PROMPT, max_new_tokens=NEW, sparsity="fine", correction=argmax(6, width))
        assert list(got.token_ids) != want, f"width {width}"


@pytest.mark.parametrize("width", [1, 3])
def test_without_the_rewrite_the_drafts_keys_and_values_stay(width):
    def furthest(**ablation):
        engine = Engine(tiny_model(dtype=torch.float64, eos_token_id=None))
        correction = argmax(5, width, **ablation)
        batch = engine.batch(sparsity=SparsityConfig("fine", 0.5), correction=correction)
        batch.add(engine.text(PROMPT, max_new_tokens=30))
        distances = []
        while batch.busy:
            batch.step()
            distances += [staleness(batch.session, i, e.row.tokens[:-1]) for i, e in enumerate(batch.active)]
        return max(distances)

    assert furthest() < 1e-9
    assert furthest(ablate=("rewrite",)) > 1e-2


@pytest.mark.parametrize("width", [1, 3])
def test_without_interleaving_there_is_no_token_after_a_draft_that_passed(width):
    model = tiny_model(eos_token_id=None)

    def decoded(**ablation):
        correction = argmax(4, width, **ablation)
        return Engine(model).generate(PROMPT, max_new_tokens=NEW, sparsity="fine", correction=correction)

    without = decoded(ablate=("interleave",))
    assert "bonus" in decoded().origins and "bonus" not in without.origins
    assert list(without.token_ids) == greedy(model, PROMPT, NEW), "only the pace is another"
    assert not without.stats.lossless


@pytest.mark.parametrize("width", [1, 3])
def test_without_rollback_every_guess_stays(width):
    model = tiny_model(eos_token_id=None)
    correction = argmax(4, width, ablate=("rollback",))
    got = Engine(model).generate(PROMPT, max_new_tokens=NEW, sparsity="fine", correction=correction)
    assert got.stats.accepted == got.stats.drafted > 0 and "correction" not in got.origins
    assert list(got.token_ids) != greedy(model, PROMPT, NEW) and not got.stats.lossless


@pytest.mark.parametrize("accept", ["threshold", "relative", "typical"])
@pytest.mark.parametrize("width", [1, 4])
def test_a_lossy_rule_keeps_more_guesses_and_is_called_lossy(accept, width):
    engine = Engine(tiny_model(eos_token_id=None))

    def kept(rule):
        options = {"max_new_tokens": NEW, "sparsity": SparsityConfig("fine", 0.2)}
        bar = None if rule == "argmax" else 0.01
        correction = CorrectionConfig(6, rule, bar, accept_temperature=1.0, tree_width=width)
        return engine.generate(PROMPT, **options, correction=correction).stats

    assert kept(accept).aal > kept("argmax").aal
    assert kept("argmax").lossless and not kept(accept).lossless


def test_a_threshold_above_one_half_is_exact_on_trees_too():
    model = tiny_model(eos_token_id=None)
    correction = CorrectionConfig(6, "threshold", 0.51, accept_temperature=2.0, tree_width=4)
    got = Engine(model).generate(PROMPT, max_new_tokens=NEW, sparsity="fine", correction=correction)
    assert list(got.token_ids) == greedy(model, PROMPT, NEW) and got.stats.lossless


@pytest.mark.parametrize("method", ["coarse", "fine"])
def test_keep_one_reproduces_the_full_model_for_any_rule(method):
    model = tiny_model(eos_token_id=None)
    want = greedy(model, PROMPT, NEW)
    for correction in (None, argmax(7), CorrectionConfig(7, "threshold", 0.0), CorrectionConfig(16, "threshold", 0.9)):
        got = Engine(model).generate(
            PROMPT, max_new_tokens=NEW, sparsity=SparsityConfig(method, keep=1.0), correction=correction
        )
        assert list(got.token_ids) == want
        assert got.stats.lossless and got.stats.corrections == 0


@pytest.mark.parametrize("method", ["coarse", "fine"])
def test_threshold_zero_accepts_everything(method):
    engine = Engine(tiny_model(eos_token_id=None))
    correction = CorrectionConfig(6, "threshold", 0.0)
    got = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=SparsityConfig(method, 0.2), correction=correction)
    assert got.stats.accepted == got.stats.drafted > 0
    assert not got.stats.lossless


def test_period_one_is_plain_decoding():
    model = tiny_model(eos_token_id=None)
    want = greedy(model, PROMPT, NEW)
    got = Engine(model).generate(PROMPT, max_new_tokens=NEW, correction=CorrectionConfig(1, "threshold", 0.0))
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
    lossy = CorrectionConfig(7, "threshold", 0.0)
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


@ordinary()
def test_rows_of_different_lengths_share_a_session():
    """Each row's scores equal those of the row alone, through a real model, cut back and read again."""
    model = tiny_model(dtype=torch.float64)
    session = Session(model, prepare(model))
    for prompt in ([5, 6, 7, 8, 9], [15, 16]):
        session.open(torch.tensor(prompt), slots=12)
    chain = Window(0, torch.arange(2).expand(2, -1), torch.ones(2, 2, 2).tril().bool(), torch.ones(2, 2))
    for wrong in (True, False):
        tokens = torch.tensor([[30, 31], [40, 41]]) + wrong
        got = session.read(tokens, Mode.DENSE, chain)
    assert session.cache.lengths.tolist() == [5, 2]
    for row, whole in enumerate(([5, 6, 7, 8, 9, 30, 31], [15, 16, 40, 41])):
        want = model(torch.tensor([whole])).logits[0, -2:]
        torch.testing.assert_close(got[row], want, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not (SHARED / "models").exists(), reason="no models trained elsewhere beside this checkout")
@pytest.mark.parametrize("name", ["stories260K", slow("babyllama-chars")])
def test_models_trained_elsewhere_keep_their_greedy_text(name):
    engine = Engine.load(str(SHARED / "models" / name))
    prompts = [[1], [1, 7, 30, 31, 32], [1, *range(40, 60)]]
    want = [greedy(engine.model, prompt, 40) for prompt in prompts]
    for method in ("coarse", "fine"):
        for correction in (argmax(16), argmax(8, 3)):
            done = engine.generate_many(prompts, max_new_tokens=40, sparsity=method, correction=correction)
            assert {index: list(got.token_ids) for index, got in done} == dict(enumerate(want))

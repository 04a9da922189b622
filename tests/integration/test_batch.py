"""Texts side by side: they join, end, fail and are cancelled, and none disturbs another."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice

import pytest
import torch
from batches import NEW, PROMPTS, RULE, SPARSITY, drain, open_batch

from conftest import greedy, tiny_model
from sirius.core import CorrectionConfig, SparsityConfig
from sirius.decoding.probe import probe
from sirius.engine import Engine
from sirius.errors import ConfigError, ModelError, RequestError
from sirius.runtime import session
from sirius.runtime.session import Session
from sirius.runtime.workspace import drop_idle
from sirius.sparsity.coarse import CoarseSparsity

pytestmark = pytest.mark.integration


@pytest.fixture
def passes(engine) -> Iterator[list[tuple[int, int]]]:
    """The passes of the model, each with its rows and the tokens of a row; with a hook each is run by the model."""
    found: list[tuple[int, int]] = []

    def note(model, args, given):
        found.append(tuple(given["input_ids"].shape))

    hook = engine.model.register_forward_pre_hook(note, with_kwargs=True)
    yield found
    hook.remove()


def test_waiting_texts_take_the_rows_of_those_that_ended(engine, alone):
    batch = open_batch(engine, rows=2)
    tickets = [batch.add(engine.text(prompt, max_new_tokens=NEW)) for prompt in PROMPTS]
    most = 0
    done = {}
    while batch.busy:
        done |= {update.ticket: update.completion for update in batch.step() if update.completion}
        most = max(most, len(batch.active))
    assert most == 2
    assert [list(done[ticket].token_ids) for ticket in tickets] == alone


def test_a_text_that_joins_costs_the_others_no_pass(engine, passes):
    batch = open_batch(engine)
    batch.add(engine.text(PROMPTS[0], max_new_tokens=NEW))
    batch.step()
    batch.step()
    del passes[:]
    batch.add(engine.text(PROMPTS[2], max_new_tokens=NEW))
    [update] = batch.step()
    assert passes == [(1, len(PROMPTS[2]))] and update.round.origins == ("full",)
    batch.step()
    assert {rows for rows, _ in passes[1:]} == {2}


def test_a_text_that_leaves_costs_the_others_no_pass(engine, alone, passes):
    batch = open_batch(engine)
    first, *others = [batch.add(engine.text(prompt, max_new_tokens=NEW)) for prompt in PROMPTS[:3]]
    batch.step()
    before = len(passes)
    batch.cancel(first)
    assert len(passes) == before and len(batch.active) == len(batch.session.methods) == 2
    done = drain(batch)
    assert [list(done[ticket].token_ids) for ticket in others] == alone[1:3]
    assert first not in done


def test_a_cancelled_text_that_waits_never_starts(engine, alone):
    batch = open_batch(engine, rows=1)
    tickets = [batch.add(engine.text(prompt, max_new_tokens=NEW)) for prompt in PROMPTS[:3]]
    batch.step()
    batch.cancel(tickets[1])
    batch.cancel(tickets[1])
    done = drain(batch)
    assert {ticket: list(text.token_ids) for ticket, text in done.items()} == {
        tickets[0]: alone[0],
        tickets[2]: alone[2],
    }


@pytest.mark.parametrize("when", [3, 4, 9])
def test_a_processor_that_breaks_ends_its_own_text_alone(engine, alone, when):
    def breaks(tokens, scores):
        if tokens.shape[1] >= when:
            raise KeyError("no such token")
        return scores

    batch = open_batch(engine)
    texts = [engine.text(prompt, max_new_tokens=NEW) for prompt in PROMPTS[:3]]
    texts[0] = replace(texts[0], process=breaks)
    tickets = [batch.add(text) for text in texts]
    done = drain(batch)
    assert isinstance(done[tickets[0]], RequestError) and "no such token" in str(done[tickets[0]])
    assert [list(done[ticket].token_ids) for ticket in tickets[1:]] == alone[1:3]


@pytest.mark.parametrize(
    "result", [torch.zeros(1, 3), torch.full((1, 131), -torch.inf), torch.full((1, 131), torch.nan)]
)
def test_a_processor_that_leaves_no_scores_is_told_of(engine, result):
    batch = open_batch(engine)
    text = engine.text(PROMPTS[0])
    ticket = batch.add(replace(text, process=lambda tokens, scores: result))
    assert "logits processor failed" in str(drain(batch)[ticket])


def test_a_criterion_that_breaks_ends_its_own_text_alone(engine, alone):
    class Breaks:
        text, stopped = "", False

        def push(self, tokens):
            raise KeyError("no such token")

        def finish(self): ...

    batch = open_batch(engine)
    texts = [engine.text(prompt, max_new_tokens=NEW) for prompt in PROMPTS[:3]]
    tickets = [batch.add(text) for text in (replace(texts[0], make_ending=Breaks), *texts[1:])]
    done = drain(batch)
    assert "stopping criterion failed: KeyError('no such token')" in str(done[tickets[0]])
    assert [list(done[ticket].token_ids) for ticket in tickets[1:]] == alone[1:3]


def test_a_text_may_be_decoded_several_times(engine, alone):
    batch, text = open_batch(engine), engine.text(PROMPTS[0], max_new_tokens=NEW)
    tickets = [batch.add(text) for _ in range(3)]
    done = drain(batch)
    assert [list(done[ticket].token_ids) for ticket in tickets] == [alone[0]] * 3


def test_prompts_without_end_are_taken_as_rows_come_free_and_can_be_left(engine, alone):
    taken = []

    def endless():
        for index in count():
            taken.append(index)
            yield PROMPTS[index % len(PROMPTS)]

    results = engine.generate_many(endless(), batch_size=2, max_new_tokens=NEW, sparsity=SPARSITY, correction=RULE)
    for index, done in islice(results, 7):
        assert list(done.token_ids) == alone[index % len(PROMPTS)]
    assert len(taken) <= 7 + 2 * 2
    results.close()
    assert len(taken) <= 7 + 2 * 2


def test_each_prompt_may_have_options_of_its_own(engine, alone):
    each = [{"max_new_tokens": 3}, {}, {"sampling": -1.0}]
    results = engine.generate_many(PROMPTS[:4], each=each, max_new_tokens=NEW, sparsity=SPARSITY, correction=RULE)
    done = dict(results)
    assert "temperature" in str(done.pop(2))
    assert {index: list(text.token_ids) for index, text in done.items()} == {
        0: alone[0][:3],
        1: alone[1],
        3: alone[3],
    }


def test_prompts_after_a_batchful_of_bad_ones_are_decoded_all_the_same(engine, alone):
    prompts = [[], [500], [], PROMPTS[0], [], PROMPTS[1]]
    done = dict(engine.generate_many(prompts, batch_size=2, max_new_tokens=NEW, sparsity=SPARSITY, correction=RULE))
    assert sorted(done) == list(range(6))
    assert [list(done[index].token_ids) for index in (3, 5)] == alone[:2]


@pytest.mark.parametrize("prompts", ["a text", [{"role": "user", "content": "a"}]])
def test_a_single_prompt_is_not_taken_for_many(engine, prompts):
    with pytest.raises(RequestError, match="give a single one to generate"):
        engine.generate_many(prompts)


@pytest.mark.parametrize("company", [[], PROMPTS[1:]])
def test_the_density_of_a_text_is_measured_on_it_alone(engine, company):
    def density(prompts):
        sparsity = SparsityConfig("fine", threshold=0.3)
        rule = CorrectionConfig(5, accept="argmax", tree_width=3)
        done = dict(engine.generate_many(prompts, max_new_tokens=NEW, sparsity=sparsity, correction=rule))
        return done[0].stats.density

    assert density([PROMPTS[0], *company]) == pytest.approx(density(PROMPTS[:1]))
    assert density(PROMPTS[:1]) < 0.99


@pytest.mark.parametrize("family", ["llama", "gemma2"], ids=["sdpa", "eager"])
def test_a_text_whose_scores_are_no_numbers_leaves_nothing_to_the_one_that_takes_its_row(family):
    model = tiny_model(family, eos_token_id=None)
    with torch.no_grad():
        model.get_input_embeddings().weight[99] = float("nan")
        model.lm_head.weight[99] = 0  # never drafted
    engine = Engine(model)
    batch = open_batch(engine, rows=2)
    asked = [([5, 17, 93] * 10, 40), ([7, 7, 99] * 6, 30), ([9], 20)]
    first, broken, successor = [batch.add(engine.text(prompt, max_new_tokens=new)) for prompt, new in asked]
    done = drain(batch)
    assert isinstance(done[broken], ModelError)
    for ticket, (prompt, new) in ((first, asked[0]), (successor, asked[2])):
        assert list(done[ticket].token_ids) == greedy(model, prompt, new)


def test_prompts_that_cannot_be_decoded_yield_their_error_and_the_others_their_text(engine, alone):
    prompts = [PROMPTS[0], [], PROMPTS[1], [500], list(range(60)), PROMPTS[2]]
    done = dict(engine.generate_many(prompts, batch_size=2, max_new_tokens=NEW, sparsity=SPARSITY, correction=RULE))
    assert [isinstance(done[index], RequestError) for index in (1, 3, 4)] == [True] * 3
    assert [list(done[index].token_ids) for index in (0, 2, 5)] == alone[:3]


def test_no_prompts_give_no_completions(engine):
    assert list(engine.generate_many([])) == []


@pytest.mark.parametrize("rows", [0, -1])
def test_a_batch_of_no_rows_is_refused(engine, rows):
    with pytest.raises(ConfigError, match=f"at least 1; got {rows}"):
        engine.generate_many(PROMPTS, batch_size=rows)


def test_a_closed_stream_frees_its_cache_at_once(engine, monkeypatch):
    sessions = []
    opened = Session.open

    def watched(self, prompt, slots):
        sessions.append(weakref.ref(self))
        return opened(self, prompt, slots)

    monkeypatch.setattr(Session, "open", watched)
    gc.disable()
    try:
        stream = engine.stream(PROMPTS[0], max_new_tokens=NEW, correction=RULE)
        next(stream), next(stream)
        stream.close()
        assert sessions[0]() is None
    finally:
        gc.enable()


def test_the_pieces_of_a_stream_make_up_the_completion(engine, alone):
    updates = list(engine.stream(PROMPTS[0], max_new_tokens=NEW, sparsity=SPARSITY, correction=RULE))
    done = updates[-1].completion
    rounds = [update.round for update in updates]
    assert [token for r in rounds for token in r.tokens] == list(done.token_ids) == alone[0]
    assert done.origins == tuple(origin for r in rounds for origin in r.origins)
    assert done.logprobs == tuple(p for r in rounds for p in r.logprobs)
    assert [update.last for update in updates] == [False] * (len(updates) - 1) + [True]


@pytest.mark.parametrize("width", [1, 4, 8])
def test_a_tree_takes_its_width_in_slots_for_each_level_and_no_more(engine, width):
    drop_idle(engine.model)
    batch = open_batch(engine, correction=CorrectionConfig(period=6, accept="argmax", tree_width=width))
    for prompt in PROMPTS[:2]:
        batch.add(engine.text(prompt, max_new_tokens=NEW))
    batch.step()
    before = [store.data_ptr() for layer in batch.session.cache.slot_layers for store in layer.stores]
    longest = max(len(prompt) for prompt in PROMPTS[:2]) + NEW + 5 * width
    assert batch.session.cache.table.slots == longest
    while len(batch.active) == 2:
        batch.step()
    assert [store.data_ptr() for layer in batch.session.cache.slot_layers for store in layer.stores] == before


@pytest.mark.parametrize(
    "options", [{}, {"shared_set": True}, {"refresh": 0.3}, {"shared_set": True, "refresh": 0.3}], ids=str
)
def test_neurons_are_chosen_anew_when_rows_come_or_go_and_not_otherwise(engine, options, monkeypatch):
    chosen, fixed_routes = [], session.fixed_routes
    monkeypatch.setattr(
        session, "fixed_routes", lambda methods, *others: chosen.append(len(methods)) or fixed_routes(methods, *others)
    )
    batch = open_batch(engine, sparsity=SparsityConfig("coarse", 0.3, **options))
    for prompt in PROMPTS[:2]:
        batch.add(engine.text(prompt, max_new_tokens=40))
    batch.step()
    batch.step()
    assert chosen == [2]
    batch.step()
    assert len(chosen) == (2 if options.get("refresh") else 1)
    batch.cancel(1)
    batch.step()
    assert chosen[-1] == 1


@pytest.mark.parametrize("width", [1, 3])
def test_the_statistic_is_refreshed_by_the_tokens_that_were_kept_alone(engine, width, monkeypatch):
    """Against a method that saw, with nothing drafted, the prompt and each round's tokens in a pass of their own."""
    shown, refresh = [], CoarseSparsity.refresh

    def watched(self, layer, z):
        shown.append((layer, z.clone()))
        refresh(self, layer, z)

    monkeypatch.setattr(CoarseSparsity, "refresh", watched)

    def seen(correction):
        shown.clear()
        sparsity = SparsityConfig("coarse", 0.1, refresh=0.3)
        engine.generate(PROMPTS[0], max_new_tokens=NEW, sparsity=sparsity, correction=correction)
        return [torch.cat([z for layer, z in shown if layer == want]) for want in range(2)]

    windows = seen(CorrectionConfig(5, accept="argmax", tree_width=width))
    one_by_one = seen(CorrectionConfig(1, accept="argmax"))
    for got, want in zip(windows, one_by_one, strict=True):
        torch.testing.assert_close(got, want[: len(got)], atol=1e-4, rtol=1e-4)
        assert len(got) > NEW / 2


def test_a_probe_under_a_lossy_rule_shows_the_statistic_no_token_twice(engine, monkeypatch):
    shown, refresh = [], CoarseSparsity.refresh
    monkeypatch.setattr(CoarseSparsity, "refresh", lambda self, n, z: shown.append(len(z)) or refresh(self, n, z))
    sparsity, correction = SparsityConfig("coarse", 0.3, refresh=0.3), CorrectionConfig(1, "typical")
    batch = open_batch(engine, sparsity=sparsity, correction=correction)
    batch.add(engine.text(PROMPTS[0], max_new_tokens=20))
    for _ in range(12):
        batch.step()
    before = len(shown)
    assert before
    probe(batch.session, [entry.row for entry in batch.active], batch.plan, 5)
    assert len(shown) == before
    batch.step()
    assert shown[before:] == [1, 1]  # two layers


@pytest.mark.parametrize("ablate", [(), ("rewrite",)], ids=["rewritten", "not rewritten"])
@pytest.mark.parametrize("accept", ["lossless", "threshold"])
def test_a_probe_leaves_the_cache_as_it_is_even_where_memory_runs_out(engine, accept, ablate, monkeypatch):
    correction = CorrectionConfig(4, accept, ablate=ablate)
    batch = open_batch(engine, sparsity=SparsityConfig("fine", 0.3), correction=correction)
    for prompt in PROMPTS[:2]:
        batch.add(engine.text(prompt, max_new_tokens=30))
    for _ in range(6):
        batch.step()
    cache, rows = batch.session.cache, [entry.row for entry in batch.active]

    def held() -> list[torch.Tensor]:
        stores = [store for layer in cache.slot_layers for store in layer.stores]
        return [store[row, :length].clone() for store in stores for row, length in enumerate(cache.lengths.tolist())]

    before = held()
    probe(batch.session, rows, batch.plan, 5)
    assert all(map(torch.equal, held(), before))

    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("sirius.decoding.probe.add_noise", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        probe(batch.session, rows, batch.plan, 5)
    assert all(map(torch.equal, held(), before))


def test_a_rows_own_neurons_make_a_lossy_text_independent_of_its_neighbours(engine):
    def text(prompts, **options):
        sparsity = SparsityConfig("coarse", 0.2, **options)
        done = dict(engine.generate_many(prompts, max_new_tokens=NEW, sparsity=sparsity, correction=None))
        return done[0].token_ids

    assert text(PROMPTS) == text(PROMPTS[:1]) == text(PROMPTS[:1], shared_set=True)
    assert text(PROMPTS, shared_set=True) != text(PROMPTS[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 2])
def test_with_neurons_of_its_own_a_text_under_a_lossy_rule_is_what_it_is_alone(dtype, width):
    engine = Engine(tiny_model(dtype=dtype, eos_token_id=None))
    options = {
        "max_new_tokens": NEW,
        "sparsity": SparsityConfig("coarse", 0.5),
        "correction": CorrectionConfig(5, "threshold", 0.02, tree_width=width),
    }
    alone = [engine.generate(prompt, **options).token_ids for prompt in PROMPTS]
    done = dict(engine.generate_many(PROMPTS, batch_size=3, **options))
    assert [done[index].token_ids for index in range(len(PROMPTS))] == alone
    assert alone[0] != engine.generate(PROMPTS[0], max_new_tokens=NEW, correction=RULE).token_ids  # it is lossy


def test_a_batch_whose_step_was_interrupted_goes_on_with_no_text(monkeypatch):
    engine = Engine(tiny_model(eos_token_id=None))
    batch = engine.batch(rows=1, correction=CorrectionConfig(4, "argmax"))
    batch.add(engine.text([3, 1, 4], max_new_tokens=20))
    batch.step(), batch.step()
    with monkeypatch.context() as patch:
        patch.setattr("sirius.decoding.loop.keep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            batch.step()
    with pytest.raises(RequestError, match=r"ended midway.*open another batch"):
        batch.step()
    done = engine.generate([3, 1, 4], max_new_tokens=20, correction=CorrectionConfig(4, "argmax"))
    assert list(done.token_ids) == greedy(engine.model, [3, 1, 4], 20)


def interrupt(*given: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", [4, 9])
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_a_processor_that_writes_no_numbers_where_it_stands_is_told_of(engine, alone, when, fails):
    def spoils(tokens, scores):
        if tokens.shape[1] >= when:
            scores[:, 3:9] = torch.nan
            if fails:
                raise KeyError("no such token")
        return scores

    batch = open_batch(engine)
    tickets = [
        batch.add(replace(engine.text(prompt, max_new_tokens=NEW), process=process))
        for prompt, process in zip(PROMPTS[:2], (spoils, None), strict=True)
    ]
    done = drain(batch)
    assert "logits processor failed" in str(done[tickets[0]])
    assert list(done[tickets[1]].token_ids) == alone[1]

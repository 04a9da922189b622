"""Texts side by side: they join, end, fail and are cancelled, and none disturbs another."""

import gc
import weakref
from dataclasses import replace
from itertools import count, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import greedy, tiny_model
from sirius.batch import Batch
from sirius.core import CorrectionConfig, SparsityConfig
from sirius.decoding.probe import probe
from sirius.engine import Engine
from sirius.errors import ConfigError, ModelError, OutOfMemoryError, RequestError
from sirius.model.cache import SlotLayer
from sirius.model.session import Session
from sirius.sparsity.coarse import CoarseSparsity
from sirius.texts import Completion, Update

pytestmark = pytest.mark.integration

PROMPTS = [[5, 17, 93], [9], [70, 3, 12, 88, 41, 6, 19], [33, 20], [101, 55, 20, 33, 8]]
NEW = 24
RULE = CorrectionConfig(period=5, accept="argmax", tree_width=2)
SPARSITY = SparsityConfig("coarse", 0.3)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model(eos_token_id=None, max_position_embeddings=60))


@pytest.fixture(scope="module")
def alone(engine) -> list[list[int]]:
    return [greedy(engine.model, prompt, NEW) for prompt in PROMPTS]


def open_batch(engine: Engine, rows: int = 8, **options) -> Batch:
    return engine.batch(rows=rows, **{"sparsity": SPARSITY, "correction": RULE, **options})


def drain(batch: Batch) -> dict[int, Completion | Exception | None]:
    """Run a batch to its end; return what became of each ticket that still had something to come."""
    updates: list[Update] = []
    while batch.busy:
        updates += batch.step()
    return {update.ticket: update.completion or update.error for update in updates if update.last}


def fed(monkeypatch) -> list[tuple[int, int]]:
    """Watch the passes of the model; return the list to which each adds its rows and tokens of a row."""
    passes, scores = [], Session._scores

    def watched(self, forward, mask, inputs, **options):
        passes.append(tuple(inputs["input_ids"].shape))
        return scores(self, forward, mask, inputs, **options)

    monkeypatch.setattr(Session, "_scores", watched)
    return passes


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


def test_a_text_that_joins_costs_the_others_no_pass(engine, monkeypatch):
    passes = fed(monkeypatch)
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


def test_a_text_that_leaves_costs_the_others_no_pass(engine, alone, monkeypatch):
    passes = fed(monkeypatch)
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


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 110592 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: not enough memory: you tried to allocate"),
    RuntimeError("Storage size calculation overflowed with sizes=[1, 9000000000000000000]"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]
in_every_way = pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: f"{type(error).__name__} {error}"[:50])


@in_every_way
def test_no_memory_for_a_prompt_is_that_texts_affair_alone(engine, alone, monkeypatch, error):
    read = Session.open

    def full(self, prompt, slots):
        if len(prompt) == len(PROMPTS[2]):
            raise error
        return read(self, prompt, slots)

    monkeypatch.setattr(Session, "open", full)
    done = dict(engine.generate_many(PROMPTS, max_new_tokens=NEW, sparsity=SPARSITY, correction=RULE))
    assert isinstance(done[2], RequestError)
    assert "out of memory with 39 cache slots" in str(done[2]) and "lower max_new_tokens or the batch size" in str(
        done[2]
    )
    assert all(list(done[i].token_ids) == alone[i] for i in (0, 1, 3, 4))


def test_an_error_of_the_model_is_not_taken_for_a_shortage_of_memory(engine, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    for method in "open", "read":
        monkeypatch.undo()
        monkeypatch.setattr(Session, method, broken)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            engine.generate(PROMPTS[0])


@in_every_way
def test_no_memory_for_a_first_token_leaves_no_row_behind(engine, alone, monkeypatch, error):
    def full(*_):
        raise error

    batch = open_batch(engine)
    texts = [engine.text(prompt, max_new_tokens=NEW) for prompt in PROMPTS[:3]]
    first = batch.add(texts[0])
    batch.step()
    with monkeypatch.context() as broken:
        broken.setattr("sirius.decoding.loop.fetch", full)
        batch.add(texts[1])
        [update] = batch.step()
    assert isinstance(update.error, RequestError)
    last = batch.add(texts[2])
    done = drain(batch)
    assert [list(done[ticket].token_ids) for ticket in (first, last)] == [alone[0], alone[2]]


@in_every_way
def test_no_memory_for_a_round_ends_the_texts_in_it_and_the_batch_goes_on(engine, alone, monkeypatch, error):
    batch = open_batch(engine, rows=2)
    tickets = [batch.add(engine.text(prompt, max_new_tokens=NEW)) for prompt in PROMPTS[:3]]
    batch.step()
    with monkeypatch.context() as broken:
        broken.setattr(Session, "read", lambda *_: (_ for _ in ()).throw(error))
        updates = batch.step()
    assert len(updates) == 2 and all(isinstance(update.error, RequestError) for update in updates)
    done = drain(batch)
    assert list(done) == tickets[2:] and list(done[tickets[2]].token_ids) == alone[2]


@in_every_way
def test_no_memory_for_a_round_of_so_many_ends_the_longest_alone(engine, alone, monkeypatch, error):
    read = Session.read

    def narrow(self, tokens, *window):
        if len(tokens) > 2:
            raise error
        return read(self, tokens, *window)

    monkeypatch.setattr(Session, "read", narrow)
    done = dict(engine.generate_many(PROMPTS[:3], max_new_tokens=NEW, sparsity=SPARSITY, correction=RULE))
    assert isinstance(done[2], RequestError)  # of 7 tokens
    assert [list(done[index].token_ids) for index in (0, 1)] == alone[:2]


def test_the_message_names_what_was_asked_for_and_holds_no_memory(engine, monkeypatch):
    def full(*_):
        raise NO_MEMORY[1]

    monkeypatch.setattr(Session, "read", full)
    with pytest.raises(RequestError, match="slots for a text, where 110592 bytes were asked for; lower") as caught:
        engine.generate(PROMPTS[0])
    assert caught.value.__cause__ is NO_MEMORY[1] and NO_MEMORY[1].__traceback__ is None


@pytest.mark.parametrize("place", [0, 1, 3], ids=["first", "among them", "last"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_text_too_large_for_the_memory_ends_alone_wherever_it_stands_in_line(rows, place, monkeypatch):
    """As a device would refuse it: every allocation of more than 100 slots fails."""
    allocate, grow = SlotLayer.lazy_initialization, SlotLayer.grow

    def refused(slots: int) -> None:
        if slots > 100:
            raise torch.OutOfMemoryError("full")

    def allocated(self, *states):
        refused(self.table.slots)
        allocate(self, *states)

    def grown(self, rows, slots):
        refused(slots if self.is_initialized else 0)
        grow(self, rows, slots)

    monkeypatch.setattr(SlotLayer, "lazy_initialization", allocated)
    monkeypatch.setattr(SlotLayer, "grow", grown)
    engine = Engine(tiny_model(eos_token_id=None))
    budgets = [NEW] * 3
    budgets.insert(place, 400)
    batch = open_batch(engine, rows=rows)
    tickets = [batch.add(engine.text(p, max_new_tokens=n)) for p, n in zip(PROMPTS[:4], budgets, strict=True)]
    done = drain(batch)
    for index, ticket in enumerate(tickets):
        if index == place:
            assert "out of memory" in str(done[ticket])
        else:
            assert list(done[ticket].token_ids) == greedy(engine.model, PROMPTS[index], NEW)


def test_a_cache_that_could_grow_only_in_part_goes_on(monkeypatch):
    engine = Engine(tiny_model(eos_token_id=None))
    batch, grow = open_batch(engine, rows=2), SlotLayer.grow
    tickets = [batch.add(engine.text(PROMPTS[0], max_new_tokens=NEW))]
    batch.step()
    first, second, *_ = batch.session.cache.slot_layers

    def second_layer_fails(self, rows, slots):
        if self is second and slots > 300:
            raise torch.OutOfMemoryError("full")
        return grow(self, rows, slots)

    monkeypatch.setattr(SlotLayer, "grow", second_layer_fails)
    tickets.append(batch.add(engine.text(PROMPTS[1], max_new_tokens=300)))
    [refused] = batch.step()
    assert isinstance(refused.error, RequestError)
    assert first.stores[0].shape[1] == second.stores[0].shape[1] < 300, "what had grown is given back"
    tickets.append(batch.add(engine.text(PROMPTS[2], max_new_tokens=NEW + 9)))
    done = drain(batch)
    assert list(done[tickets[0]].token_ids) == greedy(engine.model, PROMPTS[0], NEW)
    assert list(done[tickets[2]].token_ids) == greedy(engine.model, PROMPTS[2], NEW + 9)


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


def test_unknown_options_are_refused(engine):
    for call in (
        lambda: engine.batch(perod=3),
        lambda: engine.text([5], perod=3),
        lambda: engine.generate_many([], a=1),
    ):
        with pytest.raises(TypeError, match="unknown option"):
            call()


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
    from sirius.model import session as module

    chosen, fixed_routes = [], module.fixed_routes
    monkeypatch.setattr(
        module, "fixed_routes", lambda methods, mlps: chosen.append(len(methods)) or fixed_routes(methods, mlps)
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

    monkeypatch.setattr("sirius.decoding.probe.noisy", no_memory)
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


GROWING = {
    "chain": CorrectionConfig(5, "argmax"),
    "tree": RULE,
    "auto": CorrectionConfig(),
    "plain": CorrectionConfig(1),
    "lossy": CorrectionConfig(4, "typical"),
}


@pytest.mark.parametrize("growth", [0, 1, 7])
@pytest.mark.parametrize("method", ["coarse", "fine"])
@pytest.mark.parametrize("rule", GROWING)
def test_a_cache_that_grows_changes_no_text(engine, rule, method, growth, monkeypatch):
    options = {"sparsity": SparsityConfig(method, 0.3), "correction": GROWING[rule]}
    want = [engine.generate(prompt, max_new_tokens=NEW, **options).token_ids for prompt in PROMPTS]
    monkeypatch.setattr("sirius.batch.GROWTH", growth)
    batch, sizes = open_batch(engine, rows=3, **options), []
    tickets = [batch.add(engine.text(prompt, max_new_tokens=NEW)) for prompt in PROMPTS[:4]]
    lost = batch.add(engine.text(PROMPTS[1], max_new_tokens=NEW))
    done = {}
    while batch.busy:
        if len(sizes) == 4:
            batch.cancel(lost)
            tickets.append(batch.add(engine.text(PROMPTS[4], max_new_tokens=NEW)))
        done |= {update.ticket: update.completion.token_ids for update in batch.step() if update.completion}
        batch.session.cache.check_integrity()
        sizes.append(batch.session.slots)
    assert [done[ticket] for ticket in tickets] == want
    assert len(set(sizes)) > 1 and max(sizes) <= max(map(len, PROMPTS)) + NEW + batch.window


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.data())
def test_texts_of_any_length_that_join_while_the_cache_grows_are_theirs_alone(engine, data):
    draw = data.draw
    correction = CorrectionConfig(draw(st.sampled_from([1, 3, 6, "auto"])), tree_width=draw(st.integers(1, 3)))
    asked = draw(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(PROMPTS), st.integers(1, 40)), min_size=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sirius.batch.GROWTH", draw(st.integers(0, 9)))
        batch = open_batch(engine, rows=draw(st.integers(1, 4)), correction=correction)
        done, wanted, steps = {}, {}, 0
        while asked or batch.busy:
            for line in [line for line in asked if line[0] <= steps]:
                asked.remove(line)
                _, prompt, new = line
                wanted[batch.add(engine.text(prompt, max_new_tokens=new))] = prompt, new
            done |= {update.ticket: list(update.completion.token_ids) for update in batch.step() if update.completion}
            steps += 1
    assert done == {ticket: greedy(engine.model, *line) for ticket, line in wanted.items()}


def test_memory_is_reserved_for_what_is_written_and_not_for_the_budget():
    model = tiny_model(eos_token_id=None)
    want = greedy(model, PROMPTS[0], 60)
    engine = Engine(model, max_context=2 * 10**8)
    engine.ends = frozenset({next(token for token in want[30:] if token not in want[:30])})
    batch = engine.batch(rows=1)
    ticket = batch.add(engine.text(PROMPTS[0], max_new_tokens=10**8))
    batch.step()
    assert batch.session.slots < 1100
    [done] = drain(batch).values()
    count = len(done.token_ids)
    assert ticket == 1 and 30 < count <= 60 and list(done.token_ids) == want[:count] and done.finish_reason == "stop"
    assert batch.session.slots < 1100


@pytest.mark.parametrize("period", [1, 5])
def test_slots_double_so_that_records_are_seldom_dropped(period, monkeypatch):
    engine = Engine(tiny_model(eos_token_id=None))
    monkeypatch.setattr("sirius.batch.GROWTH", 10)
    batch, sizes = open_batch(engine, correction=CorrectionConfig(period)), []
    batch.add(engine.text(PROMPTS[0], max_new_tokens=400))
    while batch.busy:
        batch.step()
        sizes.append(batch.session.slots)
    most = 3 + 400 + period - 1
    assert list(dict.fromkeys(sizes)) == [min((13 + period - 1) * 2**n, most) for n in range(6)]


@in_every_way
def test_where_slots_cannot_grow_the_texts_that_need_them_end_alone(monkeypatch, error):
    """As a device would refuse it: every allocation of more than 100 slots fails."""
    grow = SlotLayer.grow

    def grown(self, rows, slots):
        if slots > 100:
            raise error
        grow(self, rows, slots)

    monkeypatch.setattr(SlotLayer, "grow", grown)
    monkeypatch.setattr("sirius.batch.GROWTH", 5)
    engine = Engine(tiny_model(eos_token_id=None))
    batch = open_batch(engine, rows=3)
    budgets = [NEW, 400, 80, 300, 87]
    tickets = [batch.add(engine.text(p, max_new_tokens=n)) for p, n in zip(PROMPTS, budgets, strict=True)]
    done = drain(batch)
    for index, ticket in enumerate(tickets):
        if budgets[index] >= 300:
            assert "out of memory with" in str(done[ticket]) and "lower max_new_tokens" in str(done[ticket])
        else:
            want = greedy(engine.model, PROMPTS[index], budgets[index])
            assert list(done[ticket].token_ids) == want


@pytest.mark.parametrize("place", [0, 2, 3], ids=["first", "among them", "last"])
def test_memory_that_really_runs_out_costs_the_text_alone(place, monkeypatch):
    monkeypatch.setattr("sirius.batch.GROWTH", 10**14)
    model = tiny_model(eos_token_id=None)
    want = [greedy(model, prompt, NEW) for prompt in PROMPTS[:3]]
    each = [{"max_new_tokens": NEW}] * 3
    each.insert(place, {"max_new_tokens": 9 * 10**13})
    prompts = [*PROMPTS[:place], [9, 8], *PROMPTS[place:3]]
    done = dict(Engine(model, max_context=10**14).generate_many(prompts, each=each, batch_size=2))
    error = done.pop(place)
    assert isinstance(error, OutOfMemoryError) and "90000000000033 cache slots for a text, where" in str(error)
    assert [list(done[index].token_ids) for index in sorted(done)] == want


def test_a_cache_that_cannot_double_grows_by_a_step(monkeypatch):
    grow, tried = SlotLayer.grow, []

    def grown(self, rows, slots):
        tried.append(slots)
        if slots > 120:
            raise NO_MEMORY[1]
        grow(self, rows, slots)

    monkeypatch.setattr(SlotLayer, "grow", grown)
    monkeypatch.setattr("sirius.batch.GROWTH", 70)
    engine = Engine(tiny_model(eos_token_id=None))
    batch, want = open_batch(engine, rows=1, correction=CorrectionConfig(1)), greedy(engine.model, PROMPTS[0], 400)
    batch.add(engine.text(PROMPTS[0], max_new_tokens=400))
    monkeypatch.setattr("sirius.batch.GROWTH", 40)
    updates = []
    while batch.busy:
        updates += batch.step()
    assert list(dict.fromkeys(slots for slots in tried if slots > 73)) == [146, 114, 228, 155]
    assert [token for update in updates for token in update.round.tokens] == want[: 114 - 2]
    assert "out of memory with 155 cache slots" in str(updates[-1].error)

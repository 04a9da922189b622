"""Memory: the cache grows as texts need it, and where it runs out that costs the text alone."""

from dataclasses import replace

import pytest
import torch
from batches import NEW, PROMPTS, RULE, SPARSITY, drain, open_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import check_integrity, greedy, slow, tiny_model
from sirius.core import CorrectionConfig, SparsityConfig
from sirius.engine import Engine
from sirius.errors import OutOfMemoryError, RequestError
from sirius.runtime import session
from sirius.runtime.cache import SlotLayer
from sirius.runtime.session import Session
from sirius.runtime.workspace import drop_idle

pytestmark = pytest.mark.integration


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


def name_of(error: BaseException) -> str:
    return f"{type(error).__name__} {error}"[:50]


in_every_way = pytest.mark.parametrize("error", NO_MEMORY, ids=name_of)


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


GROWING = {
    "chain": CorrectionConfig(5, "argmax"),
    "tree": RULE,
    "auto": CorrectionConfig(),
    "plain": CorrectionConfig(1),
    "lossy": CorrectionConfig(4, "typical"),
}


@pytest.mark.parametrize("growth", [slow(0), 1, slow(7)])
@pytest.mark.parametrize("method", ["coarse", "fine"])
@pytest.mark.parametrize("rule", GROWING)
def test_a_cache_that_grows_changes_no_text(engine, rule, method, growth, monkeypatch):
    options = {"sparsity": SparsityConfig(method, 0.3), "correction": GROWING[rule]}
    want = [engine.generate(prompt, max_new_tokens=NEW, **options).token_ids for prompt in PROMPTS]
    monkeypatch.setattr("sirius.batch.GROWTH", growth)
    drop_idle(engine.model)
    batch, sizes = open_batch(engine, rows=3, **options), []
    tickets = [batch.add(engine.text(prompt, max_new_tokens=NEW)) for prompt in PROMPTS[:4]]
    lost = batch.add(engine.text(PROMPTS[1], max_new_tokens=NEW))
    done = {}
    while batch.busy:
        if len(sizes) == 4:
            batch.cancel(lost)
            tickets.append(batch.add(engine.text(PROMPTS[4], max_new_tokens=NEW)))
        done |= {update.ticket: update.completion.token_ids for update in batch.step() if update.completion}
        check_integrity(batch.session.cache)
        sizes.append(batch.session.slots)
    assert [done[ticket] for ticket in tickets] == want
    assert len(set(sizes)) > 1 and max(sizes) <= max(map(len, PROMPTS)) + NEW + batch.window


@settings(max_examples=12, derandomize=True, deadline=None)
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
def test_slots_double_so_that_captures_are_seldom_dropped(period, monkeypatch):
    engine = Engine(tiny_model(eos_token_id=None))
    monkeypatch.setattr("sirius.batch.GROWTH", 10)
    batch, sizes = open_batch(engine, correction=CorrectionConfig(period)), []
    batch.add(engine.text(PROMPTS[0], max_new_tokens=400))
    while batch.busy:
        batch.step()
        sizes.append(batch.session.slots)
    most = 3 + 400 + period - 1
    assert list(dict.fromkeys(sizes)) == [min((13 + period - 1) * 2**n, most) for n in range(6)]


@pytest.mark.parametrize("error", [NO_MEMORY[1], *map(slow, NO_MEMORY[:1] + NO_MEMORY[2:])], ids=name_of)
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


def shortage(tokens, scores):
    """Runs out of memory at its fourth token."""
    if tokens.shape[1] >= len(PROMPTS[0]) + 4:
        raise torch.OutOfMemoryError("full")
    return scores


def test_memory_that_runs_out_in_a_processor_is_no_fault_of_the_processor(engine, alone):
    batch = open_batch(engine)
    texts = [engine.text(prompt, max_new_tokens=NEW) for prompt in PROMPTS[:2]]
    tickets = [batch.add(replace(texts[0], process=shortage)), batch.add(texts[1])]
    done = drain(batch)
    failed = [each for each in done.values() if isinstance(each, Exception)]
    assert failed and all("out of memory" in str(error) for error in failed)
    assert tickets[0] in done


class Counting:
    """Keeps how often it was asked, and acts by it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tokens, scores):
        self.calls += 1
        return scores.roll(self.calls, -1)


def test_a_round_is_not_repeated_before_a_processor_that_keeps_state(engine):
    """Asked a second time about a token, it would count that twice: its text must not go on."""
    batch, rounds = open_batch(engine), []
    accept = batch.plan.accept

    def full_once(*arguments):
        rounds.append(1)
        if len(rounds) == 5:
            raise torch.OutOfMemoryError("full")
        return accept(*arguments)

    batch.plan = replace(batch.plan, accept=full_once)
    ticket = batch.add(replace(engine.text(PROMPTS[0], max_new_tokens=NEW), process=Counting()))
    assert "out of memory" in str(drain(batch)[ticket])


def test_a_shortage_in_a_models_first_pass_does_not_cost_it_our_attention(monkeypatch, caplog):
    """A model that computes something of its mask may fail there too, and keeps its own attention then."""
    engine, scores, calls = Engine(tiny_model(eos_token_id=None)), session._scores, []

    def full_once(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:  # the first pass after the prompt's
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return scores(*arguments, **options)

    monkeypatch.setattr(session, "_scores", full_once)
    with caplog.at_level("WARNING", "sirius"):
        done = engine.generate(PROMPTS[0], max_new_tokens=NEW, correction=5)
    assert list(done.token_ids) == greedy(engine.model, PROMPTS[0], NEW)
    assert caplog.text == ""

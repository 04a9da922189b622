"""What passes of a streamed model move over the link, and what memory was planned for."""

import gc
import os
import threading
import weakref

import pytest
import torch
from streaming import (  # noqa: F401 - fixtures
    COARSE,
    EIGHT,
    FOUR,
    NEW,
    PLAIN,
    PROMPT,
    PROMPTS,
    chain,
    folder,
    llama,
    plan_of,
    streamed,
    want,
    write,
    write_all,
)

from sirius import restore
from sirius.core import SparsityConfig
from sirius.engine import Engine
from sirius.errors import ConfigError, OutOfMemoryError, UnsupportedModelError
from sirius.model.prepared import prepared_of
from sirius.offload.checkpoint import PAGE

pytestmark = pytest.mark.integration


def moved(engine: Engine, **options) -> int:
    """Return the bytes that cross the link while a text is written."""
    placed = prepared_of(engine.model).placed
    before = placed.moved
    write(engine, **options)
    return placed.moved - before


def test_each_pass_moves_the_bytes_of_its_plan(folder):
    plan = plan_of(folder, "010 010", PLAIN, torch.float32, 600, 3)
    engine = streamed(folder, "010 010")
    write(engine)  # the next text finds the first units in the buffers
    few, many = (moved(engine, max_new_tokens=count, correction=chain(1)) for count in (3, 9))
    assert many - few == 6 * plan.full_streamed
    plan = plan_of(folder, "000 000 111", FOUR, torch.float32, 600, 3)
    engine = streamed(folder, "000 000 111", FOUR)
    write(engine, FOUR)
    done = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=FOUR, correction=chain())
    passes = moved(engine, draft=FOUR) / plan.full_streamed
    assert done.stats.rounds - 1 <= passes <= done.stats.rounds + 1, "drafts move nothing"


@pytest.mark.parametrize("stays", ["000 000", "010 001", "100 010 000 001"])
def test_a_draft_pass_of_coarse_moves_attention_and_kept_neurons_alone(folder, stays):
    plan = plan_of(folder, stays, COARSE, torch.float32, 600, 3)
    engine = streamed(folder, stays, COARSE)
    batch = engine.batch(rows=1, sparsity=COARSE, correction=chain(8))
    batch.add(engine.text(PROMPT, max_new_tokens=99))
    [batch.step() for _ in range(3)]  # the prompt, and rounds after which the next one finds the buffers filled
    before, rounds = prepared_of(engine.model).placed.moved, 4
    guesses = sum(len(update.round.draft) for _ in range(rounds) for update in batch.step())
    found = prepared_of(engine.model).placed.moved - before
    pages = 3 * PAGE - 3 * 22 * 36 * 4  # gate, up and down of 22 neurons take a page each
    expected = rounds * plan.full_streamed + guesses * (plan.draft_streamed + plan.neurons.count(False) * pages)
    assert guesses and expected <= found <= expected + rounds * 4 * plan.unit, "a pass of another kind is a surprise"


def test_a_batch_is_opened_without_bringing_what_its_drafts_read(folder):
    engine = streamed(folder, "000 000 000", FOUR)
    want = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=FOUR, correction=chain()).stats.density
    placed = prepared_of(engine.model).placed
    before = placed.moved
    engine.batch(rows=1, sparsity=FOUR, correction=chain())
    assert placed.moved == before
    inside = Engine(llama()).generate(PROMPT, max_new_tokens=NEW, sparsity=FOUR, correction=chain())
    assert inside.stats.density == want


def test_an_engine_that_is_deleted_frees_its_buffers_threads_and_files(folder):
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    threads, files = set(threading.enumerate()), opened()
    engine = streamed(folder, "010 000", COARSE)
    write(engine, COARSE)
    ring = weakref.ref(prepared_of(engine.model).placed.ring)
    assert opened() > files and set(threading.enumerate()) - threads
    del engine
    gc.collect()
    assert ring() is None and opened() == files
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
        assert not thread.is_alive()


def test_texts_wait_their_turn_where_memory_was_planned_for_fewer(folder, want):
    engine, most = streamed(folder, "010 010", FOUR, slots=60), []
    batch = engine.batch(rows=3, sparsity=FOUR, correction=chain())
    tickets = [batch.add(engine.text(prompt, max_new_tokens=NEW)) for prompt in PROMPTS]
    done = {}
    while batch.busy:
        done |= {update.ticket: update.completion for update in batch.step() if update.last}
        most.append((len(batch.active), batch.session.cache.table.rows * batch.session.slots))
    assert [list(done[ticket].token_ids) for ticket in tickets] == want
    assert max(rows for rows, _ in most) == 2 and max(slots for _, slots in most) <= 60


def test_neurons_of_each_prompt_are_kept_for_one_text_at_a_time(folder, want):
    engine, most = streamed(folder, "111 010", COARSE), 0
    batch = engine.batch(rows=3, sparsity=COARSE, correction=chain())
    tickets = [batch.add(engine.text(prompt, max_new_tokens=NEW)) for prompt in PROMPTS]
    done = {}
    while batch.busy:
        done |= {update.ticket: update.completion for update in batch.step() if update.last}
        most = max(most, len(batch.active))
    assert [list(done[ticket].token_ids) for ticket in tickets] == want and most == 1
    assert engine.batch(rows=3, sparsity="none").rows == 3


def test_a_text_longer_than_was_planned_for_is_refused(folder, want):
    engine = streamed(folder, "000 000", slots=40)
    with pytest.raises(OutOfMemoryError, match=r"107 slots of keys and values are needed .* planned for 40;"):
        engine.generate(PROMPT, max_new_tokens=100, correction=chain(1))
    assert write(engine, correction=chain(1)) == want[0]


def test_a_draft_that_memory_was_not_planned_for_is_refused_by_name(folder):
    four, coarse, plain = (
        streamed(folder, "010 010", FOUR),
        streamed(folder, "010 010", COARSE),
        streamed(folder, "000 000"),
    )
    for engine, draft, words in (
        (four, "fine", "planned for every neuron at 4 bits, and fine 0.5 may read more"),
        (four, "coarse", "planned for every neuron at 4 bits, and coarse 0.5 may read more"),
        (four, EIGHT, "planned for weights of 4 bits, and draft_bits is 8"),
        (coarse, SparsityConfig("coarse", 0.6), "planned for coarse 0.5, and coarse 0.6 may read more"),
        (coarse, "fine", "planned for coarse 0.5, and fine"),
        (coarse, FOUR, "planned for no weights of fewer bits, and draft_bits is 4"),
        (plain, "coarse", "planned for no draft, and coarse 0.5 may read more"),
        (plain, FOUR, "planned for no weights of fewer bits"),
    ):
        with pytest.raises(ConfigError, match=words):
            engine.generate(PROMPT, sparsity=draft, correction=chain())


def test_neurons_of_each_text_are_kept_for_one_text_where_one_set_was_planned_for_all(folder, want):
    engine = streamed(folder, "111 010", SparsityConfig("coarse", shared_set=True))
    assert engine.batch(rows=3, sparsity=COARSE).rows == 1
    assert write_all(engine, COARSE) == want


def test_neurons_in_full_width_are_refused_where_rounded_ones_were_planned(folder):
    engine = streamed(folder, "111 010", SparsityConfig("coarse", draft_bits=4))
    with pytest.raises(ConfigError, match=r"planned for coarse 0.5 at 4 bits, and coarse 0.5 may read more"):
        engine.generate(PROMPT, sparsity="coarse", correction=chain())


def test_a_draft_that_reads_less_than_memory_was_planned_for_is_taken(folder, want):
    coarse = streamed(folder, "110 010", COARSE)
    for draft in (SparsityConfig("coarse", 0.3), PLAIN):
        assert write(coarse, draft) == want[0]
    four = streamed(folder, "110 010", FOUR)
    for draft in (SparsityConfig("coarse", draft_bits=4), SparsityConfig("fine", draft_bits=4), PLAIN):
        assert write(four, draft) == want[0]
    for engine in (coarse, four):
        assert list(engine.generate(PROMPT, max_new_tokens=NEW).token_ids) == want[0], "the default"


def test_a_streamed_model_is_neither_restored_nor_compiled(folder):
    engine = streamed(folder, "000 000")
    with pytest.raises(UnsupportedModelError, match="not in memory, as it was loaded with a memory budget"):
        restore(engine.model)
    with pytest.raises(ConfigError, match="leave compile out"):
        Engine(engine.model, compile=True)

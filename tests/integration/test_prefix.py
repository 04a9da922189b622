"""The beginning that prompts of a batch have in common is read once; no text and no cache differs for that."""

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest
import torch
from batches import drain

from conftest import FAMILIES, VOCABULARY, check_integrity, greedy, slow, tiny_model
from sirius.batch import Batch
from sirius.core import CorrectionConfig, Mode, SparsityConfig, Window
from sirius.engine import Engine
from sirius.errors import OutOfMemoryError
from sirius.kernels import cpu
from sirius.runtime.prefix import BLOCK, REST, Prefixes, block_names
from sirius.runtime.session import Session, ordinary
from sirius.sparsity import base
from sirius.sparsity.coarse import CoarseSparsity

pytestmark = pytest.mark.integration

NEW = 10
CHAIN, TREE = CorrectionConfig(period=5), CorrectionConfig(period=4, tree_width=3)
LONG = {"max_position_embeddings": 2048, "eos_token_id": None}
needs_kernels = pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_kernels)]


def drawn(count: int, seed: int = 0) -> list[int]:
    random = Random(seed)
    return [random.randrange(3, VOCABULARY) for _ in range(count)]


def with_common(common: int, *rests: int) -> list[list[int]]:
    """Return prompts that begin with as many tokens in common and go on with tokens of their own."""
    return [drawn(common) + drawn(rest, seed) for seed, rest in enumerate(rests, start=1)]


@contextmanager
def nothing_shared() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefixes, "find", lambda *_: (0, 0))
        yield


@contextmanager
def counted(engine: Engine) -> Iterator[list[int]]:
    """Give the number of tokens of each pass in the block."""
    passes: list[int] = []
    hook = engine.model.get_input_embeddings().register_forward_hook(
        lambda _, given, __: passes.append(given[0].numel())
    )
    yield passes
    hook.remove()


def open_rows(engine: Engine, prompts: list[list[int]], method: str = "coarse") -> tuple[Session, list[torch.Tensor]]:
    """Return a session with a row of each prompt, and the scores after each."""
    session = Batch(engine.model, SparsityConfig(method, 0.3), CHAIN).session
    with ordinary():
        return session, [session.open(torch.tensor(prompt), len(prompt) + 20).clone() for prompt in prompts]


def assert_same_rows(one: Session, other: Session) -> None:
    """Compare lengths, keys, values and the methods' scores of all open rows, bit for bit."""
    count = len(one.methods)
    assert count == len(other.methods) and torch.equal(one.cache.lengths[:count], other.cache.lengths[:count])
    for ours, theirs in zip(one.cache.slot_layers, other.cache.slot_layers, strict=True):
        for got, want in zip(ours.stores, theirs.stores, strict=True):
            for row, length in enumerate(one.cache.lengths[:count].tolist()):
                assert torch.equal(got[row, :length], want[row, :length])
    for got, want in zip(one.methods, other.methods, strict=True):
        assert isinstance(got, CoarseSparsity) == isinstance(want, CoarseSparsity)
        if isinstance(got, CoarseSparsity) and isinstance(want, CoarseSparsity):
            for layer in range(len(one.mlps)):
                assert torch.equal(got.score(layer), want.score(layer))
                assert torch.equal(got.select(layer), want.select(layer))


@pytest.fixture(scope="module")
def long() -> Engine:
    return Engine(tiny_model(**LONG))


@pytest.mark.parametrize("common", [300, slow(600), 1000])
@pytest.mark.parametrize("method", ["coarse", "fine", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_texts_of_a_batch_are_those_that_each_prompt_gives_alone(dtype, method, common):
    engine = Engine(tiny_model(dtype=dtype, **LONG))
    prompts = with_common(common, 100, 1, 90, 300)
    for correction in (CHAIN, TREE):
        options = {"max_new_tokens": NEW, "sparsity": method, "correction": correction}
        together = dict(engine.generate_many(prompts, batch_size=4, **options))
        for index, prompt in enumerate(prompts):
            assert together[index].token_ids == engine.generate(prompt, **options).token_ids


def test_a_text_after_a_long_prompt_is_transformers_greedy_text(long):
    prompts = with_common(600, 90, 33)
    done = dict(long.generate_many(prompts, max_new_tokens=NEW, sparsity="coarse", correction=TREE))
    assert [list(done[index].token_ids) for index in range(2)] == [greedy(long.model, each, NEW) for each in prompts]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_scores_and_chosen_neurons_are_those_of_prompts_read_in_full(family, dtype):
    engine = Engine(tiny_model(family, dtype, **LONG, **({"sliding_window": 2048} if "gemma" in family else {})))
    prompts = with_common(600, 90, 41, 300)
    shared, scores = open_rows(engine, prompts)
    with nothing_shared():
        apart, wanted = open_rows(engine, prompts)
    assert all(torch.equal(got, want) for got, want in zip(scores, wanted, strict=True))
    assert_same_rows(shared, apart)
    check_integrity(shared.cache)


@pytest.mark.parametrize("method", ["coarse", "fine", "none"])
def test_a_block_in_common_is_read_once(long, method):
    prompts = with_common(600, 90, 41, 300)
    with counted(long) as passes:
        open_rows(long, prompts, method)
    assert passes == [BLOCK, BLOCK, 690 - 512, 641 - 512, BLOCK, 900 - 768]
    assert sum(passes) == sum(map(len, prompts)) - 2 * 512


def test_a_prompt_is_copied_from_the_row_that_has_most_in_common_with_it(long):
    first, second = with_common(300, 400, 900)
    third = second[:800] + drawn(100, seed=7)
    with counted(long) as passes:
        session, _ = open_rows(long, [first, second, third, first])
    assert passes[-2:] == [900 - 768, 700 - 512]
    with nothing_shared():
        assert_same_rows(session, open_rows(long, [first, second, third, first])[0])


def test_the_last_pass_reads_no_fewer_tokens_than_products_of_many_need(long):
    for length in (BLOCK + REST - 1, BLOCK + REST, 2 * BLOCK, 2 * BLOCK + REST - 1, 2 * BLOCK + REST):
        with counted(long) as passes:
            open_rows(long, [drawn(length)])
        blocks = (length - REST) // BLOCK
        assert passes == [BLOCK] * blocks + [length - blocks * BLOCK] and len(block_names(drawn(length))) == blocks


def test_prompts_shorter_than_a_block_and_prompts_unlike_each_other_are_read_in_full(long):
    for prompts in ([drawn(200), drawn(200)], [drawn(1), drawn(1)], [drawn(600), drawn(600, 1)]):
        with counted(long) as passes:
            open_rows(long, prompts)
        assert sum(passes) == sum(map(len, prompts))


def test_equal_blocks_after_other_tokens_are_not_equal(long):
    same = drawn(2 * BLOCK)
    with counted(long) as passes:
        open_rows(long, [drawn(BLOCK, 1) + same, drawn(BLOCK, 2) + same], "none")
    assert sum(passes) == 2 * 3 * BLOCK


def test_new_tokens_of_a_row_are_never_copied(long):
    """They were written by checks, whose bits may be others in 16 bits."""
    prompt, new = drawn(400), drawn(120, seed=1)
    session, _ = open_rows(long, [prompt], "none")
    where = Window(0, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.bool), torch.ones(1, 1))
    with ordinary():
        session.reserve(1, 800)
        for token in new:
            session.read(torch.tensor([[token]]), Mode.DENSE, where)
            session.keep(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
        with counted(long) as passes:
            session.open(torch.tensor(prompt + new + drawn(200, seed=2)), 800)
    assert passes == [BLOCK, 720 - 512]


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_rows_that_close_meanwhile_disturb_nobody(long, closed):
    prompts, late = with_common(600, 90, 41, 300), with_common(600, 90, 41, 300, 50)[3]
    with ordinary():
        session, _ = open_rows(long, prompts)
        session.close(closed)
        with counted(long) as passes:
            scores = session.open(torch.tensor(late), 700).clone()
        assert passes == [650 - 512]
        prompts[closed] = prompts[-1]
        with nothing_shared():
            apart, wanted = open_rows(long, [*prompts[:-1], late])
    assert torch.equal(scores, wanted[-1])
    assert_same_rows(session, apart)


def test_nothing_is_shared_with_a_row_that_is_gone(long):
    first, second = with_common(600, 90, 41)
    with ordinary():
        session, _ = open_rows(long, [first, drawn(30)])
        session.close(0)
        assert not session.prefixes.states
        with counted(long) as passes:
            session.open(torch.tensor(second), 700)
    assert sum(passes) == len(second)


def test_a_batch_of_more_texts_than_rows_shares_with_the_rows_at_work(long):
    prompts = with_common(600, 90, 50, 41, 70, 60, 64)
    budgets = [3, 20, 5, 9, 4, 6]
    batch = long.batch(rows=2, sparsity=SparsityConfig("coarse", 0.3), correction=CHAIN)
    with counted(long) as passes:
        tickets = [batch.add(long.text(p, max_new_tokens=n)) for p, n in zip(prompts, budgets, strict=True)]
        done = drain(batch)
    assert passes.count(BLOCK) == 2
    for ticket, prompt, budget in zip(tickets, prompts, budgets, strict=True):
        want = long.generate(prompt, max_new_tokens=budget, sparsity=SparsityConfig("coarse", 0.3), correction=CHAIN)
        assert done[ticket].token_ids == want.token_ids


@pytest.mark.parametrize("place", ["first block", "second block", "rest", "copy"])
def test_no_memory_in_the_midst_of_a_prompt_leaves_no_row_half_open(long, monkeypatch, place):
    first, second = with_common(300, 100, 400)
    session, _ = open_rows(long, [first])
    read, part = Session._read_prompt, {"first block": 0, "second block": BLOCK, "rest": 2 * BLOCK}.get(place)

    def full(*_):
        raise torch.OutOfMemoryError("full")

    def failing(self, prompt, row, part_read, routes):
        return full() if part_read[0] == part else read(self, prompt, row, part_read, routes)

    with ordinary(), monkeypatch.context() as patch:
        patch.setattr(Session, "_read_prompt", failing)
        if place == "copy":
            patch.setattr("sirius.runtime.session.Prefixes.recall", full)
        if place == "first block":
            patch.setattr(Prefixes, "find", lambda *_: (0, 0))
        with pytest.raises(torch.OutOfMemoryError):
            session.open(torch.tensor(second), 720)
    assert len(session.methods) == len(session.prefixes.rows) == 1
    assert session.cache.lengths.tolist() == [len(first), *[0] * (session.cache.table.rows - 1)]
    with ordinary():
        got = session.open(torch.tensor(second), 720).clone()
        with nothing_shared():
            apart, wanted = open_rows(long, [first, second])
    assert torch.equal(got, wanted[1])
    assert_same_rows(session, apart)


def test_a_text_without_memory_for_its_second_block_ends_alone(long, monkeypatch):
    prompts = with_common(300, 100, 400, 110)
    read = Session._read_prompt

    def failing(self, prompt, row, part, routes):
        if len(prompt) == 700 and part[0] == BLOCK:
            raise torch.OutOfMemoryError("full")
        return read(self, prompt, row, part, routes)

    want = [long.generate(prompt, max_new_tokens=NEW, correction=CHAIN).token_ids for prompt in prompts]
    monkeypatch.setattr(Session, "_read_prompt", failing)
    done = dict(long.generate_many(prompts, max_new_tokens=NEW, correction=CHAIN))
    assert isinstance(done[1], OutOfMemoryError)
    assert [done[0].token_ids, done[2].token_ids] == [want[0], want[2]]


def test_positions_that_are_scaled_anew_are_given_to_whole_prompts():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [3.0] * 3}
    sizes = {"max_position_embeddings": 2000, "original_max_position_embeddings": 700}
    engine = Engine(tiny_model("phi3", eos_token_id=None, rope_parameters=rope, **sizes))
    for common, passes_wanted in (600, [BLOCK, BLOCK, 690 - 512, 641 - 512]), (720, [810, 761]):
        prompts = with_common(common, 90, 41)
        with counted(engine) as passes:
            open_rows(engine, prompts)
        assert passes == passes_wanted
        done = dict(engine.generate_many(prompts, max_new_tokens=NEW, correction=CHAIN))
        assert [list(done[i].token_ids) for i in range(2)] == [greedy(engine.model, each, NEW) for each in prompts]


class KeepsAll(CoarseSparsity):
    """A method with a state of any form: all that it saw, in place."""

    locked = False

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.seen = [torch.zeros(0, size) for size in self.neurons]
        self.lock = (_ for _ in ()) if self.locked else None  # cannot be copied

    def observe(self, layer, z) -> None:
        super().observe(layer, z)
        self.seen[layer] = torch.cat([self.seen[layer], z])


@pytest.mark.parametrize("obstacle", [None, "size", "copy"])
def test_a_method_of_another_package_sees_every_token_of_each_prompt(long, monkeypatch, obstacle):
    """Where its state cannot be copied, or is too large, prompts are read in full."""
    monkeypatch.setitem(base._METHODS, "keeps-all", KeepsAll)
    monkeypatch.setattr(KeepsAll, "locked", obstacle == "copy")
    if obstacle == "size":
        monkeypatch.setattr("sirius.runtime.prefix.MOST_BYTES", 1000)
    prompts = with_common(600, 90, 41)
    with counted(long) as passes:
        session, _ = open_rows(long, prompts, "keeps-all")
    assert sum(passes) == sum(map(len, prompts)) - (0 if obstacle else 512)
    assert [len(method.seen[0]) for method in session.methods] == [690, 641]
    with nothing_shared():
        apart, _ = open_rows(long, prompts, "keeps-all")
    for got, want in zip(session.methods, apart.methods, strict=True):
        assert all(torch.equal(*pair) for pair in zip(got.seen, want.seen, strict=True))
    assert_same_rows(session, apart)


def test_copies_of_methods_are_bounded_and_the_ones_in_use_stay(long, monkeypatch):
    used = drawn(700)
    session, _ = open_rows(long, [used])
    size = sum(size for _, size in session.prefixes.states.values()) // 2
    monkeypatch.setattr("sirius.runtime.prefix.MOST_BYTES", 3 * size)
    with ordinary():
        for seed in range(1, 5):
            for prompt in used[:520] + drawn(130, seed), drawn(700, seed):
                session.open(torch.tensor(prompt), 710)
                assert len(session.prefixes.states) <= 3
        with counted(long) as passes:
            session.open(torch.tensor(used), 710)
    assert passes == [700 - 512]


def test_released_memory_costs_time_alone(long):
    first, second = with_common(600, 90, 41)
    with ordinary():
        session, _ = open_rows(long, [first])
        session.release()
        assert not session.prefixes.states
        session.open(torch.tensor(second), 700)
    with nothing_shared():
        assert_same_rows(session, open_rows(long, [first, second])[0])


def test_a_batch_of_one_row_keeps_no_copies_for_others(long):
    """Its prompts are read in the same blocks, so that their bits are those in any batch."""
    prompt, seen = drawn(700), []
    for rows in (1, 2):
        batch = long.batch(rows=rows, sparsity=SparsityConfig("coarse", 0.3), correction=CHAIN)
        batch.add(long.text(prompt, max_new_tokens=NEW))
        with counted(long) as passes:
            batch.step()
        assert passes[:3] == [BLOCK, BLOCK, 700 - 512] and len(batch.session.prefixes.states) == (rows > 1) * 2
        seen.append([method.score(0) for method in batch.session.methods])
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))


def test_names_of_blocks_are_equal_where_all_tokens_up_to_them_are():
    one, other = drawn(1000), drawn(1000)
    other[300] += 1
    names = block_names(one), block_names(other)
    assert [a == b for a, b in zip(*names, strict=True)] == [True, False, False]

"""Texts side by side under a memory budget: as many as there is memory for, the others wait."""

import random

import pytest
from budgets import saved, smallest, streamed, unmeasured

from sirius.core import CorrectionConfig, SparsityConfig
from sirius.engine import Engine
from sirius.errors import ConfigError, OutOfMemoryError, RequestError
from sirius.model.prepared import prepared_of
from sirius.offload.budget import Budget, as_budget, window_of
from sirius.runtime.workspace import Workspace

pytestmark = pytest.mark.integration

NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch):
    unmeasured(monkeypatch)


@pytest.fixture
def largest(monkeypatch) -> list[tuple[int, int]]:
    """Collect the rows and slots of every cache after it was asked for room."""
    sizes, reserve = [], Workspace.reserve

    def noted(self, rows, slots):
        reserve(self, rows, slots)
        sizes.append((self.cache.table.rows, self.cache.table.slots))

    monkeypatch.setattr(Workspace, "reserve", noted)
    return sizes


def prompts(*lengths: int) -> list[list[int]]:
    draw = random.Random(sum(lengths))
    return [[draw.randrange(3, 131) for _ in range(length)] for length in lengths]


def texts(engine: Engine, asked: list[list[int]], **options) -> list[tuple[int, ...]]:
    done = dict(engine.generate_many(asked, max_new_tokens=NEW, batch_size=8, **options))
    return [done[index].token_ids for index in range(len(asked))]


@pytest.mark.parametrize(
    "lengths",
    [[5] * 8, [3, 9, 200, 4, 4, 300, 5, 450, 7, 8, 6], [450, 5, 5, 5, 5], [400] * 3],
    ids=["short", "mixed", "a long one first", "long"],
)
def test_eight_rows_share_the_planned_slots_and_write_what_the_model_in_memory_writes(folder, largest, lengths):
    engine, asked = streamed(folder), prompts(*lengths)
    planned = prepared_of(engine.model).slots
    assert planned == 512 + 32
    got = texts(engine, asked, sparsity="none")
    assert max(rows * slots for rows, slots in largest) <= planned
    together = max(rows for rows, _ in largest)
    assert together == 8 if max(lengths) < 10 else together < 8
    assert got == texts(Engine.load(folder), asked, sparsity="none")


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["a set each", "one set"])
def test_drafts_with_kept_neurons_have_as_many_rows_as_were_planned(folder, largest, shared):
    draft = SparsityConfig("coarse", shared_set=shared)
    engine, asked = streamed(folder, draft=draft, rows=2), prompts(*range(4, 14))
    got = texts(engine, asked, sparsity=draft, correction=4)
    assert max(rows for rows, _ in largest) == (8 if shared else 2)
    assert got == texts(Engine.load(folder), asked, sparsity="none")


def test_each_row_has_the_given_context_and_fewer_rows_are_planned_where_the_budget_is_small(folder):
    wide = streamed(folder, more=400_000, draft=SparsityConfig("none"), rows=4, context=100)
    assert (prepared_of(wide.model).slots, wide.limit) == (4 * 132, 100)
    assert "4 texts side by side" in str(prepared_of(wide.model).plan)
    narrow = streamed(folder, draft=SparsityConfig("none"), rows=4, context=100)
    assert (prepared_of(narrow.model).slots, narrow.limit) == (132, 100)
    assert smallest(folder, rows=4, context=100) == smallest(folder, rows=1, context=100)


def test_a_model_that_fits_whole_keeps_to_the_planned_slots_too(folder, largest):
    engine, asked = streamed(folder, more=10**6), prompts(*[300] * 4)
    assert not any(each.is_meta for each in engine.model.parameters())
    assert texts(engine, asked) == texts(Engine.load(folder), asked)
    planned = prepared_of(engine.model).slots
    assert max(rows * slots for rows, slots in largest if rows < 4) <= planned


def test_what_a_text_at_work_holds_is_not_given_to_another_one_and_is_free_after_it(folder):
    engine = streamed(folder)
    first, second = prompts(300, 301)
    waiting = engine.stream(first, max_new_tokens=NEW, sparsity="none")
    next(waiting)
    with pytest.raises(OutOfMemoryError, match=r"^1 x 3\d\d slots .* for 544, of which other texts take 3\d\d"):
        engine.generate(second, max_new_tokens=NEW, sparsity="none")
    assert len(list(waiting)) == NEW - 1
    assert len(engine.generate(second, max_new_tokens=NEW, sparsity="none").token_ids) == NEW  # `waiting` is still here


def test_a_check_that_is_longer_than_was_planned_for_ends_its_text_alone_with_one_line(folder):
    tree = CorrectionConfig(period=16, tree_width=8)
    engine, (short, long) = streamed(folder, draft=SparsityConfig("coarse")), prompts(20, 495)
    done = dict(engine.generate_many([short, long], max_new_tokens=NEW, sparsity="coarse", correction=tree))
    assert len(done[0].token_ids) == NEW
    assert isinstance(done[1], RequestError) and "\n" not in str(done[1])
    planned = streamed(folder, draft=SparsityConfig("coarse"), window=window_of(tree))
    assert len(planned.generate(long, max_new_tokens=NEW, sparsity="coarse", correction=tree).token_ids) == NEW


def test_a_draft_is_planned_where_so_many_of_its_tokens_are_expected_that_it_pays(folder):
    poor, good = (streamed(folder, more=60_000, aal=aal) for aal in (1, 15))
    assert [prepared_of(each.model).placed.planned.draft.draft_bits for each in (poor, good)] == [0, 4]


def test_a_budget_above_the_memory_of_the_machine_is_refused(folder):
    with pytest.raises(ConfigError, match=r"a memory budget of 1000 TB is more than this machine has: .*; give less"):
        Engine.load(folder, memory_budget=10**15)


def test_a_budget_is_given_by_its_size_or_as_a_whole():
    assert as_budget("8GiB", "coarse", 9) == Budget("8GiB", SparsityConfig("coarse"), 9)
    assert as_budget(Budget(5, rows=3), None, 9) == Budget(5, context=9, rows=3)
    with pytest.raises(ConfigError, match=r"Budget\(\.\.\., draft=\)"):
        as_budget(Budget(5), "coarse", None)
    with pytest.raises(ConfigError, match="at least 1; got 0 and 32"):
        Budget(5, rows=0)
    assert Budget(5, draft={"draft_bits": 4}).draft == SparsityConfig("none", draft_bits=4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="link is a finite number of bytes a second, above 0; got nan"):
        Budget(5, link=float("nan"))
    with pytest.raises(ConfigError, match="a period of at least 2; got 1"):
        Budget(5, period=1)
    with pytest.raises(ConfigError, match="a round of 4 brings from 1 to 4 tokens; got aal 5"):
        Budget(5, period=4, aal=5)
    assert [window_of(each) for each in (None, CorrectionConfig(4), CorrectionConfig(16, tree_width=4))] == [32, 32, 60]

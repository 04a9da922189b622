import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import check_integrity
from sirius.model.prepared import Pass, Prepared
from sirius.runtime.cache import SlotCache

HEADS, DIM = 2, 3


def make(rows: int = 2, slots: int = 10, layers: int = 2) -> SlotCache:
    return SlotCache(layers, rows, slots, torch.device("cpu"), Prepared())


def write(cache: SlotCache, slots: list[list[int]], values: list[list[float]], first: int = 0) -> tuple[Tensor, Tensor]:
    """Write `values` [B, T] to `slots` [B, T] of every layer, spread over heads and head_dim; return the last view."""
    placed, none = cache.locate(torch.tensor(slots), first), torch.zeros(0)
    states = torch.tensor(values)[:, None, :, None].expand(-1, HEADS, -1, DIM)
    with cache.table.prepared.running(Pass([], placed, none, none, none, False, False)):
        return [cache.update(states, -states, layer) for layer in range(len(cache.slot_layers))][-1]


def filled(lengths: list[int], slots: int = 10, layers: int = 2) -> SlotCache:
    """Return a cache whose row b holds 100 b, 100 b + 1, ..., its free slots too."""
    cache = make(len(lengths), slots, layers)
    write(
        cache, [list(range(slots))] * len(lengths), [[100.0 * b + i for i in range(slots)] for b in range(len(lengths))]
    )
    for row, length in enumerate(lengths):
        cache.advance(row, length)
    return cache


def held(cache: SlotCache, row: int) -> list[float]:
    """Return what a row holds, the same in the keys and values of every layer, every head and dimension."""
    stores = [sign * store for layer in cache.slot_layers for sign, store in zip((1, -1), layer.stores, strict=True)]
    line = stores[0][row, : int(cache.lengths[row])]
    assert all(torch.equal(store[row, : len(line)], line[:, :1, :1].expand_as(line)) for store in stores)
    return line[:, 0, 0].tolist()


def test_rows_of_different_lengths_advance_on_their_own():
    cache = make()
    write(cache, [[0, 1, 2], [0, 1, 2]], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    cache.advance(0, 3)
    cache.advance(1, 1)
    write(cache, [[3], [1]], [[7.0], [8.0]])
    cache.advance(0, 4)
    cache.advance(1, 2)
    assert held(cache, 0) == [1, 2, 3, 7]
    assert held(cache, 1) == [4, 8]


def test_a_pass_sees_every_slot_up_to_the_furthest_row():
    cache = make()
    keys, values = write(cache, [[0, 1, 2, 3], [0, 1, 2, 3]], [[1.0] * 4, [2.0] * 4])
    assert keys.shape == values.shape == (2, HEADS, 4, DIM)
    assert torch.equal(values, -keys)


def test_a_pass_may_take_a_run_of_rows_and_leaves_the_others_alone():
    cache = filled([3, 2, 5])
    keys, _ = write(cache, [[2, 3]], [[7.0, 8.0]], first=1)
    cache.advance(1, 4)
    assert keys[:, 0, :, 0].tolist() == [[100, 101, 7, 8]]
    assert [held(cache, row) for row in range(3)] == [[0, 1, 2], [100, 101, 7, 8], [200, 201, 202, 203, 204]]


def test_reading_the_same_slots_again_writes_over_them():
    cache = make(rows=1)
    write(cache, [[0, 1, 2]], [[1.0, 2.0, 3.0]])
    cache.advance(0, 3)
    cache.truncate(0, 1)
    write(cache, [[1, 2]], [[8.0, 9.0]])
    cache.advance(0, 3)
    assert held(cache, 0) == [1, 8, 9]


def test_keep_gathers_a_scattered_path_into_place():
    cache = filled([2, 3], slots=12)
    cache.keep(torch.tensor([[2, 4, 6], [0, 2, 4]]), torch.tensor([3, 3]))
    assert held(cache, 0) == [0, 1, 4, 6, 8]
    assert held(cache, 1) == [100, 101, 102, 103, 105, 107]
    check_integrity(cache)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 4), max_size=5)), min_size=1, max_size=4))
def test_keep_is_right_for_ragged_paths_in_any_order(rows):
    cache, most = filled([length for length, _ in rows]), max(len(path) for _, path in rows)
    paths = [path + [-9] * (most - len(path)) for _, path in rows]  # what is passed over may be anything
    cache.keep(torch.tensor(paths, dtype=torch.int64), torch.tensor([len(path) for _, path in rows]))
    for row, (length, path) in enumerate(rows):
        want = [*range(length), *(length + place for place in path)]
        assert held(cache, row) == [100 * row + slot for slot in want]


def test_keep_of_some_rows_leaves_those_after_them_alone():
    cache = filled([1, 4])
    cache.keep(torch.tensor([[2]]), torch.tensor([1]))
    assert [held(cache, row) for row in range(2)] == [[0, 3], [100, 101, 102, 103]]


@pytest.mark.parametrize(
    ("path", "counts"),
    [([[0, 8]], [2]), ([[-1]], [1]), ([[0]], [2]), ([[0]], [-1]), ([[0]] * 3, [1] * 3)],
    ids=["past the slots", "before the row's end", "longer than the path", "negative", "too many rows"],
)
def test_paths_that_make_no_sense_are_refused(path, counts):
    cache = filled([2, 2])
    with pytest.raises(ValueError, match=r"path|offsets"):
        cache.keep(torch.tensor(path), torch.tensor(counts))
    assert cache.lengths.tolist() == [2, 2]


@pytest.mark.parametrize("before_first_write", [True, False])
def test_reserve_makes_room_and_keeps_what_is_held(before_first_write):
    cache = make(0, 0) if before_first_write else filled([3, 2], slots=4)
    cache.reserve(3, 6)
    write(cache, [[3, 4, 5]] * 3, [[7.0] * 3] * 3)
    assert cache.lengths.tolist() == ([0, 0, 0] if before_first_write else [3, 2, 0])
    if not before_first_write:
        cache.advance(0, 5)
        assert [held(cache, row) for row in range(3)] == [[0, 1, 2, 7, 7], [100, 101], []]
    check_integrity(cache)


@pytest.mark.parametrize(("rows", "slots"), [(1, 20), (3, 5), (2, 10)])
def test_reserve_never_takes_room_away(rows, slots):
    cache = filled([3, 2])
    cache.reserve(rows, slots)
    assert (cache.table.rows, cache.table.slots) == (max(rows, 2), max(slots, 10))
    assert held(cache, 0) == [0, 1, 2]


def test_a_row_moves_to_the_place_of_another():
    cache = filled([5, 2, 3])
    cache.move(2, 0)
    assert [held(cache, row) for row in range(3)] == [[200, 201, 202], [100, 101], []]
    cache.move(1, 1)  # the last row itself is dropped
    assert cache.lengths.tolist() == [3, 0, 0]


def test_what_was_copied_before_a_pass_can_be_pasted_after_it():
    cache = filled([2, 3])
    placed = cache.locate(torch.tensor([[2, 3, 4], [3, 4, 5]]))
    before = cache.copy(placed, 2)
    write(cache, [[2, 3, 4], [3, 4, 5]], [[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    cache.paste(placed, 2, before)
    cache.advance(0, 5)
    cache.advance(1, 6)
    assert held(cache, 0) == [0, 1, 2, 3, -3]
    assert held(cache, 1) == [100, 101, 102, 103, 104, -6]


@pytest.mark.parametrize(
    ("call", "row", "length"),
    [("truncate", 0, 3), ("truncate", 0, -1), ("advance", 1, 3), ("advance", 0, 11), ("truncate", 1, 5)],
)
def test_lengths_that_make_no_sense_are_refused(call, row, length):
    cache = filled([2, 4])
    with pytest.raises(ValueError, match=f"length {length} of row {row}"):
        getattr(cache, call)(row, length)
    assert cache.lengths.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("slots", "first"), [([[10], [0]], 0), ([[-1], [0]], 0), ([[0]] * 3, 0), ([[0], [0]], 1), ([[], []], 0)]
)
def test_slots_outside_the_cache_are_refused(slots, first):
    with pytest.raises(ValueError, match="slots"):
        make().locate(torch.tensor(slots, dtype=torch.int64), first)


def test_integrity_finds_a_row_that_holds_no_numbers():
    cache = make(rows=1)
    write(cache, [[0, 1]], [[1.0, float("nan")]])
    cache.advance(0, 1)
    check_integrity(cache)
    cache.advance(0, 2)
    with pytest.raises(AssertionError, match="row 0"):
        check_integrity(cache)


def test_no_second_copy_is_ever_made():
    cache = make(rows=1, layers=1)
    write(cache, [[0, 1, 2]], [[1.0, 2.0, 3.0]])
    address = cache.slot_layers[0].stores[0].data_ptr()
    cache.keep(torch.tensor([[2]]), torch.tensor([1]))
    seen, _ = write(cache, [[1]], [[4.0]])
    assert cache.slot_layers[0].stores[0].data_ptr() == address == seen.data_ptr()


def test_a_cache_is_cut_to_what_its_rows_hold_and_grows_again():
    cache = filled([3, 2, 0])
    cache.shrink(2, 4)
    assert (cache.table.rows, cache.table.slots, cache.lengths.tolist()) == (2, 4, [3, 2])
    assert {tuple(store.shape[:2]) for layer in cache.slot_layers for store in layer.stores} == {(2, 4)}
    assert [held(cache, row) for row in range(2)] == [[0, 1, 2], [100, 101]]
    cache.reserve(3, 6)
    write(cache, [[0]], [[7.0]], first=2)
    cache.advance(2, 1)
    assert [held(cache, row) for row in range(3)] == [[0, 1, 2], [100, 101], [7]]
    check_integrity(cache)
    for rows, slots in ((2, 6), (3, 2)):
        with pytest.raises(AssertionError, match="hold more"):
            cache.shrink(rows, slots)

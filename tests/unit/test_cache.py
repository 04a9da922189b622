import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sirius.model.cache import SlotCache
from sirius.model.mask import chain_mask

HEADS, DIM = 2, 3


def make(rows: int = 2, slots: int = 10, layers: int = 2) -> SlotCache:
    return SlotCache(layers, rows, slots, torch.device("cpu"))


def write(cache: SlotCache, slots: list[list[int]], values: list[list[float]]):
    """Write `values` [B, T] to `slots` [B, T] of every layer, spread over heads and head_dim; return the last view."""
    cache.place(torch.tensor(slots))
    states = torch.tensor(values)[:, None, :, None].expand(-1, HEADS, -1, DIM)
    for layer in range(len(cache.slot_layers)):
        seen = cache.update(states, -states, layer)
    return seen


def held(cache: SlotCache, row: int) -> list[float]:
    keys = cache.slot_layers[0].keys
    assert keys is not None
    return keys[row, : int(cache.lengths[row]), 0, 0].tolist()


def test_rows_of_different_lengths_advance_on_their_own():
    cache = make()
    write(cache, [[0, 1, 2], [0, 1, 2]], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    cache.advance(torch.tensor([3, 1]))
    write(cache, [[3], [1]], [[7.0], [8.0]])
    cache.advance(torch.tensor([4, 2]))
    assert held(cache, 0) == [1, 2, 3, 7]
    assert held(cache, 1) == [4, 8]


def test_a_pass_sees_every_slot_up_to_the_furthest_row():
    cache = make()
    cache.place(torch.tensor([[0, 1], [0, 1]]))
    keys, values = write(cache, [[0, 1, 2, 3], [0, 1, 2, 3]], [[1.0] * 4, [2.0] * 4])
    assert keys.shape == values.shape == (2, HEADS, 4, DIM)
    assert torch.equal(values, -keys)


def test_reading_the_same_slots_again_writes_over_them():
    cache = make(rows=1)
    write(cache, [[0, 1, 2]], [[1.0, 2.0, 3.0]])
    cache.advance(torch.tensor([3]))
    cache.truncate(torch.tensor([1]))
    write(cache, [[1, 2]], [[8.0, 9.0]])
    cache.advance(torch.tensor([3]))
    assert held(cache, 0) == [1, 8, 9]


def test_keep_gathers_a_scattered_path_into_place():
    cache = make(slots=12)
    write(cache, [list(range(9))] * 2, [[float(i) for i in range(9)], [10.0 + i for i in range(9)]])
    cache.advance(torch.tensor([9, 9]))
    cache.keep(torch.tensor([[4, 6, 8], [3, 5, 7]]), lengths=torch.tensor([2, 3]))
    assert cache.lengths.tolist() == [5, 6]
    assert held(cache, 0) == [0, 1, 4, 6, 8]
    assert held(cache, 1) == [10, 11, 12, 13, 15, 17]
    cache.check_integrity()


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_keep_is_right_for_any_path_forwards_or_backwards(data):
    cache = make(rows=1, slots=10, layers=1)
    write(cache, [list(range(10))], [[float(i) for i in range(10)]])
    cache.advance(torch.tensor([10]))
    base = data.draw(st.integers(0, 9))
    path = data.draw(st.lists(st.integers(0, 9), max_size=10 - base))
    cache.keep(torch.tensor([path], dtype=torch.int64), lengths=torch.tensor([base]))
    assert held(cache, 0) == [*range(base), *path]


@pytest.mark.parametrize(
    ("call", "argument"),
    [("truncate", [3, 9]), ("truncate", [-1, 0]), ("advance", [1, 4]), ("advance", [11, 4]), ("truncate", [1])],
)
def test_lengths_that_make_no_sense_are_refused(call, argument):
    cache = make()
    write(cache, [[0, 1, 2, 3]] * 2, [[1.0] * 4] * 2)
    cache.advance(torch.tensor([4, 4]))
    cache.truncate(torch.tensor([2, 4]))
    with pytest.raises(ValueError, match="lengths"):
        getattr(cache, call)(torch.tensor(argument))
    assert cache.lengths.tolist() == [2, 4]


@pytest.mark.parametrize("slots", [[[10], [0]], [[-1], [0]], [[0]], [[], []]])
def test_slots_outside_the_cache_are_refused(slots):
    with pytest.raises(ValueError, match="slots"):
        make().place(torch.tensor(slots, dtype=torch.int64))


def test_integrity_finds_a_row_that_holds_no_numbers():
    cache = make(rows=1)
    write(cache, [[0, 1]], [[1.0, float("nan")]])
    cache.advance(torch.tensor([1]))
    cache.check_integrity()
    cache.advance(torch.tensor([2]))
    with pytest.raises(AssertionError, match="row 0"):
        cache.check_integrity()


def test_no_second_copy_is_ever_made():
    cache = make(rows=1, layers=1)
    write(cache, [[0, 1, 2]], [[1.0, 2.0, 3.0]])
    first = cache.slot_layers[0].keys
    assert first is not None
    address = first.data_ptr()
    cache.advance(torch.tensor([3]))
    cache.keep(torch.tensor([[2]]), torch.tensor([1]))
    seen, _ = write(cache, [[2]], [[4.0]])
    after = cache.slot_layers[0].keys
    assert after is not None and after.data_ptr() == address == seen.data_ptr()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_token_sees_its_own_slot_and_those_before_it(dtype):
    mask = chain_mask(torch.tensor([[2, 3], [0, 1]]), visible=5, dtype=dtype)
    seen = mask if dtype is None else mask == 0
    assert mask.shape == (2, 1, 2, 5)
    assert seen[0, 0].tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False]]
    assert seen[1, 0].tolist() == [[True] + [False] * 4, [True] * 2 + [False] * 3]
    assert dtype is None or bool(mask.isfinite().all())

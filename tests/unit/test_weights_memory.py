"""Memory for weights: rows that begin with a page, two weights side by side."""

import gc

import pytest
import torch

from sirius.model.memory import PAGE, moved, side_by_side

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (33, 2048)], ids=str)
def test_a_copy_begins_with_a_page_and_its_rows_follow_each_other(dtype, shape):
    weight = torch.randn(shape[::-1]).to(dtype).t()
    copy = moved(weight)
    assert torch.equal(copy, weight) and copy.is_contiguous() and copy.data_ptr() % PAGE == 0
    copy.zero_()
    assert weight.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (33, 2048)], ids=str)
def test_rows_of_two_weights_stand_side_by_side(dtype, shape):
    weights = torch.randn(shape).to(dtype), torch.randn(shape[::-1]).to(dtype).t()
    one, other = side_by_side(*weights)
    assert torch.equal(one, weights[0]) and torch.equal(other, weights[1])
    size = shape[1] * one.element_size()
    assert one.data_ptr() % PAGE == 0 and one.stride() == other.stride() == (2 * shape[1], 1)
    assert [row.data_ptr() - one.data_ptr() for row in other] == [(2 * j + 1) * size for j in range(shape[0])]
    assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def test_either_of_two_keeps_the_memory_of_both():
    other = side_by_side(torch.zeros(300, 2048), torch.ones(300, 2048))[1]
    gc.collect()
    taken = [torch.zeros(300, 4096) for _ in range(8)]
    assert bool((other == 1).all()) and len(taken) == 8

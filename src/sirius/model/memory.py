"""Memory for weights on the CPU: in large pages where the system has such, beginning where a page does.

NumPy asks the system for large pages, which PyTorch does not. With small ones each row is a page to look up.
"""

from mmap import mmap

import numpy as np
import torch
from torch import Tensor

PAGE = 4096  # bytes


def moved(weight: Tensor) -> Tensor:
    """Return a copy of a weight [F, H] of any strides, its rows one behind the other."""
    (copy,) = _views(weight, weight.numel(), [0])
    return copy.view(weight.shape).copy_(weight)


def side_by_side(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return copies of two weights [F, H] in one piece of memory: row j of the second follows row j of the first.

    Their strides are [2H, 1]. Each has a storage of its own that begins at its first row, as whoever saves a model
    takes tensors of one storage for one tensor. Whoever saves or counts storages finds each twice its size.
    """
    assert first.shape == second.shape and first.dtype == second.dtype, f"{first.shape} beside {second.shape}"
    rows, size = first.shape
    views = _views(first, 2 * rows * size, [0, size])
    one, other = (view.as_strided((rows, size), (2 * size, 1)) for view in views)
    return one.copy_(first), other.copy_(second)


def page_aligned(count: int) -> Tensor:
    """Return fresh memory [count] uint8 that begins where a page does, and goes back to the system when it is freed."""
    return torch.frombuffer(mmap(-1, max(count, 1)), dtype=torch.uint8)[:count]  # none is asked of an empty tensor


def _views(like: Tensor, count: int, offsets: list[int]) -> list[Tensor]:
    """Return fresh memory for `count` numbers, as they are seen from each offset on."""
    width = like.element_size()
    memory = np.empty(count * width + PAGE, dtype=np.uint8)
    begin = -memory.ctypes.data % PAGE
    return [
        torch.frombuffer(memory, dtype=like.dtype, count=count - offset, offset=begin + offset * width)
        for offset in offsets
    ]

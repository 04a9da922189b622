"""Memory for weights on the CPU: in large pages where the system has such, beginning where a page does.

NumPy asks the system for large pages, which PyTorch does not. With small ones each row is a page to look up.
"""

import mmap
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

PAGE = 4096  # bytes; reads past the system's cache begin and end at a multiple of it, in the file and in memory


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
    return torch.frombuffer(pages(count), dtype=torch.uint8)[:count]


def pages(count: int) -> mmap.mmap:
    """Return `count` bytes of the system's memory, at least one; a forked process has a copy of its own.

    Raises MemoryError where the system has not so many.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # as on Windows
    try:
        found = mmap.mmap(-1, max(count, 1), **private)
    except OSError as error:
        raise MemoryError(f"the system has no {count} bytes of memory: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without large pages
            found.madvise(mmap.MADV_HUGEPAGE)
    return found


def _views(like: Tensor, count: int, offsets: list[int]) -> list[Tensor]:
    """Return fresh memory for `count` numbers, as they are seen from each offset on."""
    width = like.element_size()
    memory = np.empty(count * width + PAGE, dtype=np.uint8)
    begin = -memory.ctypes.data % PAGE
    return [
        torch.frombuffer(memory, dtype=like.dtype, count=count - offset, offset=begin + offset * width)
        for offset in offsets
    ]

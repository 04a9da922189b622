"""How fast weights come over the link, and how fast they are read in memory: what a plan is made of."""

import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from sirius.kernels import ops
from sirius.offload.ring import Mover, Unit

MOST = 1 << 29  # bytes that are brought to measure a link
SECONDS = 1.0  # after which no further unit is brought
READ = 1 << 27  # bytes of a product that is timed
TRIES = 5


def link_speed(units: Sequence[Unit[Any]], mover: Mover) -> float:
    """Return the bytes per second at which units come one after the other, each from the request to its arrival.

    Raises FileError where one cannot be read.
    """
    memory = mover.memory(max(each.nbytes for each in units))
    moved, began = 0, perf_counter()
    for unit in units:
        mover.wait(mover.send(unit, unit.views(memory), memory, None))
        if memory.device.type == "cuda":
            torch.cuda.synchronize(memory.device)
        moved += unit.moved
        if moved >= MOST or perf_counter() - began >= SECONDS:
            break
    return moved / (perf_counter() - began)


def memory_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Return the bytes per second at which a product of one token reads weights in a device's memory."""
    matrix = torch.ones(READ // dtype.itemsize // 4096, 4096, dtype=dtype, device=device)
    x = torch.ones(1, 4096, dtype=dtype, device=device)
    times = []
    for _ in range(TRIES):
        began = perf_counter()
        ops.linear(x, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - began)
    return READ / min(times)


def held_now() -> int:
    """Return the bytes of memory that this process holds."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # no Linux
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")

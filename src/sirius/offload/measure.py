"""How fast weights come over the link, and how fast they are read in memory: what a plan is made of."""

import os
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from sirius.kernels import ops
from sirius.offload.plan import BUFFERS
from sirius.offload.ring import CudaMover, Mover, Order, Ring, Unit

MOST = 1 << 29  # bytes that are brought to measure a link
SECONDS = 1.0  # after which no further unit is brought
READ = 1 << 27  # bytes of a product that is timed
TRIES = 5


def link_speed(units: Sequence[Unit[Any]], mover: Mover) -> float:
    """Return the bytes per second at which units come one after the other, as they do in a pass; see `ring_speed`.

    The mover is stopped. Raises FileError where a unit cannot be read.
    """
    try:
        return ring_speed(Ring(max(each.nbytes for each in units), min(BUFFERS, len(units)), mover), Order(units))
    finally:
        mover.stop()  # units that were to come next take memory that loading needs


def ring_speed(ring: Ring, order: Order[Any]) -> float:
    """Return the bytes per second at which units come through a ring while nothing is computed.

    Bytes are those of memory, as in plans; files may hold weights in another dtype, and so more or fewer bytes. As many
    units as there are buffers are not counted: they may be there already, or open files and make memory. Raises
    FileError where a unit cannot be read.
    """
    units = cycle(order.units)
    for unit in islice(units, min(ring.count, len(order.units))):
        ring.enter(unit, order)
    _finish(ring.mover)
    brought, began = 0, perf_counter()
    while brought < MOST and perf_counter() - began < SECONDS:
        ring.leave()  # else an order of one unit has it at hand
        ring.enter(unit := next(units), order)
        brought += unit.nbytes
    _finish(ring.mover)
    return brought / (perf_counter() - began)


def _finish(mover: Mover) -> None:
    """Wait for what a GPU was sent; threads were waited for when their units were entered."""
    if isinstance(mover, CudaMover):
        torch.cuda.synchronize(mover.device)


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

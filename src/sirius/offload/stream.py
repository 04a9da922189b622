"""The layers of a model whose blocks partly lie elsewhere: on disk, or in the host's memory."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sirius.core import SparsityConfig
from sirius.errors import ConfigError, ModelError
from sirius.model.matrix import Dense, Expected, Placed, dense
from sirius.model.memory import page_aligned
from sirius.offload.checkpoint import PAGE, Stored
from sirius.offload.pinned import pinned
from sirius.offload.plan import Plan, acceptance
from sirius.offload.ring import CHUNK, Order, Ring, Task, Unit, copy
from sirius.offload.shelf import BlockShelf, Store

SUMMED = 1 << 17  # numbers that are added up at a time
WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # what numbers of a width are copied as
Views = dict[int, Tensor]


class Streamed(NamedTuple):
    """A layer whose weight [out, in] is not in memory.

    key         the layer's id; the layer itself holds what holds this, so that the model would never be freed
    source      where its numbers are
    transposed  its rows in memory are the columns of its weight: a down layer's, whose inputs are the neurons
    beside      it lies in memory beside the layer before it, row by row
    """

    key: int
    source: Stored
    transposed: bool = False
    beside: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows in memory, and their length."""
        outputs, inputs = self.source.shape
        return (inputs, outputs) if self.transposed else (outputs, inputs)


class BlockPart:
    """The layers of a block that come together, its attention's or its MLP's, read from the checkpoint; see `Unit`.

    block   the number of the decoder block
    gated   they are the MLP's
    checks  numbers that are not finite are refused; looking at them takes time when a part comes for the first time
    """

    def __init__(self, layers: Sequence[Streamed], dtype: torch.dtype, block: int = 0, gated: bool = True) -> None:
        self.layers, self.dtype, self.block, self.gated = layers, dtype, block, gated
        self.checks = True
        self.finite: set[tuple[int, int]] = set()  # parts that were found to be numbers, by layer and first row
        self.nbytes = sum(-(-self._size(each) // PAGE) * PAGE for each in layers)
        self.moved = sum(each.source.nbytes for each in layers)

    def views(self, memory: Tensor) -> Views:
        """Return each layer's weight as it lies in a buffer, its rows those of memory, by the layer's id."""
        found: Views = {}
        begin = 0
        for place, each in enumerate(self.layers):
            rows, length = each.shape
            if each.beside:
                continue
            pair = place + 1 < len(self.layers) and self.layers[place + 1].beside
            width = 2 * length if pair else length
            size = rows * width * self.dtype.itemsize
            whole = memory[begin : begin + size].view(self.dtype).view(rows, width)
            found[each.key] = whole[:, :length]
            if pair:
                found[self.layers[place + 1].key] = whole[:, length:]
            begin += -(-size // PAGE) * PAGE
        return found

    def tasks(self, views: Views, memory: Tensor) -> Iterator[Task]:
        """Yield what reads the layers, some rows at a time.

        Each task raises FileError where they cannot be read, and ModelError of numbers that are not finite.
        """
        for each in self.layers:
            target = views[each.key]
            target = target.t() if each.transposed else target
            for begin, end in each.source.chunks(CHUNK):
                yield partial(self._fill, target[begin:end], each, begin, end)

    def _fill(self, target: Tensor, layer: Streamed, begin: int, end: int) -> int:
        """Read rows of a layer's weight into target [n, length] of any strides; return how many bytes were read."""
        found, source = layer.source.rows(begin, end), layer.source
        if self.checks and (layer.key, begin) not in self.finite:  # looking at them takes time, so once
            check_finite(found, f"{source.name}, rows {begin} to {end}")
            self.finite.add((layer.key, begin))
        put(target, found)
        return (end - begin) * source.row_bytes

    def _size(self, each: Streamed) -> int:
        rows, length = each.shape
        return rows * length * self.dtype.itemsize


def check_finite(numbers: Tensor, name: str) -> None:
    """Raise ModelError where numbers are not finite. The sums of some at a time tell, which takes little memory."""
    if not all(bool(part.sum(dtype=torch.float64).isfinite()) for part in numbers.view(-1).split(SUMMED)):
        raise ModelError(f"{name}: numbers that are not finite (NaN or infinite); the checkpoint is damaged")


def put(target: Tensor, source: Tensor) -> None:
    """Copy a tensor into another one of any strides, in this thread alone where both are of one dtype."""
    if target.dtype is source.dtype and target.device.type == "cpu":
        np.copyto(_numbers(target), _numbers(source))
    else:
        target.copy_(source)


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().view(WHOLE[tensor.dtype.itemsize]).numpy()


class HostPart:
    """The same layers kept in the host's memory, as they lie in a buffer; see `Unit`."""

    def __init__(self, part: BlockPart, pin: bool = False) -> None:
        """Read the layers once."""
        self.part, self.nbytes, self.moved = part, part.nbytes, part.nbytes
        self.memory = pinned(part.nbytes) if pin else page_aligned(part.nbytes)
        for task in part.tasks(part.views(self.memory), self.memory):
            task()

    def views(self, memory: Tensor) -> Views:
        """Return each layer's weight as it lies in a buffer, by the layer's id."""
        return self.part.views(memory)

    def tasks(self, views: Views, memory: Tensor) -> Iterator[Task]:
        """Yield what copies the layers into a buffer, part by part; a GPU's are copied as a whole."""
        step = CHUNK if memory.device.type == "cpu" else self.nbytes
        for begin in range(0, self.nbytes, step):
            part = slice(begin, min(begin + step, self.nbytes))  # a buffer may be larger
            yield partial(copy, self.memory[part], memory[part])


class Shelves(NamedTuple):
    """Which blocks have what drafts read of them elsewhere, each layer's block by its id, and where."""

    rounded: dict[int, int]
    kept: dict[int, int]
    make_store: Callable[[], Store]


class Planned(NamedTuple):
    """A plan, and what it has memory for.

    draft  what drafts read by it
    slots  of keys and values, of all texts together
    rows   texts side by side, for the neurons that are kept of each
    most   texts side by side where drafts keep none of their own
    """

    plan: Plan
    draft: SparsityConfig
    slots: int
    rows: int = 1
    most: int = 1


class Stream(Placed):
    """Makes the matrices of a model's layers; those that lie elsewhere come through a ring of buffers."""

    def __init__(self, units: dict[BlockPart, Unit[Views]], ring: Ring, shelves: Shelves, planned: Planned) -> None:
        """Bring parts of blocks, each as its unit, through a ring of buffers; they are in the order of full passes."""
        self.ring, self.shelves, self.planned, plan = ring, shelves, planned, planned.plan
        self.full = Order(units.values())
        self.made: weakref.WeakSet[BlockShelf] = weakref.WeakSet()
        self.attention = {part.block: unit for part, unit in units.items() if not part.gated}
        self.rounded = int(planned.draft.draft_bits)
        self.expected = Expected(plan.plain_seconds, plan.draft_seconds, acceptance(plan.aal, plan.period))
        self.of = {each.key: unit for part, unit in units.items() for each in part.layers}
        self.turned = {each.key for part in units for each in part.layers if each.transposed}

    @property
    def moved(self) -> int:
        """The bytes that have crossed the link so far."""
        return self.ring.mover.moved

    @property
    def elsewhere(self) -> int:
        """The bytes of weights that are not in memory, and of what drafts read of them."""
        bags = [bag.nbytes for shelf in self.made for bag in shelf.bags.values()]
        return sum(unit.nbytes for unit in self.full.units) + sum(bags)

    def __call__(self, layer: nn.Linear, transposed: bool = False) -> Dense:
        unit = self.of.get(id(layer))
        if unit is None:
            return dense(layer, transposed)
        rows = self.ring.enter(unit, self.full)[id(layer)]
        return Dense(rows if transposed == (id(layer) in self.turned) else rows.t(), layer.bias)

    def rows_of(self, chosen: SparsityConfig) -> int:
        """Return for how many texts side by side there is memory.

        Raises ConfigError where memory was planned for another draft, or one that reads less.
        """
        planned = self.planned.draft
        if chosen.method == "none" or chosen.draft_bits:
            return self.planned.most  # `bits_of_draft` refuses bits that were not planned
        alike = chosen.method == planned.method and not planned.draft_bits and not chosen.refresh
        if alike and chosen.keep <= planned.keep:
            if chosen.shared_set:
                return self.planned.most
            return 1 if planned.shared_set else self.planned.rows
        raise ConfigError(
            f"memory was planned for {_named(planned)}, and {_named(chosen)} may read more; load the model with the "
            "draft that is to be used (Engine.load(..., draft=), or the same options on the command line)"
        )

    def rounded_shelf(self) -> BlockShelf:
        """Return an empty shelf for weights of fewer bits."""
        return self._shelf(self.shelves.rounded, {})

    def kept_shelf(self) -> BlockShelf:
        """Return an empty shelf for the neurons that a draft keeps."""
        return self._shelf(self.shelves.kept, self.attention)

    def _shelf(self, of: dict[int, int], others: dict[int, Unit[Any]]) -> BlockShelf:
        shelf = BlockShelf(of, self.shelves.make_store, self.ring, others)
        self.made.add(shelf)
        return shelf


def _named(draft: SparsityConfig) -> str:
    """Return a draft in words."""
    if draft.method == "none":
        return f"every neuron at {draft.draft_bits} bits" if draft.draft_bits else "no draft"
    refreshed = " with refresh" if draft.refresh else ""
    return f"{draft.method} {draft.keep:g}{refreshed}" + (f" at {draft.draft_bits} bits" if draft.draft_bits else "")

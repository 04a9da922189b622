"""What drafts read and memory has no room for: made once, written to a slower place, brought at each draft pass."""

import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sirius.errors import FileError
from sirius.model.memory import page_aligned
from sirius.offload.checkpoint import PAGE, File
from sirius.offload.pinned import pinned
from sirius.offload.ring import CHUNK, Order, Ring, Task, Unit, copy

MOUNTS, IN_MEMORY = Path("/proc/self/mounts"), ("tmpfs", "ramfs")
LASTING = Path("/var/tmp")  # the system's folder for larger temporary files, which outlast a restart
Read = Callable[[int, Tensor], int]  # brings bytes, from a first one on, into a buffer; returns how many


class Store(ABC):
    """A place outside of the device's memory."""

    @abstractmethod
    def write(self, parts: Sequence[Tensor]) -> Read:
        """Write parts [n] uint8 one behind the other, each at a multiple of `PAGE`; return what reads them."""


class HostStore(Store):
    """The host's memory.

    pin  keep it where a GPU can read it
    """

    def __init__(self, pin: bool = False) -> None:
        self.pin = pin

    def write(self, parts: Sequence[Tensor]) -> Read:
        held = (pinned if self.pin else page_aligned)(sum(_in_pages(len(each)) for each in parts))
        begin = 0
        for each in parts:
            held[begin : begin + len(each)] = each
            begin += _in_pages(len(each))
        return partial(_read, held)


class FileStore(Store):
    """A file without a name, which is gone with the process."""

    def __init__(self, folder: Path | None = None) -> None:
        """Make a file in a folder, None: that of `spare_folder`; raise FileError where that cannot be."""
        self.end = 0
        try:
            handle, path = tempfile.mkstemp(prefix="sirius-", dir=folder or spare_folder())
        except OSError as error:
            raise FileError(f"cannot make a temporary file: {error}; set TMPDIR to a folder with room") from error
        self.handle = handle
        weakref.finalize(self, os.close, handle).atexit = False
        self.file = File(Path(path))
        try:
            self.file.open()
        finally:
            os.unlink(path)

    def write(self, parts: Sequence[Tensor]) -> Read:
        begin = self.end
        try:
            for each in parts:
                self._write(each.cpu().numpy())
            os.fdatasync(self.handle)  # where a file system counts room late, it is found to be full here
        except OSError as error:
            raise FileError(
                f"cannot write byte {self.end} of a temporary file in {self.file.path.parent}: "
                f"{error.strerror or error}; set TMPDIR to a folder with more room, or raise the memory budget"
            ) from error
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self.handle, begin, self.end - begin, os.POSIX_FADV_DONTNEED)
        return partial(self._read, begin)

    def _write(self, part: np.ndarray) -> None:
        """Write bytes at the end, up to a whole page."""
        for left in (part.data, memoryview(bytes(_in_pages(len(part)) - len(part)))):
            while left:
                count = os.pwrite(self.handle, left, self.end)
                left, self.end = left[count:], self.end + count

    def _read(self, first: int, begin: int, target: Tensor) -> int:
        np.copyto(target.numpy(), self.file.read(first + begin, len(target)))
        return len(target)


def spare_folder() -> Path:
    """Return the system's folder for temporary files, or /var/tmp where the former is in memory, as it often is.

    Raises FileError where both are: a file there would take the memory that a budget saves. TMPDIR may name another
    one, in which files must be allowed.
    """
    asked = os.environ.get("TMPDIR")
    if asked and not os.access(asked, os.W_OK | os.X_OK):
        raise FileError(f"TMPDIR names {asked}, where no file can be made; set it to a folder on a disk")
    folders = [Path(tempfile.gettempdir()), LASTING]
    for folder in folders:
        if folder.is_dir() and _file_system(folder) not in IN_MEMORY:
            return folder
    raise FileError(f"{folders[0]} is in memory, not on a disk; set TMPDIR to a folder on a disk")


def _file_system(folder: Path) -> str:
    """Return the kind of file system that a folder is in, "" where the system does not tell."""
    try:
        mounts = [line.split() for line in MOUNTS.read_text().splitlines()]
    except OSError:
        return ""
    kinds = {Path(mount.replace("\\040", " ")): kind for _, mount, kind, *_ in mounts}  # the last one hides others
    folder = folder.resolve()
    return next((kinds[each] for each in (folder, *folder.parents) if each in kinds), "")


class _Place(NamedTuple):
    """A tensor among the bytes of a bag."""

    begin: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class _Bag:
    """What drafts read of one block, by its layers; see `Unit`."""

    def __init__(self, values: dict[int, Any], store: Store) -> None:
        """Write values, named tuples that hold tensors, to a store."""
        self.places: list[_Place] = []
        parts: list[Tensor] = []
        self.values = {key: self._taken(value, parts) for key, value in values.items()}
        self.nbytes = self.moved = sum(_in_pages(each.nbytes) for each in self.places)
        self.read = store.write(parts)

    def views(self, memory: Tensor) -> dict[int, Any]:
        """Return the values as they lie in a buffer."""
        return {key: _rebuilt(value, memory) for key, value in self.values.items()}

    def tasks(self, views: Any, memory: Tensor) -> Iterator[Task]:
        """Yield what copies the tensors into a buffer, part by part."""
        step = CHUNK if memory.device.type == "cpu" else self.nbytes
        for begin in range(0, self.nbytes, step):
            yield partial(self.read, begin, memory[begin : min(begin + step, self.nbytes)])

    def _taken(self, value: Any, parts: list[Tensor]) -> Any:
        """Return a value with places for its tensors, which are added to `parts` as bytes; biases stay."""
        if isinstance(value, Tensor):
            begin = sum(_in_pages(each.nbytes) for each in self.places)
            self.places.append(place := _Place(begin, value.dtype, value.shape))
            parts.append(value.contiguous().view(-1).view(torch.uint8))
            return place
        if isinstance(value, tuple):
            return type(value)(*(self._taken(each, parts) for each in value))
        return value


class BlockShelf:
    """Values by layers; those of one block come together.

    It is filled block by block, before it is read.
    """

    def __init__(
        self, blocks: dict[int, int], make_store: Callable[[], Store], ring: Ring, others: dict[int, Unit[Any]]
    ) -> None:
        """Take values of the layers in `blocks`, each layer's block by its id.

        make_store  makes the place where they lie, when the first block is there
        others      what a pass uses of a block before these values
        """
        self.blocks, self.make_store, self.ring, self.others = blocks, make_store, ring, others
        self.store: Store | None = None
        self.open: tuple[int, dict[int, Any]] | None = None  # the block that is being filled
        self.bags: dict[int, _Bag] = {}
        self.order: Order[dict[int, Any]] | None = None

    def takes(self, layer: nn.Linear) -> bool:
        """Tell whether a layer's block does not stay in memory."""
        return id(layer) in self.blocks

    def put(self, layer: nn.Linear, value: Any) -> None:
        """Take a layer's value, a named tuple with tensors; raise FileError where there is no room for it."""
        block = self.blocks[id(layer)]
        if self.open is None or self.open[0] != block:
            self._close()
            self.open = block, {}
        self.open[1][id(layer)] = value

    def get(self, layer: nn.Linear) -> Any:
        """Return a layer's value, which stays only until another block's is asked for; raise FileError."""
        if self.order is None:
            self._close()
            self.order = self._make_order()
        return self.ring.enter(self.bags[self.blocks[id(layer)]], self.order)[id(layer)]

    def _close(self) -> None:
        if self.open is not None:
            block, values = self.open
            self.store = self.store or self.make_store()
            self.open, self.bags[block] = None, _Bag(values, self.store)

    def _make_order(self) -> Order[dict[int, Any]]:
        """Return the order of a pass that reads these values, and the other units of their blocks."""
        blocks = sorted(self.bags.keys() | self.others.keys())
        return Order(held[block] for block in blocks for held in (self.others, self.bags) if block in held)


def _in_pages(count: int) -> int:
    """Return the bytes of whole pages that hold so many."""
    return -(-count // PAGE) * PAGE


def _read(held: Tensor, begin: int, target: Tensor) -> int:
    return copy(held[begin : begin + len(target)], target)


def _rebuilt(value: Any, memory: Tensor) -> Any:
    """Return a value with tensors where their places are."""
    if isinstance(value, _Place):
        return memory[value.begin : value.begin + value.nbytes].view(value.dtype).view(value.shape)
    if isinstance(value, tuple):
        return type(value)(*(_rebuilt(each, memory) for each in value))
    return value

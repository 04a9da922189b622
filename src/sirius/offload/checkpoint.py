"""Where the tensors of a checkpoint lie in its safetensors files, and how parts of them are read."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sirius.errors import FileError, ModelError
from sirius.model.memory import page_aligned

INDEX = "model.safetensors.index.json"
PAGE = 4096  # bytes; a read past the system's cache begins and ends at a multiple of it, in the file and in memory
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


_staging = threading.local()


class Stored(NamedTuple):
    """A tensor of a file, row by row from byte `begin` on."""

    file: "File"
    name: str
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all its numbers."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """The bytes of a row."""
        return self.nbytes // max(1, self.shape[0])

    def rows(self, begin: int, end: int) -> Tensor:
        """Read the rows from `begin` to `end`; the result is written over by this thread's next read.

        Raises FileError where they cannot be read.
        """
        raw = self.file.read(self.begin + begin * self.row_bytes, (end - begin) * self.row_bytes)
        return _view(raw, self.dtype).view(end - begin, *self.shape[1:])

    def whole(self) -> Tensor:
        """Read all of it into memory of its own; raises FileError where it cannot be read."""
        if not self.shape:
            return _view(self.file.read(self.begin, self.nbytes), self.dtype).clone().view(())
        found = torch.empty(self.shape, dtype=self.dtype)
        for begin, end in self.chunks(1 << 23):
            found[begin:end] = self.rows(begin, end)
        return found

    def chunks(self, most: int) -> Iterator[tuple[int, int]]:
        """Yield runs of rows, from a first one to before a last one, each of `most` bytes or of one row."""
        step = max(1, most // max(1, self.row_bytes))
        for begin in range(0, self.shape[0], step):
            yield begin, min(begin + step, self.shape[0])


class File:
    """A file that is read in parts, past the system's cache of files where the system can do that.

    What is read is not kept by the system then, so that a model larger than memory leaves the rest of memory alone.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        self.handle: int | None = None
        self.direct = hasattr(os, "O_DIRECT")

    def read(self, begin: int, count: int) -> np.ndarray:
        """Return `count` bytes [count] uint8 from byte `begin` on, in memory that this thread's next read uses again.

        Raises FileError where they cannot be read.
        """
        first = begin // PAGE * PAGE
        span = -(-(begin + count) // PAGE) * PAGE - first
        memory = self._memory(span)
        got = 0
        try:
            while got < begin + count - first:
                got += (read := os.preadv(self._opened(), [memory.data[got:span]], first + got))
                if not read or (got % PAGE and got < begin + count - first):  # only at its end a read is no whole pages
                    raise FileError(
                        f"{self.path} ends at byte {first + got}, and {begin + count} are needed; it was cut off: "
                        "fetch the file anew"
                    )
        except FileError:
            raise
        except OSError as error:
            raise FileError(f"cannot read {self.path} at byte {first + got}: {error.strerror or error}") from error
        if not self.direct and hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._opened(), first, span, os.POSIX_FADV_DONTNEED)
        return memory[begin - first : begin - first + count]

    def open(self) -> None:
        """Open the file now; raise FileError where that cannot be."""
        try:
            self._opened()
        except OSError as error:
            raise FileError(f"cannot open {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        with self.lock:
            if self.handle is not None:
                os.close(self.handle)
                self.handle = None

    def _memory(self, count: int) -> np.ndarray:
        """Return this thread's memory of at least so many bytes, which begins where a page does."""
        held = getattr(_staging, "memory", None)
        if held is None or len(held) < count:
            held = _staging.memory = page_aligned(count).numpy()
        return held

    def _opened(self) -> int:
        if self.handle is None:
            with self.lock:
                if self.handle is None:
                    self.handle = self._open()
        return self.handle

    def _open(self) -> int:
        if self.direct:
            try:
                handle = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
                os.preadv(handle, [self._memory(PAGE).data[:PAGE]], 0)  # some file systems refuse only now
                return handle
            except OSError:
                self.direct = False
        return os.open(self.path, os.O_RDONLY)


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a folder's safetensors files by name, of an indexed folder those that its index names.

    Raises ModelError where a file is missing, cut off, or none of safetensors.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is no index of weights: {error!r}; fetch the model anew") from error
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if missing := [name for name in names if not (folder / str(name)).is_file()]:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(names)} files of weights, first {missing[0]}; fetch the model anew"
        )
    found: dict[str, Stored] = {}
    for name in names:
        found.update(_read_header(File(folder / name)))
    return found


def _read_header(file: File) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of a file by name."""
    path = file.path
    try:
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(opened.read(length))
        tensors = {name: each for name, each in header.items() if name != "__metadata__"}
        for name, each in tensors.items():
            begin, end = each["data_offsets"]
            if each["dtype"] not in DTYPES:
                continue  # whoever needs it says so
            stored = Stored(file, name, 8 + length + begin, DTYPES[each["dtype"]], tuple(each["shape"]))
            if stored.nbytes != end - begin:
                raise ValueError(f"{name} has {end - begin} bytes where its shape needs {stored.nbytes}")
            if 8 + length + end > size:
                raise ModelError(
                    f"{path} is cut off: it has {size} bytes, and {name} ends at {8 + length + end}; "
                    "fetch the file anew"
                )
            yield name, stored
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no safetensors file: {error}; fetch the file anew") from error


def _view(raw: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return bytes as numbers; a copy where they do not begin where a number can."""
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()
    return torch.from_numpy(raw).view(dtype)

"""Where the tensors of a checkpoint lie in its safetensors files, and how parts of them are read."""

import json
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sirius.errors import FileError, ModelError
from sirius.model.memory import PAGE, page_aligned

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
NUMBERS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = NUMBERS | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
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

    What is read is not kept by the system then, so that a model larger than memory leaves the rest of memory alone. The
    file is open from its first read on, for as long as this object lives.
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
        needed = begin + count - first
        span = -(-needed // PAGE) * PAGE
        memory = self._memory(span)
        got = 0
        try:
            while got < needed:
                read = os.preadv(self._opened(), [memory.data[got:span]], first + got)
                # past the cache a read begins where a page does, and less than a page is what a file's end gives
                least, whole = (PAGE, read // PAGE * PAGE) if self.direct else (1, read)
                if got + read < needed and read < least:
                    raise FileError(
                        f"{self.path} ends at byte {first + got + read}, and {begin + count} are needed; it was cut "
                        "off: fetch the file anew"
                    )
                got += read if got + read >= needed else whole
        except FileError:
            raise
        except OSError as error:
            raise FileError(f"cannot read {self.path} at byte {first + got}: {error.strerror or error}") from error
        if not self.direct and hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._opened(), first, span, os.POSIX_FADV_DONTNEED)
        return memory[begin - first : needed]

    def open(self) -> None:
        """Open the file now; raise FileError where that cannot be."""
        try:
            self._opened()
        except OSError as error:
            raise FileError(f"cannot open {self.path}: {error.strerror or error}") from error

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
                    weakref.finalize(self, os.close, self.handle).atexit = False
        return self.handle

    def _open(self) -> int:
        if self.direct:
            handle = None
            try:
                handle = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
                os.preadv(handle, [self._memory(PAGE).data[:PAGE]], 0)  # some file systems refuse only now
                return handle
            except OSError:
                self.direct = False
                if handle is not None:
                    os.close(handle)
        return os.open(self.path, os.O_RDONLY)


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a folder's model.safetensors by name, or those of the files that its index names.

    Raises ModelError where a file is missing, cut off, or none of safetensors.
    """
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        names = _read_index(folder / INDEX)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(names)} files of weights, first {missing[0]}; fetch the model anew"
        )
    found: dict[str, Stored] = {}
    for name in names:
        found.update(_read_header(File(folder / name)))
    return found


def _read_index(index: Path) -> list[str]:
    """Return the names of the files that an index names."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({Path(name).as_posix() for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is no index of weights: {error!r}; fetch the model anew") from error


def _read_header(file: File) -> dict[str, Stored]:
    """Return the tensors of a file by name, those of kinds that PyTorch lacks left out."""
    path = file.path
    try:
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(opened.read(length))
        tensors = {name: each for name, each in header.items() if name != "__metadata__"}
        _check_offsets(tensors)
        known = {name: each for name, each in tensors.items() if each["dtype"] in DTYPES}
        found = {name: _stored(file, name, each, 8 + length) for name, each in known.items()}
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is no safetensors file: {error}; fetch the file anew") from error
    for name, each in found.items():
        if each.begin + each.nbytes > size:
            raise ModelError(
                f"{path} is cut off: it has {size} bytes, and {name} ends at {each.begin + each.nbytes}; "
                "fetch the file anew"
            )
    return found


def _check_offsets(tensors: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError where tensors do not lie one behind the other from byte 0 on, as they do in every such file."""
    at = 0
    for name, each in sorted(tensors.items(), key=lambda pair: pair[1]["data_offsets"]):
        begin, end = each["data_offsets"]
        if type(begin) is not int or type(end) is not int or not at == begin <= end:
            raise ValueError(f"{name} is said to be at bytes {begin} to {end}, and what is before it ends at {at}")
        at = end


def _stored(file: File, name: str, described: dict[str, Any], data: int) -> Stored:
    """Return where a tensor of a file is; raise ValueError where its bytes do not fit its shape.

    data  the byte at which the tensors begin
    """
    begin, end = described["data_offsets"]
    shape = tuple(described["shape"])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{name} has the shape {described['shape']}")
    stored = Stored(file, name, data + begin, DTYPES[described["dtype"]], shape)
    if stored.nbytes != end - begin:
        raise ValueError(f"{name} has {end - begin} bytes where its shape needs {stored.nbytes}")
    return stored


def _view(raw: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return bytes as numbers; a copy where they do not begin where a number can."""
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()
    return torch.from_numpy(raw).view(dtype)

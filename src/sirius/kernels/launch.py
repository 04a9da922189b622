"""Calls of the C++ kernels written to memory, so that Python makes any number of them in one call of the library."""

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from operator import index
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sirius.errors import UnsupportedModelError

PLAIN = Tensor, nn.Parameter  # what a tensor with nothing but numbers in memory is; subclasses may hold anything
SLOTS = 20  # 64-bit numbers of a call, its kernel's first, as in csrc/kernels.cpp
Run = Callable[..., int]  # the library's sirius_run
Complaint = Callable[[int], Exception]  # of what a kernel found outside of what there is
_threads = threading.local()


def is_plain(*tensors: Tensor | None) -> bool:
    """Tell whether tensors are no subclass (quantised, sharded, traced, ...), and have an address."""
    return all(each is None or type(each) in PLAIN for each in tensors)


class Kernel(NamedTuple):
    """A kernel of the library, as its table has it.

    number  its index in the table
    kinds   a letter for each argument: what `SLOT_OF` takes for it
    """

    number: int
    kinds: str


class Launch:
    """Kernels to be called one after the other; they read and write by address what is kept here.

    slots       SLOTS numbers for each call
    complaints  what to raise where its kernel finds something outside of what there is
    """

    def __init__(
        self, run: Run, slots: Sequence[int], complaints: Sequence[Complaint | None], kept: Sequence[object]
    ) -> None:
        self.run, self.slots, self.complaints, self.kept = run, slots, complaints, kept
        self.memory, self.outside = (ctypes.c_int64 * len(slots))(*slots), ctypes.c_int64()

    @staticmethod
    def of(run: Run, kernel: Kernel, arguments: Sequence[Any], complaint: Complaint | None = None) -> "Launch":
        """Return the call of a kernel; tensors and arrays go by address, None is the address 0.

        Raises AssertionError or TypeError of arguments that are not as many as the kernel has, or of another kind.
        """
        kinds = kernel.kinds
        assert len(kinds) == len(arguments) < SLOTS, f"{len(arguments)} arguments for {kinds}"
        given = list(zip(kinds, arguments, strict=True))
        slots = [kernel.number, *[SLOT_OF[kind](value) for kind, value in given]]
        dtypes = {value.dtype for kind, value in given if kind == "p" and value is not None}
        assert len(dtypes) == 1, f"numbers of several dtypes for {kinds}: {dtypes}"
        kept = [each.untyped_storage() if isinstance(each, Tensor) else each for each in arguments]
        return Launch(run, slots + [0] * (SLOTS - len(slots)), [complaint], kept)

    @staticmethod
    def joined(launches: "Sequence[Launch]") -> "Launch":
        """Return several calls as one."""
        slots, complaints, kept = (
            list(chain.from_iterable(getattr(each, name) for each in launches))
            for name in ("slots", "complaints", "kept")
        )
        return Launch(launches[0].run, slots, complaints, kept)

    def __call__(self) -> None:
        """Run the kernels, and raise what the first complaint makes of it."""
        failed = self.run(self.memory, len(self.complaints), ctypes.byref(self.outside))
        if failed >= 0 and (complaint := self.complaints[failed]) is not None:
            raise complaint(self.outside.value)


class LaunchCapture(Protocol):
    """Takes down the launches of a thread, to run them again."""

    def add(self, launch: Launch) -> None:
        """Take down a launch; its caller runs it."""


def running() -> LaunchCapture | None:
    """Return the capture of this thread's launches, None where nothing is captured."""
    return getattr(_threads, "capture", None)


def capture_to(capture: LaunchCapture | None) -> LaunchCapture | None:
    """Give this thread's launches to a capture from now on, or to none; return the one before."""
    before, _threads.capture = running(), capture
    return before


def _address(value: Tensor | None, dtype: torch.dtype | None = None) -> int:
    """Return where a tensor's numbers begin; raise TypeError of one of another dtype, where one is given."""
    if value is None:
        return 0
    if not isinstance(value, Tensor) or (dtype is not None and value.dtype is not dtype):
        what = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"a kernel takes a tensor of {dtype or 'its own dtype'} here; got {what}")
    if type(value) not in PLAIN:
        raise UnsupportedModelError(f"a kernel takes plain tensors; got a {type(value).__name__}")
    return value.data_ptr()


def _integers(value: "Tensor | ctypes.Array[ctypes.c_int64] | None") -> int:
    """Return where 64-bit whole numbers begin, those of a tensor or of an array."""
    if isinstance(value, ctypes.Array) and value._type_ is ctypes.c_int64:
        return ctypes.addressof(value)
    return _address(value, torch.int64)  # pyright: ignore[reportArgumentType]


def _whole(value: int) -> int:
    if isinstance(value, Tensor):  # one of a single number would pass for it
        raise TypeError("a kernel takes a whole number here; got a tensor")
    return index(value)


def _real(value: float) -> int:
    if not isinstance(value, float | int):
        raise TypeError(f"a kernel takes a real number here; got a {type(value).__name__}")
    return struct.unpack("q", struct.pack("d", value))[0]


SLOT_OF: dict[str, Callable[[Any], int]] = {  # the letters of csrc/kernels.cpp
    "p": _address,  # numbers, all of a call in one dtype
    "n": _integers,
    "b": partial(_address, dtype=torch.bool),
    "c": partial(_address, dtype=torch.uint8),
    "w": partial(_address, dtype=torch.int32),
    "i": _whole,
    "f": _real,
}

"""Calls of the C++ kernels as plain memory: any number of them are one call from Python."""

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from itertools import chain
from operator import index
from typing import Any, Protocol

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
    def of(run: Run, kernel: int, kinds: str, arguments: Sequence[Any], complaint: Complaint | None = None) -> "Launch":
        """Return the call of a kernel, by its number; tensors and arrays go by address, None is no address.

        kinds  a letter for each argument: p an address, i a whole number, f a real one
        """
        assert len(kinds) == len(arguments) < SLOTS, f"{len(arguments)} arguments for {kinds}"
        slots = [kernel, *(SLOT_OF[kind](value) for kind, value in zip(kinds, arguments, strict=True))]
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


class Recorder(Protocol):
    """Takes down the launches of a thread."""

    def add(self, launch: Launch) -> None:
        """Take down a launch, which is run by whoever made it."""


def running() -> Recorder | None:
    """Return what takes down this thread's launches."""
    return getattr(_threads, "recorder", None)


def record_to(recorder: Recorder | None) -> Recorder | None:
    """Have this thread's launches taken down from now on, or no longer; return what did so before."""
    before, _threads.recorder = running(), recorder
    return before


def _address(value: "Tensor | ctypes.Array[Any] | None") -> int:
    if value is None:
        return 0
    if not isinstance(value, Tensor):
        return ctypes.addressof(value)
    if not is_plain(value):
        raise UnsupportedModelError(f"a kernel takes plain tensors; got a {type(value).__name__}")
    return value.data_ptr()


def _real(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


SLOT_OF: dict[str, Callable[[Any], int]] = {"p": _address, "i": index, "f": _real}

"""Memory that ran out, on a GPU or the CPU, whoever asked for it: PyTorch, NumPy, C++ or Python itself."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sirius.errors import OutOfMemoryError

SHORTAGE = (RuntimeError, MemoryError)  # what may tell of it: catch these, then ask `ran_out`
SAID = (  # what a plain RuntimeError says
    "DefaultCPUAllocator",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "Storage size calculation overflowed",  # more bytes than there are numbers for
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_asked = re.compile(r"(?:tried|unable) to allocate ([\d.]+ \w+)", re.IGNORECASE)


def ran_out(error: BaseException) -> bool:
    """Tell whether an error says that there was no memory left; PyTorch on the CPU has no class for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


@contextmanager
def telling(slots: int) -> Iterator[None]:
    """Raise OutOfMemoryError where memory runs out within, in a text of so many slots of the cache.

    What ran out leaves no traceback, which would hold the memory of what was under way.
    """
    try:
        yield
    except SHORTAGE as error:
        if not ran_out(error):
            raise
        found = _asked.search(str(error))
        asked = f", where {found[1]} were asked for" if found else ""
        raise OutOfMemoryError(
            f"out of memory with {slots} cache slots for a text{asked}; lower max_new_tokens or the batch size, "
            "shorten the prompt, or load the model in a narrower dtype"
        ) from error.with_traceback(None)

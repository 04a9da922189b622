"""Memory that ran out, on a GPU or the CPU, whoever asked for it: PyTorch, NumPy, C++ or Python itself."""

import re

import torch

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


def asked_for(error: BaseException) -> str | None:
    """Return how much memory was asked for at once, such as "110592 bytes" or "2.00 GiB", None where it is not told."""
    found = _asked.search(str(error))
    return found and found[1]

"""Memory of the host that a GPU copies from while it computes."""

import weakref
from typing import Any

import torch
from torch import Tensor

from sirius.errors import ModelError
from sirius.model.memory import pages
from sirius.offload.amounts import in_words


def pinned(count: int) -> Tensor:
    """Return memory [count] uint8 of the host that is locked for copies to a GPU.

    PyTorch's own pinned memory takes the next power of two of bytes, for large models half as much again. Raises
    ModelError where the system does not lock so much.
    """
    held = pages(count)
    memory = torch.frombuffer(held, dtype=torch.uint8)[:count]
    runtime: Any = torch.cuda.cudart()
    if code := int(runtime.cudaHostRegister(memory.data_ptr(), len(held), 0)):
        raise ModelError(
            f"the host's memory has no {in_words(count)} to lock for copies to the GPU (CUDA error {code}); raise the "
            "memory budget, so that less is kept there, or the limit of `ulimit -l`"
        )
    weakref.finalize(held, _unlock, memory.data_ptr()).atexit = False
    return memory


def _unlock(address: int) -> None:
    """Unlock memory before the system gets it back; copies from it are waited for."""
    torch.cuda.synchronize()
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)

"""Which implementation an operation takes, decided here alone: a kernel where there is one, else plain PyTorch."""

from math import prod

import torch
from torch import Tensor

from sirius.kernels import cpu, reference

MANY = 64  # tokens from which on a matrix product of PyTorch's is the faster one, where the CPU has instructions for it


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """Return the products of x [..., H] with the rows of weight [F, H] at index; see `reference.linear`."""
    chosen = cpu if _has_kernel(x, weight, index) else reference
    return chosen.linear(x, weight, bias, index)


def project(z: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """Return the rows of weight [F, H] at index added up, weighed by z [..., F]; see `reference.project`."""
    chosen = cpu if _has_kernel(z, weight, index) else reference
    return chosen.project(z, weight, bias, index)


def largest(values: Tensor, count: int) -> Tensor:
    """Return the places of the `count` largest of values [..., F] at least 0, ascending; see `reference.largest`."""
    kernel = values.device.type == "cpu" and values.dtype in cpu.DTYPES and cpu.library() is not None
    return (cpu if kernel else reference).largest(values, count)


def places(kept: Tensor, weight: Tensor) -> Tensor:
    """Return where kept [F] bool is True, ascending, as an index of the rows of weight [F, H], [k] int64."""
    return kept.nonzero()[:, 0]


def reads_rows(weight: Tensor) -> bool:
    """Tell whether rows of weight [F, H] can be read where they lie, or must be copied together first."""
    return cpu.fits(weight, weight)


def attends(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether `attend` has a kernel there."""
    return False


def attend(
    query: Tensor, keys: Tensor, values: Tensor, held: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Return what tokens see of the slots of a cache; see `reference.attend`."""
    raise NotImplementedError


def _has_kernel(x: Tensor, weight: Tensor, index: Tensor | None) -> bool:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    few = prod(x.shape[:-1]) < MANY or (weight.dtype is not torch.float32 and not cpu.multiplies_halves())
    return (few or index is not None) and cpu.fits(x, weight)

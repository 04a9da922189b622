"""Which implementation an operation takes, decided here alone: a kernel where there is one, else plain PyTorch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from sirius.kernels import attention, cpu, gpu, reference
from sirius.kernels.activations import Activation, activation_name
from sirius.kernels.launch import is_plain
from sirius.kernels.reference import NormForm, Weight

MANY = 64  # tokens from which on a matrix product of PyTorch's is the faster one, where the CPU has instructions for it
LONG = 8  # tokens of a row from which on it is as fast alone, where rows have neurons of their own
FEW = 16  # tokens up to which a GPU reads weights in a kernel of ours as fast as it can
_alike: ContextVar[bool] = ContextVar("alike", default=False)


@contextmanager
def alike() -> Iterator[None]:
    """Have passes within give a token the same bits, however many tokens they hold, where there are kernels of ours.

    PyTorch's products of many tokens are faster, and round in another order. Prompts are read alone and may take them.
    """
    before = _alike.set(True)
    try:
        yield
    finally:
        _alike.reset(before)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """Return the products of x [..., H] with the rows of weight [F, H] at index; see `reference.linear`."""
    return _backend(index, x, weight, bias).linear(x, weight, bias, index)


def project(z: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """Return the rows of weight [F, H] at index added up, weighed by z [..., F]; see `reference.project`."""
    return _backend(index, z, weight, bias).project(z, weight, bias, index)


def gate(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, index: Tensor | None = None) -> Tensor:
    """Return act(gate(x)) [..., F] of x [..., H], or of the neurons at index alone; see `reference.gate`."""
    name = activation_name(activation)
    if name is not None and index is None and prod(x.shape[:-1]) <= FEW and _on_gpu(x, weight, bias):
        return gpu.gate(x, weight, bias, name)
    if name in cpu.ACTIVATIONS and _backend(index, x, weight, bias) is cpu:
        return cpu.glu(x, (weight, bias), (None, None), name, index)
    return activation(linear(x, weight, bias, index))


def glu(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: Activation,
    index: Tensor | None = None,
) -> Tensor:
    """Return z = act(gate(x)) * up(x) [..., F] of x [..., H], of the neurons at index alone; see `reference.glu`."""
    name = activation_name(activation)
    if name is not None and index is not None and _on_gpu(x, gate, up, gate_bias, up_bias):
        return gpu.glu(x, gate, up, gate_bias, up_bias, name, index)
    if name in cpu.ACTIVATIONS and _backend(index, x, gate, gate_bias) is _backend(index, x, up, up_bias) is cpu:
        return cpu.glu(x, (gate, gate_bias), (up, up_bias), name, index)
    return activation(linear(x, gate, gate_bias, index)) * linear(x, up, up_bias, index)


def up_rows(gated: Tensor, x: Tensor, up: Tensor, up_bias: Tensor | None, index: Tensor) -> Tensor:
    """Return z [..., k] of the neurons at index, of gated = act(gate(x)) [..., F]; see `reference.up_rows`."""
    return (gpu if _on_gpu(x, up) else reference).up_rows(gated, x, up, up_bias, index)


def finishes(inputs: Sequence[Tensor], weights: Sequence[Weight], index: Tensor | None) -> bool:
    """Tell whether `finish` has a kernel for inputs, x [..., H] and gates [..., F], and weights [F, H] of an MLP."""
    same = len({weight.shape for weight, _ in weights}) == 1
    return same and all(_backend(index, each, *weight) is cpu for each in inputs for weight in weights)


def finish(
    gated: Tensor, x: Tensor, up: Weight, down: Weight, index: Tensor | None = None, by_place: bool = False
) -> Tensor:
    """Return down(gated * up(x)) [..., H] of x [..., H], where `finishes`; see `reference.finish`."""
    return cpu.finish(gated, x, up, down, index, by_place)


def takes_sets(x: Tensor, weights: Sequence[Weight], activation: Activation, index: Tensor) -> bool:
    """Tell whether `gated_each` has a kernel, and a faster one, for x [B, T, H], an MLP's weights and activation."""
    same = len({weight.shape for weight, _ in weights}) == 1 and activation_name(activation) in cpu.ACTIVATIONS
    return same and x.shape[1] < LONG and all(_backend(index, x, *weight) is cpu for weight in weights)


def gated_each(
    x: Tensor, weights: Sequence[Weight], activation: Activation, index: Tensor, counts: Sequence[int]
) -> Tensor:
    """Return the MLP of x [B, T, H], each row by its own neurons, where `takes_sets`; see `gated.gated_mlp_each`."""
    name = activation_name(activation)
    assert name is not None, "takes_sets was not asked"
    return cpu.gated_each(x, weights, name, index, counts)


def lie_together(up: Tensor, down: Tensor) -> bool:
    """Tell whether rows of up and down [F, H] are best put side by side in memory: where `finish` reads them in one go.

    Not in 16 bits where PyTorch takes many tokens: it would copy such weights for each product.
    """
    same = up.shape == down.shape and up.dtype == down.dtype and up.device == down.device
    ours = cpu.runs_on(up.device, up.dtype) and not gpu.runs_on(up.device)
    return same and ours and (up.dtype is torch.float32 or not cpu.multiplies_halves())


def largest(values: Tensor, count: int) -> Tensor:
    """Return the places of the `count` largest of values [..., F] at least 0, ascending; see `reference.largest`."""
    if not is_plain(values):
        return reference.largest(values, count)
    if values.dtype in gpu.DTYPES and values.shape[-1] <= gpu.LONGEST and gpu.runs_on(values.device):
        return gpu.largest(values, count)
    return (cpu if cpu.runs_on(values.device, values.dtype) else reference).largest(values, count)


def places(kept: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return where kept [F] bool is True, ascending, as an index [k] int64 for a product of x with weight [F, H].

    On a GPU, which is not asked how many there are, k is F and -1 fills the end: no neuron to the kernels there.
    """
    if _on_gpu(x, weight):
        return torch.nonzero_static(kept, size=len(kept))[:, 0]
    return kept.nonzero()[:, 0]


def reads_rows(weight: Tensor) -> bool:
    """Tell whether rows of weight [F, H] can be read where they lie, or must be copied together first."""
    return cpu.fits(weight, weight) or gpu.fits(weight, weight)


def norms(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `norm` has a kernel for x."""
    same = weight.dtype == x.dtype and weight.device == x.device and weight.shape == x.shape[-1:]
    plain = weight.is_contiguous() and is_plain(x, weight)
    return same and plain and cpu.runs_on(x.device, x.dtype) and not _learns(x, weight)


def norm(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> Tensor:
    """Return x [..., H] over its root mean square, times weight [H], where `norms`; see `reference.norm`."""
    return cpu.norm(x, weight, eps, form)


def attends(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether `attend` has a kernel there."""
    return _attention(device, dtype) is not reference


def attend(
    query: Tensor, keys: Tensor, values: Tensor, held: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Return what tokens see of the slots of a cache; see `reference.attend`."""
    backend = _attention(query.device, query.dtype) if is_plain(query, keys, values) else reference
    return backend.attend(query, keys, values, held, seen, scale, softcap)


def _attention(device: torch.device, dtype: torch.dtype) -> ModuleType:
    if dtype in gpu.DTYPES and gpu.runs_on(device):
        return attention
    return cpu if cpu.runs_on(device, dtype) else reference


def _backend(index: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> ModuleType:
    if _on_gpu(x, weight, bias):
        return gpu if index is not None else reference
    few = prod(x.shape[:-1]) < MANY or (weight.dtype is not torch.float32 and not cpu.multiplies_halves())
    ours = few or index is not None or _alike.get()
    return cpu if ours and cpu.fits(x, weight) and is_plain(bias) and not _learns(x, weight, bias) else reference


def _on_gpu(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    return gpu.fits(x, weight) and is_plain(*others) and not _learns(x, weight, *others)


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)

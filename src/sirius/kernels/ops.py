"""The table of operations: what defines each one, the kernels that compute it faster, and when each kernel runs.

`reference` defines an operation in plain PyTorch. Every function here has the reference's arguments and runs the kernel
that `TABLE` names for the tensors at hand. Without a kernel it runs the reference, or returns None where its caller has
a formula of its own. docs/adding-a-kernel.md tells how to add an operation.

A weight is a matrix with its bias: `Weight`. With `invariant`, a token's result has the same bits however many tokens
are computed together (batch-invariant) where there are kernels of ours; PyTorch's products of many tokens are not used.
"""

from collections.abc import Callable, Sequence
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sirius.kernels import attention, cpu, gpu, reference
from sirius.kernels.activations import Activation, activation_name
from sirius.kernels.launch import is_plain
from sirius.kernels.quantized import CHUNK, Quantized, joined
from sirius.kernels.reference import NormForm, Weight

MANY = 64  # tokens from which PyTorch's product is the faster one, where the CPU has instructions for the dtype
LONG = 8  # tokens of a row from which PyTorch's product is as fast, where rows have neurons of their own
FEW = 16  # tokens up to which a kernel of ours reads a whole weight on a GPU as fast as memory allows


class Asked(NamedTuple):
    """What the choice of a kernel depends on.

    inputs     the operation's inputs [..., H] or [..., F]
    weights    the weights, [F, H] each
    rows       [k] int64, the rows of the weights that are asked for; None: all
    invariant  whether a token's result may not depend on how many tokens there are
    activation which activation is part of the operation, if any
    """

    inputs: Sequence[Tensor]
    weights: Sequence[Weight] = ()
    rows: Tensor | None = None
    invariant: bool = False
    activation: Activation | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return prod(self.inputs[0].shape[:-1])

    @property
    def learns(self) -> bool:
        """Whether a gradient is wanted, which kernels do not give."""
        tensors = [*self.inputs, *(each for weight in self.weights for each in weight)]
        return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)

    @property
    def one_shape(self) -> bool:
        """Whether all weights have one shape."""
        return len({weight.shape for weight, _ in self.weights}) == 1


class Kernel(NamedTuple):
    """Where the kernel of an operation is, a function of the operation's name, and when it computes the operation."""

    module: ModuleType
    when: Callable[[Asked], bool]


def _all_fit(asked: Asked, fits: Callable[[Tensor, Tensor], bool]) -> bool:
    products = all(fits(x, weight) for x in asked.inputs for weight, _ in asked.weights)
    biases = all(bias is None or (is_plain(bias) and bias.dtype is weight.dtype) for weight, bias in asked.weights)
    return products and biases and not asked.learns and not torch.is_autocast_enabled(asked.inputs[0].device.type)


def _cpu_product(asked: Asked) -> bool:
    """Products on the CPU: few tokens, some rows, or a dtype that PyTorch multiplies slowly here."""
    weight = asked.weights[0][0]
    slow = weight.dtype is not torch.float32 and not cpu.multiplies_halves()
    ours = asked.tokens < MANY or slow or asked.rows is not None or asked.invariant
    return ours and _all_fit(asked, cpu.fits) and not gpu.runs_on(weight.device)


def _cpu_activated(asked: Asked) -> bool:
    return asked.activation is not None and activation_name(asked.activation) in cpu.ACTIVATIONS and _cpu_product(asked)


def _gpu_rows(asked: Asked) -> bool:
    """Products with some rows on a GPU, which are read where they lie."""
    return asked.rows is not None and _all_fit(asked, gpu.fits)


def _gpu_glu(asked: Asked) -> bool:
    return _is_named(asked) and _gpu_rows(asked)


def _gpu_gate(asked: Asked) -> bool:
    return _is_named(asked) and asked.rows is None and asked.tokens <= FEW and _all_fit(asked, gpu.fits)


def _is_named(asked: Asked) -> bool:
    return asked.activation is not None and activation_name(asked.activation) is not None


def _cpu_finish(asked: Asked) -> bool:
    return asked.one_shape and _cpu_product(asked)


def _cpu_sets(asked: Asked) -> bool:
    return asked.one_shape and asked.inputs[0].shape[1] < LONG and _cpu_activated(asked)


def _cpu_plain(asked: Asked) -> bool:
    first = asked.inputs[0]
    return is_plain(*asked.inputs) and cpu.runs_on(first.device, first.dtype)


def _gpu_plain(asked: Asked) -> bool:
    first = asked.inputs[0]
    return is_plain(*asked.inputs) and first.dtype in gpu.DTYPES and gpu.runs_on(first.device)


def _gpu_largest(asked: Asked) -> bool:
    return asked.inputs[0].shape[-1] <= gpu.LONGEST and _gpu_plain(asked)


def _cpu_norm(asked: Asked) -> bool:
    x, [(weight, _)] = asked.inputs[0], asked.weights
    same = weight.dtype == x.dtype and weight.device == x.device and weight.shape == x.shape[-1:]
    return same and weight.is_contiguous() and is_plain(weight) and _cpu_plain(asked) and not asked.learns


def _cpu_put(asked: Asked) -> bool:
    store, values = asked.inputs
    return values.stride(-1) == 1 and values.dtype is store.dtype and _cpu_plain(asked)


def _cpu_quantize(asked: Asked) -> bool:
    weight = asked.inputs[0]
    return cpu.fits(weight, weight) and not asked.learns


def _cpu_quantized(asked: Asked) -> bool:
    x = asked.inputs[0]
    biases = [bias for _, bias in asked.weights if bias is not None]
    plain = is_plain(*[codes for codes, _ in asked.weights], *biases) and all(bias.dtype is x.dtype for bias in biases)
    return plain and _cpu_plain(asked) and not asked.learns and not torch.is_autocast_enabled("cpu")


def _cpu_quantized_glu(asked: Asked) -> bool:
    named = asked.activation is not None and activation_name(asked.activation) in cpu.ACTIVATIONS
    return named and asked.one_shape and _cpu_quantized(asked)


TABLE: dict[str, tuple[Kernel, ...]] = {  # by the names in `reference`; the first kernel that fits computes
    "linear": (Kernel(gpu, _gpu_rows), Kernel(cpu, _cpu_product)),
    "project": (Kernel(gpu, _gpu_rows), Kernel(cpu, _cpu_product)),
    "gate": (Kernel(gpu, _gpu_gate), Kernel(cpu, _cpu_activated)),
    "glu": (Kernel(gpu, _gpu_glu), Kernel(cpu, _cpu_activated)),
    "up_rows": (Kernel(gpu, _gpu_rows),),
    "finish": (Kernel(cpu, _cpu_finish),),
    "each": (Kernel(cpu, _cpu_sets),),
    "largest": (Kernel(gpu, _gpu_largest), Kernel(cpu, _cpu_plain)),
    "norm": (Kernel(cpu, _cpu_norm),),
    "attend": (Kernel(attention, _gpu_plain), Kernel(cpu, _cpu_plain)),
    "put": (Kernel(cpu, _cpu_put),),
    "quantize": (Kernel(cpu, _cpu_quantize),),
    "quantized_linear": (Kernel(cpu, _cpu_quantized),),
    "quantized_glu": (Kernel(cpu, _cpu_quantized_glu),),
    "highest": (Kernel(cpu, _cpu_plain),),
}


def kernel(name: str, asked: Asked) -> Callable[..., Any] | None:
    """Return the kernel that computes an operation of what is asked, None where its reference does."""
    return next((getattr(each.module, name) for each in TABLE[name] if each.when(asked)), None)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None, invariant: bool = False
) -> Tensor:
    """Return the products of x [..., H] with the rows of weight [F, H] at index; see `reference.linear`."""
    run = kernel("linear", Asked([x], [(weight, bias)], index, invariant))
    return (run or reference.linear)(x, weight, bias, index)


def project(
    z: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None, invariant: bool = False
) -> Tensor:
    """Return the rows of weight [F, H] at index added up, weighed by z [..., k]; see `reference.project`."""
    run = kernel("project", Asked([z], [(weight, bias)], index, invariant))
    return (run or reference.project)(z, weight, bias, index)


def gate(
    x: Tensor, gate: Weight, activation: Activation, index: Tensor | None = None, invariant: bool = False
) -> Tensor | None:
    """Return act(gate(x)) [..., F] of x [..., H], or None without a kernel; see `reference.gate`."""
    run = kernel("gate", Asked([x], [gate], index, invariant, activation))
    return run and run(x, gate, activation_name(activation), index)


def glu(
    x: Tensor, gate: Weight, up: Weight, activation: Activation, index: Tensor | None = None, invariant: bool = False
) -> Tensor | None:
    """Return z = act(gate(x)) * up(x) [..., F] of x [..., H], or None without a kernel; see `reference.glu`."""
    run = kernel("glu", Asked([x], [gate, up], index, invariant, activation))
    return run and run(x, gate, up, activation_name(activation), index)


def up_rows(gated: Tensor, x: Tensor, up: Tensor, up_bias: Tensor | None, index: Tensor) -> Tensor | None:
    """Return z [..., k] of gated neurons [..., F] at index, or None without a kernel; see `reference.up_rows`."""
    run = kernel("up_rows", Asked([x], [(up, up_bias)], index))
    return run and run(gated, x, up, up_bias, index)


def finish(
    gated: Tensor, x: Tensor, up: Weight, down: Weight, index: Tensor | None = None, invariant: bool = False
) -> Tensor | None:
    """Return down(gated * up(x)) [..., H] of x [..., H], or None without a kernel; see `reference.finish`."""
    run = kernel("finish", Asked([x, gated], [up, down], index, invariant))
    return run and run(gated, x, up, down, index)


def each(
    x: Tensor, weights: Sequence[Weight], activation: Activation, index: Tensor, counts: Sequence[int]
) -> Tensor | None:
    """Return the MLP of x [B, T, H] by neurons of each row's own, or None without a kernel; see `reference.each`."""
    run = kernel("each", Asked([x], weights, index, False, activation))
    return run and run(x, weights, activation_name(activation), index, counts)


def largest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest of values [..., F] at least 0, ascending; see `reference.largest`."""
    return (kernel("largest", Asked([values])) or reference.largest)(values, count)


def norm(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> Tensor | None:
    """Return x [..., H] over its root mean square, times weight [H], or None without a kernel; see `reference.norm`."""
    run = kernel("norm", Asked([x], [(weight, None)]))
    return None if run is None else run(x, weight, eps, form)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, held: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Return what tokens see of the slots of a cache; see `reference.attend`."""
    run = kernel("attend", Asked([query, keys, values])) or reference.attend
    return run(query, keys, values, held, seen, scale, softcap)


def put(store: Tensor, rows: Tensor, slots: Tensor, values: Tensor) -> None:
    """Write values [B, T, heads, D] to the slots of rows of a store [R, S, heads, D]; see `reference.put`."""
    (kernel("put", Asked([store, values])) or reference.put)(store, rows, slots, values)


def quantize(weight: Tensor, bits: int) -> Quantized:
    """Return weight [F, H] rounded to 4 or 8 bits; raise ConfigError of other bits; see `reference.quantize`."""
    if weight.stride(-1) != 1:  # a kernel reads rows whose elements are neighbours
        parts = weight.split(max(1, CHUNK // max(1, weight.shape[1])))
        return joined([quantize(part.clone(memory_format=torch.contiguous_format), bits) for part in parts])
    return (kernel("quantize", Asked([weight])) or reference.quantize)(weight, bits)


def quantized_linear(x: Tensor, weight: Quantized, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """Return the products of x [..., H] with a quantized weight [F, H]; see `reference.quantized_linear`."""
    run = kernel("quantized_linear", Asked([x], [(weight.codes, bias)], index)) or reference.quantized_linear
    return run(x, weight, bias, index)


def quantized_glu(
    x: Tensor,
    gate: Quantized,
    gate_bias: Tensor | None,
    up: Quantized,
    up_bias: Tensor | None,
    activation: Activation,
    index: Tensor | None = None,
) -> Tensor | None:
    """Return act(gate(x)) * up(x) of x [..., H], or None without a kernel; see `reference.quantized_glu`."""
    asked = Asked([x], [(gate.codes, gate_bias), (up.codes, up_bias)], index, activation=activation)
    run = kernel("quantized_glu", asked)
    return run and run(x, gate, gate_bias, up, up_bias, activation_name(activation), index)


def highest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest of values [..., V], in any order; see `reference.highest`."""
    return (kernel("highest", Asked([values])) or reference.highest)(values, count)


def multiplies_quantized(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether `quantized_linear` has a kernel for inputs of a dtype on a device."""
    return cpu.runs_on(device, dtype) and not gpu.runs_on(device)


def attends(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether `attend` has a kernel for a device and dtype."""
    return (dtype in gpu.DTYPES and gpu.runs_on(device)) or cpu.runs_on(device, dtype)


def reads_rows(weight: Tensor) -> bool:
    """Tell whether rows of weight [F, H] can be read where they lie, or must be copied together first."""
    return cpu.fits(weight, weight) or gpu.fits(weight, weight)


def best_side_by_side(up: Tensor, down: Tensor) -> bool:
    """Tell whether rows of up and down [F, H] are best put side by side in memory: where `finish` reads both at once.

    Not in 16 bits where PyTorch takes many tokens: it would copy such weights for each product.
    """
    same = up.shape == down.shape and up.dtype == down.dtype and up.device == down.device
    ours = cpu.runs_on(up.device, up.dtype) and not gpu.runs_on(up.device)
    return same and ours and (up.dtype is torch.float32 or not cpu.multiplies_halves())


def index_of(kept: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return where kept [F] bool is True, ascending, as an index [k] int64 for a product of x with weight [F, H].

    On a GPU the host does not ask how many there are. So k is F, and -1 fills the end, which its kernels skip.
    """
    if _all_fit(Asked([x], [(weight, None)]), gpu.fits):
        return torch.nonzero_static(kept, size=len(kept))[:, 0]
    return kept.nonzero()[:, 0]

"""The operations on a GPU: what `programs.py` holds, launched on blocks that follow from the sizes alone.

Weights are [F, H] as `reference` has them, x [..., H] is of any number of rows and tuned for one to sixteen. `index` is
[k] int64, ascending, None for all neurons; an entry of -1 is no neuron: nothing is read for it, its product is 0.
Nothing here waits for the device and no grid depends on what a tensor holds, so that CUDA graphs may capture all of it.
"""

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, wraps
from math import prod
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch
from torch import Tensor

from sirius.kernels.launch import is_plain
from sirius.kernels.reference import Weight

Rest = ParamSpec("Rest")
Operation = Callable[Concatenate[Tensor, Rest], Tensor]
DTYPES = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 19}  # bits of a float32 that their numbers use
PROGRAMS = 4 * 132  # of a product split over its neurons: four for each multiprocessor of an H100
MOST_SLICES = 64
LONGEST = 2**16  # values of a line of `largest`


class Blocks(NamedTuple):
    """What one program takes on: rows of x, rows of weights, and how much of a row at a time."""

    rows: int
    neurons: int
    bytes: int
    warps: int
    stages: int

    def columns(self, size: int, itemsize: int) -> int:
        """Return how many of a row's `size` numbers are read at a time: where it can be, a divisor of them."""
        most = self.bytes // itemsize
        return next((c for c in (most, most // 2, most // 4) if size % c == 0), min(most, power_of_two(size, 16)))


# One row: sums of products, every load 16 bytes of each thread's. More: tensor cores, the rows filled up to 16.
LINEAR = {1: Blocks(1, 4, 2048, 4, 2), 16: Blocks(16, 16, 256, 4, 4)}
PROJECT = {1: Blocks(1, 16, 512, 4, 2), 16: Blocks(16, 32, 512, 4, 4)}


@cache
def available() -> bool:
    """Tell whether Triton can be imported; where it cannot, one line in the log says so."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        logging.getLogger("sirius").warning(
            "no GPU kernels (%s); plain PyTorch takes their place, slower. Install triton to have them", error
        )
        return False
    return True


def interpreted() -> bool:
    """Tell whether Triton's interpreter is on, which runs the kernels on the CPU, for tests: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fits(x: Tensor, weight: Tensor) -> bool:
    """Tell whether the kernels can take a product of x [..., H] or [..., F] with weight [F, H]."""
    return (
        is_plain(x, weight)
        and runs_on(weight.device)
        and weight.dtype in DTYPES
        and x.dtype == weight.dtype
        and x.device == weight.device
        and weight.ndim == 2
        and weight.is_contiguous()
    )


def runs_on(device: torch.device) -> bool:
    """Tell whether the kernels run on a device."""
    return (device.type == "cuda" or (device.type == "cpu" and interpreted())) and available()


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: object, warps: int, stages: int = 1, **sizes: object
) -> None:
    """Run a kernel on a grid; products are added in one instruction, whatever a release of Triton does by itself."""
    kernel[grid](*arguments, **sizes, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def power_of_two(number: int, least: int = 1) -> int:
    """Return the smallest power of two that is no less than number and least."""
    return max(least, 1 << max(number - 1, 0).bit_length())


def operation(fake: Callable[..., Tensor]) -> Callable[[Operation[Rest]], Operation[Rest]]:
    """Make a function an operator of PyTorch's, sirius::<its name>, which a compiler takes as a whole.

    fake  what the compiler calls instead: the result without its values

    Code that is not compiled calls the function itself; the way through the operator takes longer than some kernels.
    """

    def register(function: Operation[Rest]) -> Operation[Rest]:
        @wraps(function)
        def run(x: Tensor, *args: Rest.args, **kwargs: Rest.kwargs) -> Tensor:
            with torch.cuda.device_of(x):
                return function(x, *args, **kwargs)

        operator = torch.library.custom_op(f"sirius::{function.__name__}", run, mutates_args=())
        operator.register_fake(fake)

        @wraps(function)
        def call(x: Tensor, *args: Rest.args, **kwargs: Rest.kwargs) -> Tensor:
            return (operator if torch.compiler.is_compiling() else run)(x, *args, **kwargs)

        return call

    return register


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """See `reference.linear`."""
    return products(x, weight, [bias], index=index)


def gate(x: Tensor, gate: Weight, activation: str, index: Tensor | None = None) -> Tensor:
    """See `reference.gate`; there is no index."""
    assert index is None, "the gate is computed in full"
    return products(x, gate[0], gate[1:], activation=activation)


def glu(x: Tensor, gate: Weight, up: Weight, activation: str, index: Tensor | None = None) -> Tensor:
    """See `reference.glu`; what is between the products and z stays in float32."""
    return products(x, gate[0], [gate[1], *up], index=index, activation=activation)


def up_rows(gated: Tensor, x: Tensor, up: Tensor, up_bias: Tensor | None, index: Tensor) -> Tensor:
    """See `reference.up_rows`."""
    return products(x, up, [up_bias], gated.contiguous(), index)


def _empty(x: Tensor, weight: Tensor, index: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] if index is None else index.shape[0])


@operation(lambda x, weight, more, gated=None, index=None, activation=None: _empty(x, weight, index))
def products(
    x: Tensor,
    weight: Tensor,
    more: Sequence[Tensor | None],
    gated: Tensor | None = None,
    index: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Return act(x.weight) [..., k], times x.second or gated [..., F] where there is one.

    more  the bias of weight or None, then a second matrix with its bias
    """
    from sirius.kernels.programs import linear_kernel

    x, z = x.contiguous(), _empty(x, weight, index)
    if z.numel() == 0:
        return z
    bias, second, second_bias = more if len(more) == 3 else (*more, None, None)
    (neurons, size), rows, count = weight.shape, _rows(x), z.shape[-1]
    block = LINEAR[1 if rows == 1 else 16]
    columns = block.columns(size, x.element_size())
    each = block.neurons if rows > 1 or second is None else block.neurons // 2
    launch(
        linear_kernel,
        (_blocks(rows, block.rows) * _blocks(count, each),),
        *(x, weight, bias, second, second_bias, gated, index, z),
        *(rows, count, neurons, size),
        ACTIVATION=activation,
        BLOCK_R=block.rows,
        BLOCK_F=each,
        BLOCK_H=columns,
        EVEN_H=size % columns == 0,
        warps=block.warps,
        stages=block.stages,
    )
    return z


@operation(lambda z, weight, bias=None, index=None: z.new_empty(*z.shape[:-1], weight.shape[1]))
def project(z: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """See `reference.project`; slices of the neurons are added up each on its own, then together in a fixed order."""
    from sirius.kernels.programs import add_kernel, project_kernel

    z = z.contiguous()
    y = z.new_empty(*z.shape[:-1], weight.shape[1])
    if y.numel() == 0:
        return y
    rows, count, size = _rows(z), z.shape[-1], weight.shape[1]
    block = PROJECT[1 if rows == 1 else 16]
    columns = block.columns(size, z.element_size())
    grid = _blocks(rows, block.rows) * _blocks(size, columns)
    slices, share = split(count, block.neurons, grid)
    partial = z.new_empty(slices, rows, size, dtype=torch.float32)
    launch(
        project_kernel,
        (grid * slices,),
        *(z, weight, index, partial),
        *(rows, count, size, share),
        BLOCK_R=block.rows,
        BLOCK_F=block.neurons,
        BLOCK_H=columns,
        EVEN_H=size % columns == 0,
        warps=block.warps,
        stages=block.stages,
    )
    sums = {"SLICES": slices, "BLOCK_S": power_of_two(slices), "BLOCK": 128}
    launch(add_kernel, (_blocks(y.numel(), 128),), partial, bias, y, y.numel(), size, **sums, warps=4)
    return y


def split(count: int, least: int, grid: int) -> tuple[int, int]:
    """Return into how many slices to split `count`, and how many each is of, for a grid of this size to fill a GPU.

    A slice is a multiple of `least`, of four times that where there is enough.
    """
    slices = max(1, min(PROGRAMS // grid, _blocks(count, 4 * least), MOST_SLICES))
    share = max(1, _blocks(count, slices * least)) * least
    return max(1, _blocks(count, share)), share


@operation(lambda values, count: values.new_empty(*values.shape[:-1], count, dtype=torch.int64))
def largest(values: Tensor, count: int) -> Tensor:
    """See `reference.largest`; of equal values the first, NaN before all others. Lines of up to 65,536 values."""
    from sirius.kernels.programs import largest_kernel

    size = values.shape[-1]
    assert 0 <= count <= size <= LONGEST, f"{count} of {size} values"
    values = values.contiguous()
    found = values.new_empty(*values.shape[:-1], count, dtype=torch.int64)
    if found.numel():
        block = power_of_two(size)
        warps = min(max(block // 512, 1), 32)
        bits = DTYPES[values.dtype]
        launch(largest_kernel, (_rows(values),), values, found, size, count, BITS=bits, BLOCK=block, warps=warps)
    return found


def _rows(x: Tensor) -> int:
    return prod(x.shape[:-1])


def _blocks(number: int, size: int) -> int:
    return -(-number // size)

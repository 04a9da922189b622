"""Every operation at every density and batch, the kernel beside its plain reference and the ceiling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from sirius.benchmark.ceiling import SIZE, Ceiling
from sirius.benchmark.timing import repeated
from sirius.kernels import ops, reference
from sirius.kernels.ops import attends, best_side_by_side
from sirius.model.memory import side_by_side

OPERATIONS, ON_CPU = ("linear", "glu", "up_rows", "project"), ("linear", "finish", "project")
TWO = ("glu", "finish")  # these read rows of two weights
DENSITIES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
SLOTS, HEADS, KV_HEADS, HEAD = 1024, 32, 8, 128  # of `attend`: Llama-3-8B's, at 1k tokens
MOST = 100  # matrices; small ones stay in the caches
BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class KernelFigures:
    """An operation on `batch` tokens at a density: milliseconds (medians) by kernel and by reference.

    gb_per_s          of the weights that must be read, by the kernel
    share_of_ceiling  of the measured bandwidth; small where many tokens make the operation compute-bound
    gflops            1e9 operations a second, by the kernel
    """

    operation: str
    batch: int
    density: float
    kernel_ms: float
    reference_ms: float
    gb_per_s: float
    share_of_ceiling: float
    gflops: float


@dataclass(frozen=True)
class Size:
    """One MLP: F neurons of hidden size H, in a dtype on a device."""

    neurons: int
    hidden: int
    dtype: torch.dtype
    device: str


def run(
    size: Size,
    ceiling: Ceiling,
    densities: Sequence[float] = DENSITIES,
    batches: Sequence[int] = BATCHES,
    on_row: Callable[[], None] = lambda: None,
) -> list[KernelFigures]:
    """Time every operation; `on_row` is called after each row. Weights take turns, so that no cache holds them."""
    matrix = size.neurons * size.hidden * size.dtype.itemsize
    copies = min(max(4, -(-SIZE // matrix)), MOST)
    weights = [_random(size, size.neurons, size.hidden, seed=i) for i in range(copies)]
    pairs = zip(weights[::2], weights[1::2], strict=False)
    together = [side_by_side(*pair) if best_side_by_side(*pair) else pair for pair in pairs]  # as decoding has them
    taken = {"finish": [((up, None), (down, None)) for up, down in together]}
    rows = []
    for operation in chosen_operations(size):
        for batch in batches:
            for density in densities:
                rows.append(_row(operation, size, batch, density, taken.get(operation, weights), ceiling))
                on_row()
    for operation in whole_operations(size):
        for batch in batches:
            rows.append(_whole(operation, size, batch, weights, ceiling))
            on_row()
    return rows


def count(size: Size) -> int:
    """Return how many rows `run` measures by default."""
    return len(BATCHES) * (len(chosen_operations(size)) * len(DENSITIES) + len(whole_operations(size)))


def chosen_operations(size: Size) -> tuple[str, ...]:
    """Return the operations on chosen rows that decoding takes: others where there are kernels for the CPU."""
    return ON_CPU if size.device == "cpu" and attends(torch.device("cpu"), size.dtype) else OPERATIONS


def whole_operations(size: Size) -> tuple[str, ...]:
    """Return the operations that know no density; attention is PyTorch's own where there are no kernels."""
    return ("gate", "largest", "attend") if attends(torch.device(size.device), size.dtype) else ("gate", "largest")


def _row(
    operation: str, size: Size, batch: int, density: float, weights: Sequence[Any], ceiling: Ceiling
) -> KernelFigures:
    count = round(density * size.neurons)
    order = torch.randperm(size.neurons, generator=torch.Generator().manual_seed(0))
    whole = count == size.neurons and size.device == "cpu"  # on a GPU products with all rows are PyTorch's
    index = None if whole else order[:count].sort().values.to(size.device)
    products = count * size.hidden * (2 if operation in TWO else 1)
    calls = partial(_call, operation, size=size, batch=batch, weights=weights, index=index)
    return _figures((operation, batch, density), calls, products, batch * products, size, ceiling)


def _call(
    operation: str, module: ModuleType, size: Size, batch: int, weights: Sequence[Any], index: Tensor | None
) -> Callable[[], Tensor]:
    """Return a call of an operation on other weights each time; of `finish` they are pairs with their biases."""
    turns, everything = cycle(weights), torch.arange(size.neurons, device=size.device)
    x, gated = _random(size, batch, size.hidden), _random(size, batch, size.neurons)
    z = gated if index is None else gated[:, index]
    calls: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: module.linear(x, next(turns), None, index),
        "project": lambda: module.project(z, next(turns), None, index),
        "finish": lambda: module.finish(gated, x, *next(turns), index),
        "glu": lambda: module.glu(x, (next(turns), None), (next(turns), None), silu, index),
        "up_rows": lambda: module.up_rows(gated, x, next(turns), None, everything if index is None else index),
    }
    return calls[operation]


def _whole(operation: str, size: Size, batch: int, weights: list[Tensor], ceiling: Ceiling) -> KernelFigures:
    """Time an operation without a density; of `largest` half of the values are wanted, to `attend` are SLOTS slots."""
    turns = cycle(weights)
    x, values = _random(size, batch, size.hidden), _random(size, batch, size.neurons).abs()
    query, keys = _random(size, 1, HEADS, batch, HEAD), _random(size, 1, SLOTS, KV_HEADS, HEAD)
    held = torch.tensor([SLOTS - batch], device=size.device)
    seen = torch.ones(1, batch, batch, dtype=torch.bool, device=size.device).tril()
    calls: dict[str, tuple[Callable[[ModuleType], Tensor], int, int]] = {  # with what is read, and multiplied
        "gate": (lambda m: m.gate(x, (next(turns), None), silu), weights[0].numel(), weights[0].numel()),
        "largest": (lambda m: m.largest(values, size.neurons // 2), values.numel(), 0),
        "attend": (
            lambda m: m.attend(query, keys, keys, held, seen, HEAD**-0.5, None),
            2 * keys.numel(),
            2 * HEADS * SLOTS * HEAD,
        ),
    }
    call, read, products = calls[operation]
    point = operation, batch, 0.5 if operation == "largest" else 1.0
    return _figures(point, lambda module: partial(call, module), read, batch * products, size, ceiling)


def _figures(
    point: tuple[str, int, float],
    call_of: Callable[[ModuleType], Callable[[], object]],
    read: int,
    products: int,
    size: Size,
    ceiling: Ceiling,
) -> KernelFigures:
    """Time the call of an operation by kernel and by reference, which also stands for a kernel that is missing.

    read, products  the numbers that are read, and the products of numbers that are added up
    """
    kernel, plain = call_of(ops), call_of(reference)
    calls = (plain if kernel() is None else kernel), plain
    ours, theirs = (1e3 * median(repeated(call, size.device)) for call in calls)
    speed = read * size.dtype.itemsize / ours / 1e6
    share, gflops = round(speed / ceiling.gb_per_s, 3), round(2 * products / ours / 1e6, 1)
    return KernelFigures(*point, round(ours, 4), round(theirs, 4), round(speed, 2), share, gflops)


def _random(size: Size, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(size.device, size.dtype)

"""Compiles the GPU's kernels for a GPU that is not here: the shared memory that each takes, as JSON.

A process of its own, as Triton is either its interpreter or its compiler: python compiled.py BACKEND ARCH LANES DTYPE
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sirius.kernels import attention, gpu
from sirius.kernels.activations import ACTIVATIONS

NEURONS, SIZE = 8192, 2048  # of llama-3.2-1b
HEADS = [(64, 32, 8), (128, 32, 8), (256, 8, 1)]  # their size, how many of queries, of keys


class Absent:
    """Triton's driver of a GPU that is not here."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiling:
    """A kernel that is compiled where it would be run; `taken` has the bytes of shared memory, by name and sizes."""

    def __init__(self, kernel: JITFunction, taken: dict[str, int]) -> None:
        self.kernel, self.taken = kernel, taken

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.compile, grid)

    def compile(self, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
        made = self.kernel.warmup(*arguments, **options, grid=grid)
        assert {"cubin", "hsaco"} & set(made.asm), list(made.asm)
        name = f"{self.kernel.__name__} {options}"
        self.taken[name] = max(made.metadata.shared, self.taken.get(name, 0))


def products(dtype: torch.dtype) -> None:
    weight, index = torch.empty(NEURONS, SIZE, dtype=dtype), torch.arange(0, NEURONS, 2)
    bias, gated = weight[:, 0].contiguous(), weight.view(SIZE, NEURONS)
    for rows, chosen in product((1, 16), (None, index)):
        x, count = weight[:rows], NEURONS if chosen is None else len(chosen)
        gpu.linear(x, weight, bias, chosen)
        gpu.glu(x, (weight, bias), (weight, bias), "silu", chosen)
        gpu.project(gated[:rows, :count], weight, weight[0], chosen)
        gpu.up_rows(gated[:rows], x, weight, bias, index)
    for activation in ACTIVATIONS:
        gpu.gate(weight[:1], (weight, None), activation)
    gpu.largest(gated[:1], NEURONS // 2)


def attended(dtype: torch.dtype) -> None:
    held, seen = torch.tensor([1000]), torch.ones(1, 16, 64, dtype=torch.bool)
    for (size, heads, kv_heads), tokens in product(HEADS, (1, 16)):
        keys = torch.empty(1, 2048, kv_heads, size, dtype=dtype)
        query = torch.empty(1, heads, tokens, size, dtype=dtype)
        attention.attend(query, keys, keys, held, seen[:, :tokens], 0.1, 30.0 if size == 256 else None)


def main(backend: str, arch: str, lanes: str, dtype: str) -> None:
    taken: dict[str, int] = {}
    launch = gpu.launch
    gpu.launch = attention.launch = lambda kernel, *rest, **sizes: launch(Compiling(kernel, taken), *rest, **sizes)
    driver.set_active(Absent(GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(lanes))))
    products(getattr(torch, dtype))
    attended(getattr(torch, dtype))
    json.dump(taken, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])

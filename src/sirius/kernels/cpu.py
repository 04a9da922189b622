"""The C++ kernels, bound by their plain C interface; csrc/ holds them, hatch_build.py compiles them at install.

They run as many threads as torch does, in torch's own OpenMP pool where the linker finds it loaded.
"""

import ctypes
import logging
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from sirius.errors import ConfigError

LIBRARY = Path(__file__).with_name("libsirius_cpu.so")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/rows.h
_Pointer, _Size = ctypes.c_void_p, ctypes.c_int64


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None, with one line in the log, where there are none."""
    try:
        return _bound(ctypes.CDLL(str(LIBRARY)))
    except (OSError, AttributeError) as error:  # there is none, or one of another version
        logging.getLogger("sirius").warning(
            "no compiled CPU kernels (%s); plain PyTorch takes their place, slower. "
            "Install a C++ compiler and sirius again to have them",
            error,
        )
        return None


def _bound(found: ctypes.CDLL) -> ctypes.CDLL:
    """Say what the library's functions take and return."""
    number = ctypes.c_int
    tensors = [number, _Pointer, _Size, _Size]
    found.sirius_isa.restype = ctypes.c_char_p
    found.sirius_linear.argtypes = [*tensors, _Pointer, _Size, _Size, _Pointer, _Pointer, _Pointer, number]
    found.sirius_project.argtypes = [*tensors, _Pointer, _Pointer, _Size, _Size, _Pointer, _Pointer, number]
    found.sirius_largest.argtypes = [number, _Pointer, _Size, _Size, _Pointer]
    found.sirius_linear.restype = found.sirius_project.restype = _Size
    found.sirius_largest.restype = None
    return found


def instructions() -> str | None:
    """Return the instruction set that the kernels use here, a name in `hatch_build.X86`; None without kernels."""
    found = library()
    return found and found.sirius_isa().decode()


@cache
def multiplies_halves() -> bool:
    """Tell whether the CPU multiplies bfloat16 itself; PyTorch's products of 16-bit floats crawl where it does not."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def fits(x: Tensor, weight: Tensor) -> bool:
    """Tell whether the kernels can take a product of x [..., H] or [..., F] with weight [F, H]."""
    return x.dtype == weight.dtype and weight.ndim == 2 and weight.is_contiguous() and takes(weight)


def takes(tensor: Tensor) -> bool:
    """Tell whether the kernels can take a tensor: there are some, and it is on the CPU, in one of their dtypes."""
    return (
        tensor.dtype in DTYPES
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """See `reference.linear`; raise ConfigError where the index is not one of int64, of rows that the weight has."""
    x = x.contiguous()
    count = len(weight) if index is None else len(index)
    y = x.new_empty(*x.shape[:-1], count)
    at_x, at_w, at_bias, at_y = map(_at, (x, weight, bias, y))
    sizes = DTYPES[x.dtype], at_x, _rows(x), x.shape[-1]
    rows = len(weight), count, _index_at(index, count)
    _check(_library().sirius_linear(*sizes, at_w, *rows, at_bias, at_y, torch.get_num_threads()), weight, index)
    return y


def project(z: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """See `reference.project`; raise ConfigError where the index is not one of int64, of rows that the weight has."""
    z = z.contiguous()
    y = z.new_empty(*z.shape[:-1], weight.shape[1])
    at_z, at_w, at_bias, at_y = map(_at, (z, weight, bias, y))
    sizes = DTYPES[z.dtype], at_z, _rows(z), z.shape[-1]
    rows = _index_at(index, z.shape[-1]), at_w, *weight.shape
    _check(_library().sirius_project(*sizes, *rows, at_bias, at_y, torch.get_num_threads()), weight, index)
    return y


def largest(values: Tensor, count: int) -> Tensor:
    """See `reference.largest`; of equal values the first, NaN before all others."""
    values = values.contiguous()
    found = torch.empty(*values.shape[:-1], count, dtype=torch.int64)
    for line, out in zip(values.view(-1, values.shape[-1]), found.view(-1, count), strict=True):
        _library().sirius_largest(DTYPES[line.dtype], _at(line), len(line), count, _at(out))
    return found


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None, "no compiled kernels: `fits` was not asked"
    return found


def _index_at(index: Tensor | None, count: int) -> int | None:
    if index is not None and (index.dtype is not torch.int64 or len(index) != count):
        raise ConfigError(
            f"an index of {len(index)} {index.dtype} for {count} neurons; give one of {count} torch.int64"
        )
    return _at(index)


def _check(outside: int, weight: Tensor, index: Tensor | None) -> None:
    """Raise ConfigError where a place in the index, -1 for none, is that of a row outside the weight."""
    if outside >= 0:
        row = outside if index is None else int(index[outside])
        raise ConfigError(
            f"neuron {row} is asked for, in place {outside}, of a weight of {len(weight)} rows; "
            f"a sparsity method's neurons must be from 0 to {len(weight) - 1}"
        )


def _rows(x: Tensor) -> int:
    return prod(x.shape[:-1])


def _at(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous(), f"strides {tensor.stride()} of {list(tensor.shape)}"
    return None if tensor is None else tensor.data_ptr()

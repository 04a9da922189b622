"""The C++ kernels, called by number through a plain C interface.

csrc/ holds them, hatch_build.py compiles them at install. They run as many threads as torch does, in torch's own OpenMP
pool where the linker finds it loaded.
"""

import ctypes
import logging
from collections.abc import Sequence
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sirius.errors import ConfigError
from sirius.kernels.launch import SLOTS, Complaint, Kernel, Launch, Run, is_plain, running
from sirius.kernels.quantized import BLOCK, Quantized, check_bits
from sirius.kernels.reference import NormForm, Weight

LIBRARY = Path(__file__).with_name("libsirius_cpu.so")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/rows.h
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu": 2}  # likewise; the others are PyTorch's
WITHOUT_HALVES = "generic", "avx2", "avx512"  # instruction sets that multiply no bfloat16
NEEDED = "linear", "project", "glu", "finish", "norm", "rotate", "add", "put", "attend", "largest", "each"
NEEDED += "quantize", "quantized_linear", "quantized_glu", "highest"
_Size = ctypes.c_int64
_Rows = tuple[Sequence[Tensor], Tensor | None]  # weights, and an index that may not fit them


class Library(NamedTuple):
    """The compiled kernels.

    run      calls kernels one after the other; see sirius_run in csrc/kernels.cpp
    isa      the instruction set that they use here, a name in `hatch_build.X86`
    kernels  the library's own table of them, by name
    """

    run: Run
    isa: str
    kernels: dict[str, Kernel]


@cache
def library() -> Library | None:
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


def _bound(found: ctypes.CDLL) -> Library:
    """Return a library with its table read; raise AttributeError or OSError where it is of another version."""
    found.sirius_isa.restype = found.sirius_kernels.restype = ctypes.c_char_p
    found.sirius_slots.restype = _Size
    found.sirius_run.argtypes, found.sirius_run.restype = [ctypes.c_void_p, _Size, ctypes.c_void_p], _Size
    table = [line.split() for line in found.sirius_kernels().decode().splitlines()]
    kernels = {name: Kernel(number, kinds) for number, (name, kinds) in enumerate(table)}
    missing, slots = sorted(set(NEEDED) - set(kernels)), found.sirius_slots()
    if missing or slots != SLOTS:
        raise OSError(f"{LIBRARY.name} is of another version: {slots} slots for {SLOTS}, kernels missing: {missing}")
    return Library(found.sirius_run, found.sirius_isa().decode(), kernels)


def instructions() -> str | None:
    """Return the instruction set that the kernels use here, a name in `hatch_build.X86`; None without kernels."""
    found = library()
    return found and found.isa


@cache
def multiplies_halves() -> bool:
    """Tell whether the CPU multiplies bfloat16 itself; PyTorch's products of 16-bit floats crawl where it does not.

    Kernels that SIRIUS_ISA limits to instructions without such products stand for a CPU that has none.
    """
    here = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return here and instructions() not in WITHOUT_HALVES


def fits(x: Tensor, weight: Tensor) -> bool:
    """Tell whether the kernels can take a product of x [..., H] or [..., F] with weight [F, H]; rows may lie apart."""
    rows = weight.ndim == 2 and weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1]
    return rows and x.dtype == weight.dtype and is_plain(x, weight) and runs_on(weight.device, weight.dtype)


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether there are kernels for tensors of a dtype on a device; compilers make their own, traces know none."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return device.type == "cpu" and dtype in DTYPES and not traced and not _transforms() and library() is not None


def _transforms() -> bool:
    """Tell whether a function transform runs (vmap, jvp), whose tensors have no address."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """See `reference.linear`; raise ConfigError where the index is not one of int64, of rows that the weight has."""
    x = x.contiguous()
    count = _count(weight, index)
    y = x.new_empty(*x.shape[:-1], count)
    rows = *_lying(weight), len(weight), count, index
    _call("linear", DTYPES[x.dtype], x, *_sizes(x), *rows, bias, y, rows=([weight], index))
    return y


def project(z: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """See `reference.project`; raise ConfigError where the index is not one of int64, of rows that the weight has."""
    z = z.contiguous()
    y = z.new_empty(*z.shape[:-1], weight.shape[1])
    _check_index(index, z.shape[-1])
    rows = index, *_lying(weight), *weight.shape
    _call("project", DTYPES[z.dtype], z, *_sizes(z), *rows, bias, y, rows=([weight], index))
    return y


def attend(
    query: Tensor, keys: Tensor, values: Tensor, held: Tensor, seen: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """See `reference.attend`.

    Queries, keys and values may be views whose last dimension lies together. A slot that no token sees is not read.
    """
    (rows, heads, tokens, size), (slots, kv_heads) = query.shape, keys.shape[1:3]
    assert query.stride(3) == keys.stride(3) == values.stride(3) == 1, "heads must lie together"
    assert query.dtype == keys.dtype == values.dtype and held.dtype is torch.int64 and seen.dtype is torch.bool
    assert keys.shape == values.shape and held.shape == (rows,) and seen.shape[:2] == (rows, tokens)
    y = query.new_empty(rows, tokens, heads, size)
    at = (_Size * 9)(*query.stride()[:3], *keys.stride()[:3], *values.stride()[:3])
    sizes = (_Size * 7)(rows, tokens, heads, kv_heads, slots, seen.shape[2], size)
    tensors = query, keys, values, at, held.contiguous(), seen.contiguous()
    _call("attend", DTYPES[query.dtype], *tensors, sizes, float(scale), float(softcap or 0), y)
    return y


def norm(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> Tensor:
    """See `reference.norm`."""
    x = x.contiguous()
    y = x.new_empty(x.shape)
    _call("norm", DTYPES[x.dtype], x, *_sizes(x), weight, float(eps), form.offset, form.early, y)
    return y


def gate(x: Tensor, gate: Weight, activation: str, index: Tensor | None = None) -> Tensor:
    """See `reference.gate`; raise ConfigError where the index is not one of int64, of rows that the weight has."""
    return glu(x, gate, (None, None), activation, index)


def glu(
    x: Tensor, gate: Weight, up: Weight | tuple[None, None], activation: str, index: Tensor | None = None
) -> Tensor:
    """See `reference.glu`, of up if there is one; raise ConfigError of an index as `gate` does."""
    x, weights = x.contiguous(), [weight for weight, _ in (gate, up) if weight is not None]
    count = _count(gate[0], index)
    y = x.new_empty(*x.shape[:-1], count)
    tokens = DTYPES[x.dtype], ACTIVATIONS[activation], x, *_sizes(x)
    lying = *_lying(gate[0]), *((None, 0) if up[0] is None else _lying(up[0])), len(gate[0]), count, index
    _call("glu", *tokens, *lying, gate[1], up[1], y, rows=(weights, index))
    return y


def finish(
    gated: Tensor, x: Tensor, up: Weight, down: Weight, index: Tensor | None = None, gathered: bool = False
) -> Tensor:
    """See `reference.finish`; raise ConfigError where the index is not one of int64, of rows that the weights have.

    gathered  gated is [..., k], of the neurons at index alone
    """
    x, gated = x.contiguous(), gated.contiguous()
    count, y = _count(up[0], index), x.new_empty(x.shape)
    sent = count if gathered else len(up[0])
    assert gated.dtype == x.dtype and gated.shape == (*x.shape[:-1], sent), f"{list(gated.shape)} for {sent} neurons"
    assert up[0].shape == down[0].shape, f"up {list(up[0].shape)}, down {list(down[0].shape)}"
    weights = *_lying(up[0]), *_lying(down[0]), len(up[0]), count, index
    tokens = DTYPES[x.dtype], x, *_sizes(x), gated, gathered
    _call("finish", *tokens, *weights, up[1], down[1], y, rows=([up[0], down[0]], index))
    return y


def each(x: Tensor, weights: Sequence[Weight], activation: str, index: Tensor, counts: Sequence[int]) -> Tensor:
    """See `reference.each`; bit for bit what each row comes to alone.

    Raises ConfigError where the index is not one of int64, of rows that the weights have.
    """
    x, (gate, up, down) = x.contiguous(), weights
    y = x.new_empty(x.shape)
    _check_index(index, sum(counts))
    assert len(counts) == len(x) and gate[0].shape == up[0].shape == down[0].shape, f"{counts} for {list(x.shape)}"
    tokens = DTYPES[x.dtype], ACTIVATIONS[activation], x, (_Size * 4)(*x.shape, len(gate[0]))
    lying = *_lying(gate[0]), *_lying(up[0]), *_lying(down[0])
    sets = index, (_Size * len(counts))(*counts)
    rows = [gate[0], up[0], down[0]], index
    _call("each", *tokens, *lying, *sets, gate[1], up[1], down[1], y, rows=rows)
    return y


def largest(values: Tensor, count: int) -> Tensor:
    """See `reference.largest`; of equal values the first, NaN before all others."""
    values = values.contiguous()
    found = values.new_empty(*values.shape[:-1], count, dtype=torch.int64)
    _call("largest", DTYPES[values.dtype], values, *_sizes(values), count, found)
    return found


def quantize(weight: Tensor, bits: int) -> Quantized:
    """See `reference.quantize`, which it equals bit for bit; rows may lie apart."""
    check_bits(bits)
    (rows, length), blocks = weight.shape, -(-weight.shape[1] // BLOCK)
    codes = weight.new_empty(rows, blocks * BLOCK * bits // 8, dtype=torch.uint8)
    scales = weight.new_empty(rows, 2 * blocks if bits == 4 else 0, dtype=torch.uint8)
    base = weight.new_empty(rows, dtype=torch.int32)
    given = DTYPES[weight.dtype], weight, rows, length, weight.stride(0), bits
    _call("quantize", *given, codes, scales, base, rows=([weight], None))
    return Quantized(codes, scales, base if bits == 4 else base.view(torch.float32), bits, length)


def quantized_linear(x: Tensor, weight: Quantized, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """See `reference.quantized_linear`; raise ConfigError of an index as `linear` does."""
    x, count = x.contiguous(), _count(weight.codes, index)
    y = x.new_empty(*x.shape[:-1], count)
    tokens = DTYPES[x.dtype], x, *_sizes(x), weight.bits
    rows = *_quantized(x, weight, bias), len(weight.codes), count, index
    _call("quantized_linear", *tokens, *rows, bias, y, rows=([weight.codes], index))
    return y


def quantized_glu(
    x: Tensor,
    gate: Quantized,
    gate_bias: Tensor | None,
    up: Quantized,
    up_bias: Tensor | None,
    activation: str,
    index: Tensor | None = None,
) -> Tensor:
    """See `reference.quantized_glu`; raise ConfigError of an index as `linear` does."""
    x, count = x.contiguous(), _count(gate.codes, index)
    y = x.new_empty(*x.shape[:-1], count)
    assert gate.codes.shape == up.codes.shape and gate.bits == up.bits, "gate and up are of one shape and format"
    tokens = DTYPES[x.dtype], ACTIVATIONS[activation], x, *_sizes(x), gate.bits
    both = *_quantized(x, gate, gate_bias), *_quantized(x, up, up_bias), len(gate.codes), count, index
    _call("quantized_glu", *tokens, *both, gate_bias, up_bias, y, rows=([gate.codes, up.codes], index))
    return y


def highest(values: Tensor, count: int) -> Tensor:
    """See `reference.highest`; of equal values the first, NaN before all others unless its sign is set."""
    assert count <= values.shape[-1], f"{count} of {values.shape[-1]} values"
    values = values.contiguous()
    found = values.new_empty(*values.shape[:-1], count, dtype=torch.int64)
    _call("highest", DTYPES[values.dtype], values, *_sizes(values), count, found)
    return found


def rotation(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor) -> Launch:
    """Return what writes x * cos + turned * sin to y [B, heads, T, D]; see `reference.rotate`.

    All may be views whose last dimension lies together; cos and sin are of x's shape. Only in 16 bits is the result
    PyTorch's bit for bit.
    """
    tensors = x, cos, sin, y
    assert all(each.shape == x.shape and each.stride(3) == 1 for each in tensors), "heads must lie together"
    assert x.shape[3] % 2 == 0, f"halves of {x.shape[3]} numbers"
    at = (_Size * 12)(*(step for each in tensors for step in each.stride()[:3]))
    return _launch("rotate", DTYPES[x.dtype], x, cos, sin, at, (_Size * 4)(*x.shape), y)


def addition(a: Tensor, b: Tensor, y: Tensor) -> Launch:
    """Return what writes a + b to y, all of one shape and dtype."""
    return _launch("add", DTYPES[a.dtype], a, b, a.numel(), y)


def put(store: Tensor, rows: Tensor, slots: Tensor, values: Tensor) -> None:
    """See `reference.put`; all may be views, and heads of a store lie together.

    A slot below 0 counts from the end, as in PyTorch. Raises IndexError of a row or slot that the store does not have.
    """
    (height, width, heads, size), counts, rows = store.shape, slots.shape, rows.expand_as(slots)
    assert values.shape == (*counts, heads, size) and values.stride(3) == 1 and values.dtype is store.dtype
    assert store.stride()[2:] == (size, 1) and rows.dtype is slots.dtype is torch.int64
    at = (_Size * 9)(*store.stride()[:2], *rows.stride(), *slots.stride(), *values.stride()[:3])
    sizes = (_Size * 6)(*counts, heads, size, height, width)

    def complain(position: int) -> Exception:
        row, slot = (int(each.flatten()[position]) for each in (rows, slots))
        return IndexError(f"row {row}, slot {slot} of {height} rows of {width} slots")

    _run(_launch("put", DTYPES[store.dtype], store, rows, slots, values, at, sizes, complaint=complain))


def _call(kernel: str, *arguments: object, rows: _Rows | None = None) -> None:
    """Call a kernel with tensors by their addresses, and the number of threads; a running capture takes it down.

    rows  the weights, whose rows may lie apart, and the index of some of them
    """
    apart = {id(weight) for weight in rows[0]} if rows else set()
    tensors = [each for each in arguments if isinstance(each, Tensor) and id(each) not in apart]
    assert kernel == "attend" or all(each.is_contiguous() for each in tensors), f"{kernel} of views"
    _run(_launch(kernel, *arguments, complaint=rows and partial(_no_such_row, rows)))


def _run(launch: Launch) -> None:
    """Run a launch, and add it to the capture that runs, if any."""
    if (capture := running()) is not None:
        capture.add(launch)
    launch()


def _launch(kernel: str, *arguments: object, complaint: Complaint | None = None) -> Launch:
    found = library()
    assert found is not None, "no compiled kernels: `fits` was not asked"
    return Launch.of(found.run, found.kernels[kernel], (*arguments, torch.get_num_threads()), complaint)


def _no_such_row(rows: _Rows, position: int) -> ConfigError:
    (weight, *_), index = rows
    row = position if index is None else int(index[position])
    return ConfigError(
        f"neuron {row} is asked for, at index {position}, of a weight of {len(weight)} rows; "
        f"a sparsity method's neurons must be from 0 to {len(weight) - 1}"
    )


def _lying(weight: Tensor) -> tuple[Tensor, int]:
    """Return a weight and how many elements its rows are apart."""
    return weight, weight.stride(0)


def _quantized(x: Tensor, weight: Quantized, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors of a quantized weight as the kernels take them, which compare no shapes."""
    codes, scales, base, bits, length = weight
    blocks = -(-length // BLOCK)
    assert x.shape[-1] == length, f"{list(x.shape)} for rows of {length}"
    assert codes.shape[1] == blocks * BLOCK * bits // 8 and scales.shape == (len(codes), 2 * blocks * (bits == 4))
    assert codes.is_contiguous() and base.shape == (len(codes),) and (bias is None or bias.shape == base.shape)
    return codes, scales, base.view(torch.int32)


def _count(weight: Tensor, index: Tensor | None) -> int:
    """Return how many rows of a weight are asked for."""
    if index is None:
        return len(weight)
    _check_index(index, len(index))
    return len(index)


def _check_index(index: Tensor | None, count: int) -> None:
    if index is not None and (index.dtype is not torch.int64 or len(index) != count):
        raise ConfigError(
            f"an index of {len(index)} {index.dtype} for {count} neurons; give one of {count} torch.int64"
        )


def _sizes(x: Tensor) -> tuple[int, int]:
    return prod(x.shape[:-1]), x.shape[-1]

"""Weights rounded to 4 or 8 bits: their layout in memory, how they are made, and the numbers that they stand for.

Elements of a row come in blocks of 64, and a block is two groups of 32. With 4 bits, every group has a scale. A scale
takes one byte: its sign, a 4-bit exponent and a 3-bit mantissa, so that every product of a code with a scale is exact
in float32. With 8 bits, every row has a float32 scale.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sirius.errors import ConfigError

BLOCK, GROUP = 64, 32  # elements
BITS = 4, 8
STEPS = range(-3, 4)  # the scales that are tried for a group, in steps of a mantissa from an eighth of the extreme on
LAST = 127  # the largest code of a scale's magnitude
LEAST = 8  # the upper bits of the least normal float32, 2^-126: no scale is below it
LEAST_BLOCK = 2.0**-100  # a block of activations whose values are all below it counts as zeros
CHUNK = 1 << 20  # elements that are quantized at a time, which bounds the memory for it to some 40 MB


class Quantized(NamedTuple):
    """A weight [F, H] rounded to integers with scales; B = ceil(H / 64) blocks a row.

    codes   uint8   4 bits: [F, B * 32]; byte i of a block has element i in its low half and element 32 + i in its
                    high half, plus 8 each. 8 bits: [F, B * 64], an element plus 128 each
    scales  uint8   4 bits: [F, B * 2], the code of each group's scale; 8 bits: [F, 0]
    base    4 bits: [F] int32, what is added to the bits of each scale of a row; 8 bits: [F] float32, the row's scale
    bits    4 or 8
    length  H
    """

    codes: Tensor
    scales: Tensor
    base: Tensor
    bits: int
    length: int

    @property
    def nbytes(self) -> int:
        """The bytes of codes, scales and bases."""
        return self.codes.nbytes + self.scales.nbytes + self.base.nbytes

    def part(self, begin: int, end: int) -> "Quantized":
        """Return the rows from `begin` to `end`, which are not copied."""
        own = slice(begin, end)
        return self._replace(codes=self.codes[own], scales=self.scales[own], base=self.base[own])

    def rows(self, index: Tensor) -> "Quantized":
        """Return a copy of the rows at index [k] int64."""
        return self._replace(codes=self.codes[index], scales=self.scales[index], base=self.base[index])


def quantize(weight: Tensor, bits: int) -> Quantized:
    """Return weight [F, H] rounded to 4 or 8 bits; raise ConfigError of another number of bits.

    With 4 bits, a group's scale is the one of several candidates that has the least squared error. Errors are float32,
    which must hold the squares of the weights.
    """
    check_bits(bits)
    chunk = max(1, CHUNK // max(1, weight.shape[1]))
    parts = [(_to_4_bits if bits == 4 else _to_8_bits)(part) for part in weight.split(chunk)]
    return joined([Quantized(*part, bits, weight.shape[1]) for part in parts])


def joined(parts: Sequence[Quantized]) -> Quantized:
    """Return the rows of quantized weights of one length, one behind the other."""
    codes, scales, base = (torch.cat(each) for each in zip(*(part[:3] for part in parts), strict=True))
    return parts[0]._replace(codes=codes, scales=scales, base=base)


def bytes_of(rows: int, length: int, bits: int) -> int:
    """Return the bytes that a weight [rows, length] takes at 4 or 8 bits."""
    blocks = -(-length // BLOCK)
    return rows * (blocks * (BLOCK * bits // 8 + (BLOCK // GROUP if bits == 4 else 0)) + 4)


def check_bits(bits: int) -> None:
    """Raise ConfigError where there is no format of so many bits."""
    if bits not in BITS:
        raise ConfigError(f"weights cannot be quantized to {bits} bits; give 4 or 8")


def dequantize(weight: Quantized) -> Tensor:
    """Return the numbers [F, H] float32 that a quantized weight stands for."""
    if weight.bits == 8:
        return ((weight.codes.float() - 128) * weight.base[:, None])[:, : weight.length]
    halves = weight.codes.unflatten(1, (weight.scales.shape[1] // 2, GROUP))
    nibbles = torch.stack([halves & 15, halves >> 4], 2).flatten(1, 2)  # [F, groups, 32]
    scales = scales_of(weight.scales.int(), weight.base[:, None])[..., None]
    return ((nibbles.float() - 8) * scales).flatten(1)[:, : weight.length]


def scales_of(codes: Tensor, base: Tensor) -> Tensor:
    """Return the scales float32 of codes [F, groups] int32 in rows of base [F, 1] int32."""
    magnitudes = ((codes & LAST) << 20) + base
    return torch.where(codes > LAST, -magnitudes.view(torch.float32), magnitudes.view(torch.float32))


def rounded(x: Tensor) -> Tensor:
    """Return x [..., H] as a product with a quantized weight takes it, float32: 8-bit integers times a block's scale.

    The scale of a block of 64 elements is its largest magnitude over 127. Infinities and NaN make all of a block NaN.
    """
    blocks = _padded(x.float()).unflatten(-1, (-1, BLOCK))
    most = blocks.abs().amax(-1, keepdim=True).clamp(min=LEAST_BLOCK)
    return ((blocks * (most.reciprocal() * 127)).round() * (most / 127)).flatten(-2)[..., : x.shape[-1]]


def _padded(x: Tensor) -> Tensor:
    """Return x [..., H] with zeros up to whole blocks."""
    return F.pad(x, (0, -x.shape[-1] % BLOCK))


def _to_8_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = weight.float()
    scale = (wide.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    codes = _padded((wide / scale[:, None]).round()) + 128
    return codes.to(torch.uint8), codes.new_empty(len(codes), 0, dtype=torch.uint8), scale


def _to_4_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = _padded(weight.float()).unflatten(-1, (-1, GROUP))  # [F, groups, 32]
    near = (groups.abs().amax(-1) / 8).view(torch.int32) >> 20
    base = (near.amax(-1) + STEPS[-1] - LAST).clamp(min=LEAST) << 20
    codes = _best_scales(groups, near - (base >> 20)[:, None], base[:, None])
    nibbles = (_nearest(groups, scales_of(codes, base[:, None])) + 8).to(torch.uint8)
    first, second = nibbles.unflatten(1, (-1, 2)).unbind(2)
    return (first | second << 4).flatten(1), codes.to(torch.uint8), base


def _best_scales(groups: Tensor, near: Tensor, base: Tensor) -> Tensor:
    """Return the codes [F, groups] int32 of the scales with the least squared error, of equal ones the first.

    near  [F, groups] int32  the codes that the search starts from
    base  [F, 1] int32       of the rows' scales
    """
    best, least = torch.zeros_like(near), torch.full(near.shape, torch.inf, device=near.device)
    for step in STEPS:
        for sign in (0, LAST + 1):
            code = (near + step).clamp(0, LAST) + sign
            scale = scales_of(code, base)
            squares = (groups - _nearest(groups, scale) * scale[..., None]).square()
            parts = squares.unflatten(-1, (-1, 4)).unbind(-2)
            first, second, third, fourth = reduce(torch.add, parts).unbind(-1)
            error = (first + third) + (second + fourth)  # the order in which the kernel adds
            better = error < least
            best, least = torch.where(better, code, best), torch.where(better, error, least)
    return best


def _nearest(groups: Tensor, scales: Tensor) -> Tensor:
    return (groups * (1 / scales)[..., None]).clamp(-8, 7).round()

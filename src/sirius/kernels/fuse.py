"""Kernels of ours in place of PyTorch's operations on a tape, with the same bits: rotary positions and sums.

For a few tokens these operations cost their calls, not their arithmetic.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from sirius.kernels import cpu
from sirius.kernels.launch import Launch

aten = torch.ops.aten
HALVES = torch.bfloat16, torch.float16
ROTATION = [aten.mul.Tensor, aten.neg.default, aten.cat.default, aten.mul.Tensor, aten.add.Tensor]


class Operation(NamedTuple):
    """An operation of PyTorch's that ran."""

    operation: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


Step = Operation | Launch


def fused(steps: Sequence[Step]) -> list[Step]:
    """Return the steps of a tape, with kernels in place of operations where there are such.

    A kernel computes no intermediate results. So it replaces several operations only where no other step uses those.
    """
    readers, done, at = _readers(steps), [], 0
    while at < len(steps):
        window = steps[at : at + len(ROTATION)]
        if (launch := _rotation(window)) is not None and _within(window, readers, at):
            done.append(launch)
            at += len(window)
            continue
        done.append(_addition(steps[at]) or steps[at])
        at += 1
    return done


def _rotation(window: Sequence[Step]) -> Launch | None:
    """Return the kernel of x * cos + cat(-x2, x1) * sin, x1 and x2 being the halves of x: of rotary positions."""
    found = [step for step in window if isinstance(step, Operation)]
    if [step.operation for step in found] != ROTATION:
        return None
    straight, negated, joined, turned, added = found
    (x, cos), (_, sin), y = straight.args, turned.args, added.result
    if not all(isinstance(each, Tensor) and each.dtype in HALVES and each.ndim == 4 for each in (x, cos, sin)):
        return None
    half, (parts, *dim) = x.shape[3] // 2, joined.args
    follows = (
        len(parts) == 2
        and x.shape[3] % 2 == 0
        and dim in ([-1], [3])
        and _same(negated.args[0], x[..., half:])
        and parts[0] is negated.result
        and _same(parts[1], x[..., :half])
        and turned.args[0] is joined.result
        and added.args[0] is straight.result
        and added.args[1] is turned.result
        and not added.kwargs
    )
    if not follows or y.shape != x.shape:
        return None
    cos, sin = cos.expand(x.shape), sin.expand(x.shape)
    fits = all(each.dtype == x.dtype and each.stride(3) == 1 and _ours(each) for each in (x, cos, sin, y))
    return cpu.rotation(x, cos, sin, y) if fits else None


def _addition(step: Step) -> Launch | None:
    """Return the kernel of a + b."""
    if isinstance(step, Launch):
        return None
    if step.operation is not aten.add.Tensor or step.kwargs or not all(isinstance(a, Tensor) for a in step.args):
        return None
    (a, b), y = step.args, step.result
    same = a.shape == b.shape and a.dtype == b.dtype
    return cpu.addition(a, b, y) if same and all(t.is_contiguous() and _ours(t) for t in (a, b, y)) else None


def _ours(tensor: Tensor) -> bool:
    return cpu.runs_on(tensor.device, tensor.dtype)


def _same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two views are of the same numbers."""
    same = one.data_ptr() == other.data_ptr() and one.dtype == other.dtype
    return same and one.shape == other.shape and one.stride() == other.stride()


def _within(window: Sequence[Step], readers: dict[int, list[int]], at: int) -> bool:
    """Tell whether nobody but the steps of a window, the first of them at an index, uses what all but its last make."""
    inside = range(at, at + len(window))
    made = [step.result for step in window[:-1] if isinstance(step, Operation)]
    return all(reader in inside for result in made for reader in readers[_memory(result)])


def _readers(steps: Sequence[Step]) -> dict[int, list[int]]:
    """Return the indices of the steps that use a piece of memory, by its address."""
    found: dict[int, list[int]] = defaultdict(list)
    for index, step in enumerate(steps):
        used = step.kept if isinstance(step, Launch) else tree_leaves((step.args, step.kwargs))
        for each in used:
            if isinstance(each, Tensor | torch.UntypedStorage):
                found[_memory(each)].append(index)
    return found


def _memory(of: "Tensor | torch.UntypedStorage") -> int:
    return (of.untyped_storage() if isinstance(of, Tensor) else of).data_ptr()

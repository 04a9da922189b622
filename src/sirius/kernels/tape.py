"""A pass on the CPU captured operation by operation, to be run again without the Python between them.

A replay reads and writes the memory that the operations used when they were captured; the tensors are kept for that.
Views are not made again: they are of the same memory. Neighbouring kernels of ours are one call.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sirius.kernels.fuse import Operation, Step, fused
from sirius.kernels.launch import PLAIN, Launch, capture_to

aten = torch.ops.aten
EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default}
EMPTY |= {aten.new_empty.default, aten.new_empty_strided.default}
READS = {  # take numbers out of a tensor, by ways that are no operation
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
}


class Tape(TorchDispatchMode):
    """What runs within `with Tape() as tape`, in this thread and outside of inference mode; `replay` runs it again.

    repeatable  whether it can be: all tensors were plain, no number was taken out of one, and no shape depended on one
    calls   what a replay calls, once the tape is off
    """

    def __init__(self) -> None:
        super().__init__()
        self.repeatable = True
        self.steps: list[Step] = []
        self.calls: list[Callable[[], object]] = []

    def __enter__(self) -> "Tape":
        assert not torch.is_inference_mode_enabled(), "operations come whole there, some of them views at times"
        self.before = capture_to(self)
        self.watch = _Watch(self)
        self.watch.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.watch.__exit__(*raised)
        del self.watch  # it holds the tape, which is to go as soon as nobody else does
        capture_to(self.before)
        steps, self.steps = self.steps, []
        if raised[0] is None and self.repeatable:
            self.calls = _calls(fused(steps))

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of PyTorch's and capture it."""
        kwargs = kwargs or {}
        self.repeatable &= set(types) <= set(PLAIN) and _is_stateless(operation, args)  # subclasses do as they like
        result = operation(*args, **kwargs)
        if not _makes_a_view(operation):
            self.steps.append(Operation(operation, args, kwargs, result))
        return result

    def add(self, launch: Launch) -> None:
        """Capture kernels of ours, which PyTorch does not see."""
        self.steps.append(launch)

    def replay(self) -> None:
        """Run all calls again, in their order."""
        for call in self.calls:
            call()


class _Watch(TorchFunctionMode):
    """Notices when a number is read out of a tensor without an operation of PyTorch's."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tape.repeatable &= function not in READS
        return function(*args, **(kwargs or {}))


def _is_stateless(operation: OpOverload, args: tuple[Any, ...]) -> bool:
    if operation is aten.index.Tensor:  # a mask's shape depends on what it holds, that of an index does not
        return all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1])
    return not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags)


def _calls(steps: Sequence[Step]) -> list[Callable[[], object]]:
    """Return the calls that do what steps did; kernels that follow each other are one."""
    calls: list[Callable[[], object]] = []
    for kernels, group in groupby(steps, lambda step: isinstance(step, Launch)):
        if kernels:
            calls.append(Launch.joined([step for step in group if isinstance(step, Launch)]))
        else:
            calls += [_again(*step) for step in group if isinstance(step, Operation)]
    return calls


def _makes_a_view(operation: OpOverload) -> bool:
    """Tell whether an operation computes nothing: its result is memory that is there, or yet to be filled."""
    aliases = [returned.alias_info for returned in operation._schema.returns]
    views = aliases and all(alias is not None and not alias.is_write for alias in aliases)
    return operation in EMPTY or bool(views)


def _again(operation: OpOverload, args: Any, kwargs: Any, result: Any) -> Callable[[], object]:
    """Return what computes a result anew where it is."""
    aliases = [returned.alias_info for returned in operation._schema.returns]
    if any(alias is not None for alias in aliases) or not aliases:
        return partial(operation, *args, **kwargs)  # in place
    if operation is aten._to_copy.default:
        return partial(aten.copy_.default, result, args[0])
    if (found := _with_out(operation)) is not None:
        overload, name = found
        return partial(overload, *args, **kwargs, **{name: result})
    return partial(_copied, operation, args, kwargs, result)


@cache
def _with_out(operation: OpOverload) -> tuple[OpOverload, str] | None:
    """Return the form of an operation that writes its one result to a tensor given to it, and that argument's name."""
    wanted = [(argument.name, str(argument.type)) for argument in operation._schema.arguments]
    for name in operation.overloadpacket.overloads():
        overload = getattr(operation.overloadpacket, name)
        arguments = overload._schema.arguments
        out = [argument.name for argument in arguments if argument.is_out]
        others = [(argument.name, str(argument.type)) for argument in arguments if not argument.is_out]
        if len(out) == 1 and others == wanted:
            return overload, out[0]
    return None


def _copied(operation: OpOverload, args: Any, kwargs: Any, result: Any) -> None:
    for old, new in zip(tree_leaves(result), tree_leaves(operation(*args, **kwargs)), strict=True):
        if isinstance(old, Tensor):
            old.copy_(new)

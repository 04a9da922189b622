"""Tells whether a logits processor keeps state from call to call. Drafting would spoil it, as guesses may be rejected.

A copy of the processor is called with a prompt, with tokens that might follow, and with the prompt again. Its
attributes and variables must not change after the first call, and its scores must be those of a fresh copy. State that
this trial does not find is found by a `Watch` while texts are decoded.
"""

import logging
import pickle
import re
from collections import deque
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sirius.errors import RequestError

PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, re.Pattern, torch.device, torch.dtype)
SHARED = (nn.Module, ModuleType, type, BuiltinFunctionType)  # not copied, as they are large or have no state
MOST_OBJECTS = 20_000  # of one processor
NEXT_TOKENS = 4  # tried after the prompt


class Opaque(Exception):
    """An object cannot be copied or compared, so that nobody can tell whether its state changes."""


def is_stateless(processor: Any, tokens: Tensor, vocabulary: int) -> bool:
    """Tell whether a processor keeps no state, by calls with random scores after tokens [B, n] int64.

    Logs a warning of one that may keep state, as nothing is drafted beside it. Raises as `keeps_state` does.
    """
    reason = keeps_state(processor, tokens, vocabulary)
    if reason is not None:
        logging.getLogger("sirius").warning("nothing is drafted, as a logits processor may keep state: %s", reason)
    return reason is None


def keeps_state(processor: Any, tokens: Tensor, vocabulary: int) -> str | None:
    """Return why a processor may keep state, None if no sign of that was found.

    An error of the first call is passed over here, as decoding meets it again. Raises RequestError where calls of a
    copy have changed the processor itself.
    """
    try:
        before = state_of(processor)
        found = _try_copies(processor, tokens, vocabulary)
        changed = state_of(processor) != before
    except Opaque as error:
        return f"it holds a {error}, which cannot be looked into"
    if changed:
        raise RequestError(
            "a logits processor keeps state that a copy of it shares, so that it cannot be tried out before a draft; "
            "decode without one (correction=1)"
        )
    return found


class Watch:
    """Compares a processor's state with that after its first call."""

    def __init__(self, processor: Any) -> None:
        """Watch a processor that has not been called yet."""
        self.processor = processor
        self.before: object = None

    def failure(self) -> RequestError | None:
        """Return an error if the state has changed since the first call, as guesses may have changed it."""
        try:
            now = state_of(self.processor)
        except Opaque:
            now = object()  # equals nothing
        self.before = now if self.before is None else self.before
        if now == self.before:
            return None
        return RequestError(
            "a logits processor keeps state, which shows only now: tokens that were guessed may have changed it; "
            "decode without a draft (correction=1)"
        )


def state_of(processor: Any) -> object:
    """Return all values within a processor, in a form to compare; raise Opaque where one cannot be compared."""
    try:
        return _Walk().visit(processor)
    except RecursionError as error:
        raise Opaque("structure of too many levels") from error


def _try_copies(processor: Any, tokens: Tensor, vocabulary: int) -> str | None:
    twin, fresh = copied(processor), copied(processor)
    random = torch.randn(2, len(tokens), vocabulary, generator=torch.Generator().manual_seed(0))
    scores, others = random.to(tokens.device)
    shown = tokens.clone()
    try:
        twin(shown, scores.clone())
        want = fresh(tokens.clone(), others.clone())
    except Exception:  # a user's function may raise anything; decoding reports it
        return None
    if not torch.equal(shown, tokens):
        raise RequestError("a logits processor writes to the tokens that it is shown; let it write to a copy of them")
    held, got = state_of(twin), None
    follow = [tokens.new_full((len(tokens), 1), token) for token in range(0, vocabulary, -(-vocabulary // NEXT_TOKENS))]
    for asked in (tokens, *(torch.cat([tokens, each], 1) for each in follow), tokens):
        try:
            got = twin(asked.clone(), others.clone())
        except Exception as error:  # likewise
            return f"asked again, it raises {error!r}"
        if state_of(twin) != held:
            return "calls change what it holds"
    if isinstance(want, Tensor) and isinstance(got, Tensor) and not torch.equal(want.nan_to_num(), got.nan_to_num()):
        return "its answer depends on what it was asked before"
    return None


def copied(processor: Any) -> Any:
    """Return a copy that shares models, tokenizers and code with the original, but no state. Raises Opaque."""
    walk = _Walk()
    try:
        walk.visit(processor)
        twin = walk.memo.get(id(processor)) or deepcopy(processor, walk.memo)
        for old, new in walk.functions:
            _copy_variables(old, new, walk.memo)
    except Opaque:
        raise
    except Exception as error:  # a user's class may raise anything
        raise Opaque(f"structure that cannot be copied ({error!r})") from error
    return twin


class _Walk:
    """Visits an object and all objects within it.

    memo       of `deepcopy`, by id: objects that a copy shares with the original, and copies that deepcopy cannot make
    functions  each function with its copy, which still needs copies of the variables and default values
    numbers    by id, the order in which objects were visited
    visited    the objects themselves, kept so that no id is used twice
    """

    def __init__(self) -> None:
        self.memo: dict[int, Any] = {}
        self.functions: list[tuple[FunctionType, FunctionType]] = []
        self.numbers: dict[int, int] = {}
        self.visited: list[Any] = []

    def visit(self, value: Any) -> object:
        """Return the values within an object, in a form to compare; raise Opaque where one cannot be compared."""
        if isinstance(value, PLAIN):
            return value if value == value else "nan"
        if id(value) in self.numbers:
            return "visited", self.numbers[id(value)]
        self.numbers[id(value)] = len(self.numbers)
        self.visited.append(value)
        if len(self.visited) > MOST_OBJECTS:
            raise Opaque(f"structure of more than {MOST_OBJECTS} objects")
        if isinstance(value, SHARED) or _is_tokenizer(value):
            self.memo[id(value)] = value
            return "shared", self._of_module(value) if isinstance(value, nn.Module) else None
        return type(value).__name__, self._inside(value)

    def _of_module(self, module: nn.Module) -> object:
        """Return a module's plain attributes and the versions of its buffers; weights are too large to compare."""
        buffers = [(name, each._version, each.data_ptr()) for name, each in module.named_buffers()]
        return _plain(vars(module)), buffers

    def _inside(self, value: Any) -> object:
        match value:
            case Tensor():
                return tuple(value.shape), value.dtype, _bytes(value)
            case torch.Generator():
                self.memo[id(value)] = value.clone_state()
                return "generator"  # if it is not seeded at each call, the scores differ
            case FunctionType():
                return self._function(value)
            case MethodType():
                return self.visit(value.__self__), self.visit(value.__func__)
            case partial():
                return self.visit(value.func), self.visit(value.args), self.visit(value.keywords)
            case set() | frozenset():
                return frozenset(map(repr, value))
            case dict():
                return *((self.visit(k), self.visit(v)) for k, v in value.items()), self._attributes(value)
            case list() | tuple() | deque():
                return *map(self.visit, value), self._attributes(value)
        if hasattr(value, "__dict__") or hasattr(type(value), "__slots__"):
            return self._attributes(value)
        try:
            return pickle.dumps(value)
        except Exception as error:  # an extension's object may raise anything
            raise Opaque(type(value).__name__) from error

    def _attributes(self, value: Any) -> object:
        """Visit an object's attributes, and those that a copy would share: its class's, and global variables."""
        own = dict(getattr(value, "__dict__", {}))
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        own |= {name: getattr(value, name) for name in slots if hasattr(value, name)}
        inside = tuple((name, self.visit(each)) for name, each in own.items())
        return inside, [(_plain(vars(kind)), *_globals(vars(kind).get("__call__"))) for kind in type(value).__mro__]

    def _function(self, value: FunctionType) -> object:
        """Visit a function's variables, and make a copy of the function, as deepcopy would return the same one."""
        cells = value.__closure__ or ()
        fresh = tuple(CellType() for _ in cells) or None
        twin = FunctionType(value.__code__, value.__globals__, value.__name__, closure=fresh)
        self.memo[id(value)] = twin
        self.functions.append((value, twin))
        inside = [cell.cell_contents for cell in cells if _is_filled(cell)]
        own = self.visit([*inside, value.__defaults__, value.__kwdefaults__, dict(value.__dict__)])
        return own, *_globals(value)


def _copy_variables(old: FunctionType, new: FunctionType, memo: dict[int, Any]) -> None:
    """Give a function's copy its own copies of the variables, default values and attributes."""
    for source, target in zip(old.__closure__ or (), new.__closure__ or (), strict=True):
        if _is_filled(source):
            target.cell_contents = deepcopy(source.cell_contents, memo)
    new.__defaults__, new.__kwdefaults__ = deepcopy((old.__defaults__, old.__kwdefaults__), memo)
    new.__dict__.update(deepcopy(old.__dict__, memo))


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is cell.cell_contents
    except ValueError:
        return False


def _is_tokenizer(value: Any) -> bool:
    """Tell whether an object is a tokenizer by its methods; tokenizers are large, and keep no state."""
    return hasattr(value, "encode") and hasattr(value, "decode")


def _plain(values: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple((name, value) for name, value in values.items() if isinstance(value, PLAIN) and value == value)


def _globals(function: object) -> Iterator[object]:
    """Yield the names and values of the global variables of a function that are plain values."""
    if isinstance(function, FunctionType):
        known = function.__globals__
        yield _plain({name: known[name] for name in function.__code__.co_names if name in known})


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

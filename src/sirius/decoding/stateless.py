"""Whether a logits processor keeps state from call to call. A draft would spoil it: it asks about tokens that may go.

A copy of the processor is asked about a prompt, about tokens that might follow, and about the prompt again. What it
holds must not change after the first call, and its answers must be those of a copy that was asked nothing before.
State that this does not reach shows later, to a `Watch`.
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
SHARED = (nn.Module, ModuleType, type, BuiltinFunctionType)  # a copy holds the same one: large, or without state
MOST = 20_000  # objects that are looked at
NEXT = 4  # tokens that might follow, about which a copy is asked


class Opaque(Exception):
    """An object cannot be copied or compared, so that its state cannot be told."""


def is_stateless(processor: Any, tokens: Tensor, vocabulary: int) -> bool:
    """Tell whether a processor keeps no state, asked with made-up scores about tokens [B, n] int64.

    One that may keep some is warned of, as it slows its batch. Raises as `keeps_state` does.
    """
    reason = keeps_state(processor, tokens, vocabulary)
    if reason is not None:
        logging.getLogger("sirius").warning("nothing is drafted, as a logits processor may keep state: %s", reason)
    return reason is None


def keeps_state(processor: Any, tokens: Tensor, vocabulary: int) -> str | None:
    """Return what shows that a processor may keep state, None where nothing does.

    What the first answer raises is left to be raised where the processor is used. Raises RequestError where asking a
    copy has changed the processor itself.
    """
    try:
        before = state_of(processor)
        found = _tried(processor, tokens, vocabulary)
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
    """Remembers what a processor holds after its first answer."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.before: object = None

    def failure(self) -> RequestError | None:
        """Return an error where a processor holds something else by now: guesses may have changed it."""
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
    """Return all that a processor holds, in a form to compare; raise Opaque where that cannot be told."""
    try:
        return _Walk().look(processor)
    except RecursionError as error:
        raise Opaque("structure of too many levels") from error


def _tried(processor: Any, tokens: Tensor, vocabulary: int) -> str | None:
    twin, fresh = copied(processor), copied(processor)
    made_up = torch.randn(2, len(tokens), vocabulary, generator=torch.Generator().manual_seed(0))
    scores, others = made_up.to(tokens.device)
    shown = tokens.clone()
    try:
        twin(shown, scores.clone())
        want = fresh(tokens.clone(), others.clone())
    except Exception:  # whatever a user's function raises is told of where it is used
        return None
    if not torch.equal(shown, tokens):
        raise RequestError("a logits processor writes to the tokens that it is shown; let it write to a copy of them")
    held, got = state_of(twin), None
    follow = [tokens.new_full((len(tokens), 1), token) for token in range(0, vocabulary, -(-vocabulary // NEXT))]
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
    """Return a copy that shares models, tokenizers and code with the original, and nothing that calls may change."""
    walk = _Walk()
    try:
        walk.look(processor)
        twin = walk.memo.get(id(processor)) or deepcopy(processor, walk.memo)
        for old, new in walk.functions:
            _fill(old, new, walk.memo)
    except Opaque:
        raise
    except Exception as error:  # whatever a user's class raises
        raise Opaque(f"structure that cannot be copied ({error!r})") from error
    return twin


class _Walk:
    """Looks at an object and at all that it holds.

    memo       for `deepcopy`, by id: what a copy shares with the original, and copies that deepcopy does not make
    functions  each with its copy, whose variables and default values are yet to be filled
    """

    def __init__(self) -> None:
        self.memo: dict[int, Any] = {}
        self.functions: list[tuple[FunctionType, FunctionType]] = []
        self.seen: dict[int, int] = {}
        self.held: list[Any] = []  # so that no id is given anew

    def look(self, value: Any) -> object:
        """Return what an object holds, in a form to compare; raise Opaque where that cannot be told."""
        if isinstance(value, PLAIN):
            return value if value == value else "nan"
        if id(value) in self.seen:
            return "seen", self.seen[id(value)]
        self.seen[id(value)] = len(self.seen)
        self.held.append(value)
        if len(self.held) > MOST:
            raise Opaque(f"structure of more than {MOST} objects")
        if isinstance(value, SHARED) or _is_tokenizer(value):
            self.memo[id(value)] = value
            return "shared", self._of_module(value) if isinstance(value, nn.Module) else None
        return type(value).__name__, self._inside(value)

    def _of_module(self, module: nn.Module) -> object:
        """Look at what a module counts: plain attributes and buffers; its weights are large and stay."""
        buffers = [(name, each._version, each.data_ptr()) for name, each in module.named_buffers()]
        return _plain(vars(module)), buffers

    def _inside(self, value: Any) -> object:
        match value:
            case Tensor():
                return tuple(value.shape), value.dtype, _bytes(value)
            case torch.Generator():
                self.memo[id(value)] = value.clone_state()
                return "generator"  # may be seeded anew at each call; else answers differ
            case FunctionType():
                return self._function(value)
            case MethodType():
                return self.look(value.__self__), self.look(value.__func__)
            case partial():
                return self.look(value.func), self.look(value.args), self.look(value.keywords)
            case set() | frozenset():
                return frozenset(map(repr, value))
            case dict():
                return *((self.look(k), self.look(v)) for k, v in value.items()), self._attributes(value)
            case list() | tuple() | deque():
                return *map(self.look, value), self._attributes(value)
        if hasattr(value, "__dict__") or hasattr(type(value), "__slots__"):
            return self._attributes(value)
        try:
            return pickle.dumps(value)
        except Exception as error:  # an extension's object raises what it likes
            raise Opaque(type(value).__name__) from error

    def _attributes(self, value: Any) -> object:
        """Look at an object's attributes, and at what a copy would share: those of its class, and global variables."""
        own = dict(getattr(value, "__dict__", {}))
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        own |= {name: getattr(value, name) for name in slots if hasattr(value, name)}
        inside = tuple((name, self.look(each)) for name, each in own.items())
        return inside, [(_plain(vars(kind)), *_globals(vars(kind).get("__call__"))) for kind in type(value).__mro__]

    def _function(self, value: FunctionType) -> object:
        """Look at a function's variables; its copy has others, which deepcopy would not make."""
        cells = value.__closure__ or ()
        fresh = tuple(CellType() for _ in cells) or None
        twin = FunctionType(value.__code__, value.__globals__, value.__name__, closure=fresh)
        self.memo[id(value)] = twin
        self.functions.append((value, twin))
        inside = [cell.cell_contents for cell in cells if _is_filled(cell)]
        own = self.look([*inside, value.__defaults__, value.__kwdefaults__, dict(value.__dict__)])
        return own, *_globals(value)


def _fill(old: FunctionType, new: FunctionType, memo: dict[int, Any]) -> None:
    """Give a function's copy copies of its variables, default values and attributes."""
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
    """Tell whether an object is a tokenizer by what it can do: it is large, and keeps no state."""
    return hasattr(value, "encode") and hasattr(value, "decode")


def _plain(values: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple((name, value) for name, value in values.items() if isinstance(value, PLAIN) and value == value)


def _globals(function: object) -> Iterator[object]:
    """Yield the global variables of plain values that a function names."""
    if isinstance(function, FunctionType):
        known = function.__globals__
        yield _plain({name: known[name] for name in function.__code__.co_names if name in known})


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

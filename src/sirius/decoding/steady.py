"""Whether a logits processor keeps state from call to call. A draft would spoil it: it asks about tokens that may go.

A copy of the processor is asked twice about the same tokens. Its answers must agree, and so must all that it holds.
"""

import logging
import pickle
import re
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sirius.errors import RequestError

Ask = Callable[[Any], object]  # asks a processor, or a copy of it, for an answer

PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, re.Pattern, torch.device, torch.dtype)
SHARED = (nn.Module, ModuleType, type, BuiltinFunctionType)  # a copy holds the same one: large, or without state
MOST = 20_000  # objects that are looked at


class Opaque(Exception):
    """An object cannot be copied or compared, so that its state cannot be told."""


def is_steady(processor: Any, tokens: Tensor, vocabulary: int) -> bool:
    """Tell whether a processor keeps no state, asked with made-up scores about tokens [B, n] int64.

    One that does is warned of, as it slows its batch. Raises as `keeps_state` does.
    """
    made_up = torch.randn(len(tokens), vocabulary, generator=torch.Generator().manual_seed(0)).to(tokens.device)
    reason = keeps_state(processor, lambda asked: asked(tokens.clone(), made_up.clone()))
    if reason is not None:
        logging.getLogger("sirius").warning("nothing is drafted: a logits processor keeps state (%s)", reason)
    return reason is None


def keeps_state(processor: Any, ask: Ask) -> str | None:
    """Return what shows that a processor keeps state, None where nothing does.

    What the first answer raises is left to be raised where the processor is used. Raises RequestError where asking a
    copy has changed the processor itself.
    """
    try:
        before, twin = _state(processor), _copy(processor)
    except Opaque as error:
        return f"it holds a {error}, whose state cannot be told"
    found = _compared(twin, ask)
    if _state(processor) != before:
        raise RequestError(
            "a logits processor keeps state that a copy of it shares, so that it cannot be tried out before a draft; "
            "decode without one (correction=1)"
        )
    return found


def _compared(twin: Any, ask: Ask) -> str | None:
    try:
        first = ask(twin)
    except Exception:  # whatever a user's function raises
        return None
    after_one = _state(twin)
    try:
        second = ask(twin)
    except Exception as error:  # likewise
        return f"asked again about the same tokens, it raises {error!r}"
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return None  # no answer: told of where it is used
    if not torch.equal(first, second):
        return "asked twice about the same tokens, it gives two answers"
    return None if _state(twin) == after_one else "each call changes what it holds"


def _state(processor: Any) -> object:
    """Return all that a processor holds, in a form to compare."""
    return _Walk().look(processor)


def _copy(processor: Any) -> Any:
    """Return a copy that shares models, tokenizers and code with the original, and nothing that calls may change."""
    walk = _Walk()
    walk.look(processor)
    try:
        twin = walk.memo.get(id(processor)) or deepcopy(processor, walk.memo)
        for old, new in walk.functions:
            _fill(old, new, walk.memo)
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
            return "shared"
        return type(value).__name__, self._inside(value)

    def _inside(self, value: Any) -> object:
        match value:
            case Tensor():
                return tuple(value.shape), value.dtype, _bytes(value)
            case torch.Generator():
                self.memo[id(value)] = value.clone_state()
                return _bytes(value.get_state())
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
        own = dict(getattr(value, "__dict__", {}))
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        own |= {name: getattr(value, name) for name in slots if hasattr(value, name)}
        return tuple((name, self.look(each)) for name, each in own.items())

    def _function(self, value: FunctionType) -> object:
        """Look at a function's variables; its copy has others, which deepcopy would not make."""
        cells = value.__closure__ or ()
        fresh = tuple(CellType() for _ in cells) or None
        twin = FunctionType(value.__code__, value.__globals__, value.__name__, closure=fresh)
        self.memo[id(value)] = twin
        self.functions.append((value, twin))
        inside = [cell.cell_contents for cell in cells if _is_filled(cell)]
        return self.look([*inside, value.__defaults__, value.__kwdefaults__]), self._attributes(value)


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


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

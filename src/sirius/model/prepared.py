"""What sirius keeps with a model that it has prepared, and the value that tells the model's parts what a pass does."""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import RLock, get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sirius.model.matrix import MakeMatrix, Placed, dense


class Slots(NamedTuple):
    """Where a pass writes keys and values.

    rows     [B, 1] int64  the cache's rows, on the model's device
    written  [B, T] int64  the slots of those rows, there too
    first    the number of the first row
    visible  how many slots of each row attention is handed
    """

    rows: Tensor
    written: Tensor
    first: int
    visible: int


@dataclass(frozen=True)
class Pass:
    """What one run of a model does, besides the tokens that it reads.

    routes     of each gated MLP, what computes it: `route(mlp, x, now)`; None: all of its neurons
    slots      where keys and values go
    mask       [B, T, M] bool  which of the M slots after the held ones each token sees; where the model's own attention
               runs, a mask over all visible slots in transformers' form
    held       [B] int64       how many slots each row holds, which all of its tokens see
    branches   [B, T] float    how likely each token's branch of a tree is, 0 of a dead one
    attends    whether attention reads the slots by a kernel of ours
    invariant  whether a token's result must have the same bits however many tokens are read together
    matrix     makes the weights of the linear layers
    """

    routes: Sequence[Callable[[Any, Tensor, "Pass"], Tensor] | None]
    slots: Slots
    mask: Tensor
    held: Tensor
    branches: Tensor
    attends: bool
    invariant: bool
    matrix: MakeMatrix = dense


class Prepared:
    """What the parts of one prepared model share. One thread at a time runs a pass; it holds `lock`.

    matrix         makes the weights of a linear layer
    own_attention  the model's attention cannot be replaced by a kernel of ours, as a pass has shown
    idle           workspaces of earlier sessions, for later ones
    spaces         all workspaces, of sessions at work too
    twins          by bits, the weights at fewer bits: those that open sessions read, and `last_twin`
    last_twin      the ones that were asked for last, which stay for later sessions
    too_large      bits at which memory had no room for them
    learnt         what passes cost and how often guesses accepted, for later sessions
    plan           what stays in memory under a budget, in words; None: there is no budget
    slots          slots of keys and values, of all texts together, for which a budget has room; None: as memory has
    """

    def __init__(self) -> None:
        self.matrix: MakeMatrix = dense
        self.own_attention = False
        self.lock = RLock()
        self.idle: dict[tuple[Hashable, Hashable, bool], Any] = {}
        self.spaces: weakref.WeakSet[Any] = weakref.WeakSet()
        self.twins: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.last_twin: Any = None
        self.too_large: set[int] = set()
        self.learnt: dict[Hashable, Any] = {}
        self.plan: str | None = None
        self.slots: int | None = None
        self._pass: Pass | None = None
        self._thread = 0

    @property
    def placed(self) -> Placed | None:
        """What brings weights that lie elsewhere; None where all are in memory."""
        return self.matrix if isinstance(self.matrix, Placed) else None

    def apart(self) -> AbstractContextManager[object]:
        """Return what a product outside of our passes runs in: the lock where its weights are in a shared buffer."""
        return self.lock if isinstance(self.matrix, Placed) else nullcontext()

    def forget_drafts(self, but: object = None) -> None:
        """Drop idle workspaces whose captured passes read rounded weights, other than those of `but`."""
        for key in [key for key in self.idle if key[1] not in (None, but)]:
            del self.idle[key]

    def now(self) -> Pass | None:
        """Return the pass that this thread runs on the model, None where the model is called by someone else."""
        return self._pass if self._thread == _this_thread() else None

    @contextmanager
    def running(self, now: Pass) -> Iterator[None]:
        """Let the model's parts do what a pass says, for calls of this thread."""
        before = self._pass, self._thread
        self._pass, self._thread = now, get_ident()
        try:
            yield
        finally:
            self._pass, self._thread = before

    def __reduce__(self) -> tuple[type["Prepared"], tuple[()]]:
        """Copies and files of a model begin with nothing."""
        return Prepared, ()


@torch.compiler.assume_constant_result
def _this_thread() -> int:
    return get_ident()


_known: "weakref.WeakKeyDictionary[nn.Module, Prepared]" = weakref.WeakKeyDictionary()


def prepared_of(model: nn.Module) -> Prepared:
    """Return what is kept with a model; a copy of a prepared model has its own, which its parts hold."""
    if (found := _known.get(model)) is None:
        parts = (vars(module).get("prepared") for module in model.modules())
        found = next((each for each in parts if isinstance(each, Prepared)), None) or Prepared()
        found = _known.setdefault(model, found)
        weakref.finalize(model, found.idle.clear).atexit = False  # the memory of workspaces goes with the model
    return found

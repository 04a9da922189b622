"""What the sessions of a model use one after the other: the slots of the cache, routes, and recorded passes."""

import logging
import weakref
from collections.abc import Hashable
from threading import RLock

import torch
from transformers import PreTrainedModel

from sirius.errors import ConfigError
from sirius.kernels import gpu
from sirius.kernels.dispatch import attends
from sirius.model.cache import SlotCache
from sirius.model.mlp import Route, Tally, renewed
from sirius.model.passes import Passes, recorder, state_of

STEP = 1024  # slots are reserved in steps of so many where records outlive a session: they end where the slots move
IDLE = 4  # workspaces kept of a model; each has memory for keys and values
GRAPHS, TAPES = 32, 6  # records of a workspace: graphs keep the scores of their shape, tapes all that a pass computes


class Workspace:
    """The tensors of one session at a time, which stay where they are, so that passes over them can be replayed.

    attends  whether attention reads the slots by a kernel of ours; only then are passes recorded
    tried    whether a pass has shown that it can
    stays    whether its records outlive a session
    state    the model's when the workspace was made: records know no other
    drafts   the routes of the draft with fixed neurons, by the number of rows, as records are
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers, self.device = model.config.get_text_config().num_hidden_layers, model.device
        self.attends, self.tried = attends_to(model), False
        self.stays = self.attends and stays_on(model.device)
        self.state = state_of(model)
        self.passes = Passes(recorder(model) if self.attends else None, GRAPHS if self.stays else TAPES)
        self.release()

    def release(self) -> None:
        """Let go of all memory."""
        self.passes.forget()
        self.cache = SlotCache(self.layers, 0, 0, self.device)
        self.tally = Tally(0, self.device)
        self.drafts: dict[int, list[Route | None]] = {}

    def begin(self) -> None:
        """Let every row hold nothing, for a new session."""
        self.cache.clear()
        self.tally.clear()
        self.passes.begin()

    def reserve(self, rows: int, slots: int) -> None:
        """Make room for at least so many rows and slots; what is held stays."""
        table = self.cache.table
        if rows <= table.rows and slots <= table.slots:
            return
        self.passes.forget()
        self.cache.reserve(rows, -(-slots // STEP) * STEP if self.stays else slots)
        self.tally.reserve(table.rows)

    def renew(self, drafts: list[Route | None], rows: int) -> list[Route | None]:
        """Take the routes of rows' newly chosen neurons, into the memory of as many rows' last ones where they fit."""
        last = self.drafts.setdefault(rows, drafts)
        if last is not drafts and not (len(last) == len(drafts) and all(map(renewed, last, drafts))):
            self.drafts[rows] = drafts
            self.passes.forget()
        return self.drafts[rows]


_locks: "weakref.WeakKeyDictionary[PreTrainedModel, RLock]" = weakref.WeakKeyDictionary()
_idle: "weakref.WeakKeyDictionary[PreTrainedModel, dict[Hashable, Workspace]]" = weakref.WeakKeyDictionary()


_with_own: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()  # models that keep their attention


def lock_of(model: PreTrainedModel) -> "RLock":
    """Return the lock of a model: whoever prepares it, or runs a pass of a session, holds it meanwhile."""
    return _locks.setdefault(model, RLock())


def keep_attention(model: PreTrainedModel) -> None:
    """Let a model's own attention run from now on, and say so."""
    _with_own.add(model)
    logging.getLogger("sirius").warning(
        "the attention of this %s computes something of its mask, so its own code runs, slower than ours",
        model.config.model_type,
    )


def attends_to(model: PreTrainedModel) -> bool:
    """Tell whether a kernel of ours can take a model's attention, which then has nothing of its own about it."""
    if not attends(model.device, model.dtype) or not getattr(model, "_supports_attention_backend", False):
        return False
    if model in _with_own:
        return False
    narrower = getattr(model.config.get_text_config(), "v_head_dim", None) is not None
    return not narrower and not any("sink" in name for name, _ in model.named_parameters())


def stays_on(device: torch.device) -> bool:
    """Tell whether records on a device are kept for the next session: on a GPU, where they take long to make."""
    return gpu.runs_on(device)


def check_compiles(model: PreTrainedModel) -> None:
    """Raise ConfigError where no pass of a model is recorded, and so none would be compiled."""
    if model.device.type != "cuda" or not attends_to(model):
        raise ConfigError(
            f"passes are compiled on a GPU with Triton, in a dtype of up to 32 bits, of plain attention; this "
            f"{model.config.model_type} is {model.dtype} on {model.device}: leave compile out"
        )


def borrow(session: object, model: PreTrainedModel, key: tuple[Hashable, bool]) -> Workspace:
    """Return a workspace for a session, an idle one of the same key where there is one; it is idle again after it.

    key  what decides the draft's routes, and whether passes are compiled
    """
    space = _idle.get(model, {}).pop(key, None)
    if space is None or space.state != state_of(model):
        space = Workspace(model)
    space.begin()
    if space.stays:
        weakref.finalize(session, _give_back, weakref.ref(model), key, space).atexit = False
    return space


def drop_idle(model: PreTrainedModel) -> None:
    """Free the memory of idle workspaces."""
    _idle.pop(model, None)


def _give_back(of: "weakref.ref[PreTrainedModel]", key: Hashable, space: Workspace) -> None:
    """Keep a workspace; nothing is done to its tensors, as a finalizer may come in the midst of anything."""
    if (model := of()) is None or not space.cache.table.rows:
        return
    kept = _idle.setdefault(model, {})
    kept[key] = space
    if len(kept) > IDLE:
        kept.pop(next(iter(kept)))

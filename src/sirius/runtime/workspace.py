"""What the sessions of a model use one after the other: the slots of the cache, routes, and captured passes."""

import logging
import weakref
from collections.abc import Hashable

import torch
from transformers import PreTrainedModel

from sirius.errors import ConfigError
from sirius.kernels import gpu
from sirius.kernels.ops import attends
from sirius.model.adopt import parts_of
from sirius.model.attention import SlotAttention
from sirius.model.mlp import SparseMLP
from sirius.model.prepared import Prepared, prepared_of
from sirius.runtime.cache import SlotCache
from sirius.runtime.capture import CapturedPasses, capture_of, state_of
from sirius.runtime.neurons import Route, Tally, overwrite

STEP = 1024  # slots are reserved in such steps on a GPU
IDLE = 4  # workspaces kept of a model; each has memory for keys and values
IDLE_BYTES = 256 << 20  # most of these that an idle workspace holds on a CPU
GRAPHS, TAPES = 32, 8  # most captured passes: a graph keeps the scores of its shape, a tape all that a pass computes

Key = tuple[Hashable, Hashable, bool]  # a method's configuration, a draft's own weights, passes are compiled


class Workspace:
    """The tensors of one session at a time, which stay where they are, so that passes over them can be replayed.

    attends  whether attention reads the slots by a kernel of ours; only then are passes captured
    tried    whether a pass with that kernel has succeeded
    reused   whether its captured passes outlive a session
    state    the model's, of which passes are captured
    drafts   the routes of the draft with fixed neurons, by the number of rows, as passes are captured
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers, self.device = model.config.get_text_config().num_hidden_layers, model.device
        self.mlps = sum(1 for _ in parts_of(model, SparseMLP))
        self.prepared = prepared_of(model)
        self.attends, self.tried = attends_to(model), False
        self.reused = self.attends and self.prepared.placed is None
        self.passes = CapturedPasses(GRAPHS if self.reused and gpu.runs_on(self.device) else TAPES)
        self.state: list[object] = []
        self.look_at(model)
        self.release()
        self.prepared.spaces.add(self)

    def look_at(self, model: PreTrainedModel) -> None:
        """Forget the captured passes where the model has been altered since they were."""
        if (now := state_of(model)) != self.state:
            self.state = now
            self.passes.forget()
            self.passes.capture = capture_of(model) if self.attends else None

    def release(self) -> None:
        """Let go of all memory."""
        self.passes.forget()
        self.cache = SlotCache(self.layers, 0, 0, self.device, self.prepared)
        self.tally = Tally(self.mlps, 0, self.device)
        self.drafts: dict[int, list[Route | None]] = {}

    def begin(self) -> None:
        """Let every row hold nothing, for a new session."""
        self.cache.clear()
        self.tally.clear()
        self.passes.begin()

    def reserve(self, rows: int, slots: int) -> None:
        """Make room for at least so many rows and slots; keys and values that are held remain."""
        table = self.cache.table
        if rows <= table.rows and slots <= table.slots:
            return
        self.passes.forget()
        step = step_on(self.device) if self.reused else 1
        self.cache.reserve(rows, -(-slots // step) * step)
        self.tally.reserve(table.rows)

    def renew(self, drafts: list[Route | None], rows: int) -> list[Route | None]:
        """Take the routes of rows' newly chosen neurons, into the memory of as many rows' last ones where they fit."""
        last = self.drafts.setdefault(rows, drafts)
        if last is not drafts and not (len(last) == len(drafts) and all(map(overwrite, last, drafts))):
            self.drafts[rows] = drafts
            self.passes.forget()
        return self.drafts[rows]


def keep_attention(model: PreTrainedModel) -> None:
    """Let a model's own attention run from now on, and say so."""
    prepared_of(model).own_attention = True
    logging.getLogger("sirius").warning(
        "the attention of this %s computes something of its mask, so its own code runs, slower than ours",
        model.config.model_type,
    )


def attends_to(model: PreTrainedModel) -> bool:
    """Tell whether a kernel of ours can take a model's attention, which then has nothing of its own about it."""
    config = model.config.get_text_config()
    if not attends(model.device, model.dtype) or prepared_of(model).own_attention:
        return False
    if len(list(parts_of(model, SlotAttention))) != config.num_hidden_layers:
        return False
    narrower = getattr(config, "v_head_dim", None) is not None
    return not narrower and not any("sink" in name for name, _ in model.named_parameters())


def step_on(device: torch.device) -> int:
    """Return the steps in which slots are reserved: long ones where captures are dear, as a growth drops them."""
    return STEP if gpu.runs_on(device) else 1


def check_compiles(model: PreTrainedModel) -> None:
    """Raise ConfigError where no pass of a model is captured, and so none would be compiled."""
    if prepared_of(model).placed is not None:
        raise ConfigError("passes are not compiled where weights come from elsewhere; leave compile out")
    if model.device.type != "cuda" or not attends_to(model):
        raise ConfigError(
            f"passes are compiled on a GPU with Triton, in a dtype of up to 32 bits, of plain attention; this "
            f"{model.config.model_type} is {model.dtype} on {model.device}: leave compile out"
        )


def borrow(session: object, model: PreTrainedModel, key: Key) -> Workspace:
    """Return a workspace for a session, an idle one of the same key where there is one; it is idle again after it."""
    kept = prepared_of(model)
    space = kept.idle.pop(key, None)
    if space is None or space.state != state_of(model):
        space = Workspace(model)
    space.begin()
    if space.reused:
        weakref.finalize(session, _give_back, kept, key, space).atexit = False
    return space


def drop_idle(model: PreTrainedModel) -> None:
    """Free the memory of idle workspaces."""
    prepared_of(model).idle.clear()


def _give_back(kept: Prepared, key: Key, space: Workspace) -> None:
    """Keep a workspace; nothing is done to its tensors, as a finalizer may come in the midst of anything.

    One with much memory on a CPU is not kept, nor one that reads rounded weights which are no longer the last ones.
    """
    _, draft, _ = key
    large = space.device.type == "cpu" and space.cache.nbytes > IDLE_BYTES
    if large or not space.cache.table.rows or (draft is not None and draft is not kept.last_twin):
        return
    kept.idle[key] = space
    if len(kept.idle) > IDLE:
        kept.idle.pop(next(iter(kept.idle)))

"""Runs passes of a prepared transformers model for the texts of one batch."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from sirius.core import Mode, Window
from sirius.errors import RequestError, UnsupportedModelError
from sirius.kernels.launch import is_plain
from sirius.model.adopt import parts_of
from sirius.model.attention import MaskChanged
from sirius.model.find import check_mode, dropouts
from sirius.model.inputs import cache_argument
from sirius.model.limits import MOST_READ, rescaling_length
from sirius.model.matrix import MakeMatrix, is_replayable, makes_dense
from sirius.model.mlp import SparseMLP, check_layers
from sirius.model.prepared import Pass, Prepared, Slots, prepared_of
from sirius.runtime.cache import SlotCache
from sirius.runtime.capture import compile_model
from sirius.runtime.mask import chain_mask, tree_mask
from sirius.runtime.neurons import Chosen, Observe, Route, fixed_routes
from sirius.runtime.prefix import BLOCK, Prefixes, block_names
from sirius.runtime.room import make_room
from sirius.runtime.workspace import borrow, drop_idle, keep_attention
from sirius.shortage import ran_out
from sirius.sparsity.base import PromptSparsity, Sparsity, TokenSparsity
from sirius.stats import DENSE, Touched

DEVICES = "cpu", "cuda"
WIDTH = 64  # masks are as wide as a multiple of so many slots, so that the levels of a draft share a captured pass
Forward = Callable[..., Any]
MakeMethod = Callable[[], Sparsity | None]


@contextmanager
def ordinary() -> Iterator[None]:
    """Run the block without gradients, without autocast, and outside of inference mode.

    A tensor that is made in inference mode cannot be written to after it.
    """
    with ExitStack() as stack:
        for device in DEVICES:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))  # turns gradients on
        stack.enter_context(torch.no_grad())
        yield


class Session:
    """One batch's cache and neurons; several sessions of a model may take turns, pass by pass.

    A method per prompt is made for each row; one per token serves all rows. Whoever calls a session holds the model's
    lock and is within `ordinary()`, as `Batch` does at each step. The model must not be altered while rows are open.

    captures  whether passes are captured where they can be
    """

    captures = True

    def __init__(
        self,
        model: PreTrainedModel,
        mlps: list[SparseMLP],
        make: MakeMethod = lambda: None,
        compiled: bool = False,
        draft: MakeMatrix | None = None,
        *,
        several: bool = True,
    ) -> None:
        """Open an empty session; `make` gives a method for a prompt, or None to draft with every neuron.

        compiled  passes that are captured are compiled first
        draft     makes the weights of the linear layers in draft passes; None: those of the full model
        several   rows may be open side by side, so what their prompts have in common is remembered
        """
        self.model, self.mlps, self.make = model, mlps, make
        self.prepared = prepared_of(model)
        self.dtype_device = model.dtype, model.device  # of its weights, of the cache and of captured passes
        self.forward = compile_model(model) if compiled else model
        self.cache_argument = cache_argument(model)
        self.shared = make()
        self.draft = draft or self.prepared.matrix
        self.space = borrow(self, model, (self.shared and self.shared.config, draft, compiled))
        self.mask_dtype = model.dtype if model.config._attn_implementation == "eager" else None
        self.dense: list[Route | None] = [None] * len(mlps)
        self.drafts: list[Route | None] | None
        self.methods: list[Sparsity | None] = []  # one for each row
        self.prefixes = Prefixes(copies=several)
        self._rows_changed()

    @property
    def cache(self) -> SlotCache:
        """The slots of all rows."""
        return self.space.cache

    @property
    def slots(self) -> int:
        """How many slots each row has."""
        return self.cache.table.slots

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def invariant(self) -> bool:
        """Whether a token's scores do not depend on how many tokens share its pass.

        On the CPU our kernels give the same bits. PyTorch's products, of weights that are no plain tensors too, round
        in another order, which shows in 16 bits, and so may other kinds of weights. A GPU's do so in any dtype.
        """
        if self.device.type != "cpu":
            return False
        wide = self.model.dtype in (torch.float32, torch.float64)
        ours = self.space.attends and makes_dense(self.prepared.matrix)
        return wide or (ours and is_plain(*self.model.parameters()))

    def reserve(self, rows: int, slots: int) -> None:
        """Make room for rows and slots to come, between passes; keys and values that are held move with it.

        Raises OutOfMemoryError where no memory was planned for so many.
        """
        if self.prepared.slots is not None:
            make_room(self.space, self.prepared.slots, rows, slots)
        self.space.reserve(rows, slots)

    def release(self) -> None:
        """Free memory: idle workspaces, captured passes, copies of methods, and rounded weights that no session reads.

        The cache goes too where no row is open.
        """
        drop_idle(self.model)
        if self.prepared.last_twin is not self.draft:
            self.prepared.last_twin = None
        self.prefixes.states.clear()
        if self.methods:
            self.space.passes.forget()
        else:
            self.space.release()
            self._rows_changed()

    def open(self, prompt: Tensor, slots: int) -> Tensor:
        """Read prompt [P] int64 into a new row of `slots` slots, the sparsity method looking on.

        Blocks that begin an open row's prompt too are copied from there. The row counts as open when all is read.
        Returns the scores of its next token [V], float32, or float64 of a float64 model. Raises RequestError where it
        cannot be read beside the rows at work.
        """
        self._check_model()
        row, length = len(self.methods), len(prompt)
        self._check_beside(row, length)
        self.space.look_at(self.model)
        self.space.reserve(row + 1, slots)
        blocks = block_names(prompt.cpu().tolist()) if self._reads_blocks(length) else ()
        method, done = self._share(row, blocks)
        routes = self._observing(method)
        for number in range(done, len(blocks)):
            self._read_prompt(prompt, row, (number * BLOCK, (number + 1) * BLOCK), routes)
            if isinstance(method, PromptSparsity):
                self.prefixes.remember(blocks[number], method)
        scores = self._read_rest(prompt, row, len(blocks) * BLOCK, routes)
        self.cache.advance(row, length)
        self.methods.append(method)
        self.prefixes.rows.append(blocks)
        self._rows_changed()
        return scores[0, 0]

    def _share(self, row: int, blocks: tuple[bytes, ...]) -> tuple[Sparsity | None, int]:
        """Copy the keys and values of a new row's first blocks from a row that holds them.

        Returns the new row's method, and how many blocks were copied; a method per prompt has seen those.
        """
        observed = isinstance(self.shared, PromptSparsity)
        count, source = self.prefixes.find(blocks, observed)
        if count:
            self.cache.share(source, row, count * BLOCK)
        if not observed:
            return self.shared, count
        return (self.prefixes.recall(blocks[count - 1]) if count else self.make()), count

    def _reads_blocks(self, length: int) -> bool:
        """Tell whether the blocks of a prompt have the same positions as the whole prompt would give them."""
        return not self._rescales(length) and self.prepared.placed is None

    def _rescales(self, length: int) -> bool:
        limit = rescaling_length(self.model.config)
        return limit is not None and length > limit

    def _read_rest(self, prompt: Tensor, row: int, begin: int, routes: list[Route | None]) -> Tensor:
        """Read a prompt from a token on and return the scores after it [1, 1, V]: in as few passes as memory allows.

        Where weights come from elsewhere, each pass brings all of them.
        """
        step = len(prompt) if self._rescales(len(prompt)) else MOST_READ
        firsts = range(begin, len(prompt), step)
        parts = [(first, min(first + step, len(prompt))) for first in firsts]
        return [self._read_prompt(prompt, row, part, routes) for part in parts][-1]

    def _read_prompt(self, prompt: Tensor, row: int, part: tuple[int, int], routes: list[Route | None]) -> Tensor:
        """Read a part of a prompt, from a first token to before a last one; return the scores after it [1, 1, V]."""
        at = self.cache.locate(torch.arange(*part)[None], first=row)
        mask = chain_mask(at.written, at.visible, self.mask_dtype)
        held = torch.full((1,), part[0], dtype=torch.int64, device=self.device)
        likely = torch.ones(1, part[1] - part[0], device=self.device)
        now = Pass(routes, at, mask, held, likely, attends=False, invariant=False, matrix=self.prepared.matrix)
        inputs = {"input_ids": prompt[None, slice(*part)].to(self.device), "position_ids": at.written}
        return _scores(self.model, self.prepared, self._cache_arguments(), now, inputs, last=1)

    def read(self, tokens: Tensor, mode: Mode, window: Window) -> Tensor:
        """Feed tokens [B, T] int64, a line for each row, to the nodes of a window; return scores [B, T, V].

        Scores are float32, or float64 of a float64 model; a later pass may write over them. What the rows hold stays as
        it is.
        """
        self._check_unmoved()
        rows, count = tokens.shape
        lengths = self.cache.lengths[:rows]
        slots = self.cache.locate(lengths[:, None] + window.first + torch.arange(count))
        before = self.cache.copy(slots, window.fixed) if window.fixed else []
        try:
            return self._try(tokens, mode, slots, window)
        finally:
            if window.fixed:
                self.cache.paste(slots, window.fixed, before)

    def _run(self, tokens: Tensor, mode: Mode, slots: Slots, window: Window) -> Tensor:
        """Run a pass, or replay it where it was captured."""
        now = self._pass(mode, slots, window)
        inputs = {"input_ids": tokens.to(self.device), "position_ids": now.held[:, None] + window.depths}
        tensors = {"written": now.slots.written, "mask": now.mask, "held": now.held, "branches": now.branches}
        cache = self._cache_arguments()
        model, compiled = (partial(_read, each, self.prepared, cache, now) for each in (self.model, self.forward))
        if not self.captures or not is_replayable(now.matrix):
            return model(**inputs, **tensors)
        apart = window.apart and isinstance(self.shared, TokenSparsity)
        key = mode, now.mask.shape, apart, torch.get_num_threads()
        calls = model, model if self.forward is self.model else compiled
        return self.space.passes.run(key, calls, {**inputs, **tensors}, alive=now.routes)

    def _pass(self, mode: Mode, slots: Slots, window: Window) -> Pass:
        """Return what a pass does whose tokens are the nodes of a window."""
        table, attends = self.cache.table, self.space.attends
        held = table.lengths[: len(slots.written)].to(table.device, non_blocking=True)
        if attends:
            mask, slots = pad(window.seen, (0, -window.seen.shape[2] % WIDTH)), slots._replace(visible=table.slots)
        else:
            mask = tree_mask(held, window.seen, slots.visible, self.mask_dtype)
        matrix = self.draft if mode is Mode.SPARSE else self.prepared.matrix
        routes = self._routes(mode, window.apart)
        return Pass(routes, slots, mask, held, window.weights, attends, invariant=True, matrix=matrix)

    def _cache_arguments(self) -> dict[str, Any]:
        return {self.cache_argument: self.cache, "use_cache": True}

    def _try(self, tokens: Tensor, mode: Mode, slots: Slots, window: Window) -> Tensor:
        """Run a pass; where our attention cannot replace the model's, the model's own runs from then on.

        A model that derives another mask from its own raises MaskChanged, or fails at its first pass with ours.
        """
        try:
            scores = self._run(tokens, mode, slots, window)
        except (MaskChanged, RuntimeError, IndexError) as error:
            known = self.space.tried and not isinstance(error, MaskChanged)
            if known or ran_out(error) or not self.space.attends:
                raise
            self.space.attends = False
            scores = self._run(tokens, mode, slots, window)
            keep_attention(self.model)
            self.space.passes.forget()
            self.space.passes.capture = None
        self.space.tried = True
        return scores

    def _check_model(self) -> None:
        """Raise UnsupportedModelError where the model has been altered so that texts would differ; asked for each text.

        It must have no dropout, and its MLPs' layers and activations must be no more than their weights and formula.
        """
        self._check_unmoved()
        check_mode(dropouts(self.model))
        for path, mlp in parts_of(self.model, SparseMLP):
            check_layers(path, mlp, mlp.roles)

    def _check_unmoved(self) -> None:
        """Raise UnsupportedModelError where the model was restored, converted or moved in the midst of a text."""
        if not isinstance(self.mlps[0], SparseMLP):
            raise UnsupportedModelError("the model was restored in the midst of a text; begin the text anew")
        if (now := (self.model.dtype, self.model.device)) != self.dtype_device:
            before, after = (f"{dtype} on {device}" for dtype, device in (self.dtype_device, now))
            raise UnsupportedModelError(
                f"the model was {before} when the text began and is {after} in the midst of it; begin the text anew"
            )

    def _check_beside(self, row: int, length: int) -> None:
        """Raise RequestError where open rows are on the other side of the length at which positions are scaled anew."""
        limit = rescaling_length(self.model.config)
        if limit is not None and bool(((self.cache.lengths[:row] > limit) != (length > limit)).any()):
            raise RequestError(
                f"a prompt of {length} tokens cannot stand beside texts on the other side of the {limit} after which "
                "this model's positions are scaled anew (longrope, dynamic); put it into a batch of its own"
            )

    def keep(self, path: Tensor, counts: Tensor) -> None:
        """Let each row hold the first counts[b] [B] of the nodes path[b] [B, n] int64 after what it holds already."""
        self.cache.keep(path, counts)

    def rewind(self, count: int) -> None:
        """Let each row hold `count` tokens less, which are nodes 0 .. count - 1 then, for `keep` to take back."""
        for row, length in enumerate(self.cache.lengths[: len(self.methods)].tolist()):
            self.cache.truncate(row, length - count)

    def close(self, row: int) -> None:
        """Drop a row and free its slots; the last row takes its number."""
        self.cache.move(len(self.methods) - 1, row)
        self.methods[row] = self.methods[-1]
        self.methods.pop()
        self.prefixes.close(row)
        self.space.tally.move(len(self.methods), row)
        self._rows_changed()

    def least_touched(self) -> tuple[Touched, Touched]:
        """Return which share of its neurons a draft token reads at least, and a probe at most."""
        if isinstance(self.shared, TokenSparsity):
            least = self._read_whole(self.shared.touched(0.0))
            return least, DENSE  # tokens with sets of their own need nearly all of them together
        once = self._read_whole(self.shared.touched()) if isinstance(self.shared, PromptSparsity) else DENSE
        return once, once

    def touched(self, row: int) -> tuple[Touched, tuple[float, ...]]:
        """Return which share of its neurons a draft token of a row reads, and the share that it keeps in each layer.

        The second is empty where nothing is sparse.
        """
        method = self.methods[row]
        if isinstance(method, TokenSparsity):
            share, shares = self.space.tally.shares(row)
            return self._read_whole(method.touched(share)), method.kept(shares)
        if isinstance(method, PromptSparsity):
            return self._read_whole(method.touched()), method.kept()
        return DENSE, ()

    def _read_whole(self, touched: Touched) -> Touched:
        """Return what is read where the draft's weights are rounded: their down layers are read whole."""
        return touched if self.draft is self.prepared.matrix else replace(touched, down=1.0)

    def _observing(self, method: Sparsity | None) -> list[Route | None]:
        """Return the routes of a prompt's pass: dense, with a prompt method looking on."""
        if not isinstance(method, PromptSparsity):
            return self.dense

        def show(layer: int, z: Tensor) -> None:
            method.observe(layer, z.flatten(0, -2))

        return [Observe(partial(show, layer)) for layer in range(len(self.mlps))]

    def _routes(self, mode: Mode, apart: bool = False) -> list[Route | None]:
        if mode is Mode.DENSE:
            return self.dense
        if apart and isinstance(self.shared, TokenSparsity):
            return [Chosen(self.shared, layer, None) for layer in range(len(self.mlps))]
        if self.drafts is None:
            prompts = [method for method in self.methods if isinstance(method, PromptSparsity)]
            if self.draft is self.prepared.placed:  # no memory for another copy of neurons
                self.space.drafts.clear()
            chosen = fixed_routes(prompts, self.mlps, self.draft)
            self.drafts = self.space.renew(chosen, len(prompts))
        return self.drafts

    def _rows_changed(self) -> None:
        """Set the draft's routes; None, where prompts decide them: they are chosen at the draft's next pass."""
        method, self.drafts = self.shared, self.dense
        if isinstance(method, PromptSparsity):
            self.drafts = None
        elif isinstance(method, TokenSparsity):
            self.drafts = [Chosen(method, layer, self.space.tally) for layer in range(len(self.mlps))]


def _read(forward: Forward, prepared: Prepared, cache: dict[str, Any], now: Pass, **tensors: Tensor) -> Tensor:
    """Return the scores of a pass whose tensors are these; it knows no session, so that a captured one keeps none."""
    slots = now.slots._replace(written=tensors.pop("written"))
    own = {name: tensors.pop(name) for name in ("mask", "held", "branches")}
    return _scores(forward, prepared, cache, replace(now, slots=slots, **own), tensors)


def _scores(
    forward: Forward, prepared: Prepared, cache: dict[str, Any], now: Pass, inputs: dict[str, Tensor], last: int = 0
) -> Tensor:
    """Run a pass and return its scores [B, T, V], or those of the `last` tokens: float32, float64 of such a model."""
    mask = now.mask[:, None] if now.attends else now.mask
    with prepared.running(now):
        scores = forward(**inputs, **cache, attention_mask=mask, logits_to_keep=last).logits
    return scores if scores.dtype == torch.float64 else scores.float()

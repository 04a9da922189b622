"""A prepared transformers model as the `LanguageModel` of a batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from sirius.core import Mode, Window
from sirius.errors import RequestError, UnsupportedModelError
from sirius.kernels.dispatch import alike
from sirius.kernels.launch import is_plain
from sirius.model import attention
from sirius.model.cache import SlotCache
from sirius.model.inputs import cache_argument
from sirius.model.mask import chain_mask, tree_mask
from sirius.model.mlp import Chosen, Observe, Route, SparseMLP, fixed_routes
from sirius.model.passes import compile_model
from sirius.model.prepare import check_mode, dropouts, rope_turn
from sirius.model.workspace import borrow, drop_idle, keep_attention
from sirius.shortage import ran_out
from sirius.sparsity.base import PromptSparsity, Sparsity, TokenSparsity
from sirius.stats import DENSE, Touched

DEVICES = "cpu", "cuda"
LOOKS = 64  # what tokens look at covers a multiple of so many slots, so that a draft's levels share a record
Forward = Callable[..., Any]
Method = TypeVar("Method", bound=Callable[..., Any])
MakeMethod = Callable[[], Sparsity | None]


def _ordinary(method: Method) -> Method:
    """Run a method without gradients, in the model's own dtype, and outside of inference mode.

    What is made in that mode could not be written to after it.
    """
    narrow: list[Any] = [torch.autocast(device, enabled=False) for device in DEVICES]
    run: Any = method
    for context in torch.no_grad(), torch.inference_mode(False), *narrow:
        run = context(run)
    return run


class Session:
    """One batch's cache and neurons; several sessions of a model may take turns, pass by pass.

    A method per prompt is made for each row; one per token serves all rows. A pass sets the routes of MLPs and the
    attention, and takes them back. So two threads must not use it at once (`Batch` holds the model's lock), nor models
    that share a config object.
    """

    @_ordinary
    def __init__(
        self, model: PreTrainedModel, mlps: list[SparseMLP], make: MakeMethod = lambda: None, compiled: bool = False
    ) -> None:
        """Open an empty session; `make` gives a method for a prompt, or None to draft with every neuron.

        compiled  passes that are recorded are compiled first
        """
        self.model, self.mlps, self.make = model, mlps, make
        self.place = model.dtype, model.device  # of its weights, of the cache and of records
        self.dropouts = dropouts(model)
        self.forward = compile_model(model) if compiled else model
        self.cache_argument = cache_argument(model)
        self.shared = make()
        self.space = borrow(self, model, (self.shared and self.shared.config, compiled))
        eager = model.config._attn_implementation == "eager"
        self.mask_dtype = model.dtype if eager else None
        self.dense: list[Route | None] = [None] * len(mlps)
        self.methods: list[Sparsity | None] = []  # one for each row
        self.drafts = self._routes_per_token()
        self.seen: dict[int, Tensor] = {}  # z of the last check, [B, T, F] a layer, while the method is refreshed
        self.refreshing = self.shared is not None and self.shared.config.refresh > 0
        self.rewound = False  # until what was taken back is kept again

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
    def alike(self) -> bool:
        """Whether what a token is given does not depend on how many tokens share its pass.

        On the CPU our kernels give the same bits. PyTorch's products, of weights that are no plain tensors too, round
        in another order, which shows in 16 bits. A GPU's do so in any dtype.
        """
        if self.device.type != "cpu":
            return False
        wide = self.model.dtype in (torch.float32, torch.float64)
        return wide or (self.space.attends and is_plain(*self.model.parameters()))

    @_ordinary
    def reserve(self, rows: int, slots: int) -> None:
        """Make room for rows and slots to come, between passes; what is held stays, and is moved where it grows."""
        self.space.reserve(rows, slots)

    @_ordinary
    def release(self) -> None:
        """Give back what memory can be had: of idle workspaces and records, and of the cache where no row is open."""
        drop_idle(self.model)
        if self.methods:
            self.space.passes.forget()
        else:
            self.space.release()
            self._rows_changed()

    @_ordinary
    def open(self, prompt: Tensor, slots: int) -> Tensor:
        """Read prompt [P] int64 into a new row of `slots` slots, the sparsity method looking on.

        Returns the scores of its next token [V], float32, or float64 of a float64 model. Raises RequestError where it
        cannot be read beside the rows at work.
        """
        self._check_model()
        row, length = len(self.methods), len(prompt)
        self._check_beside(row, length)
        self.space.reserve(row + 1, slots)
        method = self._method_of_row()
        at = torch.arange(length)[None]
        self.cache.place(at, first=row)
        placed = self.cache.table.placed
        mask = chain_mask(placed, length, self.mask_dtype)
        with self._routed(self._observing(method)):
            inputs = {"input_ids": prompt[None].to(self.device), "position_ids": placed}
            scores = self._scores(self.model, mask, inputs, last=1)
        self.cache.advance(row, length)
        self.methods.append(method)
        self._rows_changed()
        return scores[0, 0]

    @_ordinary
    def read(self, tokens: Tensor, mode: Mode, window: Window) -> Tensor:
        """Feed tokens [B, T] int64, a line for each row, to the places of a window; return scores [B, T, V].

        Scores are float32, or float64 of a float64 model; a later pass may write over them. What the rows hold stays as
        it is.
        """
        self._check_model()
        rows, count = tokens.shape
        lengths = self.cache.lengths[:rows]
        self.cache.place(lengths[:, None] + window.first + torch.arange(count))
        before = self.cache.copy(window.fixed) if window.fixed else []
        try:
            return self._try(tokens, mode, lengths, window)
        finally:
            if window.fixed:
                self.cache.paste(window.fixed, before)

    def _run(self, tokens: Tensor, mode: Mode, lengths: Tensor, window: Window) -> Tensor:
        """Run a pass, or replay it where it was recorded."""
        routes, inputs = self._routes(mode, window.apart), self._inputs(tokens, lengths, window)
        call = partial(self._read, self.model, routes)
        if self.refreshing:
            return call(**inputs)
        calls = call, call if self.forward is self.model else partial(self._read, self.forward, routes)
        apart = window.apart and isinstance(self.shared, TokenSparsity)
        key = mode, inputs["looks"].shape, apart, torch.get_num_threads()
        return self.space.passes.run(key, calls, inputs, alive=routes)

    def _try(self, tokens: Tensor, mode: Mode, lengths: Tensor, window: Window) -> Tensor:
        """Run a pass; where our attention turns out not to stand for the model's, the model's own runs from then on.

        A model that computes something of the mask may also fail of a mask in our form, which its first pass shows.
        """
        try:
            scores = self._run(tokens, mode, lengths, window)
        except (attention.MaskChanged, RuntimeError, IndexError) as error:
            known = self.space.tried and not isinstance(error, attention.MaskChanged)
            if known or ran_out(error) or not self.space.attends:
                raise
            self.space.attends = False
            scores = self._run(tokens, mode, lengths, window)
            keep_attention(self.model)
            self.space.passes.forget()
            self.space.passes.record = None
        self.space.tried = True
        return scores

    def _check_model(self) -> None:
        """Raise UnsupportedModelError where the model is no longer what it was, or drops something at random."""
        if not all(isinstance(mlp, SparseMLP) for mlp in self.mlps):
            raise UnsupportedModelError("the model was restored in the midst of a text; begin the text anew")
        check_mode(self.dropouts)
        if (now := (self.model.dtype, self.model.device)) != self.place:
            before, after = (f"{dtype} on {device}" for dtype, device in (self.place, now))
            raise UnsupportedModelError(
                f"the model was {before} when the text began and is {after} in the midst of it; begin the text anew"
            )

    def _check_beside(self, row: int, length: int) -> None:
        """Raise RequestError where the rows at work are on the other side of where the model turns positions anew."""
        turn = rope_turn(self.model.config)
        if turn is not None and bool(((self.cache.lengths[:row] > turn) != (length > turn)).any()):
            raise RequestError(
                f"a prompt of {length} tokens cannot stand beside texts on the other side of the {turn} after which "
                "this model's positions are scaled anew (longrope, dynamic); put it into a batch of its own"
            )

    def _inputs(self, tokens: Tensor, lengths: Tensor, window: Window) -> dict[str, Tensor]:
        """Return the tensors that a pass depends on, on the device.

        looks  what its tokens look at: [B, T, M] of the M slots after the held ones for a kernel of ours, or a mask
        """
        table = self.cache.table
        held = lengths.to(table.device, non_blocking=True)
        if self.space.attends:
            padding = -window.seen.shape[2] % LOOKS
            looks = pad(window.seen, (0, padding))
        else:
            looks = tree_mask(held, window.seen, table.visible, self.mask_dtype)
        return {
            "input_ids": tokens.to(table.device),
            "position_ids": held[:, None] + window.depths,
            "placed": table.placed,
            "held": held,
            "looks": looks,
            "weights": window.weights,
        }

    def _read(
        self, forward: Forward, routes: list[Route | None], placed: Tensor, weights: Tensor, **looked: Tensor
    ) -> Tensor:
        table = self.cache.table
        table.placed, self.space.tally.weights = placed, weights
        held, mask = looked.pop("held"), looked.pop("looks")
        if not self.space.attends:
            with self._routed(routes), alike():
                return self._scores(forward, mask, looked)
        table.visible = table.slots
        with self._routed(routes), self._attending(), alike():
            mask = mask[:, None]
            return self._scores(forward, mask, {**looked, "held": held, "looks": mask})

    @_ordinary
    def keep(self, path: Tensor, counts: Tensor) -> None:
        """Let each row hold the first counts[b] [B] of the places path[b] [B, n] int64 after what it holds already."""
        self.cache.keep(path, counts)
        if self.rewound:  # the statistic has these tokens already
            self.rewound, self.seen = False, {}
        if not self.seen:
            return
        for row, (method, places) in enumerate(zip(self.methods, path, strict=True)):
            kept = places[: int(counts[row])]
            if isinstance(method, PromptSparsity) and len(kept):
                for layer, z in self.seen.items():
                    method.refresh(layer, z[row, kept.to(z.device)])
        self.seen, self.drafts = {}, None

    @_ordinary
    def rewind(self, count: int) -> None:
        """Let each row hold `count` tokens less, which stand at places 0 .. count - 1 then, for `keep` to take back."""
        self.rewound = True
        for row, length in enumerate(self.cache.lengths[: len(self.methods)].tolist()):
            self.cache.truncate(row, length - count)

    @_ordinary
    def close(self, row: int) -> None:
        """Drop a row and free its slots; the last row takes its number."""
        self.cache.move(len(self.methods) - 1, row)
        self.methods[row] = self.methods[-1]
        self.methods.pop()
        self.space.tally.move(len(self.methods), row)
        self._rows_changed()

    def least_touched(self) -> tuple[Touched, Touched]:
        """Return which share of its neurons a draft token reads at least, and a probe at most."""
        if isinstance(self.shared, TokenSparsity):
            return self.shared.touched(0.0), DENSE  # tokens with sets of their own need nearly all of them together
        once = self.shared.touched() if isinstance(self.shared, PromptSparsity) else DENSE
        return once, once

    def touched(self, row: int) -> Touched:
        """Return which share of its neurons a draft token of a row reads."""
        method = self.methods[row]
        if isinstance(method, TokenSparsity):
            return method.touched(self.space.tally.share(row))
        return method.touched() if isinstance(method, PromptSparsity) else DENSE

    def _scores(self, forward: Forward, mask: Tensor, inputs: dict[str, Tensor], last: int = 0) -> Tensor:
        kept = {self.cache_argument: self.cache, "use_cache": True}
        scores = forward(**inputs, **kept, attention_mask=mask, logits_to_keep=last).logits
        return scores if scores.dtype == torch.float64 else scores.float()

    def _method_of_row(self) -> Sparsity | None:
        return self.make() if isinstance(self.shared, PromptSparsity) else self.shared

    def _watching(self) -> list[Route | None]:
        """Return the routes of a check of which `keep` will show the kept tokens to their methods."""

        def show(layer: int, z: Tensor) -> None:
            self.seen[layer] = z

        return [Observe(partial(show, layer)) for layer in range(len(self.mlps))]

    def _observing(self, method: Sparsity | None) -> list[Route | None]:
        """Return the routes of a prompt's pass: dense, with a prompt method looking on."""
        if not isinstance(method, PromptSparsity):
            return self.dense

        def show(layer: int, z: Tensor) -> None:
            method.observe(layer, z.flatten(0, -2))

        return [Observe(partial(show, layer)) for layer in range(len(self.mlps))]

    def _routes(self, mode: Mode, apart: bool = False) -> list[Route | None]:
        if mode is Mode.DENSE:
            return self._watching() if self.refreshing else self.dense
        if apart and isinstance(self.shared, TokenSparsity):
            return [Chosen(self.shared, layer, None) for layer in range(len(self.mlps))]
        if self.drafts is None:
            prompts = [method for method in self.methods if isinstance(method, PromptSparsity)]
            chosen = fixed_routes(prompts, self.mlps)
            self.drafts = self.space.renew(chosen, len(prompts))
        return self.drafts

    def _rows_changed(self) -> None:
        """Have the draft's neurons chosen anew at its next pass, where the rows have a say in them."""
        self.drafts = self._routes_per_token()

    def _routes_per_token(self) -> list[Route | None] | None:
        """Return the draft's routes where no prompt decides them, else None: they are yet to be chosen."""
        if isinstance(self.shared, PromptSparsity):
            return None
        token = self.shared
        if not isinstance(token, TokenSparsity):
            return self.dense
        return [Chosen(token, layer, self.space.tally) for layer in range(len(self.mlps))]

    @contextmanager
    def _routed(self, routes: list[Route | None]) -> Iterator[None]:
        """Set every MLP's route for one pass, so that between passes the model is the ordinary one."""
        try:
            for mlp, route in zip(self.mlps, routes, strict=True):
                mlp.route = route
            yield
        finally:
            for mlp in self.mlps:
                mlp.route = None

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """Have attention read the slots by our kernel for one pass."""
        config = self.model.config.get_text_config()
        before = config._attn_implementation
        try:
            config._attn_implementation = attention.NAME
            yield
        finally:
            config._attn_implementation = before

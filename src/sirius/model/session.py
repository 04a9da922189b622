"""A prepared transformers model as the `LanguageModel` of one generation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sirius.core import Mode
from sirius.model.cache import SlotCache
from sirius.model.mask import chain_mask
from sirius.model.mlp import Route, SparseMLP, observing, sparse
from sirius.sparsity.base import Sparsity


class Session:
    """One generation's cache and neurons; several sessions of a model may take turns, pass by pass.

    Not to be used from two threads at once: a pass sets the routes of the model's MLPs and takes them back.
    """

    def __init__(
        self, model: PreTrainedModel, mlps: list[SparseMLP], method: Sparsity | None, slots: int, rows: int = 1
    ) -> None:
        """Open a session with `slots` cache slots for each of `rows` rows; `method` None drafts with every neuron."""
        self.model, self.mlps, self.method = model, mlps, method
        self.cache = SlotCache(model.config.get_text_config().num_hidden_layers, rows, slots, model.device)
        eager = model.config._attn_implementation == "eager"
        self.mask_dtype = model.dtype if eager else None
        dense: list[Route | None] = [None] * len(mlps)
        self.routes = {
            Mode.DENSE: dense,
            Mode.OBSERVE: [observing(method, layer) for layer in range(len(mlps))],
            Mode.SPARSE: dense,
        }

    @torch.no_grad()
    def read(self, tokens: Tensor, mode: Mode, last: int | None = None) -> Tensor:
        """Feed tokens [B, T] int64 after each row's length; return scores [B, T, V], or of the last `last` only.

        Scores are float32, or float64 of a float64 model.
        """
        slots = self.cache.lengths[:, None] + torch.arange(tokens.shape[1])
        self.cache.place(slots)
        placed = self.cache.table.placed
        with self._routed(mode):
            scores = self.model(
                input_ids=tokens.to(placed.device),
                position_ids=placed,
                attention_mask=chain_mask(placed, self.cache.table.visible, self.mask_dtype),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=last or 0,
            ).logits
        self.cache.advance(slots[:, -1] + 1)
        return scores if scores.dtype == torch.float64 else scores.float()

    @torch.no_grad()
    def select(self) -> None:
        """Choose the draft model's neurons from what the passes in mode OBSERVE showed."""
        self.routes[Mode.SPARSE] = [sparse(self.method, layer, mlp) for layer, mlp in enumerate(self.mlps)]

    def truncate(self, lengths: Tensor) -> None:
        """Cut every row back to lengths [B] int64 filled slots."""
        self.cache.truncate(lengths)

    @contextmanager
    def _routed(self, mode: Mode) -> Iterator[None]:
        """Set every MLP's route for one pass, so that between passes the model is the ordinary one."""
        for mlp, route in zip(self.mlps, self.routes[mode], strict=True):
            mlp.route = route
        try:
            yield
        finally:
            for mlp in self.mlps:
                mlp.route = None

"""FSparse, known as CATS: a set of neurons for each token."""

import torch
from torch import Tensor

from sirius.core import SparsityConfig
from sirius.kernels.dispatch import largest
from sirius.sparsity.base import TokenSparsity, register
from sirius.stats import Touched


@register("fine", "cats")
class FineSparsity(TokenSparsity):
    """Keep, token by token, the neurons whose gate is furthest from zero.

    The gate is computed in full; the int((1 - keep) * F) smallest |act(gate(x))| are dropped, or with a threshold every
    one not above it. Source: CATS (arXiv 2404.08763), section 4; top-k in place of its threshold as Sirius uses it.
    """

    def __init__(self, config: SparsityConfig, neurons: tuple[int, ...]) -> None:
        super().__init__(config, neurons)
        self.counts = tuple(n - int((1 - config.keep) * n) for n in neurons)

    def touched(self, kept: float) -> Touched:
        """Return a whole gate, and of up and down the fixed fraction, or what was measured where none is fixed."""
        if self.config.threshold is None and not self.config.per_branch:
            kept = sum(self.counts) / sum(self.neurons)
        return super().touched(kept)

    def choose(self, layer: int, size: Tensor) -> Tensor:
        """Return which neurons to keep, [..., F] bool, given |act(gate(x))| [..., F]."""
        if self.config.threshold is not None:
            return size > self.config.threshold
        top = largest(size, self.counts[layer])
        return torch.zeros_like(size, dtype=torch.bool).scatter_(-1, top, True)

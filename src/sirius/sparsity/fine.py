"""FSparse, known as CATS: a set of neurons for each token."""

import torch
from torch import Tensor

from sirius.core import SparsityConfig
from sirius.kernels.ops import largest
from sirius.sparsity.base import TokenSparsity, register


@register("fine", "cats")
class FineSparsity(TokenSparsity):
    """Keep, token by token, the neurons whose gate is furthest from zero.

    The gate is computed in full; the int((1 - keep) * F) smallest |act(gate(x))| are dropped, or with a threshold every
    one not above it. Source: CATS (arXiv 2404.08763), section 4; top-k in place of its threshold as Sirius uses it.
    """

    def __init__(self, config: SparsityConfig, neurons: tuple[int, ...]) -> None:
        super().__init__(config, neurons)
        self.counts = tuple(n - int((1 - config.keep) * n) for n in neurons)

    def choose(self, layer: int, size: Tensor) -> Tensor:
        """Return which neurons to keep, [..., F] bool, given |act(gate(x))| [..., F]."""
        if self.config.threshold is not None:
            return size > self.config.threshold
        return torch.zeros_like(size, dtype=torch.bool).scatter_(-1, largest(size, self.counts[layer]), True)

    def select(self, layer: int, size: Tensor) -> Tensor:
        """Return the neurons of one set, [k] int64, ascending, given its |act(gate(x))| [F]."""
        return super().select(layer, size) if self.config.threshold is not None else largest(size, self.counts[layer])

    def fixed(self, layer: int) -> int | None:
        """Return the fixed size of a layer's sets; None with a threshold."""
        return None if self.config.threshold is not None else self.counts[layer]

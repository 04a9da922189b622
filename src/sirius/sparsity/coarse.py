"""CSparse, known as GRIFFIN: one set of neurons for the whole prompt."""

from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sirius.core import SparsityConfig
from sirius.errors import ConfigError
from sirius.sparsity.base import PromptSparsity, register
from sirius.stats import Touched


@register("coarse", "griffin")
class CoarseSparsity(PromptSparsity):
    """Keep the neurons that stood out over the prompt.

    Each prompt token's z is divided by its own L2 norm; a neuron's score is the L2 norm of its column over the tokens;
    the int(keep * F) neurons of highest score stay. Source: GRIFFIN (arXiv 2404.01365, section 4).
    """

    def __init__(self, config: SparsityConfig, neurons: tuple[int, ...]) -> None:
        super().__init__(config, neurons)
        if config.threshold is not None:
            raise ConfigError("coarse keeps a fixed fraction and knows no threshold; use 'fine', or keep alone")
        self.counts = tuple(int(config.keep * n) for n in neurons)
        if not all(self.counts):
            least = min(neurons)
            raise ConfigError(
                f"keep {config.keep} of {least} neurons keeps none; keep at least {ceil(1e4 / least) / 1e4}"
            )
        self.energy: dict[int, Tensor] = {}  # sum of squares of the normalised columns, [F] a layer

    def touched(self) -> Touched:
        """Return the kept fraction, the same for all three matrices."""
        kept = sum(self.counts) / sum(self.neurons)
        return Touched(kept, kept, kept)

    def observe(self, layer: int, z: Tensor) -> None:
        """Add prompt tokens' z [T, F] to a layer's statistic."""
        energy = normalize(z if z.dtype == torch.float64 else z.float(), dim=-1).square().sum(0)
        self.energy[layer] = self.energy[layer] + energy if layer in self.energy else energy

    def select(self, layer: int) -> Tensor:
        """Return the neurons of highest score, ascending: the order of their rows in memory."""
        return self.energy[layer].sqrt().topk(self.counts[layer]).indices.sort().values

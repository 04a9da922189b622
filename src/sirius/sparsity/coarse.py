"""CSparse, known as GRIFFIN: one set of neurons for the whole prompt."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sirius.core import SparsityConfig
from sirius.sparsity.base import PromptSparsity, register


@register("coarse", "griffin")
class CoarseSparsity(PromptSparsity):
    """Keep the neurons that stood out over the prompt.

    Each prompt token's z is divided by its own L2 norm; a neuron's score is the L2 norm of its column over the tokens;
    the int(keep * F) neurons of highest score stay. Source: GRIFFIN (arXiv 2404.01365, section 4).
    """

    def __init__(self, config: SparsityConfig, neurons: tuple[int, ...]) -> None:
        super().__init__(config, neurons)
        self.energy: dict[int, Tensor] = {}  # sum of squares of the normalised columns, [F] a layer

    def observe(self, layer: int, z: Tensor) -> None:
        """Add prompt tokens' z [T, F] to a layer's statistic."""
        energy = _energy(z)
        self.energy[layer] = self.energy[layer] + energy if layer in self.energy else energy

    def score(self, layer: int) -> Tensor:
        """Return the norm of each neuron's column, [F]."""
        return self.energy[layer].sqrt()

    def refresh(self, layer: int, z: Tensor) -> None:
        """Mix checked tokens' z [T, F] into the statistic: mean energies per token, weighed refresh to 1 - refresh.

        Ours; the paper's reference never looks at the activations of its checks.
        """
        share, held, new = self.config.refresh, self.energy[layer], _energy(z)
        self.energy[layer] = (1 - share) * normalize(held, p=1, dim=0) + share * normalize(new, p=1, dim=0)


def _energy(z: Tensor) -> Tensor:
    return normalize(z if z.dtype == torch.float64 else z.float(), dim=-1).square().sum(0)

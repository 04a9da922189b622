"""A gated MLP in plain PyTorch: the definition.

Weights are neuron-major: gate, up and down are all [F, H] and row j belongs to neuron j, so a skipped neuron is three
skipped rows. `bias` of gate and up is [F], of down [H]. The functions also take stacks of
such weights, [B, F, H], one set for each row of x [B, T, H].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Neurons:
    """The weights of some neurons of one MLP: gate, up, down [F, H], and the biases where the model has them."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @staticmethod
    def stack(sets: "Sequence[Neurons]") -> "Neurons":
        """Return sets of equal size as one of stacked weights [B, F, H]."""
        gate_bias, up_bias = (
            None if sets[0].gate_bias is None else torch.stack([getattr(each, name) for each in sets])[:, None]
            for name in ("gate_bias", "up_bias")
        )
        gate, up, down = (torch.stack([getattr(each, name) for each in sets]) for name in ("gate", "up", "down"))
        return Neurons(gate, up, down, gate_bias, up_bias, sets[0].down_bias)

    def rows(self, index: Tensor) -> "Neurons":
        """Return a copy of the neurons at index [k] int64, row by row."""
        return Neurons(
            self.gate[index],
            self.up[index],
            self.down[index],
            None if self.gate_bias is None else self.gate_bias[index],
            None if self.up_bias is None else self.up_bias[index],
            self.down_bias,
        )


def gate(x: Tensor, neurons: Neurons, activation: Activation) -> Tensor:
    """Return act(gate(x)) [..., F] of x [..., H]."""
    return activation(_linear(x, neurons.gate, neurons.gate_bias))


def combine(gated: Tensor, x: Tensor, neurons: Neurons) -> Tensor:
    """Return z = gated * up(x) [..., F], what each neuron sends on."""
    return gated * _linear(x, neurons.up, neurons.up_bias)


def project(z: Tensor, neurons: Neurons) -> Tensor:
    """Return down(z) [..., H]."""
    return _linear(z, neurons.down.mT, neurons.down_bias)


def gated_mlp(x: Tensor, neurons: Neurons, activation: Activation) -> Tensor:
    """Return down(act(gate(x)) * up(x)) [..., H] of x [..., H]."""
    return project(combine(gate(x, neurons, activation), x, neurons), neurons)


def gated_mlp_rows(gated: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> Tensor:
    """Return the MLP of x with the neurons at index [k] int64 alone: only their rows of up and down are read.

    gated  [..., F]  act(gate(x)), computed in full
    x      [..., H]
    """
    bias = None if neurons.up_bias is None else neurons.up_bias[index]
    z = gated[..., index] * F.linear(x, neurons.up[index], bias)
    return F.linear(z, neurons.down[index].t(), neurons.down_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ weight.T + bias; of stacked weights [B, F, H] row by row."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    product = x @ weight.mT
    return product if bias is None else product + bias

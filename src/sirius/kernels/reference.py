"""A gated MLP in plain PyTorch: the definition.

Weights are neuron-major: gate, up and down are all [F, H] and row j belongs to neuron j, so a skipped neuron is three
skipped rows. `bias` of gate and up is [F], of down [H].
"""

from collections.abc import Callable
from dataclasses import dataclass

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
    return activation(F.linear(x, neurons.gate, neurons.gate_bias))


def combine(gated: Tensor, x: Tensor, neurons: Neurons) -> Tensor:
    """Return z = gated * up(x) [..., F], what each neuron sends on."""
    return gated * F.linear(x, neurons.up, neurons.up_bias)


def project(z: Tensor, neurons: Neurons) -> Tensor:
    """Return down(z) [..., H]."""
    return F.linear(z, neurons.down.t(), neurons.down_bias)


def gated_mlp(x: Tensor, neurons: Neurons, activation: Activation) -> Tensor:
    """Return down(act(gate(x)) * up(x)) [..., H] of x [..., H]."""
    return project(combine(gate(x, neurons, activation), x, neurons), neurons)


def gated_mlp_rows(gated: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> Tensor:
    """Return the MLP of one token with the neurons at index [k] int64 alone: only their rows of up and down are read.

    gated  [..., F]  act(gate(x)), computed in full
    x      [..., H]  one token: all leading sizes are 1
    """
    bias = None if neurons.up_bias is None else neurons.up_bias[index]
    z = gated[..., index] * F.linear(x, neurons.up[index], bias)
    return F.linear(z, neurons.down[index].t(), neurons.down_bias)

"""A gated MLP: down(act(gate(x)) * up(x)), with all of its neurons or some."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sirius.kernels import dispatch
from sirius.kernels.activations import Activation
from sirius.kernels.reference import Weight


@dataclass(frozen=True)
class Neurons:
    """The weights of some neurons of one MLP: gate, up, down [F, H], and the biases where the model has them.

    Biases of gate and up are [F], of down [H].
    """

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


def gate(x: Tensor, neurons: Neurons, activation: Activation, index: Tensor | None = None) -> Tensor:
    """Return act(gate(x)) [..., F] of x [..., H], or of the neurons at index [k] int64 alone."""
    return dispatch.gate(x, neurons.gate, neurons.gate_bias, activation, index)


def glu(x: Tensor, neurons: Neurons, activation: Activation, index: Tensor | None = None) -> Tensor:
    """Return z = act(gate(x)) * up(x) [..., F], what each neuron sends on, or those at index [k] int64 alone."""
    return dispatch.glu(x, neurons.gate, neurons.up, neurons.gate_bias, neurons.up_bias, activation, index)


def add_up(z: Tensor, neurons: Neurons, index: Tensor | None = None) -> Tensor:
    """Return down(z) [..., H], of the neurons at index where z is theirs alone."""
    return dispatch.project(z, neurons.down, neurons.down_bias, index)


def gated_mlp(x: Tensor, neurons: Neurons, activation: Activation, index: Tensor | None = None) -> Tensor:
    """Return down(act(gate(x)) * up(x)) [..., H] of x [..., H], with the neurons at index [k] int64 alone or all."""
    if dispatch.finishes([x], [(neurons.gate, neurons.gate_bias), *_ends(neurons)], index):
        return _finish(gate(x, neurons, activation, index), x, neurons, index, by_place=True)
    return add_up(glu(x, neurons, activation, index), neurons, index)


def gated_mlp_each(x: Tensor, neurons: Neurons, activation: Activation, index: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the MLP of x [B, T, H], each row with neurons of its own alone, bit for bit as if it were the only one.

    index   [sum of counts] int64  the neurons of all rows, one row after the other
    counts  [B]                    how many each row has
    """
    weights = (neurons.gate, neurons.gate_bias), *_ends(neurons)
    if dispatch.takes_sets(x, weights, activation, index):
        return dispatch.gated_each(x, weights, activation, index, counts)
    sets = index.split(list(counts))
    return torch.stack([gated_mlp(row, neurons, activation, own) for row, own in zip(x, sets, strict=True)])


def gated_mlp_rows(gated: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> Tensor:
    """Return the MLP of x with the neurons at index [k] int64 alone: only their rows of up and down are read.

    gated  [..., F]  act(gate(x)), computed in full
    x      [..., H]
    """
    if dispatch.finishes([x, gated], _ends(neurons), index):
        return _finish(gated, x, neurons, index, by_place=False)
    return add_up(dispatch.up_rows(gated, x, neurons.up, neurons.up_bias, index), neurons, index)


def _finish(gated: Tensor, x: Tensor, neurons: Neurons, index: Tensor | None, by_place: bool) -> Tensor:
    return dispatch.finish(gated, x, *_ends(neurons), index, by_place)


def _ends(neurons: Neurons) -> tuple[Weight, Weight]:
    return (neurons.up, neurons.up_bias), (neurons.down, neurons.down_bias)

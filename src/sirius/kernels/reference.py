"""The operations in plain PyTorch: what every kernel must compute.

Weights are neuron-major: gate, up and down are all [F, H] and row j belongs to neuron j, so a skipped neuron is three
skipped rows. `linear` and `project` also take a stack of weights [B, F, H], one for each row of x [B, T, H].
"""

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """Return the products of x [..., H] with the rows of weight [F, H] at index [k] int64, [..., k]; all without it.

    bias  [F], or [B, 1, F] of a stack
    """
    if index is not None:
        weight, bias = weight[index], None if bias is None else bias[index]
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    product = x @ weight.mT
    return product if bias is None else product + bias


def project(z: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """Return the rows of weight [F, H] at index [k] int64 added up, weighed by z [..., k], [..., H]; bias [H]."""
    if index is not None:
        weight = weight[index]
    if weight.ndim == 2:
        return F.linear(z, weight.t(), bias)
    product = z @ weight
    return product if bias is None else product + bias


def largest(values: Tensor, count: int) -> Tensor:
    """Return the places of the `count` largest of values [..., F] at least 0, [..., count] int64, ascending."""
    return values.topk(count, dim=-1).indices.sort(dim=-1).values

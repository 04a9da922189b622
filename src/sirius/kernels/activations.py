"""The activations that kernels know, by name."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
_FUNCTIONS = {functional.silu: "silu", functional.gelu: "gelu", functional.relu: "relu", torch.relu: "relu"}
_MODULES = {
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.GELU(tanh)": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",  # PytorchGELUTanh is another name of it
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
}


def activation_name(activation: Activation) -> str | None:
    """Return which of ACTIVATIONS an activation of PyTorch's or transformers' is, None of any other."""
    if not isinstance(activation, nn.Module):
        return _FUNCTIONS.get(activation)
    tanh = getattr(activation, "approximate", None) == "tanh"
    name = f"{type(activation).__module__}.{type(activation).__qualname__}"
    return _MODULES.get(name + "(tanh)" * tanh)

"""The linear layers around the MLPs: attention's projections and the head."""

from torch import Tensor, nn

from sirius.kernels.dispatch import linear
from sirius.kernels.launch import is_plain


class RowLinear(nn.Linear):
    """A linear layer whose product with a few tokens takes our kernels; its parameters and their names stay."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of input [..., in_features], [..., out_features]."""
        return linear(input, self.weight, self.bias)


def obstacle(layer: nn.Module) -> str | None:
    """Return what speaks against reading a layer's weights without calling it, None where nothing does."""
    kind = type(layer)
    if kind not in (nn.Linear, RowLinear):
        name = f"{kind.__module__}.Linear" if kind.__name__ == "Linear" else kind.__name__
        return f"is a {name}, not a plain linear layer; load the model unquantised and without adapters"
    for each in layer._parameters.values():
        if not is_plain(each):
            return f"holds a {type(each).__name__}, no plain tensor; load the model unquantised and whole"
    return more_than_itself(layer)


def more_than_itself(module: object) -> str | None:
    """Return what a call of a module would do besides its class's forward, None where there is nothing."""
    if not isinstance(module, nn.Module):
        return None
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooks:
        return "has hooks, which would not be called; take them off"
    return "has a forward of its own, which would not be called; take it off" if own_forward(module) else None


def own_forward(module: nn.Module) -> bool:
    """Tell whether a module has a forward besides its class's."""
    return "forward" in vars(module)


def take_over(model: nn.Module) -> None:
    """Make every plain linear layer of a model a `RowLinear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowLinear


def give_back(model: nn.Module) -> None:
    """Make them plain again."""
    for module in model.modules():
        if type(module) is RowLinear:
            module.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue] - what it was

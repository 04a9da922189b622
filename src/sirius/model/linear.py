"""The linear layers around the MLPs: attention's projections and the head."""

from torch import Tensor, nn

from sirius.errors import UnsupportedModelError
from sirius.kernels.dispatch import linear


class RowLinear(nn.Linear):
    """A linear layer whose product with a few tokens takes our kernels; its parameters and their names stay."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of input [..., in_features], [..., out_features]."""
        return linear(input, self.weight, self.bias)


def obstacle(layer: nn.Module) -> str | None:
    """Return what speaks against reading a layer's weights without calling it, None where nothing does."""
    if type(layer) not in (nn.Linear, RowLinear):
        return f"is a {type(layer).__name__}, not a plain linear layer; load the model unquantised and without adapters"
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if hooks or "forward" in layer.__dict__:
        return f"has {'hooks' if hooks else 'a forward of its own'}, which would not be called; take it off"
    return None


def check_layers(path: str, module: nn.Module, names: dict[str, str]) -> None:
    """Raise UnsupportedModelError where a layer of a module, the model's `path`, cannot be; `names` are by role."""
    for role, name in names.items():
        if (reason := obstacle(getattr(module, name))) is not None:
            raise UnsupportedModelError(f"{path}.{name} ({role}) {reason}")


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

"""The linear layers around the MLPs: attention's projections and the head."""

from torch import Tensor, nn

from sirius.kernels.dispatch import linear


class RowLinear(nn.Linear):
    """A linear layer whose product with a few tokens takes our kernels; its parameters and their names stay."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of input [..., in_features], [..., out_features]."""
        return linear(input, self.weight, self.bias)


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

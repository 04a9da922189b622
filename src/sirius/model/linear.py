"""The linear layers of a model, attention's projections and the head among them, by our kernels."""

from typing import cast

from torch import Tensor, nn

from sirius.model.adopt import Part, adopt, own_forward
from sirius.model.matrix import Matrix
from sirius.model.prepared import Prepared


class MatrixLinear(Part):
    """A linear layer whose weights are a `Matrix`; its parameters and their names stay."""

    @property
    def matrix(self) -> Matrix:
        """The layer's weights."""
        return self.prepared.matrix(cast("nn.Linear", self), False)

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of input [..., in_features], [..., out_features]."""
        if (kept := vars(self).get("prepared")) is None:  # called by someone who kept it beyond `restore`
            return type(self).forward(self, input)
        if (now := kept.now()) is None:
            with kept.apart():
                return self.matrix.linear(input)
        return now.matrix(cast("nn.Linear", self), False).linear(input, None, now.invariant)


def adopt_linears(model: nn.Module, prepared: Prepared) -> None:
    """Make every plain linear layer of a model a `MatrixLinear`."""
    for module in list(model.modules()):
        if type(module) is nn.Linear and not own_forward(module):
            adopt(module, MatrixLinear, prepared)

"""The weights of linear layers as values: a kind of weights is a class, and the rest of sirius does not look inside.

`Dense` is the first kind: rows of numbers in memory. Another kind (rows on disk, rows of four bits) implements `Matrix`
and is put in by `prepare(model, matrix=...)`; docs/adding-a-matrix.md shows one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sirius.core import SparsityConfig
from sirius.errors import ConfigError
from sirius.kernels import ops
from sirius.kernels.activations import Activation


class Matrix(Protocol):
    """The weights of a linear layer [F, H], and its bias; row j belongs to neuron j, or to output j.

    replayable  whether a captured pass may run its products again without calling its methods
    index       [k] int64  the rows that are asked for; None: all
    invariant   a token's result must have the same bits however many tokens there are
    """

    @property
    def replayable(self) -> bool:
        """Whether products are operations on tensors that stay where they are, and nothing else."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Rows F and their length H."""
        ...

    @property
    def nbytes(self) -> int:
        """The bytes that a product with all rows reads, the bias left out."""
        ...

    def part(self, begin: int, end: int) -> "Matrix":
        """Return the rows from `begin` to `end`, which are not copied."""
        ...

    def linear(self, x: Tensor, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        """Return the products of x [..., H] with the rows, [..., F] or [..., k], the rows' biases added."""
        ...

    def project(self, z: Tensor, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        """Return the sum of the rows weighed by z [..., F] or [..., k], [..., H], the bias of the sum added."""
        ...


@runtime_checkable
class Joint(Protocol):
    """A matrix of a gate whose kernel computes gate and up in one call."""

    def glu(self, x: Tensor, up: Matrix, activation: Activation, index: Tensor | None) -> Tensor | None:
        """Return act(gate(x)) * up(x) [..., F] or [..., k] of x [..., H], None without such a kernel."""
        ...


class Dense(NamedTuple):
    """Rows of numbers in memory.

    weight  [F, H], the elements of a row side by side; or [B, F, H], a stack of sets of neurons, one for each row of x
    bias    of the rows [F], or where rows are added up, of the sum [H]; None: there is none
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def replayable(self) -> bool:
        return True  # weights stay where they are while texts are open

    @property
    def shape(self) -> tuple[int, int]:
        rows, length = self.weight.shape[-2:]
        return rows, length

    @property
    def nbytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def part(self, begin: int, end: int) -> "Dense":
        return Dense(self.weight[begin:end], None if self.bias is None else self.bias[begin:end])

    def linear(self, x: Tensor, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        return ops.linear(x, self.weight, self.bias, index, invariant)

    def project(self, z: Tensor, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        return ops.project(z, self.weight, self.bias, index, invariant)


MakeMatrix = Callable[[nn.Linear, bool], Matrix]


class Shelf(Protocol):
    """Holds what drafts read of layers whose blocks do not stay in memory; it is filled before it is read."""

    def takes(self, layer: nn.Linear) -> bool:
        """Tell whether a layer's block does not stay."""
        ...

    def put(self, layer: nn.Linear, value: Any) -> None:
        """Take what a draft reads of a layer: a named tuple that holds tensors."""
        ...

    def get(self, layer: nn.Linear) -> Any:
        """Return it; it stays only until that of another block is asked for."""
        ...


class Expected(NamedTuple):
    """What decoding costs, by calculation.

    plain, draft  seconds of a pass of the full model over one token, and of the draft; 0 without a draft
    acceptance    the chance that a guess is accepted if the one before it was
    """

    plain: float
    draft: float
    acceptance: float


class Placed(ABC):
    """Makes dense matrices of layers whose weights lie elsewhere between passes; they are brought when they are used.

    The weights of such layers are on PyTorch's device meta.

    expected  what passes and guesses are expected to be before they are measured
    rounded   bits of the rounded weights for which there is memory; 0: none
    """

    expected: "Expected"
    rounded: int

    @abstractmethod
    def rows_of(self, chosen: SparsityConfig) -> int:
        """Return for how many texts side by side there is memory; raise ConfigError where a draft has none at all."""

    @abstractmethod
    def __call__(self, layer: nn.Linear, transposed: bool = False) -> Dense:
        """Return a layer's weights, which stay only until the next block's are asked for; see `dense`."""

    @abstractmethod
    def rounded_shelf(self) -> Shelf:
        """Return an empty shelf for weights of fewer bits, by their layers."""

    @abstractmethod
    def kept_shelf(self) -> Shelf:
        """Return an empty shelf for the neurons that a draft keeps, by their down layers."""


def dense(layer: nn.Linear, transposed: bool = False) -> Dense:
    """Return a layer's weights where they lie.

    transposed  take the columns of the layer's weight for rows: its inputs are the neurons, as in an MLP's down layer
    """
    return Dense(layer.weight.t() if transposed else layer.weight, layer.bias)


def is_replayable(make: MakeMatrix) -> bool:
    """Tell whether passes with the matrices made may be captured, as far as it is known before they are made."""
    return getattr(make, "replayable", not isinstance(make, Placed))


def makes_dense(make: MakeMatrix) -> bool:
    """Tell whether weights are plain numbers in memory at the time of a product."""
    return make is dense or isinstance(make, Placed)


def check_matrix(make: object, layer: nn.Linear) -> None:
    """Raise ConfigError where `make` makes no `Matrix` of a layer, or one whose shape or products do not fit it."""
    outputs, inputs = layer.weight.shape
    for transposed, (rows, length) in ((False, (outputs, inputs)), (True, (inputs, outputs))):
        given = layer.weight.new_zeros(2, inputs)
        try:
            found: Any = make(layer, transposed)  # pyright: ignore[reportCallIssue] - what it is, is tried
            got = tuple(found.shape), bool(found.replayable), found.nbytes >= 0
            product = found.project(given) if transposed else found.linear(given)
        except Exception as error:  # whatever its author's code raises
            raise ConfigError(
                f"matrix makes the weights of a layer: matrix(layer, transposed) -> Matrix; got {error!r}, see "
                "docs/adding-a-matrix.md"
            ) from error
        if got[0] != (rows, length) or product.shape != (2, outputs):
            raise ConfigError(
                f"matrix(layer, transposed={transposed}) of a layer from {inputs} to {outputs} must have the shape "
                f"({rows}, {length}) and products of [2, {outputs}]; got {got[0]} and {list(product.shape)}"
            )


class Neurons(NamedTuple):
    """The weights of one gated MLP, down(act(gate(x)) * up(x)): row j of each matrix belongs to neuron j."""

    gate: Matrix
    up: Matrix
    down: Matrix

    def activated(
        self, x: Tensor, activation: Activation, index: Tensor | None = None, invariant: bool = False
    ) -> Tensor:
        """Return act(gate(x)) [..., F] of x [..., H], or [..., k] of the neurons at index [k] int64 alone."""
        gate = self.gate
        found = ops.gate(x, gate, activation, index, invariant) if isinstance(gate, Dense) else None
        return activation(gate.linear(x, index, invariant)) if found is None else found

    def sent(self, x: Tensor, activation: Activation, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        """Return z = act(gate(x)) * up(x) [..., F] or [..., k] of x [..., H], what each neuron sends on to down."""
        weights = self._dense()
        if weights and (found := ops.glu(x, *weights[:2], activation, index, invariant)) is not None:
            return found
        if isinstance(self.gate, Joint) and (joined := self.gate.glu(x, self.up, activation, index)) is not None:
            return joined
        return activation(self.gate.linear(x, index, invariant)) * self.up.linear(x, index, invariant)

    def mlp(self, x: Tensor, activation: Activation, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        """Return the MLP of x [..., H], with the neurons at index [k] int64 alone or with all."""
        weights = self._dense()
        if weights and (run := ops.kernel("finish", ops.Asked([x], weights, index, invariant))):
            return run(self.activated(x, activation, index, invariant), x, *weights[1:], index, True)
        return self.down.project(self.sent(x, activation, index, invariant), index, invariant)

    def mlp_each(self, x: Tensor, activation: Activation, index: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the MLP of x [B, T, H], each row with neurons of its own, bit for bit as if it were the only one.

        index   [sum of counts] int64  the neurons of all rows, one row after the other
        counts  [B]                    how many each row has
        """
        weights = self._dense()
        if weights and (found := ops.each(x, weights, activation, index, counts)) is not None:
            return found
        sets = index.split(list(counts))
        return torch.stack([self.mlp(row, activation, own, True) for row, own in zip(x, sets, strict=True)])

    def finish(self, gated: Tensor, x: Tensor, index: Tensor, invariant: bool = False) -> Tensor:
        """Return the MLP of x [..., H] with the neurons at index [k] int64 alone, given act(gate(x)) [..., F] of all.

        Only the neurons' rows of up and down are read.
        """
        weights, z = self._dense(), None
        if weights:
            if (found := ops.finish(gated, x, *weights[1:], index, invariant)) is not None:
                return found
            z = ops.up_rows(gated, x, *weights[1], index)
        z = gated[..., index] * self.up.linear(x, index, invariant) if z is None else z
        return self.down.project(z, index, invariant)

    def index_of(self, kept: Tensor, x: Tensor) -> Tensor:
        """Return where kept [F] bool is True, as the index that these weights take for x; see `ops.index_of`."""
        return ops.index_of(kept, x, weights[1].weight) if (weights := self._dense()) else kept.nonzero()[:, 0]

    @property
    def copied(self) -> bool:
        """Whether some of the neurons are read faster from a copy of them than where they lie."""
        return (weights := self._dense()) is not None and not ops.reads_rows(weights[0].weight)

    def rows(self, sets: Sequence[Tensor]) -> "Neurons":
        """Return a copy of dense neurons: of one set [k] int64, or of several of one size as a stack [B, k, H]."""
        weights = self._dense()
        assert weights is not None, "only dense weights are copied"
        index = sets[0] if len(sets) == 1 else torch.stack(list(sets))
        gate, up = (_rows(each, index) for each in weights[:2])
        return Neurons(gate, up, Dense(weights[2].weight[index], weights[2].bias))

    def _dense(self) -> tuple[Dense, Dense, Dense] | None:
        """Return the weights where all of them are dense: several operations at once have kernels then."""
        gate, up, down = self
        if isinstance(gate, Dense) and isinstance(up, Dense) and isinstance(down, Dense):
            return gate, up, down
        return None


def _rows(matrix: Dense, index: Tensor) -> Dense:
    bias = None if matrix.bias is None else matrix.bias[index]
    return Dense(matrix.weight[index], bias[:, None] if bias is not None and index.ndim > 1 else bias)

"""Which neurons of its gated MLPs a model computes in a pass: the routes, and who chooses them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sirius.errors import ConfigError
from sirius.model.matrix import MakeMatrix, Neurons, Placed, Shelf, dense
from sirius.model.mlp import SparseMLP
from sirius.model.prepared import Pass
from sirius.sparsity.base import PromptSparsity, Sparsity, TokenSparsity

Route = Callable[[SparseMLP, Tensor, Pass], Tensor]  # returns the MLP of x [B, T, H]


class Observe:
    """The dense route that shows someone what each neuron sends on, z [B, T, F]."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        self.see = see

    def __call__(self, mlp: SparseMLP, x: Tensor, now: Pass) -> Tensor:
        neurons = mlp.neurons_by(now.matrix)
        z = neurons.sent(x, mlp.activation, None, now.invariant)
        self.see(z)
        return neurons.down.project(z, None, now.invariant)


class Packed:
    """The sparse route of fixed neurons, copied once into memory of their own: one set, or one for each row."""

    def __init__(self, neurons: Neurons) -> None:
        self.neurons = neurons

    def __call__(self, mlp: SparseMLP, x: Tensor, now: Pass) -> Tensor:
        return self.neurons.mlp(x, mlp.activation, None, now.invariant)


class Shelved:
    """The sparse route of fixed neurons that were copied once, and do not stay in memory between passes."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def __call__(self, mlp: SparseMLP, x: Tensor, now: Pass) -> Tensor:
        neurons: Neurons = self.shelf.get(mlp.down)
        return neurons.mlp(x, mlp.activation, None, now.invariant)


class Indexed:
    """The sparse route of fixed neurons, read where they lie: one set [k] int64, or one for each row."""

    def __init__(self, *sets: Tensor) -> None:
        self.index = torch.cat(sets)  # `overwrite` writes to it
        self.counts = [len(index) for index in sets]

    def __call__(self, mlp: SparseMLP, x: Tensor, now: Pass) -> Tensor:
        neurons = mlp.neurons_by(now.matrix)
        if len(self.counts) == 1:
            return neurons.mlp(x, mlp.activation, self.index, now.invariant)
        return neurons.mlp_each(x, mlp.activation, self.index, self.counts)


class Tally:
    """How many neurons the draft steps of a batch have read, row by row; its tensors stay where they are.

    kept     [L, R] int64  neurons that the rows' steps have read so far, in each layer
    offered  [L, R] int64  neurons that were there for them
    """

    def __init__(self, layers: int, rows: int, device: torch.device) -> None:
        self.kept, self.offered = torch.zeros(2, layers, rows, dtype=torch.int64, device=device)

    def reserve(self, rows: int) -> None:
        """Make room for at least R rows."""
        layers, held = self.kept.shape
        both, more = (self.kept, self.offered), max(0, rows - held)
        self.kept, self.offered = (torch.cat([each, each.new_zeros(layers, more)], 1) for each in both)

    def shares(self, row: int) -> tuple[float, tuple[float, ...]]:
        """Return the share that a row's steps have read, 1 before the first: over all layers, and in each one.

        It asks a device once.
        """
        kept, offered = torch.stack([self.kept[:, row], self.offered[:, row]]).cpu().tolist()
        layers = tuple(part / whole if whole else 1.0 for part, whole in zip(kept, offered, strict=True))
        return sum(kept) / sum(offered) if any(offered) else 1.0, layers

    def move(self, source: int, target: int) -> None:
        """Let row `target` be what row `source` was, which begins anew."""
        for each in (self.kept, self.offered):
            each[:, target] = each[:, source]
            each[:, source] = 0

    def clear(self) -> None:
        """Let every row begin anew."""
        self.kept.zero_()
        self.offered.zero_()

    def add(self, layer: int, kept: Tensor, branches: Tensor) -> None:
        """Count the neurons that a step of a layer keeps, [B, 1 or T, F] bool; branches [B, T] as `Pass` has them."""
        lives = branches.sum(1) > 0
        self.kept[layer, : len(lives)] += kept.any(1).sum(1) * lives
        self.offered[layer, : len(lives)] += lives * kept.shape[2]


class Chosen:
    """The sparse route of a set per token: the gate in full, then up and down of the neurons it opens.

    A row's tokens are branches of one tree, and share a set unless `per_branch`, so that a step reads no more than one
    token's neurons. It is chosen by their mean |act(gate)|, each weighed by how likely its branch is. Source: Sirius
    (arXiv 2409.03856), its repository's option `patternstrict`; the weights are ours (dev/2026-11-23-trees.md).

    tally  None: the tokens are no branches of a tree, each has a set of its own, and nothing is counted
    """

    def __init__(self, method: TokenSparsity, layer: int, tally: Tally | None) -> None:
        self.method, self.layer, self.tally = method, layer, tally

    def __call__(self, mlp: SparseMLP, x: Tensor, now: Pass) -> Tensor:
        neurons = mlp.neurons_by(now.matrix)
        gated = neurons.activated(x, mlp.activation, None, now.invariant)
        size, tally = gated.abs(), self.tally
        if x.shape[1] > 1 and tally is not None and not self.method.config.per_branch:
            size = (size * now.branches.to(size)[..., None]).sum(1, keepdim=True)
        if size.shape[:-1].numel() == 1 and self.method.fixed(self.layer) is not None:
            return neurons.finish(gated, x, self.method.select(self.layer, size.flatten()), now.invariant)
        kept = self.method.choose(self.layer, size)
        if not isinstance(kept, Tensor) or kept.dtype is not torch.bool or kept.shape != size.shape:
            got = f"{list(kept.shape)} {kept.dtype}" if isinstance(kept, Tensor) else type(kept).__name__
            name = type(self.method).__name__
            raise ConfigError(f"{name}.choose must give which neurons to keep, {list(size.shape)} bool; got {got}")
        if tally is not None:
            if kept.shape[1] > 1:
                kept = kept & (now.branches > 0)[..., None]
            tally.add(self.layer, kept, now.branches)
        if kept.shape[:-1].numel() > 1:  # several sets
            gated = gated * kept
        return neurons.finish(gated, x, neurons.index_of(kept.flatten(0, 1).any(0), x), now.invariant)


def fixed_routes(
    methods: Sequence[PromptSparsity], mlps: Sequence[SparseMLP], matrix: MakeMatrix = dense
) -> list[Route | None]:
    """Return the draft's route in each MLP for rows of prompts, each with its method; None is the dense one.

    matrix  makes the weights that the draft reads
    """
    first, others = methods[0], methods[1:]
    if first.config.shared_set:
        sets = [[first.select(layer, others)] for layer in range(len(mlps))]
    else:
        sets = [[method.select(layer) for method in methods] for layer in range(len(mlps))]
    _check(first, sets, mlps)
    if isinstance(matrix, Placed):
        shelf = matrix.kept_shelf()
        return [_placed_route(each, mlp, matrix, shelf) for each, mlp in zip(sets, mlps, strict=True)]
    return [_fixed_route(each, mlp, matrix) for each, mlp in zip(sets, mlps, strict=True)]


def _fixed_route(sets: list[Tensor], mlp: SparseMLP, matrix: MakeMatrix) -> Route | None:
    if all(len(index) == mlp.size for index in sets):
        return None
    neurons = mlp.neurons_by(matrix)
    return Packed(neurons.rows(sets)) if neurons.copied else Indexed(*sets)


def _placed_route(sets: list[Tensor], mlp: SparseMLP, matrix: Placed, shelf: Shelf) -> Route | None:
    """Return the route of an MLP whose weights may lie elsewhere: its neurons are copied while they are here."""
    if mlp.in_memory or all(len(index) == mlp.size for index in sets):
        return _fixed_route(sets, mlp, matrix)
    neurons = mlp.neurons_by(matrix).rows(sets)
    if not shelf.takes(mlp.down):
        return Packed(neurons)
    shelf.put(mlp.down, neurons)
    return Shelved(shelf)


def overwrite(old: Route | None, new: Route | None) -> bool:
    """Write the neurons of a new route over those of an old one, which stay where they are in memory.

    Returns whether it could be done: both must be of one kind, and of one size.
    """
    if not isinstance(old, Indexed) or not isinstance(new, Indexed):
        return old is new is None
    if old.counts != new.counts:
        return False
    old.index.copy_(new.index)
    return True


def _check(method: Sparsity, sets: list[list[Tensor]], mlps: Sequence[SparseMLP]) -> None:
    """Refuse what is no set of neurons; a third party's method may have meant something else. Asks a device once."""
    pairs = [(index, mlp.size) for each, mlp in zip(sets, mlps, strict=True) for index in each]
    wrong = next((n for n, (i, _) in enumerate(pairs) if i.dtype != torch.int64 or i.ndim != 1 or not len(i)), None)
    if wrong is None:
        ordered = [(index.sort().values, size) for index, size in pairs]
        bad = torch.stack([(i.diff() == 0).any() | (i[0] < 0) | (i[-1] >= size) for i, size in ordered])
        if not bool(bad.any()):
            return
        wrong = int(bad.int().argmax())
    index, size = pairs[wrong]
    raise ConfigError(
        f"{type(method).__name__}.select must give distinct neurons of {size} as [k] int64; "
        f"got {list(index.shape)} {index.dtype}"
    )

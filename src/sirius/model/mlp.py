"""What a model's gated MLP becomes: the same weights, neuron by neuron."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sirius.errors import ConfigError, UnsupportedModelError
from sirius.kernels import gated as kernel
from sirius.kernels.dispatch import lie_together, places, reads_rows
from sirius.kernels.gated import Neurons
from sirius.model.linear import more_than_itself, obstacle, own_forward
from sirius.model.memory import moved, side_by_side
from sirius.sparsity.base import PromptSparsity, Sparsity, TokenSparsity

Route = Callable[["SparseMLP", Tensor], Tensor]


class SparseMLP(nn.Module):
    """A gated MLP that computes what it did before, or by another route while `route` is set.

    Made by `take_over` of the MLP itself, whose layers, names and hooks stay, so checkpoints look as before. `down`'s
    weight becomes a transposed view of neuron-major memory, and on the CPU, in evaluation, a neuron's row of it follows
    that of `up`. Nothing is stored twice.

    original    the class that it had
    names       what its gate, up (or gate_up) and down layers are called
    act         what its activation is called
    """

    original: type[nn.Module]
    names: dict[str, str]
    act: str
    route: Route | None

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """What the gate goes through."""
        found = getattr(self, self.act)
        if self.route is not None and (reason := more_than_itself(found)) is not None:
            raise UnsupportedModelError(f"{self.act} (activation) {reason}")
        return found

    @property
    def size(self) -> int:
        """The number of neurons F."""
        return self._linear("down").in_features

    @property
    def neurons(self) -> Neurons:
        """All neurons, as views of the linear layers' own memory."""
        down = self._linear("down")
        if "gate_up" in self.names:
            both = self._linear("gate_up")
            gate, up = both.weight.chunk(2)
            gate_bias, up_bias = (None, None) if both.bias is None else both.bias.chunk(2)
        else:
            gate, up = self._linear("gate").weight, self._linear("up").weight
            gate_bias, up_bias = self._linear("gate").bias, self._linear("up").bias
        return Neurons(gate, up, down.weight.t(), gate_bias, up_bias, down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP of x [..., H], by the route that is set."""
        if self.route is not None:
            return self.route(self, x)
        if not self._is_plain():
            return self._by_layers(x)
        return kernel.gated_mlp(x, self.neurons, self.activation)

    def restore(self) -> None:
        """Make it what it was before, its memory laid out as before; what was changed about its layers since stays."""
        with torch.inference_mode(False):
            for weight in self.parameters():
                weight.data = weight.data.contiguous()
        for name in ("names", "act", "route"):
            del self.__dict__[name]
        self.__class__ = self.__dict__.pop("original")

    def train(self, mode: bool = True) -> "SparseMLP":
        """Set the mode, PyTorch's way; optimisers want weights in one piece, so they are laid out in evaluation."""
        super().train(mode)
        self.settle()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the weights by name, PyTorch's way; those that lie apart as copies in one piece, for files."""
        found: dict[str, Any] = super().state_dict(*args, **kwargs)
        if not kwargs.get("keep_vars", False):
            own = {f"{kwargs.get('prefix', '')}{name}" for name, _ in self.named_parameters()}
            for name in own & found.keys():
                found[name] = found[name].contiguous()
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseMLP":
        """Move or convert the weights, PyTorch's way, and lay them out anew where that took them apart."""
        super()._apply(fn, recurse)
        self.settle()
        return self

    def settle(self) -> None:
        """Lay the weights out anew where something took them apart, unless layers were changed since."""
        if not self._is_plain():
            return
        down = self._linear("down").weight
        if down.device.type != "cpu" or not down.is_shared():  # another process would not learn of it
            self._lay_out()

    def _lay_out(self) -> None:
        """Put the rows of each neuron together, where they are not; in training lay weights out as PyTorch does."""
        neurons = self.neurons
        separate = "gate_up" not in self.names and lie_together(neurons.up, neurons.down)
        with torch.inference_mode(False):  # the weights stay trainable, wherever they are prepared
            down = self._linear("down").weight
            if self.training:
                for role in self.names:
                    weight = self._linear(role).weight
                    weight.data = weight.data.contiguous()
            elif separate and not _beside(neurons):
                gate, up = self._linear("gate").weight, self._linear("up").weight
                gate.data = moved(gate.data)
                up.data, rows = side_by_side(up.data, down.data.t())
                down.data = rows.t()
            elif not separate and not neurons.down.is_contiguous():
                for role in self.names:
                    weight = self._linear(role).weight
                    weight.data = weight.data.contiguous()
                down.data = down.data.t().contiguous().t()

    def _is_plain(self) -> bool:
        layers = all(obstacle(getattr(self, name)) is None for name in self.names.values())
        return layers and more_than_itself(self.activation) is None

    def _by_layers(self, x: Tensor) -> Tensor:
        """Return the MLP of x by calling its layers, whatever they are by now."""
        called = {role: getattr(self, name) for role, name in self.names.items()}
        if "gate_up" in called:
            gate, up = called["gate_up"](x).chunk(2, -1)
        else:
            gate, up = called["gate"](x), called["up"](x)
        return called["down"](self.activation(gate) * up)

    def _linear(self, role: str) -> nn.Linear:
        layer = getattr(self, self.names[role])
        if (reason := obstacle(layer)) is not None:
            raise UnsupportedModelError(f"{self.names[role]} ({role}) {reason}")
        return layer


def take_over(module: nn.Module, names: dict[str, str], act: str) -> SparseMLP:
    """Make a gated MLP a `SparseMLP` where it stands; `names` and `act` are that class's.

    Raises UnsupportedModelError where it has attributes that we call the same.
    """
    before = type(module)
    if taken := [name for name in SparseMLP.__annotations__ if hasattr(module, name)]:
        raise UnsupportedModelError(f"{before.__name__} has {', '.join(taken)} of its own, names that sirius needs")
    module.__class__ = SparseMLP
    mlp = cast("SparseMLP", module)
    mlp.original, mlp.names, mlp.act, mlp.route = before, names, act, None
    try:
        mlp.settle()
    except BaseException:  # memory that ran out
        mlp.restore()
        raise
    return mlp


def check_layers(path: str, mlp: nn.Module, names: dict[str, str], act: str) -> None:
    """Raise UnsupportedModelError where a gated MLP, the model's `path`, is more than its weights and its formula.

    names, act  as `SparseMLP` has them
    """
    reasons = {f"{path}.{name} ({role})": obstacle(getattr(mlp, name)) for role, name in names.items()}
    reasons[f"{path}.{act} (activation)"] = more_than_itself(getattr(mlp, act))
    if own_forward(mlp):
        reasons[path] = "has a forward of its own, which may go past the chosen neurons; take it off"
    for place, reason in reasons.items():
        if reason is not None:
            raise UnsupportedModelError(f"{place} {reason}")


def _beside(neurons: Neurons) -> bool:
    """Tell whether the rows of down each follow their neuron's of up."""
    apart = neurons.up.shape[1] * neurons.up.element_size()
    return neurons.down.data_ptr() - neurons.up.data_ptr() == apart and neurons.up.stride(0) == neurons.down.stride(0)


class Observe:
    """The dense route that shows someone what each neuron sends on, z [B, T, F]."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        self.see = see

    def __call__(self, mlp: SparseMLP, x: Tensor) -> Tensor:
        neurons = mlp.neurons
        z = kernel.glu(x, neurons, mlp.activation)
        self.see(z)
        return kernel.add_up(z, neurons)


class Packed:
    """The sparse route of fixed neurons, copied once into memory of their own: one set, or one for each row."""

    def __init__(self, neurons: Neurons) -> None:
        self.neurons = neurons

    def __call__(self, mlp: SparseMLP, x: Tensor) -> Tensor:
        return kernel.gated_mlp(x, self.neurons, mlp.activation)


class Indexed:
    """The sparse route of fixed neurons, read where they lie: one set [k] int64, or one for each row."""

    def __init__(self, *sets: Tensor) -> None:
        self.index = torch.cat(sets)  # `renewed` writes to it
        self.counts = [len(index) for index in sets]

    def __call__(self, mlp: SparseMLP, x: Tensor) -> Tensor:
        if len(self.counts) == 1:
            return kernel.gated_mlp(x, mlp.neurons, mlp.activation, self.index)
        return kernel.gated_mlp_each(x, mlp.neurons, mlp.activation, self.index, self.counts)


class Tally:
    """The branches of a batch's draft steps, and what the steps have read, row by row; its tensors stay where they are.

    weights  [B, T]  how likely each branch of the pass at hand is, 0 of a dead one
    kept     [R]     neurons that the rows' steps have read so far, over all layers
    offered  [R]     neurons that were there for them
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.weights = torch.ones(rows, 1, device=device)
        self.kept, self.offered = torch.zeros(2, rows, dtype=torch.int64, device=device)

    def reserve(self, rows: int) -> None:
        """Make room for at least R rows."""
        more = max(0, rows - len(self.kept))
        self.kept, self.offered = (torch.cat([each, each.new_zeros(more)]) for each in (self.kept, self.offered))

    def share(self, row: int) -> float:
        """Return the share that a row's steps have read, 1 before the first."""
        offered = int(self.offered[row])
        return int(self.kept[row]) / offered if offered else 1.0

    def move(self, source: int, target: int) -> None:
        """Let row `target` be what row `source` was, which begins anew."""
        for each in (self.kept, self.offered):
            each[target] = each[source]
            each[source] = 0

    def clear(self) -> None:
        """Let every row begin anew."""
        self.kept.zero_()
        self.offered.zero_()

    def add(self, kept: Tensor) -> None:
        """Count what a step of one layer keeps, [B, 1 or T, F] bool."""
        lives = self.weights.sum(1) > 0
        self.kept[: len(lives)] += kept.any(1).sum(1) * lives
        self.offered[: len(lives)] += lives * kept.shape[2]


class Chosen:
    """The sparse route of a set per token: the gate in full, then up and down of the neurons it opens.

    A row's tokens are branches of one tree, and share a set unless `per_branch`, so that a step reads no more than one
    token's neurons. It is chosen by their mean |act(gate)|, each weighed by how likely its branch is. Source: Sirius
    (arXiv 2409.03856), its repository's option `patternstrict`; the weights are ours (dev/2026-11-23-trees.md).

    tally  None: the tokens are no branches of a tree, each has a set of its own, and nothing is counted
    """

    def __init__(self, method: TokenSparsity, layer: int, tally: Tally | None) -> None:
        self.method, self.layer, self.tally = method, layer, tally

    def __call__(self, mlp: SparseMLP, x: Tensor) -> Tensor:
        neurons = mlp.neurons
        gated = kernel.gate(x, neurons, mlp.activation)
        size, tally = gated.abs(), self.tally
        if x.shape[1] > 1 and tally is not None and not self.method.config.per_branch:
            size = (size * tally.weights.to(size)[..., None]).sum(1, keepdim=True)
        if size.shape[:-1].numel() == 1 and self.method.fixed(self.layer) is not None:
            return kernel.gated_mlp_rows(gated, x, neurons, self.method.select(self.layer, size.flatten()))
        kept = self.method.choose(self.layer, size)
        if tally is not None:
            if kept.shape[1] > 1:
                kept = kept & (tally.weights > 0)[..., None]
            tally.add(kept)
        if kept.shape[:-1].numel() > 1:  # several sets
            gated = gated * kept
        return kernel.gated_mlp_rows(gated, x, neurons, places(kept.flatten(0, 1).any(0), x, neurons.up))


def fixed_routes(methods: Sequence[PromptSparsity], mlps: Sequence[SparseMLP]) -> list[Route | None]:
    """Return the draft's route in each MLP for rows of prompts, each with its method; None is the dense one."""
    first, others = methods[0], methods[1:]
    if first.config.shared_set:
        sets = [[first.select(layer, others)] for layer in range(len(mlps))]
    else:
        sets = [[method.select(layer) for method in methods] for layer in range(len(mlps))]
    _check(first, sets, mlps)
    return [_fixed_route(each, mlp) for each, mlp in zip(sets, mlps, strict=True)]


def _fixed_route(sets: list[Tensor], mlp: SparseMLP) -> Route | None:
    if all(len(index) == mlp.size for index in sets):
        return None
    if reads_rows(mlp.neurons.gate):
        return Indexed(*sets)
    copies = [mlp.neurons.rows(index) for index in sets]
    return Packed(Neurons.stack(copies) if len(copies) > 1 else copies[0])


def renewed(old: Route | None, new: Route | None) -> bool:
    """Let a route read the neurons of another where both are of one kind and size; tell whether they are."""
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


def example(layer: nn.Linear) -> Tensor:
    """Return two random tokens [2, H] for an MLP whose gate, or gate and up, are a layer."""
    weight = layer.weight
    return torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)


@torch.no_grad()
def agrees(mlp: SparseMLP, x: Tensor, want: object) -> bool:
    """Tell whether an MLP computes of x what is wanted, up to the rounding of the dtype; no hook learns of it."""
    got = mlp.forward(x)
    if not isinstance(want, Tensor) or want.shape != got.shape:
        return False
    bounds = torch.finfo(x.dtype)
    return bool((want - got).norm() <= 20 * bounds.eps * want.norm() + bounds.tiny)

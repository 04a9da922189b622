"""A model's gated MLP as a part of ours: its weights neuron by neuron, computed as the pass at hand says."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sirius.errors import UnsupportedModelError
from sirius.kernels.ops import best_side_by_side
from sirius.model.adopt import Part, adopt, give_back, hook_obstacle, obstacle, own_forward
from sirius.model.matrix import MakeMatrix, Neurons
from sirius.model.memory import moved, side_by_side
from sirius.model.prepared import Prepared


class Roles(NamedTuple):
    """What the children of a gated MLP are.

    layers  the names of its gate and up (or gate_up) and down layers
    act     the name of its activation
    """

    layers: dict[str, str]
    act: str


class SparseMLP(Part):
    """A gated MLP that computes what it did before, and in a pass of ours what the pass says.

    Its layers, names and hooks stay, so checkpoints look as before. `down`'s weight becomes a transposed view of
    neuron-major memory, and on the CPU, in evaluation, a neuron's row of it follows that of `up`. Nothing is stored
    twice.

    roles   which child is what
    number  its index among the model's gated MLPs
    """

    roles: Roles
    number: int

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The function that the gate goes through."""
        return getattr(self, self.roles.act)

    @property
    def size(self) -> int:
        """The number of neurons F."""
        return self._linear("down").in_features

    @property
    def down(self) -> nn.Linear:
        """Its down layer."""
        return self._linear("down")

    @property
    def in_memory(self) -> bool:
        """Whether its weights stay in memory between passes."""
        return not any(each.is_meta for each in self.parameters())

    @property
    def neurons(self) -> Neurons:
        """All neurons of the full model."""
        return self.neurons_by(self.prepared.matrix)

    def neurons_by(self, make: MakeMatrix) -> Neurons:
        """Return all neurons, their weights as `make` makes them of the linear layers."""
        if "gate_up" in self.roles.layers:
            both = make(self._linear("gate_up"), False)
            gate, up = both.part(0, self.size), both.part(self.size, 2 * self.size)
        else:
            gate, up = make(self._linear("gate"), False), make(self._linear("up"), False)
        return Neurons(gate, up, make(self._linear("down"), True))

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP of x [..., H], computed as the pass at hand says."""
        now = self.prepared.now()
        if now is None:
            with self.prepared.apart():
                return self.neurons.mlp(x, self.activation) if self._is_plain() else super().forward(x)
        route = now.routes[self.number]
        if route is not None:
            return route(self, x, now)
        return self.neurons_by(now.matrix).mlp(x, self.activation, None, now.invariant)

    def restore(self) -> None:
        """Make it what it was before, its memory laid out as before; what was changed about its layers since stays."""
        with torch.inference_mode(False):
            for weight in self.parameters():
                weight.data = weight.data.contiguous()
        give_back(self)

    def train(self, mode: bool = True) -> "SparseMLP":
        """Set the mode, PyTorch's way; optimisers want weights in one piece, so only evaluation lays them out anew."""
        super().train(mode)
        self.lay_out()
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
        self.lay_out()
        return self

    def lay_out(self) -> None:
        """Put the rows of each neuron together where they are not; in training lay weights out as PyTorch does.

        Nothing is done where layers were changed since the model was prepared, where another process shares the
        weights, or where they are not in memory.
        """
        if not self._is_plain() or not self.in_memory:
            return
        up = self._linear("up").weight if "up" in self.roles.layers else None
        down = self._linear("down").weight
        if down.device.type == "cpu" and down.is_shared():  # the other process would not learn of it
            return
        with torch.inference_mode(False):  # the weights stay trainable, wherever they are prepared
            rows = down.t()
            if self.training:
                self._gather()
            elif up is not None and best_side_by_side(up, rows):
                if not _beside(up, rows):
                    gate = self._linear("gate").weight
                    gate.data = moved(gate.data)
                    up.data, rows = side_by_side(up.data, down.data.t())
                    down.data = rows.t()
            elif not rows.is_contiguous():
                self._gather()
                down.data = down.data.t().contiguous().t()

    def _gather(self) -> None:
        """Lay every weight out as PyTorch does."""
        for role in self.roles.layers:
            weight = self._linear(role).weight
            weight.data = weight.data.contiguous()

    def _is_plain(self) -> bool:
        return not any(reason for _, reason in _obstacles("", self, self.roles))

    def _linear(self, role: str) -> nn.Linear:
        return cast("nn.Linear", getattr(self, self.roles.layers[role]))


def adopt_mlp(module: nn.Module, roles: Roles, number: int, prepared: Prepared) -> SparseMLP:
    """Make a gated MLP a `SparseMLP` where it stands.

    Raises UnsupportedModelError where it has attributes that we call the same.
    """
    if taken := [name for name in ("roles", "number", "prepared") if hasattr(module, name)]:
        name = type(module).__name__
        raise UnsupportedModelError(f"{name} has {', '.join(taken)} of its own, names that sirius needs")
    mlp = adopt(module, SparseMLP, prepared, roles=roles, number=number)
    try:
        mlp.lay_out()
    except BaseException:  # memory that ran out
        mlp.restore()
        raise
    return mlp


def check_layers(path: str, mlp: nn.Module, roles: Roles) -> None:
    """Raise UnsupportedModelError where a gated MLP, the model's `path`, is more than its weights and its formula."""
    for layer, reason in _obstacles(path, mlp, roles):
        if reason is not None:
            raise UnsupportedModelError(f"{layer} {reason}")


def _obstacles(path: str, mlp: nn.Module, roles: Roles) -> list[tuple[str, str | None]]:
    """Return why an MLP may not be computed without a call of its children: each one's path, and a reason or None."""
    found = [(f"{path}.{name} ({role})", obstacle(getattr(mlp, name))) for role, name in roles.layers.items()]
    found.append((f"{path}.{roles.act} (activation)", hook_obstacle(getattr(mlp, roles.act))))
    if own_forward(mlp):
        found.append((path, "has a forward of its own, which may go past the chosen neurons; take it off"))
    return found


def _beside(up: Tensor, down: Tensor) -> bool:
    """Tell whether the rows of down each follow their neuron's of up."""
    apart = up.shape[1] * up.element_size()
    return down.data_ptr() - up.data_ptr() == apart and up.stride(0) == down.stride(0)


@torch.no_grad()
def agrees(mlp: SparseMLP, x: Tensor, want: object) -> bool:
    """Tell whether an MLP computes of x what is wanted, up to the rounding of the dtype; no hook learns of it."""
    got = mlp.forward(x)
    if not isinstance(want, Tensor) or want.shape != got.shape:
        return False
    bounds = torch.finfo(x.dtype)
    return bool((want - got).norm() <= 20 * bounds.eps * want.norm() + bounds.tiny)

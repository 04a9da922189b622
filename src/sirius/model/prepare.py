"""Put our parts into a transformers model, and take them out again."""

from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sirius.errors import UnsupportedModelError
from sirius.model.adopt import Part, give_back, is_ours, own_forward, parts_of
from sirius.model.attention import adopt_attention
from sirius.model.find import check_config, check_finite, check_head, check_kind, check_weights, gated_mlps
from sirius.model.inputs import check_preparing
from sirius.model.linear import MatrixLinear, adopt_linears
from sirius.model.matrix import MakeMatrix, check_matrix, dense, makes_dense
from sirius.model.mlp import Roles, SparseMLP, adopt_mlp, agrees, check_layers
from sirius.model.norm import adopt_norms
from sirius.model.prepared import Prepared, prepared_of
from sirius.stats import Parameters

FORMULA = "down(act(gate(x)) * up(x))"


def prepare(model: PreTrainedModel, *, matrix: MakeMatrix | None = None) -> list[SparseMLP]:
    """Make every block's gated MLP a `SparseMLP` and return them, first block first.

    The model computes what it did before. Preparing twice lays out anew what was taken apart, and changes nothing else.
    A prepared model must not be altered while a text is decoded; what was altered is found when the next one begins.

    matrix  makes the weights of a linear layer, see docs/adding-a-matrix.md; None: as they lie in memory, or what an
            earlier call said

    Where anything does not fit, the model is left as it was. Raises UnsupportedModelError, naming the module and the
    reason, ModelError where weights are no finite numbers, and ConfigError where `matrix` makes no weights.
    """
    check_kind(model)
    check_head(model)
    with (kept := prepared_of(model)).lock:
        mlps = _prepare(model, kept)
        if matrix is not None:  # after the MLPs were tried with the weights themselves
            first, *_, last = (cast("nn.Linear", layer) for _, layer in parts_of(model, MatrixLinear))
            check_matrix(matrix, first)
            check_matrix(matrix, last)
            kept.matrix = matrix
        return mlps


def _prepare(model: PreTrainedModel, kept: Prepared) -> list[SparseMLP]:
    check_weights(model)
    check_preparing(model)
    ready = dict(parts_of(model, SparseMLP))
    for number, (path, mlp) in enumerate(ready.items()):
        check_layers(path, mlp, mlp.roles)
        mlp.lay_out()
        mlp.number = number  # blocks may have gone since
    if ready:
        return list(ready.values())
    check_config(model.config)
    found = gated_mlps(model)
    with ExitStack() as undo:
        undo.callback(_give_back_all, model)  # after the MLPs' memory is as it was
        mlps = [_adopt(path, module, roles, number, kept, undo) for number, (path, module, roles) in enumerate(found)]
        adopt_linears(model, kept)
        adopt_norms(model, kept)
        adopt_attention(model, kept)
        undo.pop_all()
    return mlps


def _give_back_all(model: nn.Module) -> None:
    for _, part in list(parts_of(model, Part)):
        give_back(part)


def restore(model: PreTrainedModel) -> None:
    """Make the modules what they were before the model was prepared.

    Raises UnsupportedModelError, and changes nothing, where an MLP has got a forward of its own since, a module
    another class, or where weights are not in memory.
    """
    check_kind(model)
    with (kept := prepared_of(model)).lock:
        if kept.placed is not None:
            raise UnsupportedModelError(
                "some weights of this model are not in memory, as it was loaded with a memory budget; load it without"
            )
        mlps = dict(parts_of(model, SparseMLP))
        for path, mlp in mlps.items():
            if own_forward(mlp):
                raise UnsupportedModelError(
                    f"{path} has got a forward of its own since it was prepared; take it off first"
                )
        if changed := next((path for path, part in parts_of(model, Part) if not is_ours(part)), None):
            raise UnsupportedModelError(
                f"{changed} has got another class since it was prepared (a parametrization?); undo that first"
            )
        for mlp in mlps.values():
            mlp.restore()
        _give_back_all(model)
        kept.idle.clear()
        kept.twins.clear()
        kept.matrix, kept.own_attention, kept.last_twin = dense, False, None


def sparse_mlps(model: nn.Module) -> list[SparseMLP]:
    """Return the MLPs of a prepared model, first block first; none where it is not prepared."""
    return [mlp for _, mlp in parts_of(model, SparseMLP)]


def count_parameters(model: PreTrainedModel, matrix: MakeMatrix | None = None) -> Parameters:
    """Count the parameters of a prepared model, and the bytes of its weights.

    matrix  makes the weights of a linear layer; None: those of the full model
    """
    made = prepared_of(model).matrix
    mlps, make = sparse_mlps(model), matrix or (dense if makes_dense(made) else made)
    neurons = [mlp.neurons_by(make) for mlp in mlps]
    linears = [cast("nn.Linear", layer) for _, layer in parts_of(model, MatrixLinear)]
    known = {id(layer.weight): make(layer, False).nbytes for layer in linears}
    downs = [getattr(mlp, mlp.roles.layers["down"]).weight for mlp in mlps]  # whose rows are its columns
    known |= {id(down): each.down.nbytes for down, each in zip(downs, neurons, strict=True)}
    inside = cast("Tensor", model.get_input_embeddings().weight)
    tied = getattr(cast("Any", model).get_output_embeddings(), "weight", None) is inside
    gate, up, down = (sum(each[part].nbytes for each in neurons) for part in range(3))
    return Parameters(
        total=sum(p.numel() for p in model.parameters()),
        weights=sum(known.get(id(p), p.nbytes) for p in model.parameters()),
        embedding=0 if tied else inside.nbytes,
        gate=gate,
        up=up,
        down=down,
    )


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def _adopt(path: str, module: nn.Module, roles: Roles, number: int, kept: Prepared, undo: ExitStack) -> SparseMLP:
    """Make a gated MLP a `SparseMLP`, which `undo` undoes, and check that it computes what it did."""
    gate = getattr(module, roles.layers.get("gate") or roles.layers["gate_up"]).weight
    if gate.is_meta:  # `offload.load` has a block of the same class tried
        mlp = adopt_mlp(module, roles, number, kept)
        undo.callback(mlp.restore)
        return mlp
    x = torch.randn(2, gate.shape[1], generator=torch.Generator().manual_seed(0)).to(gate)
    try:
        want = module.forward(x)  # past its hooks, which are not to see this
    except (TypeError, RuntimeError) as error:
        raise UnsupportedModelError(f"{path} cannot be called as {FORMULA}: {error}") from error
    mlp = adopt_mlp(module, roles, number, kept)
    undo.callback(mlp.restore)
    try:
        same = agrees(mlp, x, want)
    except (TypeError, RuntimeError) as error:
        raise UnsupportedModelError(f"{path} computes something else than {FORMULA}: {error}") from error
    if not same:
        check_finite(path, mlp)
        raise UnsupportedModelError(f"{path} computes something else than {FORMULA}")
    return mlp

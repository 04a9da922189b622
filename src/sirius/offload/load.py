"""Load a model of which a part stays in memory, while the rest comes from its files or from the host's memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedModel

from sirius.errors import ModelError, UnsupportedModelError
from sirius.kernels.ops import best_side_by_side
from sirius.model.loading import Source, attempt, check_complete, check_folder
from sirius.model.prepare import prepare
from sirius.model.prepared import prepared_of
from sirius.offload.checkpoint import INDEX, NUMBERS, WEIGHTS, Stored, read_checkpoint
from sirius.offload.guard import guard
from sirius.offload.plan import MARGIN
from sirius.offload.ring import CudaMover, Mover, Ring, ThreadMover, Throttle, Unit
from sirius.offload.shelf import FileStore, HostStore
from sirius.offload.sizes import Layers, layers_of
from sirius.offload.stream import BlockPart, HostPart, Planned, Shelves, Stream, Streamed, Views, check_finite, put


def check_source(source: Source) -> None:
    """Raise UnsupportedModelError of a GGUF file, and ModelError of a folder that holds no model."""
    if source.gguf_file:
        raise UnsupportedModelError(
            f"{source.name} is a GGUF file, whose weights cannot be read in part; a memory budget needs safetensors"
        )
    check_folder(source.location)


def find_weights(source: Source) -> dict[str, Stored]:
    """Return the tensors of a model's files by name; those of a hub id are fetched.

    Raises ModelError where files are missing or broken.
    """
    folder = Path(source.location)
    if not folder.is_dir():
        patterns = [WEIGHTS, INDEX, "model-*.safetensors"]
        fetch = partial(snapshot_download, revision=source.revision, allow_patterns=patterns)
        folder = Path(attempt(source, "weights", fetch))
    return read_checkpoint(folder)


def match(source: Source, model: PreTrainedModel, stored: dict[str, Stored]) -> dict[int, Stored]:
    """Return where each parameter of a model is stored, and each buffer that belongs to a checkpoint, by the id.

    Raises ModelError where the files lack some, hold others, or hold them in other numbers than `NUMBERS`.
    """
    model.tie_weights()
    held = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, each in held.items():
        names.setdefault(id(each), []).append(name)
    found = {key: [stored[name] for name in own if name in stored] for key, own in names.items()}
    shapes = {key: tuple(held[own[0]].shape) for key, own in names.items()}
    report = {
        "missing_keys": [names[key][0] for key, places in found.items() if not places],
        "mismatched_keys": [
            (each.name, each.shape, shapes[key])
            for key, places in found.items()
            for each in places
            if each.shape != shapes[key]
        ],
        "unexpected_keys": sorted(stored.keys() - held.keys()),
    }
    check_complete(source, report)
    for places in found.values():
        _check_places(places)
    return {key: places[0] for key, places in found.items()}


def _check_places(places: Sequence[Stored]) -> None:
    """Raise ModelError where a weight is not stored as floats of 16 bits or more, or tied weights are stored apart."""
    first, *others = places
    if first.dtype not in NUMBERS.values():
        raise ModelError(
            f"{first.name} is stored as {first.dtype}; a memory budget needs {', '.join(map(str, NUMBERS.values()))}"
        )
    for other in others:
        parts = ((first.rows(*rows).clone(), other.rows(*rows)) for rows in first.chunks(1 << 23))
        if not all(torch.equal(one.double(), another.double()) for one, another in parts):
            raise ModelError(
                f"the configuration ties {first.name} to {other.name}, and their weights differ; set "
                "tie_word_embeddings to false in config.json"
            )


@dataclass(frozen=True)
class Transfer:
    """How weights that do not stay in memory come to a device.

    from_host   from the host's memory, where they are kept; otherwise from their files
    throttle    what bounds the bytes per second, on a CPU
    """

    device: torch.device
    from_host: bool
    throttle: float | None = None

    def make_mover(self) -> Mover:
        """Return what brings them."""
        return ThreadMover(Throttle(self.throttle)) if self.device.type == "cpu" else CudaMover(self.device)


def fill(model: PreTrainedModel, where: dict[int, Stored], planned: Planned, transfer: Transfer) -> None:
    """Bring a model's weights from meta to a device, but for those that do not stay; then prepare it.

    where  each parameter's place, by its id

    Raises what `prepare` raises, FileError where a file cannot be read, and ModelError of numbers that are not finite.
    """
    found, plan = layers_of(model), planned.plan
    away = _away(found, where, plan.attention, plan.mlp)
    absent = {each.source for part in away for each in part.layers}
    _bring(model, {key: each for key, each in where.items() if each not in absent}, transfer.device)
    model.requires_grad_(False)  # a gradient would be of what a buffer holds by then
    if not away:
        prepare(model)
        return
    units = {part: unit_of(part, transfer) for part in away}
    size = max(plan.unit, *(each.nbytes for each in units.values())) + MARGIN
    ring = Ring(size, plan.buffers, transfer.make_mover())
    store = partial(HostStore, transfer.device.type == "cuda") if transfer.from_host else FileStore
    shelves = Shelves(_shelved(found, plan.rounded), _shelved(found, plan.kept), store)
    prepared_of(model).matrix = Stream(units, ring, shelves, planned)
    tried = [each for each in found[0].mlp.values() if each.weight.is_meta]  # the other blocks' MLPs are alike
    for layer in tried:
        layer.weight = nn.Parameter(_whole(where[id(layer.weight)], layer.weight, transfer.device), False)
    prepare(model)
    for layer in tried:
        layer.weight = nn.Parameter(layer.weight.detach().to("meta"), False)
    guard(model)


def unit_of(part: BlockPart, transfer: Transfer) -> Unit[Views]:
    """Return a part of a block as it comes to a device: from its files, or read now into the host's memory."""
    return HostPart(part, pin=transfer.device.type == "cuda") if transfer.from_host else part


def all_parts(model: PreTrainedModel, where: dict[int, Stored]) -> list[BlockPart]:
    """Return attention and MLP of every block of a model whose weights are on meta."""
    found = layers_of(model)
    none = [False] * len(found)
    return _away(found, where, none, none)


def _shelved(found: Sequence[Layers], stays: Sequence[bool]) -> dict[int, int]:
    """Return the block of each layer, by the layer's id, where something of the block does not stay."""
    return {
        id(each): number
        for number, layers in enumerate(found)
        if not stays[number]
        for each in (*layers.attention, *layers.mlp.values())
    }


def _away(
    found: Sequence[Layers], where: dict[int, Stored], attention: Sequence[bool], mlp: Sequence[bool]
) -> list[BlockPart]:
    """Return the parts of blocks that do not stay, in the order of a pass.

    attention, mlp  whether the block's layers outside and inside of its MLP stay
    """
    away: list[BlockPart] = []
    for number, layers in enumerate(found):
        first, *_ = *layers.attention, *layers.mlp.values()
        outside = [] if attention[number] else [Streamed(id(each), where[id(each.weight)]) for each in layers.attention]
        inside = [] if mlp[number] else _mlp(layers.mlp, where)
        away += [BlockPart(part, first.weight.dtype, number, part is inside) for part in (outside, inside) if part]
    return away


def _mlp(layers: dict[str, nn.Linear], where: dict[int, Stored]) -> list[Streamed]:
    """Return an MLP's layers as they lie in memory when the MLP is prepared; see `SparseMLP.lay_out`."""
    beside = False
    if "up" in layers:
        like = [torch.empty(shape, dtype=layers["up"].weight.dtype) for shape in _shapes(layers)]
        beside = best_side_by_side(*like)
    return [
        Streamed(id(each), where[id(each.weight)], transposed=role == "down", beside=beside and role == "down")
        for role, each in layers.items()
    ]


def _shapes(layers: dict[str, nn.Linear]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(layers["up"].weight.shape), tuple(layers["down"].weight.t().shape)


def _bring(model: PreTrainedModel, where: dict[int, Stored], device: torch.device) -> None:
    """Put parameters and buffers of a model into memory, shared ones once; other buffers go to the device as they are.

    where  each one's place, by its id; none of parameters that stay away
    """
    brought: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (cast("dict[str, Tensor | None]", module._parameters), module._buffers):
            for name, each in held.items():
                if each is None or (each.is_meta and id(each) not in where):
                    continue
                if id(each) not in brought:
                    found = _whole(where[id(each)], each, device) if id(each) in where else each.to(device)
                    brought[id(each)] = nn.Parameter(found) if isinstance(each, nn.Parameter) else found
                held[name] = brought[id(each)]


def _whole(stored: Stored, like: Tensor, device: torch.device) -> Tensor:
    """Return a stored tensor in memory, in the dtype of a parameter."""
    found = torch.empty(stored.shape, dtype=like.dtype, device=device)
    if not stored.shape:
        return found.copy_(stored.whole())
    for begin, end in stored.chunks(1 << 23):
        check_finite(rows := stored.rows(begin, end), f"{stored.name}, rows {begin} to {end}")
        put(found[begin:end], rows)
    return found

"""Models whose weights someone else has placed: by accelerate on several devices or a disk, or split over processes."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sirius.errors import UnsupportedModelError

SHOWN = 2  # modules that are named of each place


def check_placement(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError of a model that is split over processes, or that accelerate brings part by part."""
    name = getattr(model, "name_or_path", "") or "the model's folder"
    meshes = (getattr(each, "device_mesh", None) for each in model.parameters())  # of a DTensor
    if (mesh := next((each for each in meshes if each is not None), None)) is not None:
        raise UnsupportedModelError(
            f"this model is split over {mesh.size()} processes (tensor parallelism or FSDP), and sirius reads whole "
            "layers; load it whole in each process (under torchrun sirius eval and sweep share out the texts), with "
            f"Engine.load({name!r}, memory_budget=...) where it is too large for that, or use vLLM, which splits layers"
        )
    if brought := list(_brought(model)):
        raise UnsupportedModelError(
            f"accelerate has placed this model ({_places(model) or _named(brought)}) and brings its weights itself; "
            f"load it with Engine.load({name!r}, memory_budget=...), which keeps in memory what has room, or whole on "
            "one device, without a device_map"
        )


def _brought(model: nn.Module) -> Iterator[str]:
    """Yield the paths of modules inside of a model that have a hook of accelerate's by which their weights come."""
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if path and any(type(each).__name__ == "AlignDevicesHook" for each in getattr(hook, "hooks", (hook,))):
            yield path


def _places(model: PreTrainedModel) -> str:
    """Return which modules are where, as the model's device map has it; "" where it has none."""
    found: dict[Any, list[str]] = {}
    for path, place in (getattr(model, "hf_device_map", None) or {}).items():
        found.setdefault(place, []).append(path or "the model")
    few = sorted(found.items(), key=lambda each: len(each[1]))
    return "; ".join(f"{_named(paths)} on {f'GPU {at}' if isinstance(at, int) else at}" for at, paths in few)


def _named(paths: list[str]) -> str:
    more = len(paths) - SHOWN
    return ", ".join(paths[:SHOWN]) + (f" and {more} more modules" if more > 0 else "")

"""How parts of ours get into a model and out of it again: one way for MLPs, linear layers, norms and attention.

A module keeps its place, weights, hooks and name; its class becomes one that derives from ours and from its own. So
`isinstance` finds what it found before, and `super().forward` is the module's own. A module that has a `forward` set on
itself is not adopted: someone else wants that one called. `prepare` refuses an MLP like that.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar, cast

from torch import nn

from sirius.errors import ModelError
from sirius.kernels.launch import is_plain
from sirius.model.matrix import Placed
from sirius.model.prepared import Prepared

P = TypeVar("P", bound="Part")


class Part(nn.Module):
    """A module of a prepared model.

    prepared  what the model's parts share
    """

    ours: "type[Part]"
    original: type[nn.Module]
    prepared: Prepared

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., nn.Module], tuple[type, type], dict[str, Any]]:
        """Tell how to copy or pickle it; its class is made anew and not found by name.

        Raises ModelError where weights are not in memory.
        """
        if isinstance(self.prepared.matrix, Placed) and any(each.is_meta for each in self.parameters()):
            raise ModelError(
                "this model was loaded with a memory budget, and not all of its weights are in memory, so that it "
                "cannot be copied or pickled; load it once more, or without a memory budget"
            )
        return _empty, (self.ours, self.original), self.__getstate__()


def adopt(module: nn.Module, ours: type[P], prepared: Prepared, **state: object) -> P:
    """Make a module a part of ours where it stands, with the attributes that the part declares."""
    module.__class__ = _joined(ours, type(module))
    vars(module).update(prepared=prepared, **state)
    return cast("P", module)


def give_back(part: Part) -> None:
    """Make a part the module that it was."""
    for name in ("prepared", *part.ours.__annotations__):
        vars(part).pop(name, None)
    part.__class__ = part.original  # pyright: ignore[reportAttributeAccessIssue] - nn.Module's layout is the same


def is_ours(part: Part) -> bool:
    """Tell whether a part has the class that it was given, and not one derived from that since."""
    return type(part) is _joined(part.ours, part.original)


def parts_of(model: nn.Module, ours: type[P]) -> Iterator[tuple[str, P]]:
    """Yield the parts of a class with their paths in a model, in the model's order."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, ours))


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has without us."""
    return module.original if isinstance(module, Part) else type(module)


def own_forward(module: nn.Module) -> bool:
    """Tell whether a module has a forward besides its class's."""
    return "forward" in vars(module)


def hook_obstacle(module: object) -> str | None:
    """Return what a call of a module would do besides its class's forward, None where there is nothing."""
    if not isinstance(module, nn.Module):
        return None
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooks:
        return "has hooks, which would not be called; take them off"
    return "has a forward of its own, which would not be called; take it off" if own_forward(module) else None


def obstacle(layer: nn.Module) -> str | None:
    """Return what speaks against reading a layer's weights without calling it, None where nothing does."""
    if (kind := class_of(layer)) is not nn.Linear:
        name = f"{kind.__module__}.Linear" if kind.__name__ == "Linear" else kind.__name__
        return f"is a {name}, not a plain linear layer; load the model unquantised and without adapters"
    for each in layer._parameters.values():
        if not is_plain(each):
            return f"holds a {type(each).__name__}, no plain tensor; load the model unquantised and whole"
    return hook_obstacle(layer)


@cache
def _joined(ours: type[Part], original: type[nn.Module]) -> type[Part]:
    names = {"__module__": original.__module__, "__doc__": original.__doc__, "ours": ours, "original": original}
    return cast("type[Part]", type(original.__name__, (ours, original), names))


def _empty(ours: type[Part], original: type[nn.Module]) -> nn.Module:
    joined = _joined(ours, original)
    return joined.__new__(joined)

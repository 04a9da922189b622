"""What a sparsity method is, and the register of their names."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import entry_points

from torch import Tensor

from sirius.core import SparsityConfig
from sirius.errors import ConfigError
from sirius.stats import Touched

ENTRY_POINTS = "sirius.sparsity"


class Sparsity(ABC):
    """One method at work for one generation, over all layers; subclass `PromptSparsity` or `TokenSparsity`."""

    def __init__(self, config: SparsityConfig, neurons: tuple[int, ...]) -> None:
        """Take the configuration and the number of neurons F of each layer; raise ConfigError where they do not fit."""
        self.config = config
        self.neurons = neurons

    @abstractmethod
    def touched(self) -> Touched:
        """Return the fractions of the rows of gate, up and down that a draft token reads."""


class PromptSparsity(Sparsity):
    """One set of neurons per prompt: it looks at the prompt's activations, then names each layer's neurons."""

    @abstractmethod
    def observe(self, layer: int, z: Tensor) -> None:
        """See z = act(gate(x)) * up(x) [T, F] of prompt tokens at a layer; a long prompt may come in several calls."""

    @abstractmethod
    def select(self, layer: int) -> Tensor:
        """Return the neurons that a layer keeps, [k] int64, ascending, without repeats."""


class TokenSparsity(Sparsity):
    """A set of neurons per token, chosen in the midst of the MLP from the gate's activations."""

    @abstractmethod
    def choose(self, layer: int, gated: Tensor) -> Tensor:
        """Return which neurons to keep, [..., F] bool, given act(gate(x)) [..., F]."""


Factory = Callable[[SparsityConfig, tuple[int, ...]], Sparsity]
_METHODS: dict[str, Factory] = {}


def register(*names: str) -> Callable[[type[Sparsity]], type[Sparsity]]:
    """Register a method under its name and aliases: `@register("coarse", "griffin")` above the class."""

    def add(method: type[Sparsity]) -> type[Sparsity]:
        for name in names:
            if name == "none" or _METHODS.get(name, method) is not method:
                raise ConfigError(f"a sparsity method named {name!r} is already there; choose another name")
            _METHODS[name] = method
        return method

    return add


def known() -> list[str]:
    """Return the names of all methods, those of other packages' entry points included."""
    return sorted({"none", *_METHODS, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def find(name: str) -> Factory | None:
    """Return what makes a method, None of "none"; raise ConfigError, with the known names, where there is none."""
    if name == "none":
        return None
    if name in _METHODS:
        return _METHODS[name]
    for point in entry_points(group=ENTRY_POINTS, name=name):
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"the entry point of sparsity {name!r} ({point.value}) cannot be loaded: {error}"
            ) from error
    raise ConfigError(f"there is no sparsity method {name!r}; known are {', '.join(known())}")


def create(config: SparsityConfig, neurons: tuple[int, ...]) -> Sparsity | None:
    """Return a fresh method for one generation of a model with `neurons` F in each layer, None of "none"."""
    factory = find(config.method)
    if factory is None:
        return None
    method = factory(config, neurons)
    if not isinstance(method, PromptSparsity | TokenSparsity):
        raise ConfigError(f"sparsity {config.method!r} is a {type(method).__name__}: neither per prompt nor per token")
    return method

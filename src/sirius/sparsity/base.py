"""What a sparsity method is, and the register of their names."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sirius.core import SparsityConfig
from sirius.errors import ConfigError
from sirius.kernels.ops import largest
from sirius.stats import Touched

ENTRY_POINTS = "sirius.sparsity"
MANY = 10**6  # neurons, of which any share keeps some


class Sparsity:
    """One method at work for one generation, over all layers; subclass `PromptSparsity` or `TokenSparsity`."""

    def __init__(self, config: SparsityConfig, neurons: tuple[int, ...]) -> None:
        """Take the configuration and the number of neurons F of each layer; raise ConfigError where they do not fit."""
        self.config = config
        self.neurons = neurons


class PromptSparsity(Sparsity, ABC):
    """One set of neurons per prompt: it looks at the prompt's activations and scores each layer's neurons.

    The int(keep * F) neurons of highest score stay. With `shared_set` the rows of a batch have one set, in which each
    row's method has its say: scores are scaled to unit length, and the neurons of highest mean square stay.
    """

    def __init__(self, config: SparsityConfig, neurons: tuple[int, ...]) -> None:
        super().__init__(config, neurons)
        if config.threshold is not None:
            raise ConfigError(
                f"{config.method} keeps a fixed fraction and knows no threshold; use 'fine', or keep alone"
            )
        if config.per_branch:
            raise ConfigError(f"{config.method} has one set for all tokens, so none per branch; leave per_branch out")
        if config.refresh and type(self).refresh is PromptSparsity.refresh:
            raise ConfigError(f"{config.method} cannot be refreshed; set refresh to 0")
        self.counts = tuple(int(config.keep * n) for n in neurons)
        if not all(self.counts):
            least = min(neurons)
            raise ConfigError(
                f"keep {config.keep} of {least} neurons keeps none; keep at least {ceil(1e4 / least) / 1e4}"
            )

    @abstractmethod
    def observe(self, layer: int, z: Tensor) -> None:
        """See z = act(gate(x)) * up(x) [T, F] of prompt tokens at a layer; a long prompt may come in several calls."""

    @abstractmethod
    def score(self, layer: int) -> Tensor:
        """Return how much each neuron of a layer stood out so far, [F], at least 0."""

    def refresh(self, layer: int, z: Tensor) -> None:
        """See z [T, F] of checked tokens and let them weigh `config.refresh`, the prompt and earlier ones the rest."""
        raise NotImplementedError

    def select(self, layer: int, others: "Sequence[PromptSparsity]" = ()) -> Tensor:
        """Return the neurons that a layer keeps, [k] int64, ascending: the order of their rows in memory.

        others  the methods of further rows that share the set
        """
        score = self.score(layer)
        if others:
            score = torch.stack([normalize(each.score(layer), dim=0).square() for each in (self, *others)]).sum(0)
        return largest(score, self.counts[layer])

    def touched(self) -> Touched:
        """Return the fractions of the rows of gate, up and down that a draft token reads: the kept one of all three."""
        kept = sum(self.counts) / sum(self.neurons)
        return Touched(kept, kept, kept)

    def kept(self) -> tuple[float, ...]:
        """Return the fraction of its neurons that each layer keeps."""
        return tuple(count / size for count, size in zip(self.counts, self.neurons, strict=True))


class TokenSparsity(Sparsity, ABC):
    """A set of neurons per token, chosen in the midst of the MLP from the gate's activations."""

    def __init__(self, config: SparsityConfig, neurons: tuple[int, ...]) -> None:
        super().__init__(config, neurons)
        if config.refresh:
            raise ConfigError(f"{config.method} chooses anew for each token and has nothing to refresh; leave it at 0")
        if config.shared_set:
            raise ConfigError(f"{config.method} has a set for each token, so none for all rows; leave shared_set out")

    @abstractmethod
    def choose(self, layer: int, size: Tensor) -> Tensor:
        """Return which neurons to keep, [..., F] bool, given |act(gate(x))| [..., F], or several tokens' mean of it."""

    def select(self, layer: int, size: Tensor) -> Tensor:
        """Return the neurons of one set, [k] int64, ascending, given its |act(gate(x))| [F]; asked where k is `fixed`.

        To be overridden where it can be told without asking a GPU for the mask.
        """
        return self.choose(layer, size).nonzero()[:, 0]

    def fixed(self, layer: int) -> int | None:
        """Return how many neurons every set of a layer has, None where that differs from token to token."""
        return None

    def touched(self, kept: float) -> Touched:
        """Return the fractions of the rows of gate, up and down that a draft step reads.

        kept  the share of the neurons that the text's steps kept, as measured; where branches differ, any branch. Where
              every set has a `fixed` size and branches share one nothing is measured, and those sizes count
        """
        if (sizes := self._unmeasured()) is not None:
            kept = sum(sizes) / sum(self.neurons)
        return Touched(1.0, kept, kept)

    def kept(self, measured: Sequence[float]) -> tuple[float, ...]:
        """Return the fraction of its neurons that each layer keeps in a draft step.

        measured  those fractions as the text's steps had them, which count unless `touched` does without
        """
        if (sizes := self._unmeasured()) is None:
            return tuple(measured)
        return tuple(count / size for count, size in zip(sizes, self.neurons, strict=True))

    def _unmeasured(self) -> list[int] | None:
        """Return the size of each layer's sets where all sets of the layer have it, and so nothing is measured."""
        sizes = [self.fixed(layer) for layer in range(len(self.neurons))]
        known = [size for size in sizes if size is not None]
        return None if self.config.per_branch or len(known) < len(sizes) else known


Method = TypeVar("Method", bound=Sparsity)
Factory = Callable[[SparsityConfig, tuple[int, ...]], Sparsity]
_METHODS: dict[str, Factory] = {}


def register(*names: str) -> Callable[[type[Method]], type[Method]]:
    """Register a method under its name and aliases: `@register("coarse", "griffin")` above the class."""

    def add(method: type[Method]) -> type[Method]:
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


def canonical(name: str) -> str:
    """Return the first name of a method of ours that has several; any other name as it is."""
    method = _METHODS.get(name)
    return next((first for first, each in _METHODS.items() if each is method), name)


def check_options(config: SparsityConfig) -> None:
    """Raise ConfigError of a method that is none, and where one of ours refuses its options, whatever the model."""
    if getattr(find(config.method), "__module__", "").startswith("sirius."):
        create(config, (MANY,))


def create(config: SparsityConfig, neurons: tuple[int, ...]) -> Sparsity | None:
    """Return a fresh method for one generation of a model with `neurons` F in each layer, None of "none"."""
    factory = find(config.method)
    if factory is None:
        if config.threshold is not None or config.refresh or config.shared_set or config.per_branch:
            raise ConfigError("sparsity 'none' keeps every neuron and takes no further option; name a method, or none")
        return None
    method = factory(config, neurons)
    if not isinstance(method, PromptSparsity | TokenSparsity):
        raise ConfigError(f"sparsity {config.method!r} is a {type(method).__name__}: neither per prompt nor per token")
    return method

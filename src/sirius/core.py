"""The nouns of sirius: what is asked for, what a round of decoding did, and the one protocol decoding needs.

Letters of shapes, the same everywhere:
    B rows (prompts decoded side by side)    T tokens of one pass     S slots of the KV cache
    K period (tokens the full model reads in a check)                 V vocabulary
    L layers with a gated MLP                F neurons of an MLP      H hidden size
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from sirius.errors import ConfigError

AcceptName = Literal["threshold", "argmax"]
Config = TypeVar("Config", "SparsityConfig", "CorrectionConfig")
FinishReason = Literal["stop", "length"]

# Turns the scores of the next token [1, V] into others, given all tokens before it [1, n], as transformers' do.
Processor = Callable[[Tensor, Tensor], Tensor]


class Mode(Enum):
    """How a pass runs the gated MLPs."""

    DENSE = "dense"  # every neuron
    OBSERVE = "observe"  # every neuron, and the sparsity method looks on
    SPARSE = "sparse"  # the neurons that the sparsity method chose


@dataclass(frozen=True)
class SparsityConfig:
    """Which neurons the draft model keeps.

    method     a registered name: "coarse" (alias "griffin"), "fine" (alias "cats"), "none", or a third party's
    keep       the fraction of neurons kept, 0 < keep <= 1 (the papers' `spr`)
    threshold  for methods that know one: keep the neurons with |act(gate)| above it, instead of a fixed fraction
    """

    method: str = "coarse"
    keep: float = 0.5
    threshold: float | None = None

    def __post_init__(self) -> None:
        _check_kinds(self, method=str, keep=float, threshold=float | None)
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep is the fraction of neurons kept, above 0 and at most 1; got {self.keep}")
        if self.threshold is not None and not self.threshold >= 0:
            raise ConfigError(f"the sparsity threshold bounds an absolute value, so at least 0; got {self.threshold}")


@dataclass(frozen=True)
class CorrectionConfig:
    """How the full model checks the draft.

    period              K, tokens that one check reads: the newest token and K-1 drafted ones; 1 drafts nothing
    accept              the rule: "argmax" (lossless) or "threshold" (the paper's; lossy at thresholds up to 0.5)
    threshold           the least probability of an accepted token; the full model's argmax is accepted at any threshold
    accept_temperature  the temperature of that probability
    """

    period: int = 16
    accept: AcceptName = "threshold"
    threshold: float = 0.1
    accept_temperature: float = 0.6

    def __post_init__(self) -> None:
        _check_kinds(self, period=int, accept=str, threshold=float, accept_temperature=float)
        if self.period < 1:
            raise ConfigError(f"period counts the tokens of a check, at least 1 (plain decoding); got {self.period}")
        if self.accept not in ("threshold", "argmax"):
            raise ConfigError(f"accept is 'threshold' or 'argmax'; got {self.accept!r}")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold is a probability, from 0 to 1; got {self.threshold}")
        if not 0 < self.accept_temperature < float("inf"):
            raise ConfigError(f"accept_temperature must be a positive number; got {self.accept_temperature}")

    @property
    def lossless(self) -> bool:
        """Whether only the full model's argmax can pass: above one half no other token has the probability."""
        return self.accept == "argmax" or self.threshold > 0.5 or self.period == 1


def as_config(kind: type[Config], value: Any) -> Config:
    """Return a SparsityConfig or CorrectionConfig given as itself, as a mapping of its fields, or as its first field.

    So `{"method": "fine", "keep": 0.3}` and "fine" are sparsities; raises ConfigError of anything else.
    """
    if isinstance(value, kind):
        return value
    try:
        return kind(**value) if isinstance(value, Mapping) else kind(value)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(kind))
        raise ConfigError(f"{kind.__name__} takes {known}; got {value!r}") from error


def _check_kinds(config: object, **kinds: Any) -> None:
    """Raise ConfigError where a field is of another kind than it says; a whole number is also a float."""
    for name, kind in kinds.items():
        value = getattr(config, name)
        wide = kind if kind in (int, str) else kind | int
        if isinstance(value, bool) or not isinstance(value, wide):
            raise ConfigError(f"{name} must be {getattr(kind, '__name__', kind)}; got {value!r}")


@dataclass(frozen=True)
class Request:
    """One prompt to be decoded greedily.

    prompt          token ids, at least one
    max_new_tokens  the budget of new tokens, at least 1
    stop            strings that end the text; the text leaves them out, the tokens hold what completed them
    correction      None decodes with the sparse model alone
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    correction: CorrectionConfig | None = field(default_factory=CorrectionConfig)

    def __post_init__(self) -> None:
        _check_kinds(self, max_new_tokens=int)
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise ConfigError(f"stop takes strings, none of them empty; got {list(self.stop)}")


@dataclass(frozen=True)
class Verdict:
    """What a rule of acceptance says of a window: `kept` drafted tokens, then `next` from the full model."""

    kept: int
    next: int


@dataclass(frozen=True)
class Round:
    """What one round did, from the draft to the tokens that came out.

    tokens    what the round adds to the text: kept guesses, then one token of the full model unless a stop cut it off
    draft     every guess of the sparse model; draft[accepted:] was rolled back
    accepted  how many guesses are in `tokens`
    cut       whether a stop ended the text inside this round
    scores    the full model's scores of each token [len(tokens), V], where they were asked for
    """

    tokens: tuple[int, ...]
    draft: tuple[int, ...] = ()
    accepted: int = 0
    cut: bool = False
    scores: Tensor | None = None

    def until(self, count: int) -> "Round":
        """Return the round as a stop after `count` of its tokens leaves it."""
        if count == len(self.tokens):
            return self
        scores = None if self.scores is None else self.scores[:count]
        return Round(self.tokens[:count], self.draft, min(self.accepted, count), True, scores)


class LanguageModel(Protocol):
    """What decoding needs of a model: passes over tokens, and a cache that can be cut back.

    Draft and full model are two modes of one model and share one KV cache. A pass writes the K/V of its tokens to the
    slots after each row's length; cutting the length back and reading again writes over them.
    """

    def read(self, tokens: Tensor, mode: Mode, last: int | None = None) -> Tensor:
        """Feed tokens [B, T] int64 and return scores [B, T, V], or of the last `last` tokens only."""
        ...

    def select(self) -> None:
        """Choose the draft model's neurons from what the passes in mode OBSERVE showed."""
        ...

    def truncate(self, lengths: Tensor) -> None:
        """Cut every row back to lengths [B] int64 filled slots."""
        ...

"""What a batch takes and gives back: texts to be decoded, what a round did to one, and finished ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sirius.core import FinishReason, Origin, Request, Round
from sirius.errors import SiriusError
from sirius.scoring import Processor, SharedProcessor
from sirius.stats import Basis, Stats


class Ending(Protocol):
    """Where a text ends; `text` is what may be shown of it so far."""

    text: str
    stopped: bool

    def push(self, tokens: Sequence[int]) -> int:
        """Take tokens until one ends the text; return how many were taken."""
        ...

    def finish(self) -> None:
        """Show what was held back, now that nothing follows."""
        ...


@dataclass(frozen=True)
class Text:
    """A request with what the tokens alone do not say: where it ends, and what changes its scores.

    make_ending  gives a fresh `Ending`; what its `push` raises ends this text alone
    stateless    whether `process` keeps no state from call to call; None: a copy of it is tried. With one that may keep
                 state nothing is drafted in the batch, and it is asked once about each token.
    watched      the object that holds what `process` knows: it must not change while tokens are drafted
    """

    request: Request
    make_ending: Callable[[], Ending]
    process: Processor | SharedProcessor | None = None
    keep_scores: bool = False
    stateless: bool | None = None
    watched: object = None


@dataclass(frozen=True)
class Completion:
    """A finished text.

    text           without special tokens and stop strings; "" where the model has no tokenizer
    token_ids      the new tokens, an end-of-text token or the tokens of a stop string included
    finish_reason  "stop" (end of text or stop string) or "length" (the budget is used up)
    origins        where each token comes from, see `Round`
    logprobs       the natural log of the full model's probability of each token, see `Round`
    setting        what the figures of `stats` depend on besides the rounds
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    origins: tuple[Origin, ...]
    logprobs: tuple[float, ...]
    stats: Stats
    setting: Basis | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Update:
    """What a round did to one text: the round, the text it made certain, and with the last one the completion.

    ticket  which text
    error   why the text ends here without a completion
    """

    ticket: int
    text: str
    round: Round
    completion: Completion | None = None
    error: SiriusError | None = None

    @property
    def last(self) -> bool:
        """Whether nothing more comes of this text."""
        return self.completion is not None or self.error is not None

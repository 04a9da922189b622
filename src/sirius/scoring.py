"""What changes the scores of a text's next token: a processor of its own, or one that several texts share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Turns the scores of the next token [m, V] into others, given all tokens before it [m, n], row by row, as those of
# transformers do.
Processor = Callable[[Tensor, Tensor], Tensor]


def ask(processor: Processor, tokens: Tensor, scores: Tensor) -> Tensor:
    """Return what a processor makes of scores [m, V]; raise ValueError where it writes to the tokens [m, n]."""
    shown = tokens.clone()
    answer = processor(shown, scores)
    if not torch.equal(shown, tokens):
        raise ValueError("it writes to the tokens that it is shown; let it write to a copy of them")
    return answer


@dataclass(frozen=True)
class Lines:
    """What a processor is asked about one text: the scores of the next token, after each of m sequences of tokens.

    text    the text's number among those that share the processor
    tokens  [m, n] int64
    scores  [m, V] float
    """

    text: int
    tokens: Tensor
    scores: Tensor


@dataclass(frozen=True)
class SharedProcessor:
    """A processor of several texts: it is asked about all of them together where their turns come together.

    act   returns the scores [m, V] of each text's lines, in the order in which they come
    text  the text's number among those that share it
    """

    act: Callable[[Sequence[Lines]], Sequence[Tensor]]
    text: int

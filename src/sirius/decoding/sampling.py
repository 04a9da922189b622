"""Sampling by random noise that does not depend on the scores.

argmax(scores + g) with Gumbel noise g is a sample of softmax(scores). The noise of a text's j-th new token depends on
the seed and on j alone. So the draft model and the full model use the same noise, and agree where their scores are
close. The full model's own choice at a position does not depend on the draft. A rule that lets only that choice pass
therefore gives the text that the full model would sample alone, and so its distribution.

Source of the coupling: Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant speculative
decoding" (arXiv 2408.07978).
"""

import torch
from torch import Tensor


class Noise:
    """The Gumbel noise of one seeded text: a vector [V] for each new token, drawn in order of the tokens."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.drawn: list[Tensor] = []  # of new tokens first, first + 1, ...
        self.first = 0
        self.generator: torch.Generator | None = None

    def at(self, token: int, like: Tensor) -> Tensor:
        """Return the noise of a new token, counted from 0, in the shape, dtype and device of its scores [V]."""
        assert token >= self.first, f"the noise of token {token} was dropped; the first kept is {self.first}"
        if self.generator is None:
            self.generator = torch.Generator(like.device).manual_seed(self.seed)
        while self.first + len(self.drawn) <= token:
            uniform = torch.rand(like.shape, generator=self.generator, device=like.device, dtype=torch.float64)
            self.drawn.append(uniform.log_().neg_().log_().neg_().to(like.dtype))  # float64: the tail reaches far
        return self.drawn[token - self.first]

    def forget(self, before: int) -> None:
        """Drop the noise of the new tokens before the given one."""
        assert self.first <= before <= self.first + len(self.drawn), f"{before} is not drawn yet, or was dropped"
        del self.drawn[: before - self.first]
        self.first = before

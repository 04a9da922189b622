"""Acceptance played back from a histogram, because that of random weights says nothing about a trained model."""

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from sirius.decoding.accept import Check
from sirius.decoding.host import send

PUBLISHED_AAL, PUBLISHED_PERIOD = 15.22, 16  # Sirius (arXiv 2409.03856)
NAMED = {  # shares of windows that accepted 0, 1, ... K-1 guesses
    # A draft of the model's own weights at 4 bits in groups of 64, greedy, 101,000 tokens, K 16. It is the raw trace
    # published with SubSpec (arXiv 2509.18344), which does not name its model.
    "argmax-int4": (
        *(0.032, 0.032, 0.031, 0.024, 0.031, 0.027, 0.023, 0.027),
        *(0.023, 0.024, 0.021, 0.021, 0.020, 0.021, 0.021, 0.624),
    ),
}
STEP = 0.6180339887498949  # the golden ratio's: multiples of it fill [0, 1) evenly, however few are taken


def geometric(chance: float, period: int) -> tuple[float, ...]:
    """Return the chances of 0 .. K-1 accepted guesses of a window where each guess is accepted with the same chance."""
    return (*((1 - chance) * chance**i for i in range(period - 1)), chance ** (period - 1))


def mean_advance(histogram: Sequence[float]) -> float:
    """Return the tokens per window of a histogram over the accepted guesses: their mean, and one."""
    return 1 + sum(i * share for i, share in enumerate(histogram)) / sum(histogram)


class Playback:
    """A rule of acceptance that ignores the tokens: the histogram says how many levels are accepted, window by window.

    The counts follow a fixed, evenly spread sequence, so that even a few windows have the histogram's mean.
    """

    def __init__(self, histogram: Sequence[float]) -> None:
        """Take the weights of 0, 1, ... accepted guesses."""
        total = sum(histogram)
        self.edges = list(accumulate(share / total for share in histogram))
        self.windows = 0

    def __call__(self, check: Check) -> Tensor:
        """Return which guesses are accepted, [B, N] bool."""
        depths = check.tree.depths
        accepted = send([self._next() for _ in depths], depths.device)
        return depths <= accepted[:, None]

    def _next(self) -> int:
        self.windows += 1
        point = self.windows * STEP % 1.0
        return next((i for i, edge in enumerate(self.edges) if point < edge), len(self.edges) - 1)

"""Values with their standard errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error, None where it has none: a single item, or a value that is not an average."""

    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        """Return both with three decimals."""
        return self.shown()

    def shown(self, form: str = ".3f") -> str:
        """Return both in a format of Python's."""
        error = "" if self.stderr is None else f" ± {self.stderr:{form.lstrip('+')}}"
        return f"{self.value:{form}}{error}"


def average(values: Sequence[float]) -> Estimate:
    """Return the mean of at least one value; its standard error is the sample's deviation / sqrt(n)."""
    return Estimate(mean(values), stdev(values) / sqrt(len(values)) if len(values) > 1 else None)


def paired(ours: Mapping[str, float], others: Mapping[str, float]) -> Estimate | None:
    """Return the mean difference of two settings over the items that both decoded, None where there is none.

    ours, others  the score of each item by its number

    The standard error is that of the differences: items that are hard for both settings do not add to it.
    """
    differences = [score - others[item] for item, score in ours.items() if item in others]
    return average(differences) if differences else None


def accepted_spread(histogram: Sequence[int]) -> float | None:
    """Return the standard error of the mean number of guesses that a window keeps; None of fewer than two windows.

    histogram  entry i counts the windows that kept i guesses; they are taken as independent
    """
    count = sum(histogram)
    if count < 2:
        return None
    middle = sum(kept * windows for kept, windows in enumerate(histogram)) / count
    squares = sum(windows * (kept - middle) ** 2 for kept, windows in enumerate(histogram))
    return sqrt(squares / (count - 1) / count)


def acceptance_by_position(histogram: Sequence[int]) -> list[Estimate]:
    """Return the share of windows whose first i+1 guesses were all accepted, for i from 0 to K-2.

    histogram  entry i counts the windows that kept i guesses

    Each share is of all windows, also of those that had drafted fewer guesses. Its standard error is that of a share
    of independent windows.
    """
    return [_share(sum(histogram[i + 1 :]), sum(histogram)) for i in range(len(histogram) - 1)]


def lengths(histogram: Sequence[int]) -> list[Estimate]:
    """Return the share of windows that kept exactly i guesses, for i from 0 to K-1; errors as by position."""
    return [_share(windows, sum(histogram)) for windows in histogram]


def _share(part: int, count: int) -> Estimate:
    share = part / count
    return Estimate(share, sqrt(share * (1 - share) / count))

"""One clock for all that is measured."""

from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

import torch

Result = TypeVar("Result")

LEAST, MOST = 5, 30  # runs of a call
ENOUGH = 0.3  # seconds of them


def timed(call: Callable[[], Result], device: str) -> tuple[float, Result]:
    """Return the seconds that a call takes, what a GPU does for it included, and its result."""
    synchronize(device)
    began = perf_counter()
    result = call()
    synchronize(device)
    return perf_counter() - began, result


def repeated(call: Callable[[], object], device: str, least: int = LEAST, most: int = MOST) -> list[float]:
    """Return the seconds of some runs of a call, after one to warm up: `least` of them, and more of a short call."""
    call()
    seconds: list[float] = []
    while len(seconds) < least or (sum(seconds) < ENOUGH and len(seconds) < most):
        seconds.append(timed(call, device)[0])
    return seconds


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()

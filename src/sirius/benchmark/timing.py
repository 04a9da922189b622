"""One clock for all that is measured."""

from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

import torch

Result = TypeVar("Result")

LEAST, MOST = 5, 30  # runs of a call
ENOUGH = 0.3  # seconds of them
BURST = 16  # calls between two marks of a GPU's clock, beside which a launch and an answer would take as long as a call


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
        seconds.append(_burst(call, device) if device.startswith("cuda") else timed(call, device)[0])
    return seconds


def _burst(call: Callable[[], object], device: str) -> float:
    """Return the seconds of a call among several, by the GPU's own clock."""
    with torch.cuda.device(device):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        for _ in range(BURST):
            call()
        ended.record()
        ended.synchronize()
    return began.elapsed_time(ended) / 1e3 / BURST


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)

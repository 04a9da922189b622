"""Transfers between host and device. The host must wait for a GPU wherever it asks for a value, so it asks seldom."""

from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor


def answers_at_once(tensor: Tensor) -> bool:
    """Tell whether the host can read a tensor's values without waiting for a device."""
    return tensor.device.type == "cpu"


def fetch(*tensors: Tensor) -> list[Tensor]:
    """Return tensors on the host, all of them in one transfer; whole numbers are exact up to 2**53."""
    if all(map(answers_at_once, tensors)):
        return list(tensors)
    together = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu()
    parts = together.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def send(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return whole numbers on a device, [n] int64 or [m, n], without waiting for its pending work."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


class Stopwatch:
    """Measures the time between marks: on a GPU that of the device's work, not that of the host's launches."""

    def __init__(self, device: torch.device) -> None:
        """Set the first mark, at once."""
        self.device, self.on_gpu = device, device.type == "cuda"
        self.marks: list[float] = []
        self.events: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """Set a further mark."""
        if self.on_gpu:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record(torch.cuda.current_stream(self.device))
        else:
            self.marks.append(perf_counter())

    def laps(self) -> list[float]:
        """Return the seconds from each mark to the next; waits until a GPU has reached the last one."""
        if not self.on_gpu:
            return [b - a for a, b in pairwise(self.marks)]
        self.events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self.events)]

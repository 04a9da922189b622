"""What the host learns of a device, and when: a GPU runs behind the host, and for every answer it must catch up."""

from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor


def answers_at_once(tensor: Tensor) -> bool:
    """Tell whether the host may look into a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def fetch(*tensors: Tensor) -> list[Tensor]:
    """Return tensors on the host, all of them in one transfer; numbers up to 2**53 stay what they are."""
    if all(map(answers_at_once, tensors)):
        return list(tensors)
    together = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu()
    parts = together.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def send(values: list[int], device: torch.device) -> Tensor:
    """Return whole numbers on a device, [n] int64, without waiting for what it has yet to do."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


class Stopwatch:
    """Times the stretches between marks: on a GPU its own work, not how long the host took to ask for it."""

    def __init__(self, device: torch.device) -> None:
        """Set the first mark."""
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
        """Return the seconds from each mark to the next; a GPU must have come to the last one."""
        if not self.on_gpu:
            return [b - a for a, b in pairwise(self.marks)]
        self.events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self.events)]

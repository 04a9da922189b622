"""Peak memory of a stretch of work."""

from pathlib import Path

import torch


def reset_peak(device: str) -> None:
    """Begin a stretch."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int | None:
    """Return the most bytes held since `reset_peak`: of the GPU, or resident ones of the process; None if unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None

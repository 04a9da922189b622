"""Peak memory of a stretch of work."""

from pathlib import Path

import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak(device: str) -> bool:
    """Begin a stretch; tell whether its peak will be known: the CPU's only where Linux lets a process ask."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: str) -> int:
    """Return the most bytes held since `reset_peak` said yes: of the GPU, or resident ones of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def swapped_bytes() -> int:
    """Return the bytes of this process that the system has swapped out; raise OSError where it does not tell."""
    return _status("VmSwap")


def _status(name: str) -> int:
    [line] = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024

"""Amounts of memory: how they are shown, and what a device has."""

import os
from pathlib import Path

import torch

UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def in_words(count: float) -> str:
    """Return a number of bytes as it is shown: 136.9 GB, with units of powers of 1000."""
    for unit, size in UNITS.items():
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} bytes"


def memory_of(device: torch.device) -> int:
    """Return the bytes of a device's memory: all of a GPU's, or the machine's up to the limit of its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(LIMIT.read_text()))
    except (OSError, ValueError):  # there is no container, or it has no limit
        return machine

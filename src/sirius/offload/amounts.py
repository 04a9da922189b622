"""Amounts of memory: how they are shown, and what a device has."""

import os
import re
from decimal import Decimal
from pathlib import Path

import torch

from sirius.errors import ConfigError

UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
WRITTEN = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?(%|[kmgt]i?b|b)?", re.IGNORECASE)
SCALES = {"b": 1}
SCALES |= {f"{prefix}b": 1000 ** (i + 1) for i, prefix in enumerate("kmgt")}
SCALES |= {f"{prefix}ib": 1024 ** (i + 1) for i, prefix in enumerate("kmgt")}
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def in_words(count: float) -> str:
    """Return a number of bytes as it is shown: 136.9 GB, with units of powers of 1000."""
    for unit, size in UNITS.items():
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} bytes"


def free_memory(device: torch.device) -> int:
    """Return the bytes that a process may take: those of a GPU that nobody has, or all of the machine's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_of(device)


def memory_of(device: torch.device) -> int:
    """Return the bytes of a device's memory: all of a GPU's, or the machine's up to the limit of its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(LIMIT.read_text()))
    except (OSError, ValueError):  # there is no container, or it has no limit
        return machine


def parse_budget(text: str, total: int) -> int:
    """Return the bytes of a memory budget as a user writes it: "8GiB", "8GB", "500MiB", "1234567" or "50%".

    total  the bytes of the device's memory, of which a percentage is taken

    Raises ConfigError of any other form, of a share above 100%, and of less than a byte.
    """
    found = WRITTEN.fullmatch(text.strip())
    number, unit = (Decimal(found[1]), (found[2] or "b").lower()) if found else (Decimal(0), "b")
    factor = Decimal(total if number <= 100 else 0) / 100 if unit == "%" else SCALES[unit]
    budget = int(number * factor)
    if budget < 1:
        raise ConfigError(
            "a memory budget is a number of bytes above 0, such as 8GiB, 8GB, 500MiB or 1234567, or a share of the "
            f"device's {in_words(total)}, such as 50%; got {text!r}"
        )
    return budget

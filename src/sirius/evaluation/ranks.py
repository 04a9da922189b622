"""Processes that share an evaluation: which one this is, and how they exchange what they found.

`torchrun` and `accelerate launch` say so in the environment: RANK, WORLD_SIZE, LOCAL_RANK.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LONGEST = timedelta(days=7)  # that ranks wait for those whose share takes longer; PyTorch's own is half an hour


@dataclass(frozen=True)
class Ranks:
    """This process's number `rank` among `size` ones, and its number `local` on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> "Ranks":
        """Return what the environment says; one process where it says nothing."""
        rank, size, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls(rank, max(size, 1), local)

    def device(self, asked: str) -> str:
        """Return the device of this process: each has a GPU of its own, where there are GPUs."""
        if self.size > 1 and asked in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local % torch.cuda.device_count()}"
        return asked

    def gather_tensor(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, one after the other."""
        if self.size == 1:
            return tensor
        group = _group()
        found = [torch.zeros_like(tensor.reshape(-1)) for _ in range(self.size)]
        dist.all_gather(found, tensor.reshape(-1), group)
        return torch.cat(found)

    def gather(self, value: Any, to: int = 0) -> list[Any] | None:
        """Return the values of all ranks on rank `to`, None elsewhere."""
        if self.size == 1:
            return [value]
        group = _group()
        found = [None] * self.size if self.rank == to else None
        dist.gather_object(value, found, dst=to, group=group)
        return found

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(_group())


@cache
def _group() -> Any:
    """Return the group of all ranks; the first call joins it. Only objects are exchanged, through the hosts."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.new_group(backend="gloo", timeout=LONGEST)

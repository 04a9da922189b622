"""What the host learns of a device, and when: a GPU runs behind the host, and for every answer it must catch up."""

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
    """Return whole numbers on a device, [n] int64, without waiting until they are there."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

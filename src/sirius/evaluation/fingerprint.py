"""A digest of a model's weights, by which saved samples know the model that they are of."""

from collections.abc import Iterator
from hashlib import sha256

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sirius.model.adopt import parts_of
from sirius.model.linear import MatrixLinear
from sirius.model.matrix import Dense
from sirius.model.prepared import prepared_of

SPREAD = 64  # numbers of a weight in a model's fingerprint
SUMMED = 1 << 20  # numbers that are added up at a time, each as 8 bytes
WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def fingerprint(model: PreTrainedModel) -> str:
    """Return a digest of every weight's bits, so that another checkpoint, file or adapter has another one.

    Of each weight it takes the sum of all numbers, read as whole numbers by their bits, and about `SPREAD` of them.
    Such a sum does not depend on machine or order, nor on whether weights stay in memory: those that do not are brought
    once. A billion weights of bfloat16 in memory take some 3 s on one core.
    """
    digest = sha256()
    with prepared_of(model).lock:
        for name, weight in _weights(model):
            bits = weight.view(WHOLE[weight.element_size()])
            digest.update(f"{name} {list(weight.shape)} {_sum(bits)} {_some(bits)}".encode())
    return digest.hexdigest()[:16]


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's numbers by name; of a weight that is not in memory they stay until the next one."""
    layers = {f"{path}.weight": layer for path, layer in parts_of(model, MatrixLinear)}
    for name, parameter in model.named_parameters():
        made = layers[name].matrix if parameter.is_meta else None
        yield name, (made.weight if isinstance(made, Dense) else parameter).detach()


def _sum(bits: Tensor) -> int:
    """Return the sum of whole numbers modulo 2**64, some at a time: each takes 8 bytes meanwhile."""
    rows = bits.reshape(len(bits), -1) if bits.ndim else bits.reshape(1, 1)
    parts = rows.split(max(1, SUMMED // max(1, rows.shape[1])))
    return int(torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum())


def _some(bits: Tensor) -> list[int]:
    """Return about `SPREAD` of the numbers, at even distances in the order of the weight's rows."""
    places = torch.arange(0, bits.numel(), max(1, bits.numel() // SPREAD), device=bits.device)
    return bits[torch.unravel_index(places, bits.shape)].tolist() if bits.ndim else [int(bits)]

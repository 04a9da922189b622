"""The physical limit: what memory gives at best."""

from dataclasses import dataclass

import torch

from sirius.benchmark.timing import repeated
from sirius.kernels.ops import linear

SIZE = 256 * 2**20  # bytes of each operand: far larger than the caches
TRIES = 9


@dataclass(frozen=True)
class Ceiling:
    """Measured bandwidths in GB/s (1e9 bytes): of a copy (bytes read and written), and of a matrix-vector product
    in the model's dtype (bytes read). The higher one is the ceiling."""

    copy: float
    matvec: float

    @property
    def gb_per_s(self) -> float:
        """The higher of both."""
        return max(self.copy, self.matvec)


def measure_ceiling(dtype: torch.dtype, device: str) -> Ceiling:
    """Measure both bandwidths, each the best of a few tries: a limit is what is reached at best."""
    source = torch.ones(SIZE // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    matrix, x = source.view(-1, 4096), torch.ones(1, 4096, dtype=dtype, device=device)
    copy = min(repeated(lambda: target.copy_(source), device, TRIES, TRIES))
    matvec = min(repeated(lambda: linear(x, matrix), device, TRIES, TRIES))
    return Ceiling(2 * SIZE / copy / 1e9, SIZE / matvec / 1e9)

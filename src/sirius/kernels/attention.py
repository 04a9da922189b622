"""Attention of a few tokens over the slots of a cache, on a GPU: `programs.py` holds the kernels."""

import torch
from torch import Tensor

from sirius.kernels.gpu import PROGRAMS, launch, operation, power_of_two

LEAST_SHARE = 128  # slots, of a split
MOST_QUERIES = {2: 64, 4: 16}  # that one program takes on, by the size of a number


@operation(
    lambda query, keys, values, held, seen, scale, softcap=None: query.new_empty(
        query.shape[0], query.shape[2], query.shape[1], query.shape[3]
    )
)
def attend(
    query: Tensor, keys: Tensor, values: Tensor, held: Tensor, seen: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """See `reference.attend`.

    Queries, keys and values may be views whose last dimension lies together. A slot that no token sees is not read.
    """
    from sirius.kernels.programs import attend_kernel, combine_kernel

    assert query.stride(3) == keys.stride(3) == values.stride(3) == 1, "heads must lie together"
    (rows, heads, tokens, size), (slots, kv_heads) = query.shape, keys.shape[1:3]
    y, groups = query.new_empty(rows, tokens, heads, size), heads // kv_heads
    if y.numel() == 0:
        return y
    splits = _splits(slots, rows * kv_heads)
    totals = query.new_empty(rows, heads * tokens, splits, size, dtype=torch.float32)
    sums = totals.new_empty(*totals.shape[:-1], 2)
    itemsize, columns = keys.element_size(), power_of_two(size, 16)
    queries = min(power_of_two(groups * tokens, 16), MOST_QUERIES[itemsize])
    launch(
        attend_kernel,
        (splits, kv_heads * -(-groups * tokens // queries), rows),
        *(query, keys, values, held, seen.contiguous().view(torch.uint8), totals, sums),
        *(query.stride(), keys.stride(), values.stride()),
        *(scale, softcap, slots, seen.shape[2], tokens, groups),
        D=size,
        SPLITS=splits,
        BLOCK_R=queries,
        BLOCK_N=min(64, max(16, 2**15 // (columns * itemsize**2))),
        BLOCK_D=columns,
        warps=8 if queries == 64 or itemsize == 4 else 4,
        stages=2,  # with three, heads of 256 pass the shared memory of an RTX 4090, heads of 128 an MI300's
    )
    sizes = {"D": size, "SPLITS": splits, "BLOCK_D": columns}
    launch(combine_kernel, (rows * heads * tokens,), totals, sums, y, tokens, groups, heads, **sizes, warps=4)
    return y


def _splits(slots: int, programs: int) -> int:
    """Return over how many programs to split the slots, a power of two: as many as fill a GPU, none of them small."""
    wanted = max(1, min(PROGRAMS // (2 * programs), slots // LEAST_SHARE))
    return 1 << (wanted.bit_length() - 1)

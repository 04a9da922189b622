"""Who sees which slot."""

import torch
from torch import Tensor


def chain_mask(slots: Tensor, visible: int, dtype: torch.dtype | None) -> Tensor:
    """Return the mask under which each token sees its own slot and every slot before it.

    slots    [B, T] int64  where the tokens stand; in a chain also their positions
    visible  how many slots attention is handed
    dtype    None for a boolean mask (True: seen), else an additive one (0: seen, the least finite number: not)

    Returns [B, 1, T, visible].
    """
    return _as(torch.arange(visible, device=slots.device) <= slots[:, None, :, None], dtype)


def tree_mask(lengths: Tensor, seen: Tensor, visible: int, dtype: torch.dtype | None) -> Tensor:
    """Return the mask under which each token sees what its row holds and its own branch.

    lengths  [B] int64       slots that each row holds; all of them are seen
    seen     [B, T, M] bool  which of the M slots after those each token sees: its ancestors and itself
    visible, dtype           as for `chain_mask`

    Returns [B, 1, T, visible].
    """
    after = torch.arange(visible, device=seen.device) - lengths[:, None]  # [B, visible]; below 0 held
    inside = (after >= 0) & (after < seen.shape[2])
    index = after.clamp(0, seen.shape[2] - 1)[:, None].expand(-1, seen.shape[1], -1)
    return _as(((seen.gather(2, index) & inside[:, None]) | (after < 0)[:, None])[:, None], dtype)


def _as(seen: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)

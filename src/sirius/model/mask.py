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
    seen = torch.arange(visible, device=slots.device) <= slots[:, None, :, None]
    if dtype is None:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=slots.device).masked_fill_(~seen, torch.finfo(dtype).min)

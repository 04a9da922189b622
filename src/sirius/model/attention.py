"""Attention over a slot cache, in the form in which transformers calls attention functions."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from sirius.errors import UnsupportedModelError
from sirius.kernels.dispatch import attend

NAME = "sirius"


class MaskChanged(Exception):
    """A model's attention computes something of the mask that it is given, so no kernel of ours can stand for it."""


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return what tokens [B, heads, T, head_dim] see of the slots [B, kv_heads, S, head_dim], [B, T, heads, head_dim].

    attention_mask  [B, 1, T, M] bool  which of the M slots after the held ones each token sees
    held            [B] int64, of kwargs: slots that each row holds; all of them are seen
    looks           of kwargs: the mask as it was before the model had it

    Raises MaskChanged where the model made another mask of it, or has attention sinks.
    """
    if "held" not in kwargs:
        raise UnsupportedModelError(
            f"attention {NAME!r} is that of sirius' own passes, and this is none: another thread decodes with this "
            "model, or with one that shares its config object, and must be waited for; else set "
            "config._attn_implementation to 'sdpa' again"
        )
    held, looks, softcap = kwargs["held"], kwargs["looks"], kwargs.get("softcap")
    if attention_mask is None or kwargs.get("s_aux") is not None or not _is_same(attention_mask, looks):
        raise MaskChanged
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key.transpose(1, 2), value.transpose(1, 2), held, attention_mask[:, 0], scale, softcap), None


def _is_same(mask: Tensor, given: Tensor) -> bool:
    """Tell whether a mask is the one that was given, not another made of it; a trace knows no addresses."""
    traced = torch.compiler.is_compiling()
    return mask.dtype is torch.bool and mask.shape == given.shape and (traced or mask.data_ptr() == given.data_ptr())


AttentionInterface.register(NAME, slot_attention)

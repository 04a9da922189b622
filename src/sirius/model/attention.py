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
    attention_mask: Tensor,
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
            f"attention {NAME!r} is that of a session's passes, and this is none: models in two threads must not share "
            "a config object; set config._attn_implementation to 'sdpa' again"
        )
    held, looks, softcap = kwargs["held"], kwargs["looks"], kwargs.get("softcap")
    if attention_mask.dtype is not torch.bool or attention_mask.shape != looks.shape or kwargs.get("s_aux") is not None:
        raise MaskChanged
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key.transpose(1, 2), value.transpose(1, 2), held, attention_mask[:, 0], scale, softcap), None


AttentionInterface.register(NAME, slot_attention)

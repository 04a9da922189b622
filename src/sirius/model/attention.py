"""Attention over a slot cache, in the form in which transformers calls attention functions."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from sirius.errors import UnsupportedModelError
from sirius.kernels.dispatch import attend

NAME = "sirius"


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
    """
    if "held" not in kwargs:
        raise UnsupportedModelError(
            f"attention {NAME!r} is that of a session's passes, and this is none: models in two threads must not share "
            "a config object; set config._attn_implementation to 'sdpa' again"
        )
    assert kwargs.get("s_aux") is None, "attention sinks are none of ours"
    held, softcap = kwargs["held"], kwargs.get("softcap")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key.transpose(1, 2), value.transpose(1, 2), held, attention_mask[:, 0], scale, softcap), None


AttentionInterface.register(NAME, slot_attention)

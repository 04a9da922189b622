"""Attention over a slot cache: which attention modules call it, and in the form in which transformers calls it."""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from sirius.kernels import ops
from sirius.model.adopt import Part, adopt, own_forward
from sirius.model.prepared import Prepared

NAME = "sirius"


class MaskChanged(Exception):
    """A model's attention derives another mask from the one that it is given, so no kernel of ours can stand for it."""


class SlotAttention(Part):
    """An attention module that in passes of ours finds our attention function in its configuration.

    during  the configuration in such passes; the model's own object is never changed
    """

    during: PreTrainedConfig

    @property
    def config(self) -> Any:
        """The model's configuration, or in a pass of ours a copy of it that names our attention."""
        now = self.prepared.now()
        return vars(self)["config"] if now is None or not now.attends else self.during

    @config.setter
    def config(self, value: Any) -> None:
        vars(self)["config"] = value


def adopt_attention(model: PreTrainedModel, prepared: Prepared) -> None:
    """Make the attention modules of a model `SlotAttention`s, where transformers lets their function be chosen."""
    if not getattr(model, "_supports_attention_backend", False):
        return
    config = model.config.get_text_config()
    during = copy(config)
    during._attn_implementation_internal = NAME  # the property would also write to parts that both share
    for module in list(model.modules()):
        ours = type(module).__name__.endswith("Attention") and vars(module).get("config") is config
        if ours and not own_forward(module):
            adopt(module, SlotAttention, prepared, during=during)


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

    Which slots each token sees is in the pass that runs; `attention_mask` must be the pass's mask [B, 1, T, M].

    Raises MaskChanged where the model made another mask of it, or has attention sinks.
    """
    now = module.prepared.now() if isinstance(module, SlotAttention) else None
    assert now is not None, f"attention {NAME!r} is chosen in passes alone"
    if attention_mask is None or kwargs.get("s_aux") is not None or not _is_same(attention_mask, now.mask[:, None]):
        raise MaskChanged
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    slots = key.transpose(1, 2), value.transpose(1, 2)
    return ops.attend(query, *slots, now.held, now.mask, scale, kwargs.get("softcap")), None


def _is_same(mask: Tensor, given: Tensor) -> bool:
    """Tell whether a mask is the one that was given, not another made of it; a trace knows no addresses."""
    traced = torch.compiler.is_compiling()
    return mask.dtype is torch.bool and mask.shape == given.shape and (traced or mask.data_ptr() == given.data_ptr())


AttentionInterface.register(NAME, slot_attention)

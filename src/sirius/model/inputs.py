"""What reaches a model's forward besides token ids: refused by name, unless a session would give the very same."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sirius.errors import RequestError, UnsupportedModelError

OURS = {"input_ids", "attention_mask", "use_cache", "cache_position", "logits_to_keep", "return_dict"}
CACHES = {"cache", "past_key_values"}  # since transformers 5.24, and before
TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")  # 0 is text
HOOK = "prepare_inputs_for_generation"
NEVER = "_update_model_kwargs_for_generation", "_prefill", "_sample"  # of `generate`, which a session does not call


def cache_argument(model: PreTrainedModel) -> str:
    """Return what a model's forward calls its KV cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def check_inputs(ids: Tensor, mask: Tensor | None, given: Mapping[str, Any]) -> None:
    """Raise RequestError where a forward would be given something that a session leaves out.

    ids    [B, P] int64, left-padded
    mask   [B, P], 1 where ids count; None: all of them
    given  the other arguments of the forward, by name
    """
    if mask is not None and (mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all())):
        raise RequestError(
            f"attention_mask marks tokens with 1 and padding with 0, [{ids.shape[0]}, {ids.shape[1]}]; "
            f"got {list(mask.shape)} {mask.dtype}"
        )
    for name, value in given.items():
        if (reason := _obstacle(name, value, ids, mask)) is not None:
            raise RequestError(reason)


def _obstacle(name: str, value: Any, ids: Tensor, mask: Tensor | None) -> str | None:
    """Return why an argument cannot be left out, None where it can."""
    if name in OURS or value is None or value is False or _is_empty(value):
        return None
    if name in CACHES:
        filled = value.get_seq_length() > 0
        return f"sirius fills a cache of its own; give the whole prompt as input_ids and no {name}" if filled else None
    if name == "inputs_embeds":
        return "sirius reads token ids, not inputs_embeds"
    if name == "position_ids" and _are_default(value, ids, mask):
        return None
    if name in TYPES and not bool(value.any()):
        return None
    way = "leave it out, or decode with model.generate alone"
    if name == "position_ids":
        return f"position_ids are not those of the tokens one after the other, which sirius counts itself; {way}"
    if name == "mm_encoder_outputs":  # transformers has replaced them by now
        name = "pixel_values (or other images or sound)"
    return f"{name} would have no effect, as sirius gives a model token ids, positions and a mask alone; {way}"


def _is_empty(value: Any) -> bool:
    return isinstance(value, Mapping) and all(each is None for each in value.values())


def _are_default(positions: Tensor, ids: Tensor, mask: Tensor | None) -> bool:
    """Tell whether positions [..., B or 1, n] number the last n tokens that count one after the other, from 0."""
    counted = torch.ones_like(ids) if mask is None else mask.to(ids)
    count = positions.shape[-1]
    if count > ids.shape[1]:
        return False
    want = (counted.cumsum(-1) - 1)[:, ids.shape[1] - count :]
    same = (positions.to(want) == want) | (counted[:, ids.shape[1] - count :] == 0)
    return bool(same.all())


@torch.no_grad()
def check_preparing(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where a model's own code prepares other inputs than a session would.

    That of transformers prepares token ids, positions and a mask from a prompt of ids alone. Any other is tried with
    made-up tokens: a prompt, and the step after it.
    """
    for name in NEVER:
        method = getattr(model, name, None)
        if method is not None and (name in vars(model) or not method.__module__.startswith("transformers.")):
            raise UnsupportedModelError(
                f"{type(model).__name__} has a {name} of its own, which sirius would not call; decode with "
                "model.generate alone"
            )
    prepare = getattr(model, HOOK, None)
    if prepare is None or (HOOK not in vars(model) and prepare.__module__.startswith("transformers.")):
        return
    ids = torch.arange(1, 8, device=model.device)[None] % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    for first, count in ((True, 7), (False, 1)):
        given = {"attention_mask": mask, "position_ids": mask.cumsum(-1) - 1, "use_cache": True}
        step = {cache_argument(model): DynamicCache(), "next_sequence_length": count, "is_first_iteration": first}
        try:
            found = prepare(ids.clone(), **given, **step)
            _check_prepared(found, ids, mask)
        except Exception as error:  # whatever its author's code raises
            raise UnsupportedModelError(
                f"{type(model).__name__} has a {HOOK} of its own, which sirius does not call, and it prepares more "
                f"than token ids, positions and a mask: {error!r}; decode with model.generate alone"
            ) from error


def _check_prepared(found: Mapping[str, Any], ids: Tensor, mask: Tensor) -> None:
    given = found.get("input_ids")
    if not isinstance(given, Tensor) or not torch.equal(given, ids[:, ids.shape[1] - given.shape[-1] :]):
        raise ValueError("input_ids are others")
    seen = found.get("attention_mask")
    if isinstance(seen, Tensor) and not torch.equal(seen, mask):
        raise ValueError("attention_mask is another")
    check_inputs(ids, mask, found)

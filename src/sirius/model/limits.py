"""How many tokens a model can be decoded for exactly: its context, sliding windows, and where positions change.

And the bytes of their keys and values.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig

from sirius.errors import ConfigError, RequestError

SCALED, DYNAMIC = ("linear", "dynamic", "ntk", "yarn"), "dynamic"
MOST_READ = 1024  # tokens of a prompt's pass where weights come from elsewhere; it bounds the memory for the pass
FULL, SLIDING = "full_attention", "sliding_attention"


def check_context(max_context: object) -> None:
    """Raise ConfigError where the most tokens of a text, as a user says, are no whole number from 2 on, or None."""
    if max_context is not None and (type(max_context) is not int or max_context < 2):
        raise ConfigError(f"max_context counts tokens, a prompt's and a new one at least, so 2; got {max_context!r}")


def context_limit(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model was made for, scaled positions included, None where it does not say.

    Scaled by a factor are `max_position_embeddings`, of yarn what it was before. Longrope, Llama 3 and Gemma 3 give it
    scaled already. So vLLM derives its max_model_len.
    """
    text = config.get_text_config()
    own = getattr(text, "max_position_embeddings", None)
    if own is None or text.model_type.startswith("gemma3"):
        return own
    scaled = [
        (rope.get("original_max_position_embeddings") or own if rope["rope_type"] == "yarn" else own) * rope["factor"]
        for rope in _ropes(config)
        if rope.get("rope_type") in SCALED and rope.get("factor")
    ]
    return int(max([own, *scaled]))


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the settings of a model's rotary positions: one for all layers, or one for each kind of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [each for each in (rope, *rope.values()) if isinstance(each, dict)]


def check_length(config: PreTrainedConfig, prompt: int, new: int) -> None:
    """Raise RequestError where prompt + new tokens are more than a model can be decoded for exactly."""
    found, length = sliding_window(config), rescaling_length(config)
    if found is not None and prompt + new > found[1]:  # the layer forgets the first of them
        layer, window = found
        raise RequestError(
            f"prompt {prompt} + {new} new tokens pass layer {layer}'s sliding window of {window}; "
            + (f"set max_new_tokens to at most {window - prompt}" if prompt < window else "shorten the prompt")
        )
    dynamic = any(rope.get("rope_type") == DYNAMIC for rope in _ropes(config))  # scaled anew at each token from there
    if length is not None and length < prompt + new and (dynamic or prompt <= length):
        way = "shorten the prompt" if dynamic else "lengthen the prompt by a token"
        raise RequestError(
            f"prompt {prompt} + {new} new tokens pass the {length} after which this model's positions are scaled anew "
            "(longrope, dynamic), and a window cannot be on both sides; "
            + (f"set max_new_tokens to at most {length - prompt}" if prompt < length else way)
        )


def sliding_window(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Return a model's first sliding-window layer and how many tokens it sees, None where there is none.

    A layer that picks so many tokens to look at (Doge) counts too: equal ones it picks by chance.
    """
    text = config.get_text_config()
    window, picked = getattr(text, "sliding_window", None), getattr(text, "keep_window_size", None)
    kinds = getattr(text, "layer_types", None) or [SLIDING if getattr(text, "use_sliding_window", True) else FULL]
    found = [(0, picked)] if picked is not None else []
    if window is not None and SLIDING in kinds:
        found.append((kinds.index(SLIDING), window))
    return min(found, key=lambda each: each[1], default=None)


def rescaling_length(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens past which a model scales all positions of a pass anew, None where it never does.

    A window across that length would scale the positions before it too, which decoding token by token does not.
    """
    text = config.get_text_config()
    for rope in _ropes(config):
        if rope.get("rope_type") == "longrope":
            return rope.get("original_max_position_embeddings") or text.original_max_position_embeddings
        if rope.get("rope_type") == DYNAMIC:
            return text.max_position_embeddings
    return None


def cache_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of so many tokens of one row."""
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head * tokens * dtype.itemsize

"""Where a model's texts end by themselves, as its generation config says."""

from transformers import PreTrainedModel


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Return the token ids that end a text, from the model's generation config."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return frozenset([ids] if isinstance(ids, int) else ids or ())


def stop_strings(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the strings that end a text, from the model's generation config."""
    found = getattr(model.generation_config, "stop_strings", None) or ()
    return (found,) if isinstance(found, str) else tuple(found)

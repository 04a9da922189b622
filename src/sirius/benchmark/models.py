"""Models of a known shape with random weights: speed does not depend on what the weights are."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sirius.errors import ConfigError

NOISE = 1_000_003  # random values that fill all weights, over and over: no multiple of any width
SPREAD = 0.02

_LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"}
_LLAMA_3 = {**_LLAMA, "vocab_size": 128_256, "rope_theta": 500_000.0, "max_position_embeddings": 131_072}


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {**_LLAMA_3, **_shape(2048, 8192, 16, 32, 8), "tie_word_embeddings": True},
    "llama-3.2-3b": {**_LLAMA_3, **_shape(3072, 8192, 28, 24, 8), "tie_word_embeddings": True},
    "llama-3-8b": {**_LLAMA_3, **_shape(4096, 14336, 32, 32, 8), "max_position_embeddings": 8192},
    "llama-3-70b": {**_LLAMA_3, **_shape(8192, 28672, 80, 64, 8), "max_position_embeddings": 8192},
    "llama-2-7b": {**_LLAMA, "vocab_size": 32_000, **_shape(4096, 11008, 32, 32, 32), "max_position_embeddings": 4096},
    "llama-2-13b": {**_LLAMA, "vocab_size": 32_000, **_shape(5120, 13824, 40, 40, 40), "max_position_embeddings": 4096},
}


def make_config(shape: str, layers: int | None = None) -> PreTrainedConfig:
    """Return the configuration of a named shape, a config.json or its folder; `layers` of them alone if that is given.

    Raises ConfigError of a name that is not known and of a file that is no configuration.
    """
    if shape in SHAPES:
        fields = SHAPES[shape]
    else:
        try:
            path = Path(shape) / "config.json" if Path(shape).is_dir() else Path(shape)
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            known = ", ".join(SHAPES)
            raise ConfigError(
                f"--shape is one of {known}, or a config.json or its folder; cannot read {shape!r}: {error}"
            ) from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ConfigError(f"{shape} names no model_type, so it is no config.json of transformers")
    own = fields.get("num_hidden_layers")
    if layers is not None and isinstance(own, int) and layers > own:
        raise ConfigError(f"--layers is at most {own}, all that {shape} has; got {layers}")
    changed = {**fields, **({} if layers is None else {"num_hidden_layers": layers})}
    changed = {name: value for name, value in changed.items() if name not in ("eos_token_id", "quantization_config")}
    try:
        config = AutoConfig.for_model(**changed, eos_token_id=None)
    except Exception as error:  # whatever a configuration makes transformers raise
        raise ConfigError(f"{shape} is no configuration that transformers knows: {_line(error)}") from error
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"):
        size = getattr(config.get_text_config(), name, 1)
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name} of {shape} is a whole number, at least 1; got {size!r}")
    text: Any = config.get_text_config()
    heads, shared = getattr(text, "num_attention_heads", 1), getattr(text, "num_key_value_heads", None) or 1
    if heads % shared:
        raise ConfigError(f"{shape} has {heads} attention heads on {shared} of keys and values, which share unevenly")
    return config


def make_model(config: PreTrainedConfig, dtype: torch.dtype, device: str, seed: int = 0) -> PreTrainedModel:
    """Return a model of a configuration, its weights random by a seed; it never ends a text.

    Raises ConfigError where transformers, or the memory, has no room for such a model.
    """
    try:
        with no_init_weights(), torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()  # which making one without initial values leaves out
    except Exception as error:  # whatever a configuration makes transformers raise
        raise ConfigError(f"no {config.model_type} of this configuration can be made: {_line(error)}") from error
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(NOISE, generator=generator) * SPREAD).to(device, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1) if name.endswith("norm.weight") else _fill(weight, noise)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model.eval()


def _fill(weight: torch.Tensor, noise: torch.Tensor) -> None:
    flat = weight.data.view(-1)
    whole = len(flat) // len(noise) * len(noise)
    flat[:whole].view(-1, len(noise)).copy_(noise.expand(whole // len(noise), -1))
    flat[whole:].copy_(noise[: len(flat) - whole])


def _line(error: Exception) -> str:
    """Return the kind of an error and the beginning of what it says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

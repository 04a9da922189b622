"""A Llama of transformers as a GGUF file, in its own dtype."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from sirius.benchmark.extras import need
from sirius.errors import ConfigError

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # GGML's names


def check_llama(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Raise ConfigError of a model that is no plain Llama, or in a dtype that llama.cpp does not have."""
    text: Any = config.get_text_config()
    rope = text.rope_parameters["rope_type"] if config.model_type == "llama" else None
    if rope != "default" or text.attention_bias or text.mlp_bias:
        raise ConfigError(
            f"llama.cpp gets models of type llama without biases and scaled positions; this one is {config.model_type}"
            + (f", with rope_type {rope} and biases {text.attention_bias or text.mlp_bias}" if rope else "")
        )
    if dtype not in TYPES:
        known = ", ".join(str(each).removeprefix("torch.") for each in TYPES)
        raise ConfigError(f"llama.cpp runs {known}; got --dtype {str(dtype).removeprefix('torch.')}")


def _no_tokenizer(writer: Any) -> None:
    writer.add_tokenizer_model("no_vocab")


def write_gguf(model: PreTrainedModel, path: Path, add_tokenizer: Callable[[Any], None] = _no_tokenizer) -> None:
    """Write a model's weights to a GGUF file, one after the other, so that no second copy is held.

    `add_tokenizer` is given the file's writer, and adds what it has of a tokenizer.

    Raises ConfigError where it is no plain Llama, or the package gguf is not there.
    """
    check_llama(model.config, model.dtype)
    gguf = need("gguf", "peer", "--peer llama.cpp")
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    _add_fields(writer, config)
    add_tokenizer(writer)
    weights = _weights(model, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers))
    for name, weight in weights.items():
        data, kind = _raw(weight), gguf.GGMLQuantizationType[TYPES[_stored(weight)]]
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, weight in weights.items():
        writer.write_tensor_data(_raw(_interleaved(name, weight, config)))
    writer.close()


def _add_fields(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _weights(model: PreTrainedModel, names: Any) -> dict[str, Tensor]:
    """Return the weights by GGUF's names; tied ones once."""
    tied = model.config.tie_word_embeddings
    weights = {name: weight for name, weight in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    return {names.get_name(name, try_suffixes=(".weight",)): weight for name, weight in weights.items()}


def _interleaved(name: str, weight: Tensor, config: Any) -> Tensor:
    """Return a weight as llama.cpp turns it by position: neighbouring rows of a head, not rows half a head apart."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind not in heads:
        return weight
    return weight.unflatten(0, (heads[kind], 2, -1)).transpose(1, 2).reshape(weight.shape)


def _stored(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.ndim == 1 else weight.dtype  # llama.cpp wants its norms so


def _raw(weight: Tensor) -> Any:
    """Return a weight as an array; of bfloat16, which numpy does not have, the bytes."""
    weight = weight.to("cpu", _stored(weight)).contiguous()
    return (weight.view(torch.uint8) if weight.dtype == torch.bfloat16 else weight).numpy()

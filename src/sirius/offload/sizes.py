"""The bytes of a model's parts, from its configuration alone: no weight is loaded or made."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sirius.core import AUTO, LONGEST, SparsityConfig
from sirius.errors import ConfigError
from sirius.kernels.quantized import bytes_of
from sirius.model.find import blocks, check_config, gated_mlp
from sirius.model.limits import cache_bytes
from sirius.offload.plan import Draft, Sizes

COARSE = "coarse", "griffin"


def draft_of(sparsity: SparsityConfig) -> Draft:
    """Return which kind of draft a configuration is to a plan.

    Raises ConfigError of a method that chooses neurons for each token, or is a plug-in: what it reads is not known
    before the pass. At fewer bits it is "rounded", as all rounded weights may be read.
    """
    if sparsity.draft_bits:
        return "rounded"
    if sparsity.method == "none":
        return "none"
    if sparsity.method in COARSE:
        return "coarse"
    raise ConfigError(
        f"a model that is streamed cannot be drafted with {sparsity.method}: what it reads is not known before each "
        "pass; use draft_bits 4 or 8, or the method coarse"
    )


def sizes_of(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    draft: SparsityConfig,
    context: int,
    chunk: int,
    held: int = 0,
    checked: int = LONGEST,
) -> Sizes:
    """Return the sizes of a model of a configuration; rounded weights and kept neurons are those of `draft`.

    context  slots of keys and values: tokens of prompt and text, and of a window
    chunk    most tokens of a prompt that one pass reads
    held     bytes that the process holds before loading, which count as working memory
    checked  most tokens of a text that a check reads

    Raises ConfigError where transformers makes no such model, or `keep` keeps no neuron, and UnsupportedModelError
    where its structure does not fit.
    """
    assert draft.draft_bits != AUTO, "whoever plans has chosen the bits"
    model, bits = skeleton(config, dtype), draft.draft_bits
    parts = _parts(model)
    streamed = [[*block.attention, *block.mlp] for block in parts]
    head = [each for each in [model.get_output_embeddings()] if isinstance(each, nn.Linear)]
    whole = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    return Sizes(
        fixed=whole - sum(map(_bytes, streamed)),
        attention=tuple(_bytes(block.attention) for block in parts),
        mlp=tuple(_bytes(block.mlp) for block in parts),
        rounded=tuple(_rounded(block, bits) for block in streamed),
        rounded_head=_rounded(head, bits),
        kept=tuple(_kept(block, draft) for block in parts),
        cache=cache_bytes(config, context, dtype),
        working=held + _working(config, dtype, parts, (chunk, context, checked), draft.method in COARSE),
        head=_bytes(head),
    )


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of a configuration on the device meta, where its weights have shapes and no memory.

    Raises ConfigError where transformers makes no such model, and UnsupportedModelError of a kind that does not fit.
    """
    check_config(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # whatever a configuration makes transformers raise
        line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError(f"no {config.model_type} of this configuration can be made: {line}") from error


class _Part(NamedTuple):
    """The linear layers of a block, and its neurons F; what several blocks share belongs to the first of them."""

    attention: list[nn.Linear]
    mlp: list[nn.Linear]
    neurons: int


def _parts(model: PreTrainedModel) -> list[_Part]:
    """Return the parts of each block; raise UnsupportedModelError where one has no gated MLP of plain layers."""
    parts: list[_Part] = []
    known: set[nn.Module] = set()
    for path, block in blocks(model):
        _, mlp, roles = gated_mlp(path, block)
        linears = [each for each in block.modules() if isinstance(each, nn.Linear) and each not in known]
        inside = set(mlp.modules())
        gated, others = ([each for each in linears if (each in inside) is wanted] for wanted in (True, False))
        parts.append(_Part(others, gated, getattr(mlp, roles.layers["down"]).in_features))
        known |= set(linears)
    return parts


def _bytes(layers: Iterable[nn.Linear]) -> int:
    return sum(layer.weight.nbytes for layer in layers)


def _rounded(layers: Iterable[nn.Linear], bits: int) -> int:
    return sum(bytes_of(layer.out_features, layer.in_features, bits) for layer in layers) if bits else 0


def _kept(block: _Part, draft: SparsityConfig) -> int:
    """Return the bytes of the neurons that coarse keeps in a block; 0 of another method."""
    if draft.method not in COARSE:
        return 0
    count = int(draft.keep * block.neurons)
    if not count:
        raise ConfigError(f"keep {draft.keep} of {block.neurons} neurons keeps none; raise keep")
    return _bytes(block.mlp) // block.neurons * count


def _working(
    config: PreTrainedConfig, dtype: torch.dtype, parts: Sequence[_Part], tokens: tuple[int, int, int], observed: bool
) -> int:
    """Return the bytes of what is computed in a pass, as far as it is in memory at the same time.

    Of a prompt's chunk: the inputs and outputs of a block and of its norms, the outputs of the attention's linear
    layers, gate, up and their product, and the mask. Of a check: the scores, see `score_bytes`.

    tokens    of a chunk, of the context, and of a check
    observed  a method adds up the neurons' activations, float32, which takes two copies of a chunk's
    """
    text: Any = config.get_text_config()
    (chunk, context, checked), wide = tokens, torch.float32.itemsize
    outputs = max(sum(layer.out_features for layer in block.attention) for block in parts)
    neurons = max(block.neurons for block in parts)
    activations = chunk * (4 * text.hidden_size + outputs + 3 * neurons) * dtype.itemsize
    statistic = neurons * (2 * chunk + len(parts)) * wide if observed else 0
    return activations + chunk * context + score_bytes(config, dtype, checked) + statistic


def score_bytes(config: PreTrainedConfig, dtype: torch.dtype, checked: int) -> int:
    """Return the bytes of the scores of so many tokens in one pass: in the model's dtype, and twice in float32."""
    return checked * config.get_text_config().vocab_size * (dtype.itemsize + 2 * torch.float32.itemsize)

"""The bytes of a model's parts, from its configuration alone: no weight is loaded or made."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sirius.core import AUTO, LONGEST, SparsityConfig
from sirius.errors import ConfigError, UnsupportedModelError
from sirius.kernels.quantized import bytes_of
from sirius.model.find import blocks, check_config, gated_mlp
from sirius.model.limits import cache_bytes
from sirius.offload.plan import BUFFERS, MARGIN, Draft, Sizes
from sirius.sparsity.base import find

COARSE = "coarse", "griffin"


@dataclass(frozen=True)
class Layers:
    """The linear layers of one decoder block.

    attention  those outside of its gated MLP
    mlp        gate, up and down by their roles; gate and up may be one layer. {} of an MLP of an earlier block
    """

    attention: tuple[nn.Linear, ...]
    mlp: dict[str, nn.Linear]

    @property
    def neurons(self) -> int:
        """The neurons F of the MLP."""
        return self.mlp["down"].in_features if self.mlp else 0


def layers_of(model: PreTrainedModel) -> list[Layers]:
    """Return the linear layers of each decoder block, those of an MLP that several blocks share at the first one.

    Raises UnsupportedModelError where a block has no gated MLP, or blocks have MLPs of different classes.
    """
    found: list[Layers] = []
    known: set[nn.Module] = set()
    for path, block in blocks(model):
        _, module, roles = gated_mlp(path, block)
        mlp = {role: cast("nn.Linear", getattr(module, name)) for role, name in roles.layers.items()}
        inside = set(module.modules())
        others = [each for each in block.modules() if type(each) is nn.Linear and each not in inside | known]
        found.append(Layers(tuple(cast("list[nn.Linear]", others)), {} if module in known else mlp))
        known |= {module, *others}
    kinds = sorted({type(module).__name__ for module in known if not isinstance(module, nn.Linear)})
    if len(kinds) > 1:
        raise UnsupportedModelError(
            f"a memory budget needs blocks whose MLPs are alike; this model's are {', '.join(kinds)}: load it without"
        )
    return found


def draft_of(sparsity: SparsityConfig) -> Draft:
    """Return which kind of draft a configuration is to a plan.

    Raises ConfigError of a method that does not exist, chooses neurons for each token, or is a plug-in: what these read
    is not known before the pass. At fewer bits it is "rounded", as all rounded weights may be read.
    """
    if sparsity.draft_bits:
        return "rounded"
    if sparsity.refresh:
        raise ConfigError("refresh chooses neurons after each check, and all would be copied again; set it to 0")
    if sparsity.method == "none":
        return "none"
    if sparsity.method in COARSE:
        return "coarse"
    find(sparsity.method)  # there may be no method of this name
    raise ConfigError(
        f"a model that is streamed cannot be drafted with {sparsity.method}: what it reads is not known before each "
        "pass; use draft_bits 4 or 8, or the method coarse, or load the model without a budget"
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
    held     bytes that the process holds before loading, and a reserve
    checked  most tokens of a text that a check reads

    Raises ConfigError where transformers makes no such model, or `keep` keeps no neuron, and UnsupportedModelError
    where its structure does not fit.
    """
    assert draft.draft_bits != AUTO, "whoever plans has chosen the bits"
    model, bits = skeleton(config, dtype), draft.draft_bits
    parts = layers_of(model)
    streamed = [[*block.attention, *block.mlp.values()] for block in parts]
    head = [each for each in [model.get_output_embeddings()] if isinstance(each, nn.Linear)]
    whole = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    return Sizes(
        fixed=whole - sum(map(_bytes, streamed)),
        attention=tuple(_bytes(block.attention) for block in parts),
        mlp=tuple(_bytes(block.mlp.values()) for block in parts),
        rounded=tuple(_rounded(block, bits) for block in streamed),
        rounded_head=_rounded(head, bits),
        kept=tuple(_kept(block, draft) for block in parts),
        cache=cache_bytes(config, context, dtype),
        working=_working(config, dtype, parts, (min(chunk, context), context, checked), draft.method in COARSE),
        process=held,
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


def _bytes(layers: Iterable[nn.Linear]) -> int:
    return sum(layer.weight.nbytes for layer in layers)


def _rounded(layers: Iterable[nn.Linear], bits: int) -> int:
    return sum(bytes_of(layer.out_features, layer.in_features, bits) for layer in layers) if bits else 0


def _kept(block: Layers, draft: SparsityConfig) -> int:
    """Return the bytes of the neurons that coarse keeps in a block; 0 of another method."""
    if draft.method not in COARSE or not block.mlp:
        return 0
    count = int(draft.keep * block.neurons)
    if not count:
        raise ConfigError(f"keep {draft.keep} of {block.neurons} neurons keeps none; raise keep")
    return _bytes(block.mlp.values()) // block.neurons * count


def _working(
    config: PreTrainedConfig, dtype: torch.dtype, parts: Sequence[Layers], tokens: tuple[int, int, int], observed: bool
) -> int:
    """Return the bytes of what is computed in a pass, as far as it is in memory at the same time.

    - Of a prompt's chunk: what a block and its norms take and give, the outputs of the attention's layers, gate, up and
      their product.
    - Of its attention: keys and values as each head reads them, and the mask, as a bool and in the model's dtype.
    - Of a check: the scores, see `score_bytes`.
    - Of the buffers: what they have beyond a unit.

    tokens    of a chunk, of the context, and of a check
    observed  a method adds up the neurons' activations, float32, which takes two copies of a chunk's
    """
    text: Any = config.get_text_config()
    (chunk, context, checked), wide = tokens, torch.float32.itemsize
    outputs = max(sum(layer.out_features for layer in block.attention) for block in parts)
    neurons = max(block.neurons for block in parts)
    activations = chunk * (4 * text.hidden_size + outputs + 3 * neurons) * dtype.itemsize
    statistic = neurons * (2 * chunk + len(parts)) * wide if observed else 0
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = context * (2 * text.num_attention_heads * head * dtype.itemsize + chunk * (1 + dtype.itemsize))
    return activations + attention + score_bytes(config, dtype, checked) + statistic + BUFFERS * MARGIN


def score_bytes(config: PreTrainedConfig, dtype: torch.dtype, checked: int) -> int:
    """Return the bytes of the scores of so many tokens in one pass: in the model's dtype, and twice in float32."""
    return checked * config.get_text_config().vocab_size * (dtype.itemsize + 2 * torch.float32.itemsize)

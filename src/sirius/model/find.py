"""Find the gated MLPs of a transformers model by their structure, and refuse what does not fit, by name."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel

from sirius.errors import ModelError, UnsupportedModelError
from sirius.model.limits import FULL, SLIDING
from sirius.model.mlp import Roles, check_layers
from sirius.model.placement import check_placement
from sirius.model.prepared import prepared_of

SEPARATE = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
FUSED = {"gate_up": "gate_up_proj", "down": "down_proj"}
ACTIVATIONS = ("act_fn", "activation_fn")
ATTENTION = ("sdpa", "eager")


def gated_mlps(model: PreTrainedModel) -> list[tuple[str, nn.Module, Roles]]:
    """Return each block's gated MLP once, with its path and its roles, first block first.

    Raises UnsupportedModelError, naming the module and the reason, where a block has none or several, or where one is
    more than plain layers.
    """
    found = {module: (path, roles) for path, module, roles in (gated_mlp(*block) for block in blocks(model))}
    return [(path, module, roles) for module, (path, roles) in found.items()]


def check_kind(model: object) -> None:
    """Raise UnsupportedModelError of anything but a module."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a model is needed, such as AutoModelForCausalLM.from_pretrained gives; got a {type(model).__name__}"
        )


def check_head(model: object) -> None:
    """Raise UnsupportedModelError of what wraps a model, and of a model that scores no tokens."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        merge = hasattr(model, "merge_and_unload")
        raise UnsupportedModelError(
            f"a {kind} is no model of transformers but may hold one; give "
            + ("what its merge_and_unload() returns, adapters are merged then" if merge else "the model inside it")
        )
    if model.get_output_embeddings() is None and not model.can_generate():
        raise UnsupportedModelError(
            f"a {kind} has no head that scores tokens; load the checkpoint with AutoModelForCausalLM.from_pretrained"
        )


def dropouts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of a model that may drop part of what they compute at random, each with its path."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, _DropoutNd) or hasattr(module, "attention_dropout")
    ]


def check_mode(found: list[tuple[str, nn.Module]]) -> None:
    """Raise UnsupportedModelError where one of a model's `dropouts` drops something, as it does in training."""
    for path, module in found:
        if module.training and (share := getattr(module, "p", 0) or getattr(module, "attention_dropout", 0)):
            raise UnsupportedModelError(
                f"{path} is in training mode and has a dropout of {share}; call model.eval() first"
            )


def check_config(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError where a model's configuration already rules it out."""
    text: Any = config.get_text_config()
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{config.model_type} is an encoder-decoder; sirius decodes causal models")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"this {config.model_type} checkpoint is quantised, which sirius cannot run yet; load the unquantised one"
        )
    others = set(getattr(text, "layer_types", None) or ()) - {FULL, SLIDING}
    if others:
        raise UnsupportedModelError(
            f"{config.model_type} has layers of kind {', '.join(sorted(others))}, whose state cannot be rolled back"
        )


def check_weights(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where weights lie where they cannot be laid out anew, or attention takes no mask."""
    check_placement(model)
    chosen = model.config._attn_implementation
    if chosen not in ATTENTION:
        raise UnsupportedModelError(
            f"attention {chosen!r} takes no mask of ours; load the model with attn_implementation='sdpa'"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedModelError(
            "the model was made within torch.inference_mode(), which keeps its weights from being laid out anew; "
            "make or load it outside"
        )
    placed = prepared_of(model).placed is not None
    devices = {p.device for p in model.parameters() if not (placed and p.is_meta)}
    if devices == {torch.device("meta")}:
        raise UnsupportedModelError("the model is on meta, where it has no weights; load it on cpu or cuda")
    if len(devices) > 1:
        names = ", ".join(sorted(str(d) for d in devices))
        raise UnsupportedModelError(
            f"the model is spread over {names}; load it whole on one device, or where it is too large for one with "
            "Engine.load(folder, memory_budget=...)"
        )


def check_finite(path: str, module: nn.Module) -> None:
    """Raise ModelError where weights of the model's `path` are no numbers."""
    for name, weight in module.named_parameters():
        if count := int((~weight.isfinite()).sum()):
            raise ModelError(
                f"{path}.{name} holds {count} numbers of {weight.numel()} that are not finite (NaN or infinite); the "
                f"checkpoint is damaged, or {weight.dtype} is too narrow for it"
            )


def blocks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the decoder blocks with their names: the list of modules that has one for each hidden layer."""
    layers = model.config.get_text_config().num_hidden_layers
    decoder = cast("Any", model).get_decoder()
    inside = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    for name, module in decoder.named_modules(prefix=inside.rstrip(".")):
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            yield from ((f"{name}.{i}", block) for i, block in enumerate(module))
            return
    raise UnsupportedModelError(f"{type(model).__name__} holds no list of {layers} decoder blocks")


def gated_mlp(path: str, block: nn.Module) -> tuple[str, nn.Module, Roles]:
    """Return the one gated MLP of a block with its path and roles, all of its layers plain."""
    for name, parameter in block.named_parameters():
        if parameter.ndim == 3:
            raise UnsupportedModelError(f"{path}.{name} holds many experts: a mixture of experts does not fit yet")
    found = [(f"{path}.{name}", module) for name, module in block.named_modules() if _roles(module)]
    if not found:
        kinds = ", ".join(name for name, m in block.named_modules() if not list(m.children()) and "attn" not in name)
        raise UnsupportedModelError(f"{path} has no gated MLP (gate, up and down layers); it holds {kinds}")
    if len(found) > 1:
        names = ", ".join(name for name, _ in found[:3])
        raise UnsupportedModelError(f"{path} has {len(found)} gated MLPs ({names}, ...): experts do not fit yet")
    inside, module = found[0]
    roles = Roles(_roles(module), _activation(inside, module))
    check_layers(inside, module, roles)
    if dropped := [path for path, each in dropouts(module) if getattr(each, "p", 0)]:
        raise UnsupportedModelError(f"{inside}.{dropped[0]} would not be called when the model learns; set its p to 0")
    return inside, module, roles


def _roles(module: nn.Module) -> dict[str, str]:
    """Return which child plays gate, up (or both fused) and down, or nothing where the module is no gated MLP."""
    children = dict(module.named_children())
    return next((names for names in (SEPARATE, FUSED) if set(names.values()) <= children.keys()), {})


def _activation(path: str, module: nn.Module) -> str:
    """Return what the activation of a gated MLP is called."""
    own = {**vars(module), **module._modules}  # a method would go with its class
    found = next((name for name in ACTIVATIONS if callable(own.get(name))), None)
    if found is None:
        raise UnsupportedModelError(f"{path} names no activation ({' or '.join(ACTIVATIONS)})")
    return found

"""Find the gated MLPs of a transformers model by their structure, make them ours, and undo it."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel

from sirius.errors import ModelError, RequestError, UnsupportedModelError
from sirius.model import linear, norm
from sirius.model.inputs import check_preparing
from sirius.model.mlp import SparseMLP, agrees, check_layers, example, take_over
from sirius.model.workspace import drop_idle, lock_of
from sirius.stats import Parameters

SEPARATE = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
FUSED = {"gate_up": "gate_up_proj", "down": "down_proj"}
ACTIVATIONS = ("act_fn", "activation_fn")
FORMULA = "down(act(gate(x)) * up(x))"
ATTENTION = ("sdpa", "eager")
SCALED, DYNAMIC = ("linear", "dynamic", "ntk", "yarn"), "dynamic"
FULL, SLIDING = "full_attention", "sliding_attention"


def prepare(model: PreTrainedModel) -> list[SparseMLP]:
    """Make every block's gated MLP a `SparseMLP` and return them, first block first.

    The model computes what it did before. Preparing twice lays out anew what was taken apart, and changes nothing else.
    Raises UnsupportedModelError, naming the module and the reason, and leaves the model as it was where anything does
    not fit; ModelError where weights are no finite numbers.
    """
    _check_kind(model)
    _check_head(model)
    with lock_of(model):
        return _prepare(model)


def _prepare(model: PreTrainedModel) -> list[SparseMLP]:
    _check_weights(model)
    check_preparing(model)
    if ready := dict(_sparse_mlps(model)):
        for path, mlp in ready.items():
            check_layers(path, mlp, mlp.names, mlp.act)
            mlp.settle()
        return list(ready.values())
    check_config(model.config)
    found = {module: path for path, module in (_gated_mlp(name, block) for name, block in _blocks(model))}
    with ExitStack() as undo:
        mlps = [_take_over(path, module, undo) for module, path in found.items()]
        undo.pop_all()
    linear.take_over(model)
    norm.take_over(model)
    return mlps


def restore(model: PreTrainedModel) -> None:
    """Make the modules what they were before the model was prepared.

    Raises UnsupportedModelError, and changes nothing, where an MLP has got a forward of its own since.
    """
    _check_kind(model)
    with lock_of(model):
        _restore(model)


def _restore(model: PreTrainedModel) -> None:
    mlps = dict(_sparse_mlps(model))
    for path, mlp in mlps.items():
        if linear.own_forward(mlp):
            raise UnsupportedModelError(f"{path} has got a forward of its own since it was prepared; take it off first")
    for mlp in mlps.values():
        mlp.restore()
    linear.give_back(model)
    norm.give_back(model)
    drop_idle(model)


def _check_kind(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a model is needed, such as AutoModelForCausalLM.from_pretrained gives; got a {type(model).__name__}"
        )


def _check_head(model: object) -> None:
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


def sparse_mlps(model: nn.Module) -> list[SparseMLP]:
    """Return the MLPs of a prepared model, first block first; none where it is not prepared."""
    return [mlp for _, mlp in _sparse_mlps(model)]


def _sparse_mlps(model: nn.Module) -> Iterator[tuple[str, SparseMLP]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, SparseMLP))


def count_parameters(model: PreTrainedModel) -> Parameters:
    """Count the parameters of a prepared model."""
    mlps = sparse_mlps(model)
    inside = cast("Tensor", model.get_input_embeddings().weight)
    tied = getattr(cast("Any", model).get_output_embeddings(), "weight", None) is inside
    return Parameters(
        total=sum(p.numel() for p in model.parameters()),
        embedding=0 if tied else inside.numel(),
        gate=sum(mlp.neurons.gate.numel() for mlp in mlps),
        up=sum(mlp.neurons.up.numel() for mlp in mlps),
        down=sum(mlp.neurons.down.numel() for mlp in mlps),
    )


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
    """Return how a model turns positions: one for all layers, or one for each kind of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [each for each in (rope, *rope.values()) if isinstance(each, dict)]


def check_length(config: PreTrainedConfig, prompt: int, new: int) -> None:
    """Raise RequestError where prompt + new tokens are more than a model can be decoded for exactly."""
    _check_sliding(config, prompt, new)
    _check_rope(config, prompt, new)


def _check_sliding(config: PreTrainedConfig, prompt: int, new: int) -> None:
    """Raise RequestError where prompt + new tokens pass a sliding-window layer, which forgets the first of them."""
    if (found := sliding_window(config)) is None:
        return
    layer, window = found
    if prompt + new > window:
        raise RequestError(
            f"prompt {prompt} + {new} new tokens pass layer {layer}'s sliding window of {window}; "
            + (f"set max_new_tokens to at most {window - prompt}" if prompt < window else "shorten the prompt")
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


def rope_turn(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens past which a model turns all positions of a pass in another way, None of no such one.

    A window across it would give the tokens before it what those after it get, unlike a token at a time.
    """
    text = config.get_text_config()
    for rope in _ropes(config):
        if rope.get("rope_type") == "longrope":
            return rope.get("original_max_position_embeddings") or text.original_max_position_embeddings
        if rope.get("rope_type") == DYNAMIC:
            return text.max_position_embeddings
    return None


def _check_rope(config: PreTrainedConfig, prompt: int, new: int) -> None:
    """Raise RequestError where prompt + new tokens come to where the model turns positions in another way.

    Dynamic positions are turned in another way by each token from there on, so no text goes beyond.
    """
    turn = rope_turn(config)
    dynamic = any(rope.get("rope_type") == DYNAMIC for rope in _ropes(config))
    if turn is not None and turn < prompt + new and (dynamic or prompt <= turn):
        way = "shorten the prompt" if dynamic else "lengthen the prompt by a token"
        raise RequestError(
            f"prompt {prompt} + {new} new tokens pass the {turn} after which this model's positions are scaled anew "
            "(longrope, dynamic), and a window cannot be on both sides; "
            + (f"set max_new_tokens to at most {turn - prompt}" if prompt < turn else way)
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


def _check_weights(model: PreTrainedModel) -> None:
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
    devices = {p.device for p in model.parameters()}
    if devices == {torch.device("meta")}:
        raise UnsupportedModelError("the model is on meta, where it has no weights; load it on cpu or cuda")
    if len(devices) > 1:
        names = ", ".join(sorted(str(d) for d in devices))
        raise UnsupportedModelError(f"the model is spread over {names}; load it whole on one device")


@torch.no_grad()
def _take_over(path: str, module: nn.Module, undo: ExitStack) -> SparseMLP:
    """Make a gated MLP a `SparseMLP`, which `undo` undoes, and check that it computes what it did."""
    names, act = _roles(module), _activation(path, module)
    x = example(getattr(module, names.get("gate") or names["gate_up"]))
    try:
        want = module.forward(x)  # past its hooks, which are not to see this
    except (TypeError, RuntimeError) as error:
        raise UnsupportedModelError(f"{path} cannot be called as {FORMULA}: {error}") from error
    mlp = take_over(module, names, act)
    undo.callback(mlp.restore)
    try:
        same = agrees(mlp, x, want)
    except (TypeError, RuntimeError) as error:
        raise UnsupportedModelError(f"{path} computes something else than {FORMULA}: {error}") from error
    if not same:
        _check_finite(path, mlp)
        raise UnsupportedModelError(f"{path} computes something else than {FORMULA}")
    return mlp


def _check_finite(path: str, module: nn.Module) -> None:
    """Raise ModelError where weights of the model's `path` are no numbers."""
    for name, weight in module.named_parameters():
        if count := int((~weight.isfinite()).sum()):
            raise ModelError(
                f"{path}.{name} holds {count} numbers of {weight.numel()} that are not finite (NaN or infinite); the "
                f"checkpoint is damaged, or {weight.dtype} is too narrow for it"
            )


def _blocks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the decoder blocks with their names: the list of modules that has one for each hidden layer."""
    layers = model.config.get_text_config().num_hidden_layers
    decoder = cast("Any", model).get_decoder()
    inside = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    for name, module in decoder.named_modules(prefix=inside.rstrip(".")):
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            yield from ((f"{name}.{i}", block) for i, block in enumerate(module))
            return
    raise UnsupportedModelError(f"{type(model).__name__} holds no list of {layers} decoder blocks")


def _gated_mlp(path: str, block: nn.Module) -> tuple[str, nn.Module]:
    """Return the one gated MLP of a block with its path, all of its layers plain."""
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
    check_layers(inside, module, _roles(module), _activation(inside, module))
    if dropped := [path for path, each in dropouts(module) if getattr(each, "p", 0)]:
        raise UnsupportedModelError(f"{inside}.{dropped[0]} would not be called when the model learns; set its p to 0")
    return inside, module


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

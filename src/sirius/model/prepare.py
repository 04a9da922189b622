"""Find the gated MLPs of a transformers model by their structure, put ours in their place, and undo it."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sirius.errors import RequestError, UnsupportedModelError
from sirius.model import linear, norm
from sirius.model.mlp import SparseMLP, agrees
from sirius.model.workspace import drop_idle
from sirius.stats import Parameters

SEPARATE = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
FUSED = {"gate_up": "gate_up_proj", "down": "down_proj"}
ACTIVATIONS = ("act_fn", "activation_fn")
ATTENTION = ("sdpa", "eager")
FULL, SLIDING = "full_attention", "sliding_attention"


def prepare(model: PreTrainedModel) -> list[SparseMLP]:
    """Put a `SparseMLP` in the place of every block's gated MLP and return them, first block first.

    The model computes what it did before. Preparing twice lays out anew what was taken apart, and changes nothing else.
    Raises UnsupportedModelError, naming the module and the reason, and leaves the model as it was where anything does
    not fit.
    """
    if ready := sparse_mlps(model):
        for mlp in ready:
            mlp.settle()
        return ready
    check_config(model.config)
    _check_weights(model)
    found = [_gated_mlp(name, block) for name, block in _blocks(model)]
    mlps: list[SparseMLP] = []
    with ExitStack() as undo:
        for parent, name, path in found:
            original = getattr(parent, name)
            mlp = SparseMLP(original, _roles(original), _activation(path, original))
            undo.callback(mlp.restore)
            mlps.append(mlp)
            _check_agrees(path, mlp, original)
        undo.pop_all()
    for (parent, name, _), mlp in zip(found, mlps, strict=True):
        setattr(parent, name, mlp)
    linear.take_over(model)
    norm.take_over(model)
    return mlps


def restore(model: PreTrainedModel) -> None:
    """Put the modules back that stood in the model before it was prepared."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SparseMLP):
                setattr(parent, name, child.restore())
    linear.give_back(model)
    norm.give_back(model)
    drop_idle(model)


def sparse_mlps(model: nn.Module) -> list[SparseMLP]:
    """Return the MLPs of a prepared model, first block first; none where it is not prepared."""
    return [module for module in model.modules() if isinstance(module, SparseMLP)]


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


def cache_argument(model: PreTrainedModel) -> str:
    """Return what a model's forward calls its KV cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def context_limit(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model was made for, None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


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
    """Return a model's first sliding-window layer and how many tokens it sees, None where there is none."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or [SLIDING if getattr(text, "use_sliding_window", True) else FULL]
    return None if window is None or SLIDING not in kinds else (kinds.index(SLIDING), window)


def rope_turn(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens past which a model turns all positions of a pass in another way, None of no such one.

    A window across it would give the tokens before it what those after it get, unlike a token at a time.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    for each in (rope, *(inner for inner in rope.values() if isinstance(inner, dict))):
        if each.get("rope_type") == "longrope":
            return each.get("original_max_position_embeddings") or text.original_max_position_embeddings
        if each.get("rope_type") == "dynamic":
            return context_limit(config)
    return None


def _check_rope(config: PreTrainedConfig, prompt: int, new: int) -> None:
    """Raise RequestError where prompt + new tokens come to where the model turns positions in another way."""
    turn = rope_turn(config)
    if turn is not None and prompt <= turn < prompt + new:
        raise RequestError(
            f"prompt {prompt} + {new} new tokens pass the {turn} after which this model's positions are scaled anew "
            "(longrope, dynamic), and a window cannot be on both sides; "
            + (f"set max_new_tokens to at most {turn - prompt}" if prompt < turn else "lengthen the prompt by a token")
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
    if len(devices) > 1 or any(d.type == "meta" for d in devices):
        names = ", ".join(sorted(str(d) for d in devices))
        raise UnsupportedModelError(f"the model is spread over {names}; load it whole on one device")


def _check_agrees(path: str, mlp: SparseMLP, original: nn.Module) -> None:
    try:
        same = agrees(mlp, original)
    except (TypeError, RuntimeError) as error:
        raise UnsupportedModelError(f"{path} cannot be called as down(act(gate(x)) * up(x)): {error}") from error
    if not same:
        raise UnsupportedModelError(f"{path} computes something else than down(act(gate(x)) * up(x))")


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


def _gated_mlp(path: str, block: nn.Module) -> tuple[nn.Module, str, str]:
    """Return the parent, name and path of the one gated MLP of a block."""
    for name, parameter in block.named_parameters():
        if parameter.ndim == 3:
            raise UnsupportedModelError(f"{path}.{name} holds many experts: a mixture of experts does not fit yet")
    found = [(name, module) for name, module in block.named_modules() if _roles(module)]
    if not found:
        kinds = ", ".join(name for name, m in block.named_modules() if not list(m.children()) and "attn" not in name)
        raise UnsupportedModelError(f"{path} has no gated MLP (gate, up and down layers); it holds {kinds}")
    if len(found) > 1:
        names = ", ".join(f"{path}.{name}" for name, _ in found[:3])
        raise UnsupportedModelError(f"{path} has {len(found)} gated MLPs ({names}, ...): experts do not fit yet")
    name, module = found[0]
    for role, child in _roles(module).items():
        linear = getattr(module, child)
        if type(linear) is not nn.Linear:
            raise UnsupportedModelError(
                f"{path}.{name}.{child} ({role}) is a {type(linear).__name__}, not a plain linear layer; "
                "load the model unquantised and without adapters"
            )
    parent_name, _, leaf = name.rpartition(".")
    return block.get_submodule(parent_name), leaf, f"{path}.{name}"


def _roles(module: nn.Module) -> dict[str, str]:
    """Return which child plays gate, up (or both fused) and down, or nothing where the module is no gated MLP."""
    children = dict(module.named_children())
    return next((names for names in (SEPARATE, FUSED) if set(names.values()) <= children.keys()), {})


def _activation(path: str, module: nn.Module) -> Any:
    for name in ACTIVATIONS:
        if callable(activation := getattr(module, name, None)):
            return activation
    raise UnsupportedModelError(f"{path} names no activation ({' or '.join(ACTIVATIONS)})")

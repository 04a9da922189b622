"""Weights that are more than a tensor (quantised, sharded, without numbers): PyTorch multiplies them, or they are
refused by name; no kernel takes their address."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

import sirius
from conftest import greedy, tiny_model
from sirius.engine import Engine
from sirius.errors import UnsupportedModelError
from sirius.kernels import cpu

pytestmark = pytest.mark.integration

PROMPT, NEW = [5, 17, 93, 41, 8], 40
aten = torch.ops.aten


class Wrapped(Tensor):
    """Holds a tensor, computes as it does, and has no address of its own; what quantised tensors are made like."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inside = tree_map(lambda each: each.inner if isinstance(each, Wrapped) else each, (args, kwargs or {}))
        result = func(*inside[0], **inside[1])
        return Wrapped(result) if func is aten.detach.default else result


def wrap(layer: nn.Module, name: str = "weight") -> None:
    setattr(layer, name, nn.Parameter(Wrapped(getattr(layer, name).data), requires_grad=False))


LAYERS = {
    "head": lambda model: model.lm_head,
    "query": lambda model: model.model.layers[0].self_attn.q_proj,
    "norm": lambda model: model.model.layers[1].post_attention_layernorm,
    "embedding": lambda model: model.model.embed_tokens,
}


def corrected(model: PreTrainedModel, **correction: object):
    return model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        custom_generate=sirius.decode,
        correction={"period": 5, **correction},
    )


@pytest.mark.parametrize("when", ["before", "after", "between texts"])
@pytest.mark.parametrize("layer", LAYERS)
def test_outside_of_the_mlps_pytorch_multiplies_them(layer, when):
    model = tiny_model(eos_token_id=None)
    want = greedy(model, PROMPT, NEW)
    if when != "before":
        sirius.prepare(model)
    if when == "between texts":
        corrected(model)
    wrap(LAYERS[layer](model))
    done = corrected(model, tree_width=3)
    assert done.sequences[0, len(PROMPT) :].tolist() == want
    assert done.stats[0].lossless and done.stats[0].drafted > 0


def test_a_bias_may_be_such_a_tensor_too():
    model = tiny_model("qwen2", eos_token_id=None)
    want = greedy(model, PROMPT, NEW)
    wrap(model.model.layers[0].self_attn.k_proj, "bias")
    assert corrected(model).sequences[0, len(PROMPT) :].tolist() == want


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("role", ["gate_proj", "up_proj", "down_proj"])
def test_in_an_mlp_they_are_refused_by_name(role, when):
    model = tiny_model(eos_token_id=None)
    if when == "after":
        sirius.prepare(model)
    wrap(getattr(model.model.layers[1].mlp, role))
    with pytest.raises(UnsupportedModelError, match=rf"layers\.1\.mlp\.{role} .* holds a Wrapped, no plain tensor"):
        Engine(model)


def test_a_head_whose_numbers_are_elsewhere_is_refused():
    model = tiny_model()
    sirius.prepare(model)
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match="spread over cpu, meta"):
        Engine(model)


def test_an_mlp_of_fake_tensors_is_refused():
    model = tiny_model()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(FakeTensorMode().from_tensor(layer.weight.data), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="holds a FakeTensor"):
        Engine(model)


@pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")
def test_in_16_bits_a_text_is_not_called_lossless_where_pytorch_multiplies():
    model = tiny_model(eos_token_id=None, dtype=torch.bfloat16)
    assert corrected(model).stats[0].lossless
    wrap(model.lm_head)
    assert not corrected(model).stats[0].lossless


@pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")
def test_a_kernel_takes_no_address_of_such_a_tensor():
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    with pytest.raises(UnsupportedModelError, match="plain tensors; got a Wrapped"):
        cpu.norm(x, Wrapped(torch.ones(8)), 1e-6, cpu.NormForm(0, True))
    assert not cpu.fits(x, Wrapped(weight)) and cpu.fits(x, weight)

"""What a prepared model does on the CPU besides its linear layers: attention over the slots, and norms."""

import ctypes

import pytest
import torch
from torch import nn

from conftest import FAMILIES, greedy, tiny_model
from sirius import CorrectionConfig, Engine, restore
from sirius.kernels import cpu, ops
from sirius.kernels.launch import SLOTS, Launch
from sirius.kernels.reference import NormForm
from sirius.model.norm import FastNorm, form_of
from sirius.model.prepare import prepare

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels"),
]
PROMPT = [5, 17, 3, 42, 8, 11, 29]


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many tokens each call of the attention kernel had."""
    found, run, attend = [], Launch.__call__, cpu.library().kernels["attend"].number

    def counted(launch):
        for at in range(0, len(launch.slots), SLOTS):
            if launch.slots[at] == attend:
                found.append((ctypes.c_int64 * 7).from_address(launch.slots[at + 8])[1])
        return run(launch)

    monkeypatch.setattr(Launch, "__call__", counted)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pass_but_the_prompts_reads_the_slots_by_the_kernel(calls, family):
    model = tiny_model(family, eos_token_id=None)
    want = greedy(model, PROMPT, 30)
    done = Engine(model).generate(PROMPT, max_new_tokens=30, sparsity="fine", correction=CorrectionConfig(5, "argmax"))
    assert list(done.token_ids) == want
    stats = done.stats
    layers = model.config.get_text_config().num_hidden_layers
    assert len(calls) == layers * (stats.drafted + stats.rounds)
    assert set(calls) >= {1, 5}


def test_a_model_in_float64_keeps_transformers_attention(calls):
    Engine(tiny_model(dtype=torch.float64)).generate(PROMPT, max_new_tokens=5)
    assert not calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_compute_what_they_did_and_are_given_back(family, dtype):
    model = tiny_model(family, dtype)
    found, g = norms(model), torch.Generator().manual_seed(0)
    for norm in found.values():
        nn.init.normal_(norm.weight, generator=g)
    inputs = {name: torch.randn(3, 2, len(norm.weight), generator=g).to(dtype) for name, norm in found.items()}
    with torch.no_grad():
        want = {name: norm(inputs[name]) for name, norm in found.items()}
        prepare(model)
        assert found and all(isinstance(norm, FastNorm) for norm in found.values())
        for name, norm in found.items():
            torch.testing.assert_close(norm(inputs[name]), want[name], rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
    restore(model)
    assert not any(isinstance(norm, FastNorm) for norm in found.values())


@pytest.mark.parametrize("family", ["llama", "gemma"])
@torch.no_grad()
def test_an_epsilon_that_changes_counts(family):
    models, ids = (tiny_model(family), tiny_model(family)), torch.tensor([PROMPT])
    prepare(models[1])
    before = models[1](ids).logits
    for model in models:
        for norm in norms(model).values():
            setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 0.5)
    got = models[1](ids).logits
    torch.testing.assert_close(got, models[0](ids).logits)
    assert not torch.allclose(got, before, rtol=0.01)


def test_norms_that_learn_are_their_own():
    model = tiny_model()
    prepare(model)
    norm = next(iter(norms(model).values()))
    norm(torch.randn(2, len(norm.weight))).sum().backward()
    assert norm.weight.grad is not None


class CentredRMSNorm(nn.Module):
    """A norm of another formula."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-5

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt())


class AddedRMSNorm(CentredRMSNorm):
    """One whose epsilon stands outside of the root."""

    def forward(self, x):
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps))


class CountingRMSNorm(CentredRMSNorm):
    """One that takes tokens of its own shape alone."""

    def forward(self, x):
        _batch, _tokens, _heads, _size = x.shape
        return x


class ScalarRMSNorm(AddedRMSNorm):
    """One with a weight for all."""

    def __init__(self, size: int) -> None:
        super().__init__(1)


@pytest.mark.parametrize("kind", [CentredRMSNorm, AddedRMSNorm, CountingRMSNorm, ScalarRMSNorm, nn.RMSNorm])
def test_a_norm_of_another_formula_is_left_as_it_is(kind):
    model = tiny_model()
    size = model.config.hidden_size
    model.model.norm, model.model.other_norm = tiny_model().model.norm, kind(size)
    prepare(model)
    assert type(model.model.other_norm) is kind
    assert isinstance(model.model.norm, FastNorm)
    assert form_of(model.model.layers[0].input_layernorm) == NormForm(0, early=True)


def test_a_weight_of_another_size_is_not_read_past_its_end():
    x = torch.randn(2, 64)
    form = NormForm(0, early=True)
    assert ops.norm(x, torch.ones(32), 1e-6, form) is None and ops.norm(x, torch.ones(1), 1e-6, form) is None
    assert ops.norm(x, torch.ones(64), 1e-6, form) is not None

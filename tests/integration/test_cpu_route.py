"""What a prepared model does by the CPU's kernels besides its linear layers: attention over the slots, and norms."""

import gc

import pytest
import torch
from torch import nn

from conftest import FAMILIES, greedy, tiny_model
from sirius import CorrectionConfig, Engine, restore
from sirius.kernels import cpu
from sirius.kernels.reference import NormForm
from sirius.model import workspace
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
    found, attend = [], cpu.attend

    def counted(query, *args):
        found.append(query.shape[2])
        return attend(query, *args)

    monkeypatch.setattr(cpu, "attend", counted)
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


def test_a_session_on_the_cpu_leaves_no_memory_behind():
    model = tiny_model()
    Engine(model).generate(PROMPT, max_new_tokens=5)
    gc.collect()
    assert model not in workspace._idle


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
        assert found and all(isinstance(norm.forward, FastNorm) for norm in found.values())
        for name, norm in found.items():
            torch.testing.assert_close(norm(inputs[name]), want[name], rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
    restore(model)
    assert not any("forward" in norm.__dict__ for norm in found.values())


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


def test_a_norm_of_another_formula_is_left_as_it_is():
    model = tiny_model()
    model.model.norm = CentredRMSNorm(model.config.hidden_size)
    prepare(model)
    assert form_of(model.model.norm) is None and "forward" not in model.model.norm.__dict__
    assert form_of(model.model.layers[0].input_layernorm) == NormForm(0, early=True)

"""Preparing a model: what does not fit is refused, and nothing that others see of the model changes."""

import contextlib
from copy import deepcopy

import pytest
import torch
from snapshots import assert_as_before, snapshot
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from conftest import greedy, tiny_config, tiny_model
from sirius import CorrectionConfig
from sirius.engine import Engine
from sirius.errors import ModelError, UnsupportedModelError
from sirius.kernels import cpu
from sirius.model import memory
from sirius.model.prepare import prepare, restore, sparse_mlps

pytestmark = pytest.mark.integration


def test_attention_that_takes_no_mask_of_ours_is_refused():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"'flash_attention_2'.*attn_implementation='sdpa'"):
        prepare(model)


def test_a_model_that_is_not_whole_on_one_device_is_refused():
    model = tiny_model()
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match="spread over cpu, meta; load it whole"):
        prepare(model)


def test_what_is_no_model_or_has_no_weights_is_refused():
    for refused in (lambda: Engine(None), lambda: restore("a-folder")):
        with pytest.raises(UnsupportedModelError, match=r"^a model is needed.*; got a (NoneType|str)"):
            refused()
    with pytest.raises(UnsupportedModelError, match=r"^the model is on meta, where it has no weights"):
        prepare(tiny_model().to("meta"))


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification])
@pytest.mark.parametrize("prepared", [Engine, prepare])
def test_a_model_that_scores_no_tokens_is_refused_before_anything_is_changed(kind, prepared):
    model = kind.from_config(tiny_config("llama"))
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"^a Llama\w* has no head .* AutoModelForCausalLM"):
        prepared(model)
    assert_as_before(model, before)
    assert sparse_mlps(model) == []


class PeftModel(nn.Module):
    """A wrapper that hands everything on, as adapters have it."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def merge_and_unload(self):
        return self.base_model


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (PeftModel, r"^a PeftModel .* merge_and_unload\(\)"),
        (nn.Sequential, "^a Sequential .* give the model inside it"),
    ],
)
@pytest.mark.parametrize("prepared", [Engine, prepare])
def test_what_wraps_a_model_is_refused_by_its_name(wrap, says, prepared):
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=says):
        prepared(wrap(model))
    assert_as_before(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layer", ["gate_proj", "up_proj", "down_proj"])
def test_weights_that_are_no_numbers_are_told_of_by_name(value, layer):
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.mlp.{layer}").weight[3, 5] = value
    with pytest.raises(
        ModelError, match=rf"^model\.layers\.1\.mlp\.{layer}\.weight holds 1 numbers of 1620 .* not finite"
    ):
        prepare(model)
    assert sparse_mlps(model) == []


class AdaptedLinear(nn.Linear):
    """What adapters put in the place of a linear layer."""


class Doubled(LlamaMLP):
    """An MLP with the right parts and another formula."""

    def forward(self, x):
        return 2 * super().forward(x)


class Named(LlamaMLP):
    """An MLP with attributes that we would call the same."""

    def __init__(self, config):
        super().__init__(config)
        self.roles, self.number = "its own", nn.Identity()


class Joining(LlamaMLP):
    """An MLP whose down layer takes both halves."""

    def __init__(self, config):
        super().__init__(config)
        self.down_proj = nn.Linear(2 * config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(torch.cat([self.act_fn(self.gate_proj(x)), self.up_proj(x)], -1))


class Picky(LlamaMLP):
    """An MLP with the right parts that wants more than its input."""

    def forward(self, x, more):
        return super().forward(x) + more


def test_a_replaced_linear_layer_is_refused_by_name():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = AdaptedLinear(36, 45, bias=False)
    with pytest.raises(UnsupportedModelError) as caught:
        prepare(model)
    message = str(caught.value)
    assert message.startswith("model.layers.1.mlp.up_proj (up) is a AdaptedLinear, not a plain linear layer")
    assert "without adapters" in message


def test_an_mlp_without_an_activation_is_refused():
    model = tiny_model()
    del model.model.layers[0].mlp.act_fn
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp names no activation"):
        prepare(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kind", "words"),
    [(Doubled, "computes something else"), (Joining, "computes something else"), (Picky, "cannot be called")],
)
def test_an_mlp_of_another_formula_is_refused_and_the_model_left_as_it_was(kind, words, dtype):
    model = tiny_model()
    odd = kind(model.config)
    model.model.layers[1].mlp = odd
    model.to(dtype)
    before, modules = snapshot(model), dict(model.named_modules())
    with pytest.raises(UnsupportedModelError, match=rf"model\.layers\.1\.mlp {words}.*down\(act\(gate\(x\)\) \* up"):
        prepare(model)
    assert_as_before(model, before)
    assert dict(model.named_modules()) == modules and type(odd) is kind
    assert sparse_mlps(model) == []


def test_names_that_are_taken_are_not_ours():
    model = tiny_model()
    model.model.layers[1].mlp = Named(model.config)
    with pytest.raises(UnsupportedModelError, match="Named has roles, number of its own"):
        prepare(model)
    assert sparse_mlps(model) == [] and model.model.layers[1].mlp.roles == "its own"


@pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")
def test_memory_that_runs_out_leaves_the_model_as_it_was(monkeypatch):
    model, tried = tiny_model(), []

    def side_by_side(*weights):
        tried.append(1)
        if len(tried) == 2:
            raise MemoryError
        return memory.side_by_side(*weights)

    before = snapshot(model)
    monkeypatch.setattr("sirius.model.mlp.side_by_side", side_by_side)
    with pytest.raises(MemoryError):
        prepare(model)
    assert_as_before(model, before)
    assert sparse_mlps(model) == []


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(UnsupportedModelError, match="inference_mode"):
        prepare(tiny_model())


def test_autocast_does_not_reach_a_text():
    def scores() -> torch.Tensor:
        batch = Engine(model).batch(rows=1)
        batch.add(Engine(model).text(range(80), max_new_tokens=1))
        [update] = batch.step()
        assert update.completion is not None
        return torch.tensor(update.completion.logprobs)

    model = tiny_model()
    want = scores()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scores(), want)


# --- prepare, restore, save


def test_preparing_twice_changes_nothing():
    model = tiny_model()
    first, before = prepare(model), snapshot(model)
    assert len(first) == 2
    assert all(now is then for now, then in zip(prepare(model), first, strict=True))
    assert_as_before(model, before)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_restore_gives_the_model_back_to_the_bit(family):
    model = tiny_model(family)
    before, classes = snapshot(model), [type(module) for module in model.modules()]
    modules, attributes = dict(model.named_modules()), [set(vars(module)) for module in model.modules()]
    assert prepare(model.train())
    assert [type(module) for module in model.modules()] != classes
    restore(model.eval())
    assert not any(module.training for module in model.modules())
    assert dict(model.named_modules()) == modules
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert sparse_mlps(model) == []
    assert_as_before(model, before)
    assert all(weight.is_contiguous() for weight in model.parameters())


def test_a_model_cast_while_prepared_is_restored_whole():
    model = tiny_model()
    want = {name: weight.double() for name, weight in tiny_model().state_dict().items()}
    prepare(model)
    model.double()
    restore(model)
    assert all(torch.equal(weight, want[name]) for name, weight in model.state_dict().items())
    assert all(weight.is_contiguous() for weight in model.parameters())


@pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")
@pytest.mark.parametrize("multiplies", [False, True], ids=["no products of bfloat16", "products of bfloat16"])
def test_a_neurons_rows_of_up_and_down_stand_side_by_side_wherever_the_weights_go(multiplies, monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_halves", lambda: multiplies)
    model, want = tiny_model(), tiny_model().double().state_dict()
    mlps = prepare(model)

    def apart() -> set[int]:
        return {mlp.neurons.down.weight.data_ptr() - mlp.neurons.up.weight.data_ptr() for mlp in mlps}

    def in_16_bits() -> bool:
        """PyTorch, where it takes long prompts, has each weight in one piece; else a neuron's rows are neighbours."""
        pieces = all(mlp.neurons.up.weight.is_contiguous() and mlp.neurons.down.weight.is_contiguous() for mlp in mlps)
        return pieces if multiplies else apart() == {36 * 2}

    assert apart() == {36 * 4}
    places = [weight.data_ptr() for weight in model.parameters()]
    model.to("cpu")
    assert [weight.data_ptr() for weight in model.parameters()] == places, "what does not move stays where it is"
    model.to(torch.bfloat16)
    assert in_16_bits()
    assert all(torch.equal(w, want[name].to(w.dtype)) for name, w in model.state_dict().items())
    model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)
    assert apart() != {36 * 2}
    prepare(model)
    assert in_16_bits()
    model.double()
    assert all(mlp.neurons.down.weight.is_contiguous() for mlp in mlps), (
        "in float64, without kernels, only neuron-major"
    )


@pytest.mark.parametrize("before", [False, True])
def test_weights_shared_with_another_process_stay_where_they_are(before):
    model = tiny_model()
    if before:
        model.share_memory()
    prepare(model)
    model.share_memory()
    assert not before or list(Engine(model).generate([3, 1], max_new_tokens=9).token_ids)
    assert all(weight.is_shared() for weight in model.parameters())
    model.eval()
    assert all(weight.is_shared() for weight in model.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_prepared_model_learns_what_the_model_learns(optimizer):
    """Fused steps write through an address, as if weights were dense."""
    models, ids = (tiny_model(), tiny_model()), torch.arange(1, 30)[None]
    prepare(models[1])
    for model in models:
        steps = optimizer(model.train().parameters(), lr=0.01, fused=True)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            steps.step()
            steps.zero_grad()
    plain, prepared = (model.eval().state_dict() for model in models)
    for name, weight in plain.items():
        torch.testing.assert_close(prepared[name], weight, rtol=1e-3, atol=1e-4)
    done = Engine(models[1]).generate([3, 1, 4], max_new_tokens=20, correction=CorrectionConfig(accept="argmax"))
    assert list(done.token_ids) == greedy(models[0], [3, 1, 4], 20)


def test_biases_that_learn_alone_learn_what_they_did():
    models, ids = [tiny_model(mlp_bias=True, attention_bias=True) for _ in range(2)], torch.arange(1, 30)[None]
    prepare(models[1])
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, plain), prepared in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if name.endswith("bias"):
            torch.testing.assert_close(prepared.grad, plain.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("change", ["another width", "a width of one", "another dtype"])
def test_a_down_that_does_not_match_up_is_refused_or_taken_as_it_is(change):
    model = tiny_model()
    for layer in model.model.layers:
        width = {"another width": 20, "a width of one": 1}.get(change, 36)
        layer.mlp.down_proj = nn.Linear(45, width, bias=False)
        if change == "another dtype":
            layer.mlp.down_proj.double()
    before = snapshot(model)
    with contextlib.suppress(UnsupportedModelError):
        prepare(model)
        restore(model)
    assert_as_before(model, before)


def test_the_rows_of_a_copy_are_its_own():
    model = tiny_model()
    prepare(model)
    other = deepcopy(model)
    want = {name: weight.clone() for name, weight in other.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert all(torch.equal(weight, want[name]) for name, weight in other.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_prepared_model_saves_an_ordinary_checkpoint(family, tmp_path):
    want = tiny_model(family).state_dict()
    model = tiny_model(family)
    prepare(model)
    model.save_pretrained(tmp_path / "prepared")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "prepared")
    assert list(plain.state_dict()) == list(want)
    assert all(torch.equal(weight, want[name]) for name, weight in plain.state_dict().items())
    tiny_model(family).save_pretrained(tmp_path / "plain")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "prepared" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_blocks_that_go_between_two_engines_leave_the_others_their_neurons():
    models = [tiny_model(eos_token_id=None, num_hidden_layers=3) for _ in range(2)]
    Engine(models[1])
    for model in models:
        del model.model.layers[0]
        model.config.num_hidden_layers = 2
        for number, block in enumerate(model.model.layers):
            block.self_attn.layer_idx = number
    want = greedy(models[0], [3, 1, 4], 20)
    for sparsity in "coarse", "fine":
        done = Engine(models[1]).generate([3, 1, 4], max_new_tokens=20, sparsity=sparsity, correction=4)
        assert list(done.token_ids) == want


def test_a_failure_in_the_midst_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model()
    before, classes = snapshot(model), [type(module) for module in model.modules()]
    monkeypatch.setattr("sirius.model.prepare.adopt_attention", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(model)
    assert_as_before(model, before)
    assert [type(module) for module in model.modules()] == classes

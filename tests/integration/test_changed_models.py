"""What others do to a model and its MLPs, before and after it is prepared: honoured, or refused by name, and kept."""

import re

import pytest
import torch
from snapshots import assert_as_before, snapshot
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from conftest import greedy, tiny_model
from sirius import CorrectionConfig
from sirius.engine import Engine
from sirius.errors import UnsupportedModelError
from sirius.model.prepare import prepare, restore, sparse_mlps

pytestmark = pytest.mark.integration


def add_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, given, result: 2 * result)


def add_forward(layer: nn.Module) -> None:
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)


def swap_layer(model: PreTrainedModel) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    mlp = model.model.layers[1].mlp
    mlp.up_proj = Adapter(mlp.up_proj)


def add_hook_to_the_activation(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda module, given, result: 2 * result)


CHANGES = {
    "a hook": (lambda model: add_hook(model.model.layers[1].mlp.up_proj), "has hooks, which would not be called"),
    "a forward": (lambda model: add_forward(model.model.layers[1].mlp.up_proj), "has a forward of its own"),
    "an adapter": (swap_layer, "is a Adapter, not a plain linear layer"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_more_than_its_weights_is_refused(change):
    model = tiny_model()
    alter, words = CHANGES[change]
    alter(model)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=rf"^model\.layers\.1\.mlp\.up_proj \(up\) {words}"):
        prepare(model)
    assert_as_before(model, before)
    assert sparse_mlps(model) == []


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_layer_changed_in_a_prepared_model_is_honoured_refused_to_decode_and_kept(change):
    models, ids = (tiny_model(), tiny_model()), torch.arange(1, 9)[None]
    alter, words = CHANGES[change]
    engine = Engine(models[1])
    engine.generate([3, 1, 4], max_new_tokens=8)
    for model in models:
        alter(model)
    want = models[0](ids).logits
    torch.testing.assert_close(models[1](ids).logits, want)
    with pytest.raises(UnsupportedModelError, match=rf"^model\.layers\.1\.mlp\.up_proj \(up\) {words}"):
        engine.generate([3, 1, 4], max_new_tokens=8)
    models[1].train().eval().double().float()
    torch.testing.assert_close(models[1](ids).logits, want)
    restore(models[1])
    assert torch.equal(models[1](ids).logits, want)
    assert all(weight.is_contiguous() for weight in models[1].parameters())


def test_an_activation_that_is_more_than_itself_is_refused_and_honoured_between_calls():
    models, ids = (tiny_model(), tiny_model()), torch.arange(1, 9)[None]
    engine, words = Engine(models[1]), r"^model\.layers\.1\.mlp\.act_fn \(activation\) has hooks"
    for model in models:
        add_hook_to_the_activation(model)
    with torch.no_grad():
        torch.testing.assert_close(models[1](ids).logits, models[0](ids).logits)
    for refused in (lambda: engine.generate([3], max_new_tokens=2), lambda: prepare(models[0])):
        with pytest.raises(UnsupportedModelError, match=words):
            refused()


def test_a_forward_put_into_a_prepared_mlp_is_refused_by_all_until_it_is_taken_off():
    model = tiny_model()
    engine, mlp = Engine(model), model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x)
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.0\.mlp has a forward of its own, which may go"):
        engine.generate([3], max_new_tokens=2)
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.0\.mlp has got a forward of its own since"):
        restore(model)
    del mlp.forward
    restore(model)
    assert type(mlp) is LlamaMLP


def test_an_mlp_of_two_blocks_is_prepared_and_restored_once():
    models = [tiny_model(eos_token_id=None) for _ in range(2)]
    for model in models:
        model.model.layers[1].mlp = model.model.layers[0].mlp
    done = Engine(models[1]).generate([3, 1, 4], max_new_tokens=20, correction=CorrectionConfig(accept="argmax"))
    assert list(done.token_ids) == greedy(models[0], [3, 1, 4], 20)
    restore(models[1])
    assert type(models[1].model.layers[1].mlp) is LlamaMLP


def test_a_model_restored_while_a_text_is_written_ends_it_with_a_reason():
    for correction in None, CorrectionConfig(4):
        engine = Engine(tiny_model(eos_token_id=None))
        stream = engine.stream([3, 1, 4], max_new_tokens=40, correction=correction)
        next(stream)
        restore(engine.model)
        with pytest.raises(UnsupportedModelError, match="restored in the midst of a text"):
            list(stream)


@pytest.mark.parametrize("change", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_a_model_moved_while_a_text_is_written_ends_it_with_a_reason(change):
    for correction in None, CorrectionConfig(4):
        engine = Engine(tiny_model(eos_token_id=None))
        stream = engine.stream([3, 1, 4], max_new_tokens=40, correction=correction)
        next(stream)
        engine.model.to(change)
        with pytest.raises(UnsupportedModelError, match=rf"float32 on cpu when .* {change}.* in the midst of it"):
            list(stream)


DROPOUTS = {
    "of attention": lambda model: setattr(model.model.layers[1].self_attn, "attention_dropout", 0.5),
    "a module": lambda model: setattr(model.model, "norm", nn.Sequential(model.model.norm, nn.Dropout(0.5))),
}
WHERE = {"of attention": "model.layers.1.self_attn", "a module": "model.norm.1"}


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("correction", [None, CorrectionConfig(4, "argmax")], ids=["plain", "corrected"])
def test_dropout_is_refused_where_it_would_act(dropout, correction):
    model = tiny_model(eos_token_id=None)
    DROPOUTS[dropout](model)
    engine, options = Engine(model), {"max_new_tokens": 12, "correction": correction}
    engine.generate([3, 1, 4], **options)
    path = WHERE[dropout]
    dict(model.named_modules())[path].train()
    words = rf"^{re.escape(path)} is in training mode and has a dropout of 0\.5; call model\.eval\(\) first"
    with pytest.raises(UnsupportedModelError, match=words):
        engine.generate([3, 1, 4], **options)
    assert len(Engine(model).generate([3, 1, 4], **options).token_ids) == 12


def test_training_mode_without_dropout_changes_no_text():
    engine, options = Engine(tiny_model(eos_token_id=None)), {"max_new_tokens": 12}
    want = engine.generate([3, 1, 4], **options).token_ids
    engine.model.train()
    assert engine.generate([3, 1, 4], **options).token_ids == want


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_inside_an_mlp_is_refused_if_it_would_drop(p):
    class Dropping(LlamaMLP):
        def forward(self, x):
            return self.dropout(super().forward(x))

    model = tiny_model()
    mlp = model.model.layers[1].mlp
    mlp.dropout, mlp.__class__ = nn.Dropout(p), Dropping
    before, model = snapshot(model), model.eval()
    if p:
        with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.1\.mlp\.dropout would not be called when"):
            prepare(model)
        assert_as_before(model, before)
    else:
        assert len(prepare(model)) == 2


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_a_prepared_mlp_can_be_traced():
    model, x = tiny_model(), torch.randn(1, 4, 36)
    prepare(model.requires_grad_(False))
    mlp = model.model.layers[0].mlp
    torch.testing.assert_close(torch.jit.trace(mlp, x, check_trace=False)(2 * x), mlp(2 * x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("alter", "words"),
    [(swap_layer, r"up_proj \(up\) is a Adapter"), (add_hook_to_the_activation, r"act_fn \(activation\) has hooks")],
)
def test_a_layer_or_activation_altered_while_a_batch_is_open_is_refused_with_the_next_text(alter, words):
    engine = Engine(tiny_model(eos_token_id=None))
    batch = engine.batch(rows=1, correction=None)
    batch.add(engine.text([3, 1, 4], max_new_tokens=12))
    while batch.busy:
        batch.step()
    alter(engine.model)
    batch.add(engine.text([3, 1, 4], max_new_tokens=12))
    with pytest.raises(UnsupportedModelError, match=rf"^model\.layers\.1\.mlp\.{words}"):
        batch.step()


def test_hooks_on_an_mlp_are_called_before_meanwhile_and_after_and_never_with_numbers_of_ours():
    model, seen = tiny_model(), []
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda module, given, result: seen.append(tuple(result.shape)))
    engine = Engine(model)
    assert seen == []
    engine.generate([3, 1, 4], max_new_tokens=8, sparsity="coarse", correction=None)
    assert seen[0] == (1, 3, 36) and set(seen[1:]) == {(1, 1, 36)} and len(seen) == 8
    late = []
    mlp.register_forward_hook(lambda module, given, result: late.append(1))
    restore(model)
    handle.remove()
    seen.clear()
    model(torch.tensor([[3, 1, 4]]))
    assert seen == [] and late == [1]


def test_a_hook_on_an_mlp_changes_the_text_as_it_does_without_us():
    models = tiny_model(eos_token_id=None), tiny_model(eos_token_id=None)
    for model in models:
        add_hook(model.model.layers[1].mlp)
    want = greedy(models[0], [3, 1, 4], 20)
    assert want != greedy(tiny_model(eos_token_id=None), [3, 1, 4], 20)
    done = Engine(models[1]).generate([3, 1, 4], max_new_tokens=20, correction=CorrectionConfig(accept="argmax"))
    assert list(done.token_ids) == want


def test_a_replaced_activation_is_honoured():
    models = tiny_model(eos_token_id=None), tiny_model(eos_token_id=None)
    engine = Engine(models[1])
    for model in models:
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.ReLU()
    done = engine.generate([3, 1, 4], max_new_tokens=20, correction=CorrectionConfig(accept="argmax"))
    assert list(done.token_ids) == greedy(models[0], [3, 1, 4], 20)


def test_restoring_a_module_whose_class_has_changed_is_refused_and_a_forward_that_was_kept_works_on():
    model, ids = tiny_model(), torch.arange(1, 9)[None]
    want, layer = model(ids).logits, model.model.layers[0].self_attn.q_proj
    prepare(model)
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(UnsupportedModelError, match=r"q_proj has got another class since it was prepared"):
        restore(model)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    for module in layer, model.model.norm:
        module.forward = module.forward
    restore(model)
    torch.testing.assert_close(model(ids).logits, want)


@torch.no_grad()
def test_autocast_and_function_transforms_reach_a_prepared_model_as_they_do_any_other():
    models, ids = (tiny_model(), tiny_model()), torch.arange(1, 9)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prepare(models[1])
        logits = [model(ids).logits for model in models]
    assert logits[0].dtype is logits[1].dtype is torch.bfloat16
    x = torch.randn(3, 4, 36)
    one, other = (torch.func.vmap(model.model.layers[0].mlp)(x) for model in models)
    torch.testing.assert_close(one, other)

"""A prepared model is saved by whatever saves an ordinary one, and the file is the ordinary one."""

import pytest
import torch
from huggingface_hub import save_torch_model
from safetensors.torch import load_file, save_file, save_model
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from conftest import greedy, tiny_model
from sirius.model.prepare import prepare, restore, sparse_mlps

pytestmark = pytest.mark.integration

PROMPT = [5, 17, 93]


@pytest.fixture(params=["llama", "phi3"])
def family(request) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def models(family, request):
    """The same model twice, the second prepared."""
    plain, prepared = (tiny_model(family, dtype=request.param) for _ in range(2))
    prepare(prepared)
    return plain, prepared


def save_state(model, folder):
    save_file(model.state_dict(), folder / "model.safetensors")


def save_whole(model, folder):
    save_model(model, str(folder / "model.safetensors"))


def save_to_hub(model, folder):
    save_torch_model(model, folder)


def save_pretrained(model, folder):
    model.save_pretrained(folder)


@pytest.mark.parametrize("save", [save_state, save_whole, save_to_hub, save_pretrained])
def test_safetensors_hold_the_ordinary_weights(models, save, tmp_path):
    for model, name in zip(models, ["plain", "prepared"], strict=True):
        (tmp_path / name).mkdir()
        save(model, tmp_path / name)
    plain, prepared = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "prepared"))
    assert plain.keys() == prepared.keys()
    assert all(torch.equal(plain[name], prepared[name]) for name in plain)


def test_torch_saves_the_state_at_its_own_size(models, tmp_path):
    sizes = []
    for model in models:
        torch.save(model.state_dict(), tmp_path / "state.pt")
        sizes.append((tmp_path / "state.pt").stat().st_size)
    assert sizes[1] <= sizes[0] * 1.05


def test_a_state_of_the_parameters_themselves_stays_theirs(models):
    state = models[1].state_dict(keep_vars=True)
    assert all(state[name] is parameter for name, parameter in models[1].named_parameters())


@pytest.mark.parametrize("way", ["in training", "restored"])
def test_parameters_go_into_a_vector_and_back(models, way):
    plain, prepared = models
    if way == "in training":
        prepared.train()
    else:
        restore(prepared)
    vector = parameters_to_vector(prepared.parameters())
    assert torch.equal(vector, parameters_to_vector(plain.parameters()))
    vector_to_parameters(2 * vector, prepared.parameters())
    vector_to_parameters(2 * vector, plain.parameters())
    prepare(prepared.eval())
    assert sparse_mlps(prepared)
    assert greedy(prepared, PROMPT, 12) == greedy(plain, PROMPT, 12)
